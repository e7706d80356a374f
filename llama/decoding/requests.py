"""What is asked of the scheduler, and what it answers: prompts of ids with their options, and steps. Ids only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Optional, Protocol

import torch

from ..model import ModelArgs
from ..system.checks import whole
from ..system.printable import shortened
from .settings import FinishReason as FinishReason
from .settings import Sampling

# Ids that are read behind a prefix round differently from a prompt that is read whole. So a shorter prefix is read
# again: equal calls give equal numbers to the bit.
LEAST_SHARED = 32


class Grammar(Protocol):
    """Says which ids may come next in one row, and is told which one did. It may have more methods: `ends_with(token)`
    says whether an id leaves nothing that could follow it but an end; `forced()` gives the ids that are to come next
    without a choice, which `fill` would allow one after the other, and `behind(ids)` a copy of the grammar that has
    taken them."""

    def fill(self, bits: torch.Tensor) -> None:
        """Write into int32 (ceil(vocab_size / 32),) on the CPU: bit i % 32 of word i // 32 is set if id i may come
        next."""

    def accept(self, token: int) -> None:
        """Take the id that came next."""


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be answered.

    max_new: how many ids may follow. seed: of draws of its own. ends: ids that end it. logprobs, alternatives: report
    each id's log-probability, and this number of best ids, at each place. scored: report those of these ids, which are
    the prompt's from `scored_from` on; the last of them may stand behind the prompt, and is not read. draft: verify
    several ids, which the text itself suggests, in one pass; None: where that changes no id; False: no guesses of a
    draft model either. grammar: a `Grammar`; or data, of which the scheduler makes a new one for each row, wherever
    that runs. least_shared: start behind a prefix that the cache holds if it has at least this number of ids.
    """

    prompt: list[int]
    max_new: int
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0))
    seed: Optional[int] = None
    ends: frozenset[int] = frozenset()
    logprobs: bool = False
    alternatives: int = 0
    scored: Sequence[int] = ()
    scored_from: int = 0
    draft: Optional[bool] = None
    grammar: Optional[Any] = None
    least_shared: int = LEAST_SHARED

    @property
    def draws(self) -> bool:
        """Whether its ids are drawn, and not the best."""
        return self.sampling.temperature > 0

    @cached_property
    def looks_up(self) -> bool:
        """Whether guesses from its own ids cannot go wrong: the best id is taken, and depends on nothing else."""
        return self.draft is not False and not self.draws and not self.sampling.counts_ids and self.grammar is None

    @property
    def sharable(self) -> list[int]:
        """The first ids of the prompt: those behind which no hidden state is needed."""
        return self.prompt[: max(self.scored_from - 1, 0) if self.scored else -1]

    def targets(self, start: int, end: int) -> tuple[int, Sequence[int]]:
        """The ids to score by what the model says at the places from `start` to `end`, and the first such place."""
        first = max(start, self.scored_from - 1)
        return first, self.scored[first + 1 - self.scored_from : max(0, end + 1 - self.scored_from)]


@dataclass(slots=True)
class Step:
    """What one step decided for one prompt.

    Attributes:
        index: which prompt of the call.
        token: the id; None if the row ends without one, at the id `end` or because there was nothing to generate.
        logprob: its natural log-probability, or that of `end`, if asked for.
        alternatives: the best ids at this place with their log-probabilities, if asked for.
        finish_reason: "stop", "length" or "context" in each prompt's last step; otherwise None.
        prompt_logprobs: in the first step, if asked for, one for each id that is scored, 0.0 for the prompt's first.
        prompt_alternatives: in the first step, if asked for, as `alternatives`; the prompt's first id has none.
        end: EOS, or another id that ended the row.
    """

    index: int
    token: Optional[int] = None
    logprob: float = 0.0
    alternatives: list[tuple[int, float]] = field(default_factory=list)
    finish_reason: Optional[FinishReason] = None
    prompt_logprobs: Optional[list[float]] = None
    prompt_alternatives: list[list[tuple[int, float]]] = field(default_factory=list)
    end: Optional[int] = None


def check_prompts(prompt_tokens: Sequence[Sequence[int]], args: ModelArgs) -> list[list[int]]:
    """Prompts of ids as lists. ValueError for one that is empty, too long for the cache, or has an unknown id."""
    if not isinstance(prompt_tokens, Sequence):
        way = "; pass its .tolist()" if hasattr(prompt_tokens, "tolist") else ""
        raise ValueError(f"prompt_tokens must be a list of lists of ids, not {type(prompt_tokens).__name__}{way}")
    prompts = [_ids(prompt) for prompt in prompt_tokens]
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} is empty; it needs at least one id, BOS for example")
        if len(prompt) > args.max_seq_len:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens, but max_seq_len is {args.max_seq_len}; "
                f"shorten it, or build with max_seq_len={len(prompt)} or more"
            )
        for token in prompt:
            if not 0 <= token < args.vocab_size:
                raise ValueError(
                    f"prompt {row} has the id {token}, which is outside the vocabulary; ids go from 0 to "
                    f"{args.vocab_size - 1}"
                )
    return prompts


def _ids(prompt: Iterable[int]) -> list[int]:
    """A prompt as a list of Python's whole numbers."""
    try:
        given = None if isinstance(prompt, (Mapping, Set)) else list(prompt)
    except TypeError:
        given = None
    if given is not None and set(map(type, given)) <= {int}:
        return given
    ids = [number for token in given or () if (number := whole(token)) is not None]
    if given is None or len(ids) < len(given):
        if given is None:
            raise ValueError(
                f"prompt_tokens must be lists of ids, and {shortened(prompt)} is no list; put one prompt into a list"
            )
        wrong = next(token for token in given if whole(token) is None)
        raise ValueError(f"prompt_tokens must be lists of ids, and {shortened(wrong)} is no whole number")
    return ids
