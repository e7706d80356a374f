"""`Llama.build(processes=N)`: this process is the first of N, starts the others itself, and ends them with its
`Llama`."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Optional

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from . import runtime
from .decoding.leading import Leader
from .system.checks import whole, whole_number
from .system.children import Child
from .system.launch import Launch
from .system.printable import counted, shortened

HERE = "127.0.0.1"
LOOK = 0.02  # seconds between two looks at whether the others have come, or one is gone
POLITE = 5.0  # seconds that the other processes have to end by themselves
CLOSED = "this Llama was closed, and its processes have ended; build it again"


class Followers:
    """The other processes of a `Llama` that is built over several."""

    def __init__(self, count: int) -> None:
        """count: of all processes, this one included."""
        self.count = count
        self._children: list[Child] = []
        self._pid = os.getpid()  # a process that is forked from this one has no part in all this
        self._leader: Callable[[], Optional[Leader]] = lambda: None
        self._hang_up: Callable[[], None] = lambda: None
        self._lock = threading.RLock()
        self._is_over = False

    def start(self, build: Callable[..., Any], given: Mapping[str, Any]) -> Launch:
        """Start them; they build the same. -> this process's place, once all are there"""
        with socket.create_server((HERE, 0)) as listening:
            port = listening.getsockname()[1]
            options: Any = {
                "is_master": True,
                "wait_for_workers": False,
                "master_listen_fd": os.dup(listening.fileno()),
            }
            store = TCPStore(HERE, port, **options)
        ranks = range(1, self.count)
        for rank in ranks:
            self._children.append(Child(_follow, port, _place(rank, self.count), build, given))
        while not store.check([str(rank) for rank in ranks]):
            if lost := self.why_lost(LOOK):
                raise RuntimeError(lost)
        return replace(_place(0, self.count), store=store, why_gone=self.why_lost)

    def follow(self, leader: Leader) -> None:
        """The processes belong to this `Llama` from now on, and end with it."""
        self._leader, self._hang_up = weakref.ref(leader), leader.line.hang_up
        runtime.release_first(self._let_go)
        weakref.finalize(leader, self.close)
        if torch.cuda.is_initialized():
            threading.Thread(target=self._watch, name="llama-followers", daemon=True).start()

    def why_lost(self, patience: float = 0) -> str:
        """Why one of them is gone; an empty text if all live after `patience` seconds."""
        deadline = time.monotonic() + patience
        while True:
            for rank, child in enumerate(self._children, start=1):
                if how := child.why_ended():
                    return f"process {rank} {how}"
            if time.monotonic() >= deadline:
                return ""
            time.sleep(LOOK)

    def lose(self) -> None:
        """End them at once: one is gone, or has stopped within a step."""
        with self._lock:
            if not self._is_over:
                runtime.lose()
                self._end(0)

    def close(self, why: str = CLOSED) -> None:
        """End them. why: what later calls of the `Llama` say."""
        with self._lock:
            if self._is_over or self._pid != os.getpid():
                return
            lost = self.why_lost()
            if (leader := self._leader()) is not None:
                with contextlib.suppress(RuntimeError):  # a connection was lost
                    leader.end(None, why)
            if lost:
                runtime.lose()
            self._end(0 if lost else POLITE)

    def _let_go(self) -> None:
        if self._pid != os.getpid():
            return
        with contextlib.suppress(RuntimeError):  # a connection was lost
            self._hang_up()

    def _end(self, patience: float) -> None:
        self._is_over = True
        if not patience:
            for child in self._children:
                child.end()
        runtime.shutdown()
        for child in self._children:
            child.end(patience)
        self._children.clear()

    def _watch(self) -> None:
        """On GPUs nothing else ends a sum that waits for a process that is gone."""
        while not self._is_over:
            if self.why_lost():
                runtime.lose()
                return
            time.sleep(1.0)


_newest: Optional[weakref.ref[Followers]] = None
_building = threading.Lock()


def _place(rank: int, count: int) -> Launch:
    return Launch(True, rank, count, rank, count)


@contextlib.contextmanager
def started(count: int, build: Callable[..., Any], given: Mapping[str, Any]) -> Iterator[Followers]:
    """A block that builds on this process what `build(**given)` builds on the others. A `Llama` that was built so
    before is closed, since torch has one process group."""
    global _newest
    with _building:
        if _newest is not None and (before := _newest()) is not None:
            before.close("this Llama was closed when another one was built over several processes; build it again")
        followers = Followers(count)
        try:
            with runtime.placed(followers.start(build, given)):
                yield followers
        except BaseException as error:
            lost = followers.why_lost(POLITE) if isinstance(error, RuntimeError) else ""
            followers.lose()
            if lost:
                raise RuntimeError(f"the model was not built: {lost}") from error
            raise
        _newest = weakref.ref(followers)


def check(processes: Any, given: Mapping[str, Any]) -> tuple[int, torch.device]:
    """The number of processes for these arguments of `build`, and the first one's device. ValueError if they are not
    possible here."""
    count = whole_number("processes", processes, 1, 2**15, "of 1 or more")
    if runtime.this_launch().by_launcher:
        raise ValueError(
            f"processes={count}, but torchrun's variables, or a process group of your own, say already which processes "
            f"there "
            "are; leave processes out, or start this with python alone"
        )
    size = given["model_parallel_size"]
    if size is not None and ((number := whole(size)) is None or number < 1 or count % number):
        raise ValueError(f"model_parallel_size={shortened(size)} does not fit processes={count}; it must divide it")
    device = runtime.choose_device(given["device"], _place(0, count))
    if runtime.device_kind(device) == "cuda":
        there = torch.cuda.device_count()
        if count > there:
            raise ValueError(
                f"processes={count}, each with a GPU of its own, but torch sees {counted(there, 'GPU')}; "
                f"pass processes={there} or less, or device='cpu'"
            )
        if count > 1 and torch.device(given["device"] or "cuda").index is not None:
            raise ValueError(
                f"device={str(given['device'])!r} is one GPU, but processes={count} take one each; pass 'cuda'"
            )
    if not sys.executable:
        raise ValueError("processes= starts Python anew, but sys.executable does not say where that is")
    return count, device


def _follow(port: int, launch: Launch, build: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """What a process that was started does."""
    store = TCPStore(HERE, port, is_master=False)
    store.set(str(launch.rank), "here")
    with runtime.placed(replace(launch, store=store)):
        build(**given).lead(lambda: None)
        runtime.shutdown()
