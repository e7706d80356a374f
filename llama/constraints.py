"""Answers of a given form: JSON by a schema, a regular expression, one of several texts, a grammar.

A `Constraint` is what a caller asks for, checked, as a grammar of llguidance. `masks` makes of it what may come next.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional

from .system.checks import real, whole
from .system.files import parse_json
from .system.printable import clipped, escaped, shortened

KINDS = ("json_schema", "json_object", "regex", "choice", "grammar")
MOST_CHARACTERS = 2**18  # most characters of a schema, a regular expression, a grammar, or all choices together
SECONDS = 5.0  # the time limit of a compilation, which has a process of its own
MOST_MEMORY, MOST_STACK = 2**31, 2**22  # bytes that the compilation may take
# llguidance's own limits, so that a step takes some milliseconds at most.
LIMITS = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
}
COMPILED = 32  # compiled constraints that are kept for each tokenizer, the last ones
# Between the parts of JSON: nothing, a space, or a new line with what indents it. Otherwise spaces could follow without
# end.
WHITESPACE = r" |\n {0,12}"
# All ids that lead on are allowed, since those that llguidance would choose depend on the space before a text.
FREELY = '\n%llguidance {"no_forcing": true}\n'
NOT_INSTALLED = "answers of a given form need the package llguidance; pip install 'llguidance>=1.8'"
CHILD = r"""
import json, re, sys
asked = json.load(sys.stdin)
try:
    import resource
    for name, most in asked["resources"].items():
        resource.setrlimit(getattr(resource, name), (most, resource.getrlimit(getattr(resource, name))[1]))
except (ImportError, ValueError, OSError):
    pass
sys.path.append(asked["path"])
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
grammar = asked["grammar"]

class Bytes:  # a vocabulary of bytes, and of all the names of special tokens that the grammar may mean
    names = sorted(set(re.findall(r"<[^\s<>\[\]]+>", grammar)))
    tokens = [b"</s>", *(bytes([i]) for i in range(256)), *map(str.encode, names)]
    special_token_ids = [0, *range(257, len(tokens))]
    tokens += [b""] * (2**18 if "<[" in grammar else 0)  # it may mean ids as well
    eos_token_id, bos_token_id, is_tokenizer_wrapper = 0, None, True
    def __call__(self, text):
        return [i + 1 for i in (text.encode() if isinstance(text, str) else text)]

grammar = LLMatcher.grammar_from_lark(grammar)
limits = LLParserLimits(verbose_errors=False, **asked["limits"])
matcher = LLMatcher(LLTokenizer(Bytes()), grammar, log_level=0, limits=limits)
if not matcher.is_error():
    matcher.compute_bitmask()
json.dump(matcher.get_error(), sys.stdout)
"""


def library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ValueError(NOT_INSTALLED) from error
    return llguidance


@dataclass(frozen=True)
class Constraint:
    """A form that an answer must have. grammar: in llguidance's kind of Lark; equal ones mean the same."""

    kind: str
    grammar: str

    @classmethod
    def of(cls, given: Any) -> Optional[Constraint]:
        """The option `constraint`: None, or a dict with one key. ValueError if it is wrong, too large, or more than
        llguidance can do.

        json_schema: a JSON Schema, as a dict or as text; {} and True mean any object. json_object: True. regex: a
        regular expression in Rust's syntax, for the whole answer. choice: a list of texts. grammar: Lark's, as
        llguidance has it, or llama.cpp's GBNF.
        """
        if given is None or isinstance(given, cls):
            return given
        told = f"constraint={shortened(given)} must be a dict with one of the keys {', '.join(KINDS)}"
        if not isinstance(given, Mapping) or len(given) != 1:
            raise ValueError(told)
        [(kind, value)] = given.items()
        if kind not in KINDS:
            raise ValueError(told)
        grammar = _GRAMMARS[kind](value) + FREELY
        if kind not in ("choice", "json_object"):
            _check(kind, grammar)
        return cls(kind, grammar)


# What the keys of the option mean


def _text(kind: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"constraint: {kind}={shortened(value)} must be a text")
    if len(value) > MOST_CHARACTERS:
        raise ValueError(f"constraint: {kind} has {len(value)} characters; at most {MOST_CHARACTERS} are read")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"constraint: {kind} has characters that UTF-8 cannot encode") from error
    return value


def _json_schema(value: Any) -> str:
    try:
        if isinstance(value, str):
            value = parse_json(_text("json_schema", value).encode())
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"constraint: json_schema={shortened(value)} is no JSON: {escaped(str(error))}") from error
    if value is not True and not isinstance(value, dict):
        raise ValueError(f"constraint: json_schema={shortened(value)} must be a JSON Schema, a dict or its JSON")
    _text("json_schema", text)
    if problem := next(filter(None, map(_problem, _schemas(value))), ""):
        raise ValueError(f"constraint: json_schema cannot be used: {problem}")
    # Each text has one spelling; if "a" could be \u0061 too, an object might have the key twice. Only controls need
    # those.
    escapes = 'nrbtf\\"' + "u" * (re.search(r"\\u00[01]|\x7f", json.dumps(value)) is not None)
    options = {
        "whitespace_pattern": WHITESPACE, "json_allowed_escapes": escapes, "lenient": False, "coerce_one_of": False,
    }  # fmt: skip
    schema: dict[str, Any] = value if isinstance(value, dict) and value else {"type": "object"}
    return f"start: %json {json.dumps({**schema, 'x-guidance': options})}"


def _schemas(value: Any) -> Iterator[dict[str, Any]]:
    """A schema and all schemas within it. Data in it, such as the values of an enum, is no schema."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            yield part
            left += [inner for key, inner in part.items() if key not in ("const", "enum", "default", "examples")]
        elif isinstance(part, list):
            left += part


def _problem(schema: dict[str, Any]) -> str:
    """What llguidance accepts and gets wrong: it would let answers through that are not valid."""
    least, required = whole(schema.get("minProperties")), schema.get("required")
    if least is not None and least - len(required if isinstance(required, list) else []) > 1:
        return (
            f"minProperties={least} counts keys, and those that are not required could be twice the same; require them"
        )
    low, high = (real(schema.get(f"exclusive{name}")) for name in ("Minimum", "Maximum"))
    most, fewest = (real(schema.get(name)) for name in ("maximum", "minimum"))
    above = min((bound for bound in (high, most) if bound is not None), default=math.inf)
    below = max((bound for bound in (low, fewest) if bound is not None), default=-math.inf)
    for name, open_end, other in (("exclusiveMinimum", low, above), ("exclusiveMaximum", high, below)):
        if (
            open_end is not None
            and open_end.is_integer()
            and 0 < abs(other - open_end) < 1
            and schema.get("type") != "integer"
        ):
            return (
                f"{name}={open_end:g} would let this number itself through, where the other bound is less than 1 away"
            )
    return ""


def _json_object(value: Any) -> str:
    if value is not True:
        raise ValueError(f"constraint: json_object={shortened(value)} must be True; json_schema describes the object")
    return _json_schema(True)


def _regex(value: Any) -> str:
    return _matching(_text("regex", value))


def _choice(value: Any) -> str:
    several = isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))
    if not several or not value or not all(isinstance(text, str) and text for text in value):
        raise ValueError(f"constraint: choice={shortened(value)} must be a list of texts that are not empty")
    _text("choice", "".join(value))
    texts = (
        "".join(c if c.isascii() and c.isalnum() else rf"\x{{{ord(c):x}}}" for c in text)
        for text in dict.fromkeys(value)
    )
    return _matching("|".join(texts))


def _grammar(value: Any) -> str:
    text = _text("grammar", value)
    if "::=" not in text:
        return text
    try:
        return str(library().grammar_from("gbnf", text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"constraint: grammar is no GBNF: {one_line(str(error))}") from error


def _matching(regex: str) -> str:
    """The grammar of what a regular expression matches."""
    return str(json.loads(library().LLMatcher.grammar_from_regex(regex))["grammars"][0]["lark_grammar"])


_GRAMMARS = {
    "json_schema": _json_schema, "json_object": _json_object, "regex": _regex, "choice": _choice, "grammar": _grammar,
}  # fmt: skip


def one_line(message: str) -> str:
    """llguidance's error, on one line."""
    return clipped(escaped(" ".join(message.split())), 300)


@lru_cache(maxsize=256)
def _check(kind: str, grammar: str) -> None:
    """ValueError if llguidance refuses it, cannot do it in time, or ends the process that tries."""
    asked = {
        "grammar": grammar, "limits": LIMITS, "path": str(Path(library().__file__).parents[1]),
        "resources": {"RLIMIT_AS": MOST_MEMORY, "RLIMIT_STACK": MOST_STACK},
    }  # fmt: skip
    command = [sys.executable, "-I", "-S", "-c", CHILD]
    try:
        ended = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"constraint: {kind} takes longer than {SECONDS:g} seconds to compile; simplify it") from error
    if ended.returncode:
        raise ValueError(f"constraint: {kind} is nested too deep, or takes too much memory to compile; simplify it")
    if refused := json.loads(ended.stdout):
        raise ValueError(f"constraint: {kind} cannot be used: {one_line(refused)}")
