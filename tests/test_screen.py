"""Replies at a terminal: Markdown in color, wrapped at words, while it comes; nothing of it is lost."""

from __future__ import annotations

import io
import os
import random
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai_server import OpenAI
from terminals import Terminal

pytest.importorskip("rich")

from rich.console import Console
from rich.text import Text

from llama.commands import screen
from llama.commands.markdown import blocks, drawn, spans
from llama.commands.screen import Screen

REPLY = """A *short* recipe for **pancakes**: it takes about `20` minutes and feeds four hungry children.

## What you need
- 2 cups of flour (or **rye**, if you like a darker and heavier sort of pancake)
  * large, not `small`
10. Bake it
> Do not walk away from the pan while it is hot, since pancakes burn.

| food | per person | note |
|:-----|-----------:|:----:|
| flour | 125 g | **sifted** |
| milk, which is best if it is fresh | 1 | a \\| b | more |

```python
def pancake(flour):

    return 5 ** 2  # a comment that is longer than the forty columns
```
---
    four   spaces, 你好,世界。**重点**内容 测试一下,看看什么情况。今天天气很好,我们去公园玩
averyveryveryverylongwordthatdoesnotfitonanylineofthisterminal
"""


class Emulated:
    """A terminal: what it shows, and what has scrolled away, after the few controls that are used here."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.rows, self.y, self.x = [""], 0, 0

    def feed(self, text: str) -> None:
        for found in re.finditer(r"\x1b\[(\d*)([A-Za-z])|\x1b\[[\d;]+m|([^\x1b])", text):
            number, control, letter = found.groups()
            if control == "A":
                self.y = max(self.y - int(number), len(self.rows) - self.height, 0)
            elif control == "J":
                self.rows[self.y :] = [self.rows[self.y][: self.x]]
            elif letter == "\r":
                self.x = 0
            elif letter == "\n":
                self.y, self.x = self.y + 1, 0
                self.rows += [""] * (self.y == len(self.rows))
            elif letter:
                self.rows[self.y] = self.rows[self.y][: self.x] + letter
                self.x += 1
            else:
                assert control == "m" or not control


def console(out: io.StringIO, width: int = 40, height: int = 24, **more: Any) -> Console:
    return Console(file=out, force_terminal=True, width=width, height=height, highlight=False, **more)


def shown(pieces: list[str], width: int = 40, height: int = 24) -> list[str]:
    """What the terminal has in the end."""
    terminal = Emulated(width, height)
    out = io.StringIO()
    with Screen(console(out, width, height)) as write:
        for piece in pieces:
            write(piece)
    terminal.feed(out.getvalue())
    return [row.rstrip() for row in terminal.rows]


@pytest.fixture(autouse=True)
def every_piece_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "LEAST_SECONDS", 0)
    monkeypatch.setattr(screen, "SHARE", 0)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 24), (40, 5), (23, 9)])
def test_it_ends_as_if_it_had_come_at_once(width: int, height: int) -> None:
    """Where a table's lines changed after they had scrolled away, it comes once more, whole: no line is lost."""
    dice = random.Random(width)
    places = sorted(dice.sample(range(len(REPLY)), 150))
    pieces = [REPLY[a:b] for a, b in zip([0, *places], [*places, None])]
    rows, whole = shown(pieces, width, height), shown([REPLY], width, 1000)
    left = iter(rows)
    assert all(line in left for line in whole)  # in this order
    assert (rows == whole) == (height == 24)
    if width == 80:  # no cell is wrapped
        assert re.findall(r"\w", "".join(rows)) == re.findall(r"\w", REPLY)


@pytest.mark.parametrize(
    ("text", "plain", "styles"),
    [
        ("a **b c** d", "a b c d", ["bold"]),
        ("*a*, (**b**): ***c*** ~~d~~!", "a, (b): c d!", ["italic", "bold", "bold italic", "strike"]),
        ("**a *b* `c**`** ``d`e``", "a b c** d`e", ["bold", "italic", "bold cyan", "bold cyan"]),
        ("这是**重点**内容", "这是重点内容", ["bold"]),
        ("*laughs* **Note:** x", "laughs Note: x", ["italic", "bold"]),
        *[(text, text, []) for text in (
            "5*3*2 = 30", "2 ** 3 ** 4", "2**3**4", "__init__ and _x_", "*args, **kwargs", "int *a, *b", "'*' and '*'",
            "(*) (*)", "rm *.py *.txt *", "<b>bold</b> &amp; <br>", ("[x] [link](http://a.b/c_d_e) "
                                                                    "![i](j)"), r"\*no\* \`no\`",
            "`` ` **", "a ** b", "f**k and sh*t", "****", "~/a ~~ b", "two  spaces   three",
            "[bold]no markup[/] :smile:",
            "*a\\*", "**", "`", "x ```y",
        )],
    ],
)  # fmt: skip
def test_signs(text: str, plain: str, styles: list[str]) -> None:
    """They become styles where nothing else can be meant."""
    words = spans(text)
    assert words.plain == plain
    assert sorted(str(span.style) for span in words.spans if str(span.style)) == sorted(styles)


@pytest.mark.parametrize(
    ("block", "lines"),
    [
        ("# Title", ["# Title"]),
        ("#no heading", ["#no", "heading"]),
        ("1) one two three", ["1) one two", "   three"]),
        ("- a\n", ["• a"]),
        ("-5 is cold", ["-5 is cold"]),
        ("> a b c d e f", ["> a b c d", "> e f"]),
        ("* * *", ["─" * 10]),
        ("            deep", ["", "  deep"]),
        ("| a | b |\n", ["| a | b |"]),
        ("| a | b |\n| no table", ["| a | b |", "| no table"]),
        ("|a|\n|-|\n|b|\n", [" a", "───", " b"]),
        ("|a|\n|-|\n|b|c|", [" a", "───────", " b   c"]),
        ("|abc|\n|:--|\n|d|", [" abc", "─────", " d"]),
        ("|abc|\n|--:|\n|d|", [" abc", "─────", "   d"]),
        ("|abc|\n|:-:|\n|d|", [" abc", "─────", "  d"]),
        ("```\n\n  x\n\n", ["```", "", "  x", ""]),
        ("~~~py\nx = 1  \n~~~\n", ["~~~py", "x = 1", "~~~"]),
        ("```nolanguage\n**x**", ["```nolangu", "age", "**x**"]),
        ("a\tb", ["a       b"]),
        ("", [""]),
    ],
)
def test_lines(block: str, lines: list[str]) -> None:
    assert [line.plain.rstrip() for line in drawn(block, console(io.StringIO(), 10))] == lines


@pytest.mark.parametrize(
    ("line", "styles"),
    [
        ("# a", ["dim", "bold magenta"]), ("> a", ["dim", "italic"]), ("- a", ["cyan"]), ("2. a", ["cyan"]),
        ("---", ["dim"]),
        ("a", []),
    ],
)  # fmt: skip
def test_styles(line: str, styles: list[str]) -> None:
    [shown] = drawn(line, console(io.StringIO()))
    assert [style for style in (str(shown.style), *(str(span.style) for span in shown.spans)) if style] == styles


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("a\n\nb", ["a\n", "\n", "b"]),
        ("```\na\n\n| b\n```\nc", ["```\na\n\n| b\n```\n", "c"]),
        ("~~~~\n~~~\n~~~~\n", ["~~~~\n~~~\n~~~~\n", ""]),
        ("```\na\n```", ["```\na\n```"]),  # it may go on as ```b
        ("```a`` b\nc", ["```a`` b\n", "c"]),
        ("| a\n| b\n", ["| a\n| b\n"]),
        ("| a\n\n", ["| a\n", "\n", ""]),
        ("", [""]),
    ],
)
def test_what_may_still_grow(text: str, cut: list[str]) -> None:
    assert blocks(text) == cut
    assert Screen.last_block(text) == cut[-1]


def test_the_model_cannot_steer_the_terminal() -> None:
    assert shown(["a\x1b[2J\x07**b\x1b[31m**\r\n[red]c"]) == ["a\ufffd[2J\ufffdb\ufffd[31m\ufffd", "[red]c"]


def test_a_new_width_of_the_terminal_begins_the_block_anew() -> None:
    """The terminal has wrapped the old lines in its own way, and going up would overwrite what is above them."""
    out = io.StringIO()
    page = console(out)
    with Screen(page) as write:
        write("above\none two three")
        page.width = 12
        write(" four")
    assert re.sub(r"\x1b\[J|\r", "", out.getvalue()).endswith("one two three\none two \nthree four")
    assert "\x1b[1A" not in out.getvalue()


def test_a_block_may_become_shorter() -> None:
    """No empty line stays where its last ones were."""
    terminal, out = Emulated(40, 24), io.StringIO()
    it = Screen(console(out))
    for lines in ("ab", "a", "ac", "xyz", "x", "x"):
        it._draw([Text(line) for line in lines], False)
        terminal.feed(out.getvalue())
        out.seek(0)
        out.truncate()
        assert [row.rstrip() for row in terminal.rows] == list(lines)


def test_code_in_color_and_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "**a**\n```python\ndef f(): pass\n```\n"
    monkeypatch.setenv("TERM", "xterm")
    for forbidden, some in ((None, True), ("1", False)):
        out = io.StringIO()
        if forbidden:
            monkeypatch.setenv("NO_COLOR", forbidden)
        with Screen(console(out, color_system="standard")) as write:
            write(code)
        assert ("\x1b[94mdef" in out.getvalue()) == some
        assert "\x1b[1ma\x1b[0m" in out.getvalue()


@pytest.mark.parametrize(
    ("terminal", "encoding", "at_terminal", "able"),
    [
        ("xterm", "utf-8", True, True),
        ("dumb", "utf-8", True, False),
        ("xterm", "latin-1", True, False),
        ("xterm", "utf-8", False, False),
    ],
)
def test_where_it_draws(
    terminal: str, encoding: str, at_terminal: bool, able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(out, "isatty", lambda: at_terminal, raising=False)
    monkeypatch.setenv("TERM", terminal)
    monkeypatch.setenv("FORCE_COLOR", "1")  # a pipe stays one
    monkeypatch.setattr(sys, "stdout", out)
    assert (Screen.at_terminal() is not None) == able


def test_drawing_does_not_hold_up_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is done at most so often; what waits is shown at the end."""
    monkeypatch.setattr(screen, "LEAST_SECONDS", 1000)
    out = io.StringIO()
    with Screen(console(out)) as write:
        for letter in "a **b** c":
            write(letter)
        assert out.getvalue() == "a"
    assert out.getvalue().endswith("a \x1b[1mb\x1b[0m c")


# At a terminal


@pytest.fixture
def server() -> Iterator[OpenAI]:
    server = OpenAI()
    yield server
    server.close()


def shows_keys(terminal: Terminal) -> bool:
    termios = pytest.importorskip("termios")
    return bool(termios.tcgetattr(terminal.master)[3] & termios.ECHO)


def test_a_chat_at_a_terminal(server: OpenAI, tmp_path: Path) -> None:
    pytest.importorskip("prompt_toolkit")
    typed = threading.Event()
    server.answers = [["The **quick** brown fox jumps ov", typed, "er the lazy dog.\n- `", "ls`"], ["Yes."], ["No."],
                      [" More."], [" a time"]]  # fmt: skip
    with Terminal(["chat", "--url", server.address], tmp_path, 24, 40) as it:
        it.wait_for("/help lists")
        assert "Type a message. /help lists the commands;\n" not in it.raw.decode()  # wrapped at words
        it.wait_for(">")
        it.type("Hi\r")
        it.wait_for("ov")
        assert not shows_keys(it)
        it.type("Is it\x08\x08so?\r")  # a whole message, with its corrections
        typed.set()
        reply = it.wait_for("tok/s")
        assert "so?" not in reply
        it.wait_for("Yes.\n")
        assert "fox jumps over the lazy \ndog.\n• ls\n" in reply
        assert b"The \x1b[1mquick\x1b[0m brown" in it.raw
        assert b"\x1b[1;36mls\x1b[0m" in it.raw
        assert [message["content"] for message in server.last["messages"]][::2] == ["Hi", "Is so?"]
        it.wait_for(">")
        it.type("/edit\r")
        it.wait_for("Is so?")
        it.type(" Or not?\r")
        it.wait_for("No.\n")
        assert server.last["messages"][2]["content"] == "Is so? Or not?"
        for typed_now, shown in (("/continue\r", "No. More.\n"), ("/continue Once upon\r", "Once upon a time\n")):
            it.wait_for(">")
            it.type(typed_now)
            it.wait_for(shown)
        it.wait_for(">")
        it.type("/edit\r")
        it.wait_for("Or not?")
        it.type("\x03")
        it.wait_for("it stays as it was")
        it.wait_for(">")
        it.type("\x03")
        it.wait_for("Ctrl-C again or /quit leaves")
        it.wait_for(">")
        it.type("\x03")
        assert it.end() == 0
        assert shows_keys(it)


def test_ctrl_c_gives_the_keys_back(server: OpenAI, tmp_path: Path) -> None:
    """Also where it comes as a signal, and where the chat ends by an error."""
    pytest.importorskip("prompt_toolkit")
    server.answers = [["One, ", threading.Event()]]
    with Terminal(["chat", "--url", server.address], tmp_path, TERM="dumb") as it:
        it.wait_for(">")
        it.type("**Count**\r")
        it.wait_for("One, ")
        os.kill(it.program.pid, signal.SIGINT)
        it.wait_for("stopped; the reply is kept as far as it came")
        it.wait_for(">")
        it.type("/quit\r")
        assert it.end() == 0
        assert shows_keys(it)
