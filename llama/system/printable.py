"""Makes text safe to print: a model's text and the names of files must not steer a terminal or hide what they say."""

from __future__ import annotations

import json
import re
import sys
from typing import Any, Optional, TextIO

# All controls but tab and line feed; direction marks; spaces and joints of no width; other line ends; tags; halves of
# surrogate pairs. The two joiners U+200C and U+200D stay: Persian, Hindi and emoji are written with them.
STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def harmless(text: str) -> str:
    """The text, with U+FFFD in place of each character that steers."""
    return STEERING.sub("\N{REPLACEMENT CHARACTER}", text)


def printable(text: str, stream: Optional[TextIO] = None) -> str:
    """The text as a stream is to get it (stdout if not given): a terminal harmless, a pipe or file unchanged."""
    stream = sys.stdout if stream is None else stream
    return harmless(text) if stream.isatty() else text


def escaped(text: str) -> str:
    """A name, or a message with names in it, on one line: characters that do not print become Python's escapes, as
    \\x1b."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shortened(value: Any, most: int = 80) -> str:
    """Any value of a caller or a file, as an error message shows it: its `repr`, escaped, in up to `most`
    characters."""
    try:
        big = isinstance(value, int) and value.bit_length() > 4096
        text = f"a {value.bit_length()}-bit number" if big else escaped(repr(value))
    except (ValueError, RecursionError):  # a number of thousands of digits, or thousands of lists, inside
        text = f"a {type(value).__name__}"
    return clipped(text, most)


def clipped(text: str, most: int) -> str:
    """Up to `most` characters of a text; "…" stands for the rest."""
    return text if len(text) <= most else text[: most - 1] + "…"


def reason(error: BaseException) -> str:
    """The first line of an error's message, or its class."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def counted(number: int, thing: str) -> str:
    """A number of things in words: "1 process", "2 processes"."""
    ending = "" if number == 1 else "es" if thing.endswith("s") else "s"
    return f"{number} {thing}{ending}"


def gigabytes(nbytes: float) -> str:
    """nbytes in GB, MB or KB (powers of 1000), with one digit after the point."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= size / 10:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes / 1e3:.1f} KB"


def json_line(value: Any) -> str:
    """JSON of a value on one line. Letters of all scripts stay; characters that steer a terminal become JSON's
    escapes."""
    return STEERING.sub(lambda found: json.dumps(found[0])[1:-1], json.dumps(value, ensure_ascii=False))
