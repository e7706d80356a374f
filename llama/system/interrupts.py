"""Ctrl-C, or a notebook's button, in work that must not be cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Optional


@contextmanager
def held_back() -> Iterator[None]:
    """A block that Ctrl-C does not interrupt: the first one takes effect behind it, a second one at once."""
    before = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if before is None or not callable(before):  # another thread is never interrupted
        yield
        return
    came: list[Optional[FrameType]] = []

    def hold_back(number: int, frame: Optional[FrameType]) -> None:
        if came:
            before(number, frame)
        came.append(frame)

    signal.signal(signal.SIGINT, hold_back)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if len(came) == 1:
            before(signal.SIGINT, came[0])
