"""A whole program around the library: its flags are checked, and Ctrl-C ends it quietly, before anything is built.

What takes time is imported inside, where Ctrl-C is expected.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn, Optional

from . import pipes

INTERRUPTED = 130  # the status that shells give what Ctrl-C has ended
FLAG = re.compile(r"--?(?=[A-Za-z])([\w-]+)(?:=.*)?", re.DOTALL)  # as fire has it; "-5" is a value


@contextlib.contextmanager
def as_a_program(main: Optional[Callable[..., Any]] = None) -> Iterator[None]:
    """A block for a whole program: its standard streams may be closed, and Ctrl-C ends it with status 130, without a
    traceback.

    main: the function whose arguments fire makes of the command line. It is checked first: fire would run `main`, and
    then complain.
    """
    with _interrupted_quietly(), pipes.as_the_shell_left_them():
        if main is not None and (problem := wrong_flag(main, sys.argv[1:])):
            fail(problem, os.path.basename(sys.argv[0]))
        yield


@contextlib.contextmanager
def _interrupted_quietly() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGINT)
    if plain := handler is signal.default_int_handler and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    except KeyboardInterrupt:
        from . import peers

        peers.end("was interrupted")
        sys.exit(INTERRUPTED)
    finally:
        if plain:
            signal.signal(signal.SIGINT, handler)


def _interrupt(number: int, frame: Optional[FrameType]) -> None:
    """Interrupt as Python does; but an import, which may take the exception for a module that is missing, ends the
    program."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def fail(problem: str, name: str) -> NoReturn:
    """End this process with status 1, and a line on stderr that begins with the program's name. One process speaks for
    all."""
    from . import peers
    from .launch import ALONE, Launch, joined

    peers.end(f"failed: {problem}")
    try:
        launch = Launch.read()
    except ValueError:  # torchrun's variables are what is wrong
        launch = ALONE
    if launch.rank > 0 and launch.launcher is not None and joined() is None:
        time.sleep(peers.PATIENCE)  # torchrun ends all with the first that fails: let that be the one that speaks
        peers.tell(f"{name}: {problem} (on process {launch.rank} only)")
    elif launch.rank == 0:
        peers.tell(f"{name}: {problem}")
    sys.exit(1)


def wrong_flag(main: Callable[..., Any], words: Sequence[str]) -> str:
    """What is wrong with the flags that fire is to give `main`, or nothing. Behind "--" come fire's own."""
    from inspect import signature

    from .printable import shortened

    names = list(signature(main).parameters)
    words = words[: words.index("--")] if "--" in words else words
    loose, given, at = list[str](), set[str](), 0
    while at < len(words):
        found, at = FLAG.fullmatch(words[at]), at + 1
        if found is None:
            loose.append(words[at - 1])
            continue
        name = found[1].replace("-", "_")
        short = [known for known in names if known.startswith(name)] if len(name) == 1 else []
        if name in ("help", "h"):
            return ""  # fire shows it
        if name not in names and len(short) != 1 and name.removeprefix("no") not in names:
            told = f"there is no flag {shortened(found[0])}{nearest(name, names, '--')}; there are "
            return told + ", ".join(f"--{known}" for known in names)
        given.add(name if name in names else (short or [name.removeprefix("no")])[0])
        if "=" not in found[0] and at < len(words) and FLAG.fullmatch(words[at]) is None:
            at += 1  # its value
    if more := loose[len(names) - len(given) :]:
        return (
            f"there is no flag for {shortened(' '.join(more))}; there are {', '.join(f'--{known}' for known in names)}"
        )
    return ""


def nearest(
    name: str, names: Collection[str], dashes: str = "", also_called: Optional[Mapping[str, str]] = None
) -> str:
    """A question after the name that was meant, if one is like it. also_called: what other programs call names."""
    from difflib import get_close_matches

    meant = (also_called or {}).get(name)
    near = [meant] if meant in names else [known for known in names if len(name) > 2 and known.startswith(name)]
    near = near or get_close_matches(name, names)
    return f" (did you mean {dashes}{near[0]}?)" if near else ""
