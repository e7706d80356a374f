"""Bars and lines that tell a user what takes time: on the first process, at a terminal or in a notebook, unless it is
quiet."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any

from .launch import is_first_process
from .printable import printable

PATIENCE = 1.5  # seconds that nobody wonders about
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


@contextlib.contextmanager
def quietly(quiet: bool = True) -> Iterator[None]:
    """A block without bars and lines, if quiet."""
    before = _quiet.set(quiet or _quiet.get())
    try:
        yield
    finally:
        _quiet.reset(before)


def say(line: str) -> None:
    """Print a line."""
    if is_first_process() and not _quiet.get():
        print(printable(line))


def bar(shown: bool = True, stays: bool = False, **options: Any) -> Any:
    """A bar of tqdm. Unless it stays, it is there while something takes longer than `PATIENCE`, and disappears."""
    from tqdm import tqdm  # here, since most commands end before they need it

    notebook = in_notebook()
    if notebook and find_spec("ipywidgets"):
        from tqdm.auto import tqdm
    told = shown and is_first_process() and not _quiet.get()
    # None shows a bar only if stderr is a terminal. A notebook's stderr is no terminal, but shows bars.
    hidden = (False if notebook else None) if told else True
    return tqdm(disable=hidden, delay=0 if stays else PATIENCE, leave=stays, **options)


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", ())
