"""Gives a model's cache to one user at a time, from any thread or `Llama`, for a step or for a whole call."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .runtime import device_kind

PAST_THE_STEP = (
    "the model was called in the middle of a step, by a hook or a patch for example, and the cache was written over; "
    "call a model of its own there"
)
_USES: weakref.WeakSet[CacheUse] = weakref.WeakSet()


class CacheUse:
    """The use of one model's cache.

    A user holds `lock` while it steps, so that others wait. Others may step between its steps; `is_of` tells.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.calls = 0  # calls of the model by others than the user, which write to its cache
        self.called = False  # set by compiled code: counting would compile it anew
        self.columns: list[int] = []  # how many columns of each slot are to be kept
        self._stream: Any = None  # the GPU stream that the last turn was queued on
        self._user: Callable[[], Any] = lambda: None
        self._calls_then = 0
        self.stepping = False  # whether a turn is under way
        self._depth = 0  # depth of nested calls of the model
        _USES.add(self)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return CacheUse, ()  # a copy of a model has a cache of its own, which nobody uses yet

    @contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """A block of one or more steps of one user; others wait. RuntimeError within another turn, or if somebody else
        called the model within this one."""
        with self.lock:
            if self.stepping:
                raise RuntimeError(PAST_THE_STEP)
            if device_kind(device) == "cuda":
                self._follow(torch.cuda.current_stream(device))
            if self.called:
                self.calls += 1
            before, self.stepping = self.calls, True
            try:
                yield
            finally:
                self.stepping = self.called = False  # a compiled model is part of the step
            if self.calls != before:
                raise RuntimeError(PAST_THE_STEP)

    def _follow(self, stream: Any) -> None:
        """Wait for the work of the last turn, which may still run on another stream of the GPU."""
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    @contextmanager
    def call(self) -> Iterator[None]:
        """A block of one call of the model: a part of the user's step, or another's call, which waits for steps to
        end."""
        with self.lock:
            if not self.stepping or self._depth > 0:
                self.calls += 1
            try:
                self._depth += 1
                yield
            finally:
                self._depth -= 1

    def take(self, user: Any) -> bool:
        """The cache is this user's from now on, or nobody's (None). -> whether it was already, and nobody wrote to it
        since"""
        kept = user is not None and self.is_of(user)
        self._user = (lambda: None) if user is None else weakref.ref(user)  # a user holds its model already
        self._calls_then = self.calls
        return kept

    def is_of(self, user: Any) -> bool:
        """Whether the cache is as this user's steps left it."""
        return self._user() is user and self._calls_then == self.calls


def _in_forked_child() -> None:
    """Make new locks: the threads that held the old ones are not there, and may have been in the middle of a step."""
    for use in list(_USES):
        use.lock, use.stepping, use._depth = threading.RLock(), False, 0
        use.calls += 1


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_in_forked_child)
