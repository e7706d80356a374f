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


def bar(shown: bool = True, **options: Any) -> Any:
    """A bar of tqdm. It disappears when it is done if leave=False."""
    from tqdm import tqdm  # here, since most commands end before they need it

    notebook = in_notebook()
    if notebook and find_spec("ipywidgets"):
        from tqdm.auto import tqdm
    told = shown and is_first_process() and not _quiet.get()
    # None shows a bar only if stderr is a terminal. A notebook's stderr is no terminal, but shows bars.
    return tqdm(disable=(False if notebook else None) if told else True, **options)


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", ())
