"""A reply at a terminal while it comes: what is finished stays, and the rest is drawn again as it grows."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import takewhile
from typing import Optional

from rich.console import Console
from rich.text import Text

from ..system.printable import harmless
from .markdown import blocks, drawn

LEAST_SECONDS = 0.03  # from one drawing to the next
SHARE = 10  # drawing takes at most 1 / SHARE of the time


class Screen:
    """Draws a text in Markdown below the cursor, in blocks of which the last one grows.

    A terminal changes only the lines that it still shows. So a block that is longer than the screen scrolls away as it
    grows; if a line that is gone would have to change (a table's columns become wider), the whole block is drawn again
    at its end.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._source = ""  # the block that grows
        self._shown: list[Text] = []  # its lines, as the terminal has them
        self._width = console.width
        self._waits = False  # a line that is gone would have to change
        self._due = 0.0

    @classmethod
    def at_terminal(cls) -> Optional[Screen]:
        """None if stdout is something else than a terminal, or a terminal that cannot do this."""
        console = Console(file=sys.stdout, highlight=False)
        able = sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal
        return cls(console) if able and not console.options.ascii_only and not console.legacy_windows else None

    @staticmethod
    def last_block(text: str) -> str:
        """The end of a text, which may still grow."""
        return blocks(harmless(text))[-1]

    def __enter__(self) -> Callable[[str], None]:
        return self.write

    def __exit__(self, *_: object) -> None:
        self.draw(ends=True)

    def write(self, text: str) -> None:
        """Go on with the text. It may show a moment later, since drawing must not hold up the model."""
        self._source += harmless(text)
        if (began := time.monotonic()) >= self._due:
            self.draw()
            self._due = began + max(LEAST_SECONDS, SHARE * (time.monotonic() - began))

    def draw(self, ends: bool = False) -> None:
        """Show all that was written. The cursor stays behind it."""
        *finished, self._source = blocks(self._source)
        for block in finished:
            self._draw(drawn(block, self.console), True)
            self._put("\n", [])
            self._shown, self._waits = [], False
        self._draw(drawn(self._source, self.console), ends)

    def _draw(self, lines: list[Text], is_whole: bool) -> None:
        old, (width, height) = self._shown, self.console.size
        gone = max(0, len(old) - height)
        lost = len(lines) <= gone or any(was.plain != line.plain for was, line in zip(old[:gone], lines))
        self._waits = self._waits or lost
        if self._waits and not is_whole:
            return
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(old, lines)))
        start = max(gone, min(same, len(lines) - 1))
        up = len(old) - 1 - start
        if not old:
            self._put("", lines)
        elif old == lines:
            pass
        elif self._waits or width != self._width:  # a terminal of a new width has wrapped the old lines in its own way
            self._put("\n", lines)
        elif up < 0:
            self._put("\n", lines[start:])
        else:
            self._put("\r" + f"\x1b[{up}A" * (up > 0) + "\x1b[J", lines[start:])
        self._shown, self._width = lines, width

    def _put(self, before: str, lines: list[Text]) -> None:
        with self.console.capture() as captured:
            self.console.print(Text("\n").join(lines), soft_wrap=True, end="")
        self.console.file.write(before + captured.get())
        self.console.file.flush()
