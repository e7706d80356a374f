"""Memory that the processes of a group share, if all are on this machine. `parallel` sends messages over it, by the
operators of `shared_memory.cpp`.

The memory is a file without a name, so nothing stays of it however a process ends, and /dev/shm does not limit it. The
first rank makes it, and the others open it through /proc.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple, Optional

import torch

from ..runtime import machine
from . import cpp

SOURCE = Path(__file__).with_name("shared_memory.cpp")
PIECE = 512 * 1024  # bytes of a buffer; longer messages go in pieces
LINE = 256  # bytes that each rank has beside its two buffers
SUMMED = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)


def place() -> Optional[str]:
    """What processes have in common that can share memory: a machine, and its ids of processes. None if they cannot."""
    if sys.platform != "linux":
        return None
    try:
        return f"{machine()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no /proc, through which the others would open the memory
        return None


@cache
def load() -> None:
    """Bring in the operators, `torch.ops.llama_shared`. Raises the errors of `cpp.load`."""
    cpp.load(SOURCE)  # without a line: it takes 3 s, and programs read what a command prints
    if not hasattr(torch.ops.llama_shared, "messages"):
        raise RuntimeError("torch does not take the operators of the compiled file")
    torch.library.register_fake("llama_shared::sum", lambda x, room: x.new_empty(x.shape))
    torch.library.register_fake("llama_shared::gather", _fake_gather)


def _fake_gather(x: torch.Tensor, room: torch.Tensor, ranks: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] * ranks)


class Memory(NamedTuple):
    """A process's id; and of the first rank, its descriptor of the file, and the file's number."""

    process: int
    descriptor: int = -1
    inode: int = -1


@contextmanager
def made(ranks: int, rank: int) -> Iterator[Memory]:
    """A block in which the others can `join` the memory that the first rank makes.

    OSError if there is not enough: all of it is set aside here, since a page that is missing later would end the
    process that writes there.
    """
    if rank > 0:
        yield Memory(os.getpid())
        return
    descriptor = os.memfd_create("llama")
    try:
        os.posix_fallocate(descriptor, 0, ranks * (LINE + 2 * PIECE))
        yield Memory(os.getpid(), descriptor, os.fstat(descriptor).st_ino)
    finally:
        os.close(descriptor)


def join(memories: Sequence[Memory], rank: int, limit: float) -> torch.Tensor:
    """This rank's part, for the operators. limit: seconds that it waits for another rank that lives.

    OSError or RuntimeError if it cannot have the memory.
    """
    first = memories[0]
    descriptor = os.open(f"/proc/{first.process}/fd/{first.descriptor}", os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_ino != first.inode:
            raise RuntimeError("the first process's file is another one")
        processes = torch.tensor([memory.process for memory in memories], device="cpu")
        return torch.ops.llama_shared.join(processes, rank, descriptor, int(limit))
    finally:
        os.close(descriptor)


def check(room: torch.Tensor, ranks: int, rank: int) -> None:
    """RuntimeError if a sum, or a gather, over all ranks is wrong."""
    numbers = torch.arange(1000, device="cpu")
    total = torch.ops.llama_shared.sum(numbers + rank, room)
    everyones = torch.ops.llama_shared.gather(numbers[:3] + rank, room, ranks)
    if not torch.equal(total, ranks * numbers + sum(range(ranks))) or everyones[::3].tolist() != [*range(ranks)]:
        raise RuntimeError("a sum over shared memory was wrong")
