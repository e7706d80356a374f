"""The help of the commands, on one screen each, out of the same tables that the command line is read by."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Optional

from .arguments import HELP, REQUIRED, Command, Option, a_number, a_path, find_command, truth

WIDEST, LABEL = 110, 26  # columns of a line, and of the names of options at its beginning


def asked_help(commands: Mapping[str, Command], words: Sequence[str]) -> Optional[str]:
    """The help that a command line asks for; None if it asks for something else."""
    first, *rest = words or ["help"]
    if first in ("help", *HELP) and rest[:1] not in ([], ["all"]):
        find_command(commands, rest[0])
        first, rest = rest[0], ["--help", *rest[1:]]
    if first in ("help", *HELP):
        return "\n".join(_of_all(commands)) + "\n"
    before = rest[: rest.index("--")] if "--" in rest else rest
    asked = [i for i, word in enumerate(before) if word.partition("=")[0] in HELP]
    if first not in commands or not asked:
        return None
    whole = "all" in (before[asked[0]].partition("=")[2], *before[asked[0] + 1 : asked[0] + 2])
    return "\n".join(_of_one(first, commands[first], whole)) + "\n"


def summary(command: Command) -> str:
    """What a command does, in a few words."""
    return " ".join((command.work.__doc__ or "").split()).partition(". ")[0].rstrip(".")


def _width() -> int:
    return max(40, min(WIDEST, shutil.get_terminal_size().columns - 1))


def _of_all(commands: Mapping[str, Command]) -> Iterator[str]:
    yield "usage: llama COMMAND [--OPTION VALUE …]"
    yield ""
    for name, command in commands.items():
        yield from _entry(f"  {name}", 14, summary(command))
    yield ""
    yield "llama COMMAND --help shows the options of one, and llama --version the version."


def _of_one(name: str, command: Command, whole: bool) -> Iterator[str]:
    options = command.options
    places = " ".join(p.upper() if options[p].default is REQUIRED else f"[{p.upper()}]" for p in command.places)
    yield from textwrap.wrap(f"usage: llama {name} {places} [--OPTION VALUE …]", _width(), subsequent_indent="    ")
    for paragraph in (command.work.__doc__ or "").split("\n\n"):
        yield from textwrap.wrap(" ".join(paragraph.split()), _width())
    shown = {title: {o: k for o, k in group.items() if whole or not k.rare} for title, group in command.groups.items()}
    labels = {o: f"  --{o} {_value(k)}".rstrip() for group in shown.values() for o, k in group.items()}
    column = min(LABEL, max(map(len, labels.values()), default=0) + 2)
    for title, group in shown.items():
        if group:
            yield f"{title}:"
        for option, kind in group.items():
            yield from _entry(labels[option], column, sentence(kind))
    if rare := [f"--{o}" for o, kind in options.items() if kind.rare and not whole]:
        told = f"and {', '.join(rare)}: see llama {name} --help all"
        yield from textwrap.wrap(told, _width())
    if command.examples:
        yield "for example:"
        yield from (f"  llama {name} {example}".rstrip() for example in command.examples)


def _value(kind: Option) -> str:
    """What stands for the value of an option."""
    if kind.read is truth:
        return ""
    return "N" if kind.read is a_number else "PATH" if kind.read is a_path else "NAME" if kind.choices else "TEXT"


def sentence(kind: Option) -> str:
    """What the help says of an option: its choices, what it does, and its default."""
    *choices, last = kind.choices or ("",)
    among = f"{', '.join(choices)} or {last}" if choices else ""
    told = f"{among}; {kind.told}".replace("; which", ", which") if among else kind.told
    return told if kind.default in (None, False, REQUIRED) else f"{told} (default {kind.default})"


def _entry(label: str, column: int, told: str) -> list[str]:
    """A label, and what is told of it from a column on; on the next line if the label is too wide."""
    lines = textwrap.wrap(told, max(20, _width() - column), break_on_hyphens=False)
    first, *rest = lines if len(label) < column else ["", *lines]
    return [f"{label:{column}}{first}".rstrip(), *(" " * column + line for line in rest)]
