"""What is asked of the scheduler, and what it answers: prompts of ids with their options, and steps. Ids only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Optional, Protocol

import torch

from ..model import ModelArgs
from ..system.checks import whole
from ..system.printable import shortened
from .sampling import Sampling

# Ids that are read behind a prefix round differently from a prompt that is read whole. So a shorter prefix is read again:
# equal calls give equal numbers to the bit.
LEAST_SHARED = 32
FinishReason = Literal["stop", "length", "context"]


class Grammar(Protocol):
    """Says which ids may come next in one row, and is told which one did. It may have more methods: `ends_with(token)` says
    whether an id leaves nothing that could follow it but an end; `forced()` gives the ids that are to come next without a
    choice, which `fill` would allow one after the other, and `behind(ids)` a copy of the grammar that has taken them."""

    def fill(self, bits: torch.Tensor) -> None:
        """Write into int32 (ceil(vocab_size / 32),) on the CPU: bit i % 32 of word i // 32 is set if id i may come next."""

    def accept(self, token: int) -> None:
        """Take the id that came next."""


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be answered.

    max_new: how many ids may follow. seed: of draws of its own. ends: ids that end it. logprobs, alternatives: report each
    id's log-probability, and this number of best ids, at each place. score_prompt: report those of the prompt's ids.
    draft: verify several ids, which the text itself suggests, in one pass; None: where that changes no id; False: no guesses
    of a draft model either. grammar: a `Grammar`; or data, of which the scheduler makes a new one for each row, wherever that
    runs. least_shared: start behind a prefix that the cache holds if it has at least this number of ids.
    """

    prompt: list[int]
    max_new: int
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0))
    seed: Optional[int] = None
    ends: frozenset[int] = frozenset()
    logprobs: bool = False
    alternatives: int = 0
    score_prompt: bool = False
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


@dataclass(slots=True)
class Step:
    """What one step decided for the prompt `index`. The last step of each prompt has a finish_reason.

    token is None if the row ends without one: at EOS or another id that is the `end`, which has the log-probability then, or
    when there was nothing to generate. prompt_logprobs come
    with a prompt's first step, if asked for: one for each of its ids, 0.0 for the first; so do prompt_alternatives, of which
    the first id has none.
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
        raise ValueError(f"prompt_tokens must be a list of lists of ids, not {type(prompt_tokens).__name__}")
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
                    f"prompt {row} has the id {token}, which is outside the vocabulary; ids go from 0 to {args.vocab_size - 1}"
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
        wrong = prompt if given is None else next(token for token in given if whole(token) is None)
        raise ValueError(f"prompt_tokens must be lists of ids, and {shortened(wrong)} is none")
    return ids
