"""How the commands read and speak.

stdout has only the model's words; the program's own go to stderr. If torchrun started several processes, the first one
reads, and tells the others what it read; all of them run the same lines, and the first one prints.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, TypeVar, Union, cast

from ..system.files import read_file, user_path
from ..system.launch import Launch, is_first_process
from ..system.pipes import reader_may_leave
from ..system.printable import escaped, harmless, json_line, printable, shortened

T = TypeVar("T")
# Gives the next line, None at the end. The first argument says what to show below the line while it is typed; a second
# one is a text to change: None if it is to stay.
Read = Callable[..., Optional[str]]


def say(text: str) -> None:
    """Write to stdout at once."""
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def note(text: str) -> None:
    """Tell the user something, on stderr."""
    _tell(text, "2")


def complain(text: str) -> None:
    """Tell the user an error, on one line of stderr."""
    _tell(escaped(" ".join(text.split())), "31")


def _tell(text: str, color: str) -> None:
    """Print on stderr, from the first process; at a terminal in color, and wrapped at words."""
    if is_first_process():
        text = harmless(text)
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns
            lines = (
                textwrap.fill(line, width, break_on_hyphens=False, replace_whitespace=False)
                for line in text.split("\n")
            )
            text = f"\x1b[{color}m" + "\n".join(lines) + "\x1b[0m"
        print(text, file=sys.stderr, flush=True)


@contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """A block whose warnings to the user are a line each, without the place in our source that Python adds."""
    before = warnings.formatwarning

    def formatted(message: Union[Warning, str], category: type[Warning], *place: Any, **more: Any) -> str:
        told = f"llama: {escaped(str(message))}\n"
        return told if category is UserWarning else before(message, category, *place, **more)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = before


def quoted(text: str, *, quotes: bool = False) -> str:
    """A text on one line, with JSON's escapes."""
    line = json_line(text)
    return line if quotes else line[1:-1].replace('\\"', '"')


@contextmanager
def pipe_may_close() -> Iterator[None]:
    """A block that prints. `… | head` is no error, and neither is a character that the terminal lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    with reader_may_leave():
        yield


def on_first(work: Callable[[], T]) -> T:
    """The result of `work` on the first process, on all; its ValueError or OSError is a ValueError on all."""
    outcome: Any = None
    if is_first_process():
        try:
            outcome = work(), None
        except (ValueError, OSError) as error:
            outcome = None, str(error)
    if Launch.read().world_size > 1:
        from ..layers.parallel import from_first_process

        outcome = from_first_process(outcome)
    value, failure = outcome
    if failure is not None:
        raise ValueError(failure)
    return cast(T, value)


def piped_lines() -> Read:
    """Read messages from stdin; a backslash at the end of a line joins it to the next."""
    lines = _decoded(sys.stdin.buffer)

    def read(*_: object) -> Optional[str]:
        message = next(lines, None)
        while message is not None and message.endswith("\\"):
            message = message[:-1] + "\n" + next(lines, "")
        return message

    return read


def _decoded(file: Any) -> Iterator[str]:
    for number, raw in enumerate(file, start=1):
        try:
            yield raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"line {number} of the pipe is not UTF-8") from error


def given_text(text: Optional[str], file: Optional[str], what: str) -> str:
    """The text that a command works on. Only the first process reads files and pipes; the others get "" here."""
    if text is not None and file is not None:
        raise ValueError(f"give the {what} or --file, not both")
    if text is not None:
        return text
    if Launch.read().rank > 0:
        return ""
    if file is None and sys.stdin.isatty():
        raise ValueError(f"no {what}; give one in quotes, --file FILE, or a pipe")
    return file_text(None if file in (None, "-") else user_path(file))


def file_text(path: Optional[Path]) -> str:
    """The text of a file, or of the pipe, less its last line end."""
    data = sys.stdin.buffer.read() if path is None else read_file(path)
    # Editors and echo put a line end there.
    return _utf8(data, path or "the pipe", "utf-8-sig").removesuffix("\n").removesuffix("\r")


def exact_text(path: Path) -> str:
    """The text of a file as it stands there, to the last line end. ValueError if it is empty."""
    text = _utf8(read_file(path), path)
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def _utf8(data: bytes, source: object, codec: str = "utf-8") -> str:
    try:
        return data.decode(codec)
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 at byte {error.start}") from error


def texts(value: str) -> Union[str, list[str]]:
    """One text, or several as a JSON list. ValueError for what was meant as a list and is none."""
    if value.startswith("["):
        told = (
            f'{shortened(value)} is no JSON list of texts; write ["a", "b"], and one text that begins like a list as a '
            "list of one"
        )
        try:
            several = json.loads(value)
        except (ValueError, RecursionError) as error:
            if re.match(r"\[\s*[\"']", value):
                raise ValueError(told) from error
            return value
        if not all(isinstance(text, str) for text in several):
            raise ValueError(told)
        return several
    return value


def number(value: str) -> Union[int, float]:
    """ValueError if it is not a number."""
    try:
        return int(value)
    except ValueError:
        return float(value)


def numbers_in(ids: str) -> list[int]:
    """Ids as people write them: 1,306 or "1 306" or [1, 306]."""
    try:
        return [int(part) for part in re.split(r"[\s,]+", str(ids).strip("[]() ")) if part]
    except ValueError as error:
        raise ValueError(f"ids={shortened(ids)} must be numbers, such as 1,306,4658") from error
