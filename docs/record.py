"""Records a chat with the demo model as docs/chat.svg, the picture of the README. It needs pip install -e '.[terminal]'
pyte.

python docs/record.py [OUT]
"""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import sys
import tempfile
import termios
from collections.abc import Iterator
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import pyte

COLUMNS, LINES = 80, 26
COMMAND = ["chat", "--seed", "3", "--max_gen_len", "70"]
# What is typed, with line ends as Esc Enter makes them, and what the answer shows.
TALK = [
    ("Tell me about a dog.", "tok/s"),
    ("What is the dog's name?", "tok/s"),
    ("/continue ## The park\nOnce upon a time, a **small dog** named Max", "tok/s"),
]
KEY, PAUSE, REPLY = 0.05, 0.8, 0.03  # seconds in the picture: a key, before a line is typed, a piece of a reply
WIDTH, HEIGHT, SIZE = 8.43, 19, 14  # of a letter's cell, and of the font
FONTS = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
PAPER, INK = "#1b1e26", "#d7dae0"
COLORS = {
    "black": "#3b4048", "red": "#e8696f", "green": "#98c379", "brown": "#e0c07a", "blue": "#6cb2f5",
    "magenta": "#d08be8",
    "cyan": "#62c4cf", "white": INK, "brightblack": "#8a919e", "brightblue": "#6cb2f5", "brightcyan": "#62c4cf",
}  # fmt: skip


class Recording:
    """A program at a terminal: what the screen has, and when each of its lines became what it is."""

    def __init__(self, arguments: list[str], home: str) -> None:
        self.screen = pyte.Screen(COLUMNS, LINES)
        self.stream = pyte.ByteStream(self.screen)
        self.screen.draw(f"$ llama {' '.join(arguments)}")
        self.stream.feed(b"\r\n")
        self.clock = 0.0  # of the picture
        self.since = [0.0] * LINES
        self.child, self.terminal = pty.fork()
        if self.child == 0:
            os.environ.update(TERM="xterm-256color", HOME=home)
            os.execv(sys.executable, [sys.executable, "-m", "llama", *arguments])
        self.screen.write_process_input = lambda answer: os.write(self.terminal, answer.encode())  # where the cursor is
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))

    def count(self, text: str) -> int:
        """How often the screen has a text."""
        return sum(text in line for line in self.screen.display)

    def wait(self, text: str, count: int, rest: float) -> None:
        """Until the screen has a text so often, and comes to rest."""
        while select.select([self.terminal], [], [], rest)[0] or self.count(text) < count:
            before = list(self.screen.display)
            self.stream.feed(os.read(self.terminal, 4096).replace(b"\x1b[2m", b"\x1b[90m"))  # pyte knows no dim letters
            changed = [y for y, line in enumerate(self.screen.display) if line != before[y]]
            self.clock += REPLY * bool(changed)
            for y in changed:
                self.since[y] = self.clock

    def type(self, line: str, answer: str) -> None:
        """Type a message, and send it; the answer has this text."""
        self.clock += PAUSE
        for key in line:
            os.write(self.terminal, b"\x1b\r" if key == "\n" else key.encode())
            self.clock += KEY
            self.wait("", 0, 0.1)
        count = self.count(answer) + 1
        os.write(self.terminal, b"\r")
        self.wait(answer, count, 0.5)


def picture(screen: pyte.Screen, since: list[float]) -> Iterator[str]:
    """The lines of the SVG. Where pictures move, a line comes when it came; elsewhere all are there."""
    width, height = COLUMNS * WIDTH + 32, LINES * HEIGHT + 52
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img"'
    )
    yield ' aria-label="A chat with the demo model at a terminal">'
    yield f"<style>text{{font-size:{SIZE}px;white-space:pre;font-family:{FONTS}}}"
    yield "@media (prefers-reduced-motion:no-preference){g{animation:a .2s both}}@keyframes a{from{opacity:0}}</style>"
    yield f'<rect width="100%" height="100%" rx="8" fill="{PAPER}"/>'
    for x, color in ((20, "red"), (38, "brown"), (56, "green")):
        yield f'<circle cx="{x}" cy="18" r="5.5" fill="{COLORS[color]}"/>'
    for y in range(LINES):
        row = [screen.buffer[y][x] for x in range(COLUMNS)]
        if runs := list(_runs(row)):
            yield f'<g style="animation-delay:{since[y]:.2f}s">'
            yield from (_run(x, y, text, style) for x, text, style in runs)
            yield "</g>"
    yield "</svg>"


def _runs(row: list[Any]) -> Iterator[tuple[int, str, Any]]:
    """(column, text, a letter with its style) of each run of letters of one style."""
    x = 0
    for _, some in groupby(row, lambda cell: cell[1:]):
        letters = list(some)
        text = "".join(cell.data for cell in letters)
        if text.strip() or letters[0].reverse:
            yield x, text, letters[0]
        x += len(letters)


def _run(x: int, y: int, text: str, style: Any) -> str:
    ink, paper = (COLORS.get(color, INK) for color in (style.fg, style.bg))
    left, top, wide, box = 16 + x * WIDTH, 40 + y * HEIGHT, len(text) * WIDTH, ""
    if style.reverse:
        ink, paper = PAPER, ink
        box = (
            f'<rect x="{left:.1f}" y="{top - 0.75 * HEIGHT:.1f}" width="{wide:.1f}" height="{HEIGHT}" fill="{paper}"/>'
        )
    more = ' font-weight="bold"' * style.bold + ' font-style="italic"' * style.italics
    shown = text.rstrip() or text
    place = f'x="{left:.1f}" y="{top}" textLength="{len(shown) * WIDTH:.1f}" fill="{ink}"{more}'
    return f"{box}<text {place}>{escape(shown)}</text>"


def main(out: Path) -> None:
    """Write the picture."""
    with tempfile.TemporaryDirectory() as home:
        recording = Recording(COMMAND, home)
        recording.wait("0 of 512 tokens", 1, 0.5)
        for line, answer in TALK:
            recording.type(line, answer)
        os.kill(recording.child, signal.SIGKILL)
        os.waitpid(recording.child, 0)
    out.write_text("\n".join(picture(recording.screen, recording.since)) + "\n", encoding="utf-8")
    print("\n".join(line.rstrip() for line in recording.screen.display))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_name("chat.svg"))
