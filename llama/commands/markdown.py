"""Markdown at a terminal: in color, and wrapped at words.

No letter is lost: only the signs around a word (**bold**, `code`) give way to a style, where nothing else can be meant.
5*3*2, __init__, <tag>, [link](address) and \\* stay as the model wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import zip_longest

from rich import box
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

FENCE = re.compile(r"( *)(`{3,}|~{3,})([^`\n]*)(?:\n|$)")
RULE = re.compile(r" {0,3}([-*_])(?: *\1){2,} *")
ROW = re.compile(r" {0,3}\|")
DIVIDER = re.compile(r" {0,3}(?=.*-)\|(?: *:?-+:? *\|)*(?: *:?-+:?)? *")
# What a line begins with: a heading, an item of a list, a quote. Wrapped lines go on below the text behind it.
MARKER = re.compile(r" *(#{1,6} +|[-*+] +|\d{1,9}[.)] +|(?:> ?)+|)")
# A sign opens where a word begins, and closes where one ends; Chinese has no spaces there. The limit keeps searches
# short.
SPAN = re.compile(
    r"""
    (?<![`\\]) (?P<tick>`+)(?!`) (?P<code>.{1,500}?) (?<!`)(?P=tick)(?!`)
    | (?: (?<!\S) (?=[*~]+[^\s*~.,;:/)\]]) | (?<![0-9A-Za-zÀ-ԯ\\*~]) (?=[*~]+[^\W_]) )
      (?P<sign>\*{1,3}|~~) (?P<text>(?![\s*~])(?:`[^`]+`|[^`]){1,500}?) (?<![\s*~\\])(?P=sign) (?![0-9A-Za-zÀ-ԯ*~])
    """,
    re.VERBOSE,
)
STYLES = {"*": "italic", "**": "bold", "***": "bold italic", "~~": "strike"}
CODE, HEADING, QUOTE, ITEM, QUIET = "bold cyan", "bold magenta", "italic", "cyan", "dim"


def blocks(source: str) -> list[str]:
    """A text, cut into lines, whole tables, and whole pieces of code. The last one may grow yet, and may be empty."""
    found, lines = list[str](), source.splitlines(keepends=True)
    while lines:
        length = _length(lines)
        found.append("".join(lines[:length]))
        if length > len(lines) or not found[-1].endswith("\n"):
            return found
        lines = lines[length:]
    return [*found, ""]


def _length(lines: list[str]) -> int:
    """How many lines the first block has; more than there are if it may grow."""
    if fence := FENCE.match(lines[0]):
        return next(
            (n for n, line in enumerate(lines[1:], 2) if line.endswith("\n") and _closes(line, fence)), len(lines) + 1
        )
    if ROW.match(lines[0]):
        return next((n for n, line in enumerate(lines) if not ROW.match(line)), len(lines) + 1)
    return 1


def _closes(line: str, fence: re.Match[str]) -> bool:
    return line.count(fence[2][0]) >= len(fence[2]) and not line.strip(f"{fence[2][0]} \n")


def drawn(block: str, console: Console) -> list[Text]:
    """The lines that show a block, of the console's width at most."""
    lines = block.removesuffix("\n").split("\n")
    if fence := FENCE.match(block):
        return _code(lines, fence, console)
    if ROW.match(block) and len(lines) > 1 and DIVIDER.fullmatch(lines[1]):
        return _table(lines, console)
    return [shown for line in lines for shown in _line(line.expandtabs(), console)]


def _line(line: str, console: Console) -> Iterator[Text]:
    if RULE.fullmatch(line):
        yield Text("─" * console.width, QUIET)
        return
    found = MARKER.match(line)
    assert found is not None  # nothing is a marker, too
    sign, start = found[1][:1], found.end() if found.end() <= console.width // 2 else 0
    marker = Text(re.sub(r"[-*] ", "• ", line[:start]), QUIET if sign in ("#", ">") else ITEM)
    text = spans(line[start:])
    text.stylize_before(HEADING if sign == "#" else QUOTE if sign == ">" else "")
    for number, part in enumerate(_wrapped(text, console.width - start, console)):
        yield Text.assemble(marker if number == 0 or sign == ">" else " " * start, part)


def spans(text: str) -> Text:
    """The words of a line, with styles in place of the signs around them."""
    shown, at = Text(), 0
    for found in SPAN.finditer(text):
        shown.append(text[at : found.start()])
        if found["tick"]:
            shown.append(found["code"], CODE)
        else:
            inner = spans(found["text"])
            inner.stylize_before(STYLES[found["sign"]])
            shown.append_text(inner)
        at = found.end()
    return shown.append(text[at:])


def _code(lines: list[str], fence: re.Match[str], console: Console) -> list[Text]:
    first, *inner = lines
    last = [inner.pop()] if inner and _closes(inner[-1], fence) else []
    source = "\n".join(inner).expandtabs(4)
    code = Syntax("", (fence[3].split() or ["text"])[0], theme="ansi_dark").highlight(source)
    if code.plain.removesuffix("\n") != source:  # it must not lose what it cannot read
        code = Text(source)
    shown = [
        Text(first, QUIET),
        *code.split("\n", allow_blank=True)[: len(inner)],
        *(Text(line, QUIET) for line in last),
    ]
    return [part for line in shown for part in _wrapped(line, console.width, console)]


def _table(lines: list[str], console: Console) -> list[Text]:
    head, dividers, *body = map(_cells, lines)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="bold")
    for name, divider in zip_longest(head, dividers, fillvalue=""):  # a longer row adds columns of its own
        right, middle = divider.endswith(":"), divider.startswith(":")
        table.add_column(
            spans(name), justify="center" if right and middle else "right" if right else "left", overflow="fold"
        )
    for row in body:
        table.add_row(*map(spans, row))
    shown = console.render_lines(table, pad=False)
    return [Text.assemble(*((part.text, part.style or "") for part in line)) for line in shown]


def _cells(line: str) -> list[str]:
    inside = line.strip().removeprefix("|").removesuffix("|")
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", inside)]


def _wrapped(text: Text, width: int, console: Console) -> list[Text]:
    return list(text.wrap(console, width, overflow="fold", no_wrap=False)) or [Text()]
