"""Copes with standard streams as a shell may leave them: closed (`<&-`, `>&-`), or with no reader (`| head`)."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Iterator

nobody_reads = False  # True once stdout leads to /dev/null


def open_closed_streams() -> None:
    """Open closed streams as /dev/null. The next file that is opened would take their numbers, and be written to."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115, stays open until the process ends


def lost_reader() -> bool:
    """Whether nobody reads stdout any more. If so, it leads to /dev/null from now on: Python would fail on it at its
    end."""
    global nobody_reads
    try:
        number = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # closed, or no file
        return nobody_reads
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(number, 0)
        if any(events & select.POLLERR for _, events in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            nobody_reads = True
    return nobody_reads


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """A block that prints: `… | head` ends it without an error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        if not lost_reader():
            raise


@contextlib.contextmanager
def as_the_shell_left_them() -> Iterator[None]:
    """A block for a whole program: its standard streams may be closed, and may have no reader."""
    open_closed_streams()
    with reader_may_leave():
        yield
