"""Answers of a given form: JSON by a schema, a regular expression, one of several texts, a grammar. llguidance says which
bytes may come next; here they become ids.

A `Constraint` is what a caller asks for, checked; a `Form` is what a request has of it, and can be sent to other processes;
a `Matcher` holds how far one row has come.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional
from weakref import WeakKeyDictionary

import torch

from .system.checks import real, whole
from .system.files import parse_json
from .system.printable import clipped, escaped, shortened
from .tokenizer import Tokenizer

KINDS = ("json_schema", "json_object", "regex", "choice", "grammar")
MOST_CHARACTERS = 2**18  # of a schema, a regular expression, a grammar, or all choices together
SECONDS = 5.0  # for the compilation of one, in a process of its own
MOST_MEMORY, MOST_STACK = 2**31, 2**22  # bytes that it may take for that
# llguidance's own limits, so that a step takes some milliseconds at most.
LIMITS = {"initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 200_000, "step_max_items": 50_000, "max_lexer_states": 50_000}
LOOKED_AT = 256  # bytes of a text that must come
COMPILED = 32  # of the last constraints are kept, for each tokenizer
# Between the parts of JSON: nothing, a space, or a new line with what indents it. Otherwise spaces could follow without end.
WHITESPACE = r" |\n {0,12}"
# All ids that lead on, and not only those that llguidance would choose: which these are depends on the space before a text.
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
matcher = LLMatcher(LLTokenizer(Bytes()), grammar, log_level=0, limits=LLParserLimits(verbose_errors=False, **asked["limits"]))
if not matcher.is_error():
    matcher.compute_bitmask()
json.dump(matcher.get_error(), sys.stdout)
"""


def _llguidance() -> Any:
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
        """The option `constraint`: None, or a dict with one key. ValueError if it is wrong, too large, or more than llguidance
        can do.

        json_schema: a JSON Schema, as a dict or as text; {} and True mean any object. json_object: True. regex: a regular
        expression in Rust's syntax, for the whole answer. choice: a list of texts. grammar: Lark's, as llguidance has it, or
        llama.cpp's GBNF.
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


@dataclass(frozen=True)
class Form:
    """What a request says of the form of its answer: plain data. bare: the first piece loses SentencePiece's space."""

    grammar: str
    bare: bool
    ends: frozenset[int]


def forms(
    constraint: Optional[Constraint], tokenizer: Tokenizer, before: Sequence[Sequence[int]], ends: Collection[int]
) -> Sequence[Optional[Form]]:
    """The form of each answer, which goes on from the text of the ids `before` it, and is ended by one of `ends`. ValueError if
    the tokenizer is somebody's own, or its vocabulary makes the form too large."""
    if constraint is None:
        return [None] * len(before)
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"a constraint needs the pieces of a llama.Tokenizer, which {type(tokenizer).__name__} is not")
    ids = vocabulary(tokenizer)
    ids.compiled(constraint.grammar)
    return [Form(constraint.grammar, ids.loses_space(tokenizer, some), frozenset(ends)) for some in before]


def matcher_of(tokenizer: Tokenizer, grammar: Any) -> Any:
    """The grammar of a row: a new `Matcher` for a `Form`; somebody's own as it is."""
    return Matcher(tokenizer, grammar) if isinstance(grammar, Form) else grammar


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
    # Each text has one spelling; if "a" could be \u0061 too, an object might have the key twice. Only controls need those.
    escapes = 'nrbtf\\"' + "u" * (re.search(r"\\u00[01]|\x7f", json.dumps(value)) is not None)
    options = {
        "whitespace_pattern": WHITESPACE, "json_allowed_escapes": escapes, "lenient": False, "coerce_one_of": False,
    }  # fmt: skip
    schema: dict[str, Any] = value if isinstance(value, dict) and value else {"type": "object"}
    return f"start: %json {json.dumps({**schema, 'x-guidance': options})}"


def _schemas(value: Any) -> Iterator[dict[str, Any]]:
    """A schema and all those within it. Data that may be an answer is none."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            yield part
            left += [inner for key, inner in part.items() if key not in ("const", "enum", "default", "examples")]
        elif isinstance(part, list):
            left += part


def _problem(schema: dict[str, Any]) -> str:
    """What llguidance takes, but gets wrong: it would let answers through that are not valid."""
    least, required = whole(schema.get("minProperties")), schema.get("required")
    if least is not None and least - len(required if isinstance(required, list) else []) > 1:
        return f"minProperties={least} counts keys, and those that are not required could be twice the same; require them"
    low, high = (real(schema.get(f"exclusive{name}")) for name in ("Minimum", "Maximum"))
    most, fewest = (real(schema.get(name)) for name in ("maximum", "minimum"))
    above = min((bound for bound in (high, most) if bound is not None), default=math.inf)
    below = max((bound for bound in (low, fewest) if bound is not None), default=-math.inf)
    for name, open_end, other in (("exclusiveMinimum", low, above), ("exclusiveMaximum", high, below)):
        if open_end is not None and open_end.is_integer() and 0 < abs(other - open_end) < 1 and schema.get("type") != "integer":
            return f"{name}={open_end:g} would let this number itself through, where the other bound is less than 1 away"
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
    texts = ("".join(c if c.isascii() and c.isalnum() else rf"\x{{{ord(c):x}}}" for c in text) for text in dict.fromkeys(value))
    return _matching("|".join(texts))


def _grammar(value: Any) -> str:
    text = _text("grammar", value)
    if "::=" not in text:
        return text
    try:
        return str(_llguidance().grammar_from("gbnf", text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"constraint: grammar is no GBNF: {_told(str(error))}") from error


def _matching(regex: str) -> str:
    """The grammar of what a regular expression matches."""
    return str(json.loads(_llguidance().LLMatcher.grammar_from_regex(regex))["grammars"][0]["lark_grammar"])


_GRAMMARS = {
    "json_schema": _json_schema, "json_object": _json_object, "regex": _regex, "choice": _choice, "grammar": _grammar,
}  # fmt: skip


def _told(message: str) -> str:
    """llguidance's error, on one line."""
    return clipped(escaped(" ".join(message.split())), 300)


@lru_cache(maxsize=256)
def _check(kind: str, grammar: str) -> None:
    """ValueError if llguidance refuses it, cannot do it in time, or ends the process that tries."""
    asked = {
        "grammar": grammar, "limits": LIMITS, "path": str(Path(_llguidance().__file__).parents[1]),
        "resources": {"RLIMIT_AS": MOST_MEMORY, "RLIMIT_STACK": MOST_STACK},
    }  # fmt: skip
    command = [sys.executable, "-I", "-S", "-c", CHILD]
    try:
        ended = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"constraint: {kind} takes longer than {SECONDS:g} seconds to compile; simplify it") from error
    if ended.returncode:
        raise ValueError(f"constraint: {kind} is nested too deep, or takes too much memory to compile; simplify it")
    if refused := json.loads(ended.stdout):
        raise ValueError(f"constraint: {kind} cannot be used: {_told(refused)}")


# Ids


def _bits(some: torch.Tensor) -> torch.Tensor:
    """bool (32 * W,) -> int32 (W,), the first in the lowest bit."""
    places = torch.arange(32, dtype=torch.int32, device="cpu")
    return (some.view(-1, 32).to(torch.int32) << places).sum(-1, dtype=torch.int32)


def _bools(bits: torch.Tensor) -> torch.Tensor:
    """int32 (W,) -> bool (32 * W,)"""
    return (bits[:, None] >> torch.arange(32, dtype=torch.int32, device="cpu") & 1).flatten().bool()


class _Pieces:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], special: list[int]) -> None:
        self.tokens, self.special_token_ids = tokens, special
        self.eos_token_id, self.bos_token_id, self.is_tokenizer_wrapper = tokenizer.eos_id, None, True

    def __call__(self, text: str) -> list[int]:
        """The ids of a text: none are asked for, since none are forced."""
        return []


class Vocabulary:
    """The ids of a tokenizer, for llguidance.

    At the start of a text SentencePiece drops the space that a piece begins with. So llguidance knows more ids than the
    tokenizer has, behind these: the pieces without their space, each of which stands for the one with it at a start.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.words, self.eos = -(-tokenizer.n_words // 32), tokenizer.eos_id
        self._probe: Optional[int] = None  # an id whose text begins with a space
        tokens, special = self._read(tokenizer)
        self.space: Optional[int] = None  # a space alone, which is no text at a start, if the next piece then shows its space
        self._twins = self._without_space(tokenizer, tokens, set(special))
        self._at_start = torch.arange(32 * self.words, device="cpu")  # id -> the one that says whether it may begin a text
        for i, twin in self._twins.items():
            self._at_start[i] = twin
        self.bytes, self._sorted = tokens, sorted(tokens)
        self._tokenizer = _llguidance().LLTokenizer(_Pieces(tokenizer, tokens, special))
        self.compiled = lru_cache(maxsize=COMPILED)(self._compiled)

    def _read(self, tokenizer: Tokenizer) -> tuple[list[bytes], list[int]]:
        """The bytes of each id, in whole words of a mask; and the ids that are no text, which only their names mean."""
        model, special = tokenizer.sp_model, list[int]()
        tokens = [b""] * (32 * self.words)
        for i in sorted(set(range(tokenizer.n_words)) - tokenizer.nameless):
            piece = tokenizer.piece(i)
            if i in tokenizer.added or model.IsControl(i) or model.IsUnknown(i):
                special.append(i)
                tokens[i] = piece.encode()
            elif model.IsByte(i):
                tokens[i] = bytes.fromhex(piece[3:-1])
            else:
                tokens[i] = piece.replace("▁", " ").encode()
                if self._probe is None and piece[0] == "▁" and piece != "▁":
                    self._probe = i
        return tokens, special

    def _without_space(self, tokenizer: Tokenizer, tokens: list[bytes], special: set[int]) -> dict[int, int]:
        """For each piece that begins with a space, the id without it; new ones are put behind the `tokens`."""
        if not self.loses_space(tokenizer, ()):
            return {}
        ids = {text: i for i, text in reversed(list(enumerate(tokens))) if i not in special}
        twins = {}
        tokens.append(b"")
        nothing = ids[b""] = len(tokens) - 1
        for i in range(tokenizer.n_words):
            if tokens[i][:1] == b" " and i not in special and not tokenizer.sp_model.IsByte(i):
                text = tokens[i][1:]
                if text not in ids:
                    ids[text] = len(tokens)
                    tokens.append(text)
                twins[i] = ids[text] if text else nothing
                if not text and not self.loses_space(tokenizer, [i]):
                    self.space = i
        return twins

    def loses_space(self, tokenizer: Tokenizer, before: Sequence[int]) -> bool:
        """Whether a piece loses the space that it begins with, behind these ids."""
        if self._probe is None:
            return False
        return not tokenizer.decode([*before, self._probe])[len(tokenizer.decode(before)) :].startswith(" ")

    def _compiled(self, grammar: str) -> Any:
        """An `LLMatcher` at the beginning, to be copied. ValueError if it is too large for this vocabulary."""
        llguidance = _llguidance()
        limits = llguidance.LLParserLimits(verbose_errors=False, **LIMITS)
        whole = llguidance.LLMatcher.grammar_from_lark(grammar)
        matcher = llguidance.LLMatcher(self._tokenizer, whole, log_level=0, limits=limits)
        self.mask(matcher)
        return matcher

    def mask(self, matcher: Any) -> torch.Tensor:
        """What may come next, int32 with a bit for each id of llguidance. ValueError if it has come to a limit."""
        bits = torch.zeros(-(-len(self.bytes) // 32), dtype=torch.int32, device="cpu")
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(bits.data_ptr(), 4 * len(bits))
        if matcher.is_error():
            raise ValueError(f"constraint: it cannot be used: {_told(matcher.get_error())}")
        return bits

    def certain(self, tokenizer: Tokenizer, text: bytes) -> list[int]:
        """The first ids of a text that other text follows; not those at its end in whose place a longer piece may come. None at
        all if it begins within a character, or the tokenizer changes it."""
        try:
            whole = text[:LOOKED_AT].decode()
        except UnicodeDecodeError as error:  # the last character is not known whole
            whole = text[: error.start].decode()
        text, ids = whole.encode(), tokenizer.encode_behind(whole)
        if b"".join(self.bytes[i] for i in ids) != text:
            return []
        certain = next((i for i in range(len(text)) if self._may_grow(text[i:])), len(text))
        ends = itertools.accumulate(len(self.bytes[i]) for i in ids)
        return [i for i, end in zip(ids, ends) if end <= certain]

    def _may_grow(self, text: bytes) -> bool:
        """Whether a piece goes on behind this text."""
        longer = bisect_right(self._sorted, text)
        return longer < len(self._sorted) and self._sorted[longer].startswith(text)

    def begins(self, mask: torch.Tensor) -> torch.Tensor:
        """The mask of a text's first id, whose piece loses its space. A space alone may come where nothing else can."""
        some = _bools(mask)[self._at_start]
        if self.space is not None and not some.any():
            some[self.space] = True
        return _bits(some)

    def first(self, token: int) -> int:
        """What llguidance is told in place of a text's first id."""
        return self._twins.get(token, token)


class Matcher:
    """How far the answer of one row has come: a `Grammar` of `decoding/requests.py`."""

    def __init__(self, tokenizer: Tokenizer, form: Form) -> None:
        self._tokenizer, self._bare = tokenizer, form.bare
        self._vocabulary = vocabulary(tokenizer)
        self._matcher = self._vocabulary.compiled(form.grammar).deep_copy()
        ends = torch.zeros(32 * self._vocabulary.words, dtype=torch.bool, device="cpu")
        ends[[i for i in form.ends if i < len(ends)]] = True
        self._ends, self._others = _bits(ends), _bits(~ends)

    def fill(self, bits: torch.Tensor) -> None:
        """Write the mask of what may come next; any id that ends the answer may, once it is whole, and none before."""
        mask, eos = self._vocabulary.mask(self._matcher), self._vocabulary.eos
        whole = int(mask[eos // 32]) >> eos % 32 & 1
        if self._bare:
            mask = self._vocabulary.begins(mask)
        words = min(len(bits), self._vocabulary.words)
        bits[words:] = 0
        if whole:
            torch.bitwise_or(mask[:words], self._ends[:words], out=bits[:words])
        else:
            torch.bitwise_and(mask[:words], self._others[:words], out=bits[:words])

    def _known(self, token: int) -> list[int]:
        """What llguidance is told of an id."""
        if not self._bare:
            return [token]
        return [] if token == self._vocabulary.space else [self._vocabulary.first(token)]

    def accept(self, token: int) -> None:
        """Take the id that came next. ValueError if it may not."""
        known, self._bare = self._known(token), False
        if not self._matcher.consume_tokens(known):
            raise ValueError(f"constraint: {_told(self._matcher.get_error())}")

    def forced(self) -> list[int]:
        """The ids of the text that must come next. None for a text's first id, which may lose its space."""
        text = b"" if self._bare else self._matcher.compute_ff_bytes()
        ids = self._vocabulary.certain(self._tokenizer, text) if text else []
        return ids[: self._matcher.validate_tokens(ids)] if ids else []

    def behind(self, ids: Sequence[int]) -> Matcher:
        """A copy that has taken these ids."""
        made = copy(self)
        made._matcher = self._matcher.deep_copy()
        for token in ids:
            made.accept(token)
        return made

    def ends_with(self, token: int) -> bool:
        """Whether the answer is whole with this id, and cannot go on. A copy tries it: a step that fails is decided again."""
        trial = self._matcher.deep_copy()
        return trial.consume_tokens(self._known(token)) and trial.is_accepting() and trial.is_stopped()


_VOCABULARIES: WeakKeyDictionary[Tokenizer, Vocabulary] = WeakKeyDictionary()


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """That of a tokenizer, made once."""
    if tokenizer not in _VOCABULARIES:
        _VOCABULARIES[tokenizer] = Vocabulary(tokenizer)
    return _VOCABULARIES[tokenizer]
