"""Brings weights from mapped files onto a device. For a GPU a few threads copy pieces into pinned memory and send them
on; the device converts and rounds them, and a thread waits only for a buffer that is still being sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from typing import Any, Optional

import torch

from ..runtime import current, device_kind
from ..system.files import COPY_BYTES, MappedFiles

# One thread takes pages from the page cache at 2 to 4 GB/s, so several are needed to keep a GPU's 12 to 50 GB/s busy.
LOADERS = 4
# The size of each of a thread's two buffers: it fills one while the other is being sent. A piece costs some 0.1 ms of
# Python.
STAGED_BYTES = 8 * 2**20
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes -> a dtype that numpy has too


class Cancelled(Exception):
    """Ends the other threads after one has failed. No caller sees it."""


class Sender:
    """Reads mapped tensors in pieces. This class leaves them on the host; the job's `copy_` brings them to the
    device."""

    nbytes = COPY_BYTES

    def __init__(self, device: torch.device, mapped: MappedFiles) -> None:
        self.device, self.mapped = device, mapped
        self.cancelled = False

    def pieces(self, parts: Sequence[torch.Tensor], dim: Optional[int]) -> Iterator[tuple[slice, torch.Tensor]]:
        """A tensor that lies in the files as `parts`, in order along `dim` -> which rows, and those rows, in its dtype.

        A part may have more dimensions than the tensor: all but the last count rows. The pages of each piece are
        released when the next is asked for.
        """
        first = 0
        for beside in [parts] if dim == 1 else [[part] for part in parts]:
            entry = sum(part[0].nbytes for part in beside)
            step = max(1, self.nbytes // entry)
            for i in range(0, len(beside[0]), step):
                if self.cancelled:
                    raise Cancelled
                some = [part[i : i + step] for part in beside]
                piece = self.send(some)
                piece = piece.flatten(0, -2) if piece.ndim > 2 else piece
                yield slice(first, first + len(piece)), piece
                first += len(piece)
                for part in some:
                    self.mapped.release(part)

    def send(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """One tensor of parts side by side (along their last dimension)."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)


class PinnedSender(Sender):
    """Sends pieces to a GPU through two pinned buffers, on its own stream, without waiting for the piece before."""

    nbytes = STAGED_BYTES

    def __init__(self, device: torch.device, mapped: MappedFiles) -> None:
        super().__init__(device, mapped)
        self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))  # it may still use the memory that is written to
        self.buffers = [self._pinned(self.nbytes), self._pinned(self.nbytes)]
        self.sent: list[Optional[torch.cuda.Event]] = [None, None]
        self.turn = 0

    def _pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def send(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """`Sender.send`, on the GPU: the tensor is still on its way there on `stream`."""
        self.turn = turn = 1 - self.turn
        if (sent := self.sent[turn]) is not None:
            sent.synchronize()
        dtype, widths = parts[0].dtype, [part.shape[-1] for part in parts]
        shape = [*parts[0].shape[:-1], sum(widths)]
        nbytes = math.prod(shape) * dtype.itemsize
        if self.buffers[turn].nbytes < nbytes:  # a single row is longer
            self.buffers[turn] = self._pinned(nbytes)
        pinned = self.buffers[turn][:nbytes].view(dtype).view(shape)
        bits = _BITS[dtype.itemsize]
        for part, place in zip(parts, pinned.split(widths, dim=-1)):
            # numpy copies in this thread alone. torch would give each of our threads a team of threads for it.
            place.view(bits).numpy()[...] = part.view(bits).numpy()
        arrived = pinned.to(self.device, non_blocking=True)
        self.sent[turn] = event = torch.cuda.Event(blocking=True)
        event.record(self.stream)
        return arrived


Job = Callable[[Sender], Any]


def run_jobs(jobs: Sequence[Job], device: torch.device, mapped: MappedFiles) -> Iterator[None]:
    """Run every job with a sender: on a GPU in LOADERS threads, on other devices in this one. Yields after each job.

    The first error ends all jobs and is raised unchanged; so does an exception between two jobs, as by Ctrl-C.
    """
    if device_kind(device) != "cuda":
        sender = Sender(device, mapped)
        for job in jobs:
            job(sender)
            yield
        return
    with current(device):
        senders = [PinnedSender(device, mapped) for _ in range(min(LOADERS, len(jobs)))]
    try:
        yield from _in_threads(jobs, senders)
    finally:  # after an error too: a piece must not arrive in memory that has another owner by then
        with current(device):
            for sender in senders:
                sender.stream.synchronize()
            torch.cuda.empty_cache()  # frees blocks of the senders' streams, which no other stream can use


def _in_threads(jobs: Sequence[Job], senders: Sequence[PinnedSender]) -> Iterator[None]:
    idle: SimpleQueue[PinnedSender] = SimpleQueue()
    for sender in senders:
        idle.put(sender)

    def run(job: Job) -> None:
        sender = idle.get()
        try:
            with torch.no_grad(), current(sender.device), torch.cuda.stream(sender.stream):
                job(sender)
        finally:
            idle.put(sender)

    with ThreadPoolExecutor(len(senders), "llama-loader") as threads:
        running = [threads.submit(run, job) for job in jobs]
        try:
            for finished in as_completed(running):
                finished.result()
                yield
        except BaseException:
            for sender in senders:
                sender.cancelled = True
            threads.shutdown(wait=True, cancel_futures=True)
            raise
