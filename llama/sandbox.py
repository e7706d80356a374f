"""Jinja's sandbox, with limits: no template runs for ever, or fills the memory. Needs jinja2.

A template comes with a model that somebody has published. Jinja keeps it from files and from the program; what it
computes is limited here: the time, the rounds of its loops, and the size of whatever one step makes.
"""

from __future__ import annotations

import functools
import math
import re
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Optional

from jinja2 import Template, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from .system.printable import shortened

SECONDS = 5.0
MOST_ROUNDS = 10**6  # rounds of all loops and macros together
MOST_SIZE = 2**22  # characters of a text, or items of a list
MOST_PRODUCT = 2**26  # limit of the product of the sizes that a function of MULTIPLYING is given
MOST_BITS = 2**12  # bits of a number
MULTIPLYING = {
    "replace", "join", "center", "ljust", "rjust", "zfill", "expandtabs", "indent", "tojson", "batch", "slice",
    "wordwrap",
}  # fmt: skip
# A width in a format that makes a long text of a short one.
WIDE = re.compile(r"%(\(.*?\))?[^%a-zA-Z]*(\d{4}|\*)|{[^{}]*(\d{4}|{)")


class TooMuch(ValueError):
    """A template goes beyond a limit."""


class _Run(threading.local):
    """What is left to the template that this thread runs."""

    end = math.inf
    rounds = 0


_run = _Run()


def run(template: Template, **values: Any) -> str:
    """The text of a template of `Limited`. Raises TooMuch if it goes beyond a limit, and whatever else a template
    may raise."""
    _run.end, _run.rounds = time.monotonic() + SECONDS, 0
    return _joined(template.generate(**values))


def _joined(texts: Iterable[Any]) -> str:
    found, size = [], 0
    for text in texts:
        size += _size(text)
        _limit(size)
        found.append(str(text))
    return "".join(found)


def _limit(size: float, most: Optional[int] = None) -> None:
    if size > (most or MOST_SIZE):
        raise TooMuch(f"it makes more than {MOST_SIZE} characters or items in one step; write a smaller template")
    if time.monotonic() > _run.end:
        raise TooMuch(f"it takes longer than {SECONDS:g} seconds; write a faster template")


def _count_round() -> str:
    _run.rounds += 1
    if _run.rounds > MOST_ROUNDS:
        raise TooMuch(f"its loops and macros go more than {MOST_ROUNDS} rounds; write a smaller template")
    return ""  # which is shown, and so checked: see `_checked`


def _factor(value: Any) -> int:
    """How many times as much a step may make with a value: the number itself, or its size."""
    return max(1, abs(value)) if isinstance(value, int) else _size(value)


def _size(value: Any) -> int:
    """The characters and items in a value, counted up to the limit, and 1 at least."""
    size, inner = 0, [value]
    while inner and size <= MOST_SIZE:
        each = inner.pop()
        if isinstance(each, (list, tuple, set, dict)):
            inner += [*each, *each.values()] if isinstance(each, dict) else each
        size += len(each) if isinstance(each, (str, bytes, range)) else 1
    return max(1, size)


def _narrow(text: Any) -> Any:
    """The text, to be formatted. TooMuch if it may ask for great widths."""
    if WIDE.search(str(text)):
        raise TooMuch(f"it formats {shortened(text)}; write plain text, and join it with ~")
    return text


def _limited(function: Callable[..., Any], name: str, *own: Any) -> Callable[..., Any]:
    """A filter, or a method of an object, that makes nothing too large."""

    @functools.wraps(function)  # also what tells Jinja to pass the environment
    def limited(*args: Any, **named: Any) -> Any:
        if name in MULTIPLYING:
            _limit(math.prod(map(_factor, (*own, *args, *named.values()))), MOST_PRODUCT)
        made = function(*args, **named)
        _limit(_size(made))
        return made

    return limited


class _Counting(NodeTransformer):
    """Lets loops and macros count their rounds, and texts be joined within the limits."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.Output([_call("count_round", [])]))
        return node

    visit_Macro = visit_CallBlock = visit_For

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", [nodes.List(node.nodes)])


def _call(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


class Limited(ImmutableSandboxedEnvironment):
    """The environment, as transformers has it, within the limits."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    concat = staticmethod(_joined)
    count_round = staticmethod(_count_round)
    joined = staticmethod(_joined)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], finalize=self._checked
        )
        formatted = self.filters["format"]
        self.filters["format"] = lambda text, *args, **named: formatted(_narrow(text), *args, **named)
        self.filters = {name: _limited(filter, name) for name, filter in self.filters.items()}
        del self.globals["lipsum"]

    @staticmethod
    def _checked(value: Any) -> Any:
        """What is shown: a list of many long texts is short until then."""
        _limit(_size(value))
        return value

    def _parse(self, source: str, name: Any, filename: Any) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Counting().visit(tree)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            _limit(math.inf if bits > MOST_BITS else 1)
        elif operator == "%" and isinstance(left, str):
            _narrow(left)
        elif operator == "*":
            _limit(_factor(left) * _factor(right))
        made = super().call_binop(context, operator, left, right)
        _limit(_size(made))
        return made

    def call(self, context: Any, function: Any, *args: Any, **named: Any) -> Any:
        own = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # Jinja wraps `format`
        if isinstance(own, str) and function.__name__ in ("format", "format_map"):
            _narrow(own)
        if isinstance(own, (str, list, tuple)):
            function = _limited(function, function.__name__, own)
        return super().call(context, function, *args, **named)
