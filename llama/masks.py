"""The ids that a constraint allows: llguidance says which bytes may come next; here they become masks over ids.

A `Form` is what a request has of a constraint, and can be sent to other processes; a `Matcher` holds how far one row
has come.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Collection, Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Optional
from weakref import WeakKeyDictionary

import torch

from .constraints import COMPILED, LIMITS, Constraint, library, one_line
from .tokenizer import Tokenizer

LOOKED_AT = 256  # bytes of a text that must come


@dataclass(frozen=True)
class Form:
    """What a request says of the form of its answer: plain data. bare: the first piece loses SentencePiece's space."""

    grammar: str
    bare: bool
    ends: frozenset[int]


def forms(
    constraint: Optional[Constraint], tokenizer: Tokenizer, before: Sequence[Sequence[int]], ends: Collection[int]
) -> Sequence[Optional[Form]]:
    """The form of each answer, which goes on from the text of the ids `before` it, and is ended by one of `ends`.
    ValueError if the tokenizer is somebody's own, or its vocabulary makes the form too large."""
    if constraint is None:
        return [None] * len(before)
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"a constraint needs the pieces of a llama.Tokenizer, which {type(tokenizer).__name__} is not")
    ids = vocabulary(tokenizer)
    ids.compiled(constraint.grammar)
    return [Form(constraint.grammar, ids.loses_space(tokenizer, some), frozenset(ends)) for some in before]


def matcher_of(tokenizer: Tokenizer, grammar: Any) -> Any:
    """The grammar of a row: a new `Matcher` for a `Form`; a grammar of the caller's own stays unchanged."""
    return Matcher(tokenizer, grammar) if isinstance(grammar, Form) else grammar


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
        """The ids of a text. llguidance would ask for them to force ids by itself, which is switched off here."""
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
        # The piece that is one space. It gives no text at a start, if the next piece then shows its space.
        self.space: Optional[int] = None
        self._twins = self._without_space(tokenizer, tokens, set(special))
        # id -> the id whose bit says whether it may begin a text
        self._at_start = torch.arange(32 * self.words, device="cpu")
        for i, twin in self._twins.items():
            self._at_start[i] = twin
        self.bytes, self._sorted = tokens, sorted(tokens)
        self._tokenizer = library().LLTokenizer(_Pieces(tokenizer, tokens, special))
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
        llguidance = library()
        limits = llguidance.LLParserLimits(verbose_errors=False, **LIMITS)
        whole = llguidance.LLMatcher.grammar_from_lark(grammar)
        matcher = llguidance.LLMatcher(self._tokenizer, whole, log_level=0, limits=limits)
        self.mask(matcher)
        return matcher

    def mask(self, matcher: Any) -> torch.Tensor:
        """What may come next, int32 with a bit for each id of llguidance. ValueError if llguidance has reached a
        limit."""
        bits = torch.zeros(-(-len(self.bytes) // 32), dtype=torch.int32, device="cpu")
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(bits.data_ptr(), 4 * len(bits))
        if matcher.is_error():
            raise ValueError(f"constraint: it cannot be used: {one_line(matcher.get_error())}")
        return bits

    def certain(self, tokenizer: Tokenizer, text: bytes) -> list[int]:
        """The first ids of a text that other text follows; not those at its end in whose place a longer piece may
        come. Empty if the text begins within a character, or if the tokenizer changes it."""
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
        """Write the mask of what may come next. Ids that end the answer are allowed once it is whole, and not
        before."""
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
        """Take the id that came next. ValueError if it is not allowed."""
        known, self._bare = self._known(token), False
        if not self._matcher.consume_tokens(known):
            raise ValueError(f"constraint: {one_line(self._matcher.get_error())}")

    def forced(self) -> list[int]:
        """The ids of the text that must come next. Empty at the answer's first id, which may lose its space."""
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
        """Whether the answer is whole with this id, and cannot go on. A copy tries it: a step that fails is decided
        again."""
        trial = self._matcher.deep_copy()
        return trial.consume_tokens(self._known(token)) and trial.is_accepting() and trial.is_stopped()


_VOCABULARIES: WeakKeyDictionary[Tokenizer, Vocabulary] = WeakKeyDictionary()


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """A tokenizer's vocabulary, made once."""
    if tokenizer not in _VOCABULARIES:
        _VOCABULARIES[tokenizer] = Vocabulary(tokenizer)
    return _VOCABULARIES[tokenizer]
