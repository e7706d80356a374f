"""Requests that run: what is known of each, and when it ends."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import torch

from .calls import Call, Source
from .drafting import Drafter
from .requests import FinishReason, Grammar, Step
from .sampling import exponential_noise


class Noise:
    """What a row draws its ids from, by their numbers: the same whenever, and by whomever, it is asked for.

    A draft model that draws with the noise that its model will draw with guesses right whenever the two distributions
    lead to the same id, and no guess can change what the model draws: "drafter-invariant" speculative sampling
    (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192; Daliri et al. 2024, https://arxiv.org/abs/2408.07978).
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed, self._device, self._generator = seed, device, torch.Generator(device)
        self._kept: dict[int, torch.Tensor] = {}  # noise of guesses, until they are judged

    def of(self, number: int, vocab_size: int) -> torch.Tensor:
        """The noise for the `number`-th id after the prompt, float32 (V,)."""
        if number not in self._kept:
            key = hashlib.blake2b(f"{self._seed} {number}".encode(), digest_size=8).digest()
            self._generator.manual_seed(int.from_bytes(key, "big") >> 1)
            self._kept[number] = exponential_noise(1, vocab_size, self._device, self._generator)[0]
        return self._kept[number]

    def forget(self, before: int) -> None:
        """Drop the noise for ids with lower numbers, which are decided."""
        for number in [number for number in self._kept if number < before]:
            del self._kept[number]


NOT_FINITE, NONE_ALLOWED = -1, -2  # stand in place of an id: the logits were not finite, the row's grammar allows no id


@dataclass(slots=True)
class Decision:
    """What a step chose for one row, on the host."""

    token: int
    logprob: float = 0.0
    alternatives: list[tuple[int, float]] = field(default_factory=list)


class Row:
    """A request that runs. Its state lies here, and not in a slot, since rows move between slots."""

    def __init__(self, call: Call, index: int, limit: int, *, lane: int = 0, number: int = 0) -> None:
        """Of the call's request `index`, in a cache of `limit` columns. lane: its row of the source's noise. number:
        counts the rows as they come."""
        self.call, self.index, self.lane, self.number = call, index, lane, number
        self.request, self.source = call.requests[index], call.source
        self.ids = list(self.request.prompt)  # the generated ones follow
        self.prompt_length = len(self.ids)
        wanted = self.prompt_length + self.request.max_new
        self.end = min(limit, wanted)  # most ids that the row may have
        self.ends_by: FinishReason = "length" if wanted <= limit else "context"  # the finish reason there
        self.finished = False
        self.proven = False  # whether logits behind its ids were finite, so that its columns may be shared
        # Its place in the cache:
        self.reading = True  # not all of its ids have been read
        self.read = 0  # while reading: ids whose keys and values are in the cache
        self.behind: Optional[Row] = None  # once this row has read the first `cached` ids, they are copied from it
        self.cached = 0  # ids of the prompt that are not read, since a slot held them
        self.apart = False  # its columns are turned by its prompt's own length, so it shares none with others
        self.last: Optional[torch.Tensor] = None  # hidden state (dim,) behind all ids, until an id is chosen by it
        # Scores of the prompt's pieces, on the device: see `Engine.scores`.
        self.scores: list[tuple[torch.Tensor, ...]] = []
        self.prompt_logprobs: Optional[list[float]] = None
        self.prompt_alternatives: list[list[tuple[int, float]]] = []
        # What its options need:
        self.generator: Optional[torch.Generator] = None  # its own, if it has a seed
        self.noise: Optional[Noise] = None  # its draws can be guessed, if they come from this
        self.in_prompt: Optional[torch.Tensor] = None  # bool (V,)
        self.counts: Optional[torch.Tensor] = None  # how often each id was generated, float32 (V,)
        self.grammar: Optional[Grammar] = None
        self.drafter = Drafter()
        # In a copy that stands for this row after some ids:
        self.ahead = 0  # their number
        self.forced: Optional[int] = None  # the id that comes there without a choice
        self.agreement: Optional[float] = None  # the share of a draft model's guesses that were right
        # The first cache column that a pass over several tokens has written: such passes round differently.
        self.rounded: Optional[int] = None

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is to run any more."""
        return self.finished or self.call.is_over or self.index in self.call.over

    @property
    def generated(self) -> int:
        """How many ids follow the prompt."""
        return len(self.ids) - self.prompt_length

    @property
    def columns(self) -> int:
        """How many of its ids have their keys and values in the cache. The newest has not, until it was run."""
        if self.reading:
            return self.read
        return len(self.ids) - 1 if self.last is None else len(self.ids)

    @property
    def draws_with(self) -> Union[Row, Source]:
        """The source or the row whose noise it takes."""
        return self.source if self.generator is None else self

    @property
    def room(self) -> int:
        """How many ids may still follow."""
        return self.end - len(self.ids)

    def take_scores(self, values: list[float], *best: list[list[Any]]) -> bool:
        """Keep what `Engine.scores` told of the ids to score, for the next step. -> whether all are numbers"""
        most, first = self.request.alternatives, self.request.scored_from == 0  # nothing tells the prompt's first id
        self.scores, self.prompt_logprobs = [], [*[0.0] * first, *values]
        told = [list(zip(ids, theirs))[:most] for ids, theirs in zip(*best)]
        self.prompt_alternatives = [*[[]] * first, *told] if best else []
        return not any(map(math.isnan, values))

    def step(self, decision: Decision) -> Step:
        """What a decision means; `accept` makes it so."""
        room, scores = self.end - len(self.ids), (self.prompt_logprobs, self.prompt_alternatives)
        if room <= 0:
            return Step(self.index, None, 0.0, [], self.ends_by, *scores)
        if decision.token in self.request.ends:
            return Step(self.index, None, decision.logprob, decision.alternatives, "stop", *scores, end=decision.token)
        reason = "stop" if self._nothing_follows(decision.token) else self.ends_by if room == 1 else None
        return Step(self.index, decision.token, decision.logprob, decision.alternatives, reason, *scores)

    def _nothing_follows(self, token: int) -> bool:
        """Whether the row's grammar knows that an answer is whole with this id, and cannot go on: it needs no step for
        EOS."""
        ends_with = getattr(self.grammar, "ends_with", None)
        return ends_with is not None and ends_with(token)

    def accept(self, step: Step) -> None:
        """Make the step's id the newest of the row."""
        self.prompt_logprobs, self.prompt_alternatives, self.last = None, [], None
        self.finished = step.finish_reason is not None
        if step.token is not None:
            self.ids.append(step.token)
            if self.noise is not None:
                self.noise.forget(before=self.generated)
            if self.grammar is not None:
                self.grammar.accept(step.token)
