"""A program at a pseudo-terminal: tests type its keys, and read what it shows."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import environment

PROGRAM = "from llama.commands import cli\ncli.main()\n"
# The pseudo-terminal becomes the one that Ctrl-C of this process comes from.
AT_A_TERMINAL = (
    """
import fcntl, struct, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", {}, {}, 0, 0))
"""
    + PROGRAM
)


class Terminal:
    """A program at a pseudo-terminal: what it shows, less colors and movements."""

    def __init__(self, arguments: list[str], home: Path, lines: int = 40, columns: int = 100, **variables: str) -> None:
        pty = pytest.importorskip("pty")
        self.master, slave = pty.openpty()
        program = [sys.executable, "-W", "error", "-c", AT_A_TERMINAL.format(lines, columns), *arguments]
        inherited = {name: value for name, value in environment().items() if name not in ("COLUMNS", "LINES")}
        settings = {"HOME": str(home), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **variables}
        self.program = subprocess.Popen(
            program, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env={**inherited, **settings}
        )
        os.close(slave)
        self.raw, self.seen = b"", 0

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait_for(self, text: str, seconds: float = 20) -> str:
        """What was shown since the last wait, up to `text`, between whose words a line may end."""
        deadline = time.monotonic() + seconds
        wrapped = re.compile("[ \n]+".join(map(re.escape, text.split(" "))))
        while True:
            shown = re.sub(r"\x1b(\[[0-9;?]*[a-zA-Z]|[()].|[=>78])|[\r\x07]", "", self.raw.decode(errors="replace"))
            if found := wrapped.search(shown, self.seen):
                since, self.seen = shown[self.seen : found.start()], found.end()
                return since
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come; after {shown[: self.seen][-200:]!r} came {shown[self.seen :]!r}"
            try:
                self.raw += os.read(self.master, 65536)
            except OSError as error:  # it has ended
                raise AssertionError(f"{text!r} did not come; {shown[self.seen :]!r} did") from error

    def end(self) -> int:
        return self.program.wait(30)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.program.kill()
        self.program.wait()
        os.close(self.master)
