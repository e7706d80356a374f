"""Standard streams as a shell may leave them: closed (`<&-`, `>&-`), or with nobody at the other end (`| head`)."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Iterator

nobody_reads = False  # since when stdout goes nowhere


def open_closed_streams() -> None:
    """Open as /dev/null what is closed. The next file that is opened would take its number, and be written to."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115, as long as the process


def lost_reader() -> bool:
    """Whether nobody reads stdout any more. Then it goes nowhere from now on: Python would fail on it once more at its end."""
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
    """A whole program: its standard streams may be closed, and nobody need read what it prints."""
    open_closed_streams()
    with reader_may_leave():
        yield
