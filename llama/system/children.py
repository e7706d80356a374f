"""Starts Python processes that run a function. They end with this process, however it ends."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from typing import Any

from .printable import clipped, escaped

# The process's first steps. It imports what this process would; its standard input stays open as long as this process
# lives.
BOOT = """
import pickle, sys
sys.path = pickle.load(sys.stdin.buffer)
run, arguments = pickle.load(sys.stdin.buffer)
run(*arguments)
"""
BEAT = 1.0  # seconds between two looks at who the parent is
SHOWN = 400  # characters of a process's last line


class Child:
    """A process that runs `function(*arguments)`, which pickle can send, and prints nothing."""

    def __init__(self, function: Callable[..., object], *arguments: Any) -> None:
        message = pickle.dumps([str(path) for path in sys.path]) + pickle.dumps((_run, (function, arguments)))
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed by `end`
        self._process = subprocess.Popen(
            [sys.executable, "-c", BOOT], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._errors,
            start_new_session=True,  # Ctrl-C at the terminal, and Jupyter's button, are for this process alone
        )  # fmt: skip
        self.pid = self._process.pid
        with contextlib.suppress(BrokenPipeError):  # it has ended: `why_ended` says so
            assert self._process.stdin is not None
            self._process.stdin.write(message)
            self._process.stdin.flush()

    def why_ended(self, patience: float = 0) -> str:
        """How it ended; empty if it still runs after `patience` seconds."""
        status = self._process.poll()
        if status is None and patience:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._process.wait(patience)
        if status is None:
            return ""
        if status < 0:
            more = ", as Linux does where memory runs out" if -status == signal.SIGKILL else ""
            return f"was killed by {signal.Signals(-status).name}{more}"
        if self._errors.closed:
            return "has ended"
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), f"status {status}")
        return f"has ended: {clipped(escaped(last), SHOWN)}"

    def end(self, patience: float = 0) -> None:
        """Kill it, unless it ends by itself within `patience` seconds."""
        if not self.why_ended(patience):
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._errors.close()


def _run(function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    """What the process does."""
    _end_with_parent()
    status = 1
    try:
        function(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)  # at once: others wait for it


def _end_with_parent() -> None:
    """Let this process end when its standard input does. A process that the parent has forked may have a copy of that
    pipe's other end, so the parent's id is looked at as well."""
    parent = os.getppid()

    def wait() -> None:
        if os.name == "posix":
            while os.getppid() == parent and not select.select([sys.stdin], [], [], BEAT)[0]:
                pass
        else:
            sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=wait, name="llama-parent", daemon=True).start()
