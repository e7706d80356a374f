"""Many prompts over the slots of the cache: who runs, what is chosen, where a row ends. Ids only.

Row i of the rows that run owns slot i. A row that ends gives its slot to the next prompt that waits; when none does, the
last row moves into it, so that the rows that run always own the first slots and the cache is read in place.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Literal, Optional

import torch

from ..model import ModelArgs
from ..runtime import device_kind, to_device
from ..system.checks import whole
from ..system.printable import shortened
from .drafting import Drafter
from .engine import Engine, token_logprobs
from .sampling import Sampling, exponential_noise, next_token

# A pass over several tokens may pick the best id only if it leads the second by this many standard deviations of the logits.
# Such passes round differently from single steps: by up to 4e-6 in float32, 0.06 in bfloat16 and 0.004 in float16 (random and
# trained weights, 5 to 12 layers).
CLEAR = {torch.float32: 3e-5, torch.bfloat16: 0.08, torch.float16: 0.01}

FinishReason = Literal["stop", "length", "context"]


@dataclass
class Request:
    """A prompt, how many ids may follow it, and the seed of its own draws, if it has one."""

    prompt: list[int]
    max_new: int
    seed: Optional[int] = None


@dataclass
class Step:
    """What one step decided for the prompt `index`. The last step of each prompt has a finish_reason.

    token is None where the row ends without one: at EOS, or when there was nothing to generate. prompt_logprobs come
    with a prompt's first step, if asked for: one for each of its ids, 0.0 for the first.
    """

    index: int
    token: Optional[int] = None
    logprob: float = 0.0
    alternatives: list[tuple[int, float]] = field(default_factory=list)
    finish_reason: Optional[FinishReason] = None
    prompt_logprobs: Optional[list[float]] = None


@dataclass(eq=False)
class _Row:
    index: int
    request: Request
    lane: int  # the row of the noise that it draws with
    generator: Optional[torch.Generator] = None
    new: list[int] = field(default_factory=list)
    fresh: bool = True  # not yet prefilled
    prompt_logprobs: Optional[list[float]] = None
    drafter: Drafter = field(default_factory=Drafter)
    rounded: Optional[int] = None  # first cache column written by a pass over several tokens, which rounds differently

    @property
    def ids(self) -> list[int]:
        return self.request.prompt + self.new

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.new)


@dataclass
class _Decision:
    """What a step chose for one row, on the host."""

    token: int  # -1: the logits were not finite
    logprob: float = 0.0
    alternatives: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class _Ahead:
    """A step that was queued before it was known which rows go on, and what it takes to undo that."""

    logits: torch.Tensor
    chosen: torch.Tensor
    rows: list[_Row]  # the step was run for these
    states: list[tuple[torch.Generator, torch.Tensor]]  # what the generators were before the step drew
    seen: Optional[torch.Tensor]


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
    if given is None:
        raise ValueError(f"prompt_tokens must be lists of ids, and {shortened(prompt)} is none")
    if set(map(type, given)) <= {int}:
        return given
    ids = [number for token in given if (number := whole(token)) is not None]
    if len(ids) < len(given):
        wrong = next(token for token in given if whole(token) is None)
        raise ValueError(f"prompt_tokens must be lists of ids, and {shortened(wrong)} is none")
    return ids


class Batch:
    """Runs requests to their ends; iterate over it for the steps, in the order in which they are decided.

    eos: ids that end a row. alternatives: how many of the best ids to report at each place. score_prompts: report the
    prompts' own log-probabilities. reuse: go on from what slot 0 holds of a lone prompt. draft: verify ids that the text
    itself suggests, several in a pass; None: where that changes no id. generator: to draw with, the device's own if not
    given.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        sampling: Sampling,
        eos: frozenset[int],
        *,
        logprobs: bool = False,
        alternatives: int = 0,
        score_prompts: bool = False,
        reuse: bool = False,
        draft: Optional[bool] = None,
        generator: Optional[torch.Generator] = None,
        draw: Optional[Callable[[torch.Tensor, float], torch.Tensor]] = None,
        plainly: Optional[Callable[[Batch], Iterator[list[Step]]]] = None,
        changed: bool = False,
    ) -> None:
        params = engine.model.params
        self.engine, self.requests, self.sampling, self.eos = engine, requests, sampling, eos
        self.scored, self.alternatives, self.score_prompts = logprobs, alternatives, score_prompts
        self.reuse, self.reused = reuse, 0
        self.generator, self.draw, self.plainly, self.changed = generator, draw, plainly, changed
        self.limit, self.vocab_size = params.max_seq_len, params.vocab_size
        self.lanes = min(len(requests), params.max_batch_size)
        self.bias = sampling.bias(self.vocab_size, engine.device)
        self.seen = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(self.lanes, self.vocab_size, dtype=torch.bool, device=engine.device)
        if draft is None:
            draft = engine.dtype == torch.float32 and device_kind(engine.device) == "cpu"
        self.draft = draft and sampling.temperature == 0 and self.seen is None
        self.rows: list[_Row] = []
        self._chosen = torch.empty(0, dtype=torch.long, device=engine.device)  # each row's newest id
        self._ahead: Optional[_Ahead] = None
        self._aside: Optional[list[torch.Tensor]] = None  # the slots of these rows, while others use the cache
        self._lanes_of: tuple[list[_Row], Optional[torch.Tensor]] = [], None
        self.cancelled: set[int] = set()  # the prompts that have ended
        self.before_step: Callable[[], None] = lambda: None

    def cancel(self, index: int) -> None:
        """End a prompt before its time; no more steps of it come."""
        self.cancelled.add(index)

    def __iter__(self) -> Iterator[Step]:
        decided = self._decided()
        try:
            while True:
                with self.engine.turn():  # not while the caller has a step: others may use the model then
                    steps = next(decided, None)
                if steps is None:
                    return
                yield from steps
        finally:
            self._leave()

    @torch.inference_mode()
    def _decided(self) -> Iterator[list[Step]]:
        """What the rows decide together, time after time."""
        if self.reuse and len(self.requests) == 1:
            self.reused = self.engine.remembered(self.requests[0].prompt)
        self.engine.take(self, self.reuse)
        self.changed = self.changed or not self.engine.as_built
        if self.changed and self.plainly is None:
            raise ValueError("this model has hooks, patches or parts of somebody's own, which run in calls of Llama only")
        for steps in self.plainly(self) if self.changed and self.plainly is not None else self._run():
            if len(self.requests) == 1 and not self.changed:
                # Its newest id is not in the cache until it was run.
                self.engine.remember(self.rows[0].ids[:-1] if self.rows[0].new else self.rows[0].ids)
            yield steps
            self._come_back()

    def give_way(self) -> None:
        """Another call is about to use the cache: undo what was queued ahead, and keep what the rows need to go on."""
        self._take_back()
        self._aside = self.engine.set_aside(self.lanes) if self.rows and self.engine.owned_by(self) else None

    def _come_back(self) -> None:
        """Put into the cache what stood there before others used it. RuntimeError where that is not known."""
        if self.engine.owned_by(self):
            return
        aside, self._aside = self._aside, None
        if aside is not None:
            self.engine.take(self, self.reuse)
        if aside is None or self.changed or not self.engine.as_built:
            raise RuntimeError(
                "another call has used the model since, and this stream cannot go on: the model itself was called, or has "
                "parts, hooks or patches of somebody's own; finish a stream, or leave it, before the next call"
            )
        self.engine.put_back(aside)

    def _leave(self) -> None:
        """Undo what was queued ahead. Without a wait: the garbage collector may end a stream, in any thread; who has the
        lock meanwhile has asked this batch to give way, or is about to draw from generators that others draw from too."""
        if self.engine.lock.acquire(blocking=False):
            try:
                self._take_back()
            finally:
                self.engine.lock.release()
        self.rows, self._aside = [], None

    def _run(self) -> Iterator[list[Step]]:
        waiting = deque(enumerate(self.requests))
        while waiting and len(self.rows) < self.lanes:
            self.rows.append(self.admit(*waiting.popleft(), lane=len(self.rows)))
        while self.rows:
            for decisions in self._decide():
                yield self.report(decisions)
            ended = [i for i, row in enumerate(self.rows) if row.index in self.cancelled]
            if ended:
                self._take_back()
            keep = self._chosen.clone() if ended else self._chosen
            for i in reversed(ended):
                if waiting:
                    self.rows[i] = self.admit(*waiting.popleft(), lane=self.rows[i].lane)
                    continue
                last = self.rows.pop()
                if i < len(self.rows):
                    if not last.fresh:
                        self.engine.move(len(self.rows), i, last.length)
                    self.rows[i] = last
                    keep[i] = keep[len(self.rows)]
            self._chosen = keep[: len(self.rows)]

    def _look_ahead(self) -> None:
        """Queue the next step before the host knows this one's ids: the device need not wait for it. If a row
        turns out to have ended, the step leaves only columns that are overwritten before any query reads them."""
        rooms = (min(self.limit - row.length, row.request.max_new - len(row.new)) for row in self.rows)
        if all(room > 1 for room in rooms):
            generators = [self._generator, *(row.generator for row in self.rows if row.generator is not None)]
            states = [(generator, generator.get_state()) for generator in generators] if self.sampling.temperature > 0 else []
            seen = None if self.seen is None else self.seen.clone()
            self._ahead = _Ahead(*self._advance(self._chosen, known=False), list(self.rows), states, seen)

    def _take_back(self) -> None:
        """Undo a step that was queued but is not used: what it drew is drawn again."""
        for generator, state in self._ahead.states if self._ahead else []:
            generator.set_state(state)
        if self._ahead is not None:
            self.seen = self._ahead.seen
        self._ahead = None

    @property
    def _generator(self) -> torch.Generator:
        """The one that rows without a seed draw with."""
        if self.generator is not None:
            return self.generator
        device = self.engine.device
        return torch.default_generator if device_kind(device) == "cpu" else torch.cuda.default_generators[device.index or 0]

    def _decide(self) -> Iterator[list[_Decision]]:
        """One step's decision for each row, or those of several steps in turn where drafts of a lone row hold."""
        self.before_step()
        row = self.rows[0]
        if self._ahead is not None and self._ahead.rows == self.rows:
            ahead, self._ahead = self._ahead, None
            yield self._read(ahead.logits, ahead.chosen)
            return
        self._take_back()
        if self.draft and len(self.rows) == 1 and not row.fresh:
            yield from self._decide_with_drafts(row)
            return
        yield self._read(*self._advance(self._chosen))

    def _decide_with_drafts(self, row: _Row) -> Iterator[list[_Decision]]:
        row.drafter.read(row.ids[len(row.drafter.ids) :])
        drafts = row.drafter.draft(min(row.request.max_new - len(row.new), self.limit - row.length) - 1)
        if not drafts:
            logits, self._chosen = self._advance(self._chosen)
            unsure = None if row.rounded is None else self._is_clear(logits).logical_not()
            decisions, again = self._read_with(logits, self._chosen, unsure)
            yield self._read(*self._single_steps(row)) if any(again) else decisions
            return
        start = row.length
        if row.rounded is None:
            row.rounded = start - 1
        logits = self.engine.verify([row.ids[-1], *drafts], start - 1)
        ids = next_token(logits, self.sampling, bias=self.bias)
        decisions, clear = self._read_with(logits, ids, self._is_clear(logits))
        # The last place decides an id that no draft foresaw.
        for place, draft in enumerate([*drafts, None]):
            if not clear[place]:
                yield self._read(*self._single_steps(row))
                break
            self._chosen = ids[place : place + 1]
            yield [decisions[place]]
            if row.index in self.cancelled or row.new[-1] != draft:
                break
        agreed = zip(row.ids[start:], drafts)
        row.drafter.judge(len(drafts), sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], agreed)))

    def _is_clear(self, logits: torch.Tensor) -> torch.Tensor:
        """Whether rounding cannot change which is the best: (N, V) -> bool (N,)."""
        best, second = (logits if self.bias is None else logits + self.bias).topk(2).values.unbind(-1)
        return best - second > CLEAR[self.engine.dtype] * logits.std(-1)

    def _single_steps(self, row: _Row) -> tuple[torch.Tensor, torch.Tensor]:
        """The newest token's step as it is without drafts. In float32 what was run with drafts is run again before it."""
        first = row.length - 1
        if self.engine.dtype == torch.float32 and row.rounded is not None:
            first, row.rounded = row.rounded, None
        ids = to_device(row.ids[first:], self.engine.device)
        for at in range(len(ids)):
            logits = self.engine.decode(ids[at : at + 1], [first + at])
        return logits, next_token(logits, self.sampling, bias=self.bias)

    def admit(self, index: int, request: Request, lane: int) -> _Row:
        row = _Row(index, request, lane)
        if request.seed is not None:
            row.generator = torch.Generator(self.engine.device).manual_seed(request.seed)
        if self.seen is not None:
            self.seen[lane] = False
            self.seen[lane].index_fill_(0, to_device(request.prompt, self.engine.device), True)
        return row

    @property
    def _lanes(self) -> Optional[torch.Tensor]:
        """The rows' lanes, int64 (rows,); None where they are all lanes in order."""
        rows, lanes = self._lanes_of
        if rows != self.rows:
            order = [row.lane for row in self.rows]
            lanes = None if order == list(range(self.lanes)) else to_device(order, self.engine.device)
            self._lanes_of = list(self.rows), lanes
        return lanes

    def _advance(self, chosen: torch.Tensor, known: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the rows' newest tokens, whole prompts for those that have just come. -> float32 logits (rows, V), ids (rows,)

        known: whether the rows have the chosen tokens already, or they are only on the device.
        """
        lanes = self._lanes
        noise = self._noise(lanes) if self.sampling.temperature > 0 else None
        seen = self.seen if self.seen is None or lanes is None else self.seen[lanes]
        new = [i for i, row in enumerate(self.rows) if row.fresh]
        logits = torch.empty(0)
        if len(new) < len(self.rows):
            # The newest token stands at a row's last position. Rows that join now take part with a token at position 0;
            # their prompts overwrite it, and the others run as always.
            positions = [0 if row.fresh else row.length - known for row in self.rows]
            logits = self.engine.decode(chosen.clamp(min=0), positions)
        if new:
            first = self._prefill(new)
            whole = len(new) == len(self.rows)
            logits = first if whole else logits.index_copy(0, to_device(new, logits.device), first)
        chosen = self._next(logits, noise, seen)
        self.mark_seen(chosen.clamp(min=0))
        return logits, chosen

    def _next(
        self, logits: torch.Tensor, noise: Optional[torch.Tensor] = None, seen: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """(N, V) -> ids (N,), by `draw` if there is one: -1 if a row's logits are not finite."""
        if self.draw is None or self.sampling.temperature == 0:
            return next_token(logits, self.sampling, noise, seen, self.bias)
        probs = torch.softmax(logits / self.sampling.temperature, dim=-1)
        return self.draw(probs, self.sampling.top_p).reshape(-1).where(logits.sum(dim=-1).isfinite(), -1)

    def mark_seen(self, ids: torch.Tensor) -> None:
        """Ids (rows,), one for each row, that a repetition penalty counts from now on."""
        if self.seen is not None:
            lanes = self._lanes
            flat = ids + self.vocab_size * (self._all_lanes[: len(self.rows)] if lanes is None else lanes)
            self.seen.view(-1).index_fill_(0, flat, True)

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The next id of each of the rows, (rows, V) -> (rows,)."""
        noise = self._noise(self._lanes)[: len(self.rows)] if self.sampling.temperature > 0 else None
        return self._next(logits, noise, None if self.seen is None else self.seen[: len(self.rows)])

    def decisions(self, logits: torch.Tensor, chosen: torch.Tensor) -> list[_Decision]:
        return self._read_with(logits, chosen)[0]

    @property
    def _all_lanes(self) -> torch.Tensor:
        return torch.arange(self.lanes, device=self.engine.device)

    def _prefill(self, new: list[int]) -> torch.Tensor:
        """Read the prompts of rows that join. -> float32 logits (new, V) behind their last tokens"""
        model, device = self.engine.model, self.engine.device
        prompts = [self.rows[i].request.prompt for i in new]
        last = torch.empty(len(new), model.params.dim, dtype=model.norm.weight.dtype, device=device)
        ids = [to_device(prompt, device) for prompt in prompts] if self.score_prompts else []
        parts: list[list[torch.Tensor]] = [[] for _ in new]
        for rows, hidden, at in self.engine.prefill(prompts, new, self.reused):
            for states, row in zip(hidden, rows):
                if self.score_prompts:
                    targets = ids[row][at + 1 : at + 1 + len(states)]
                    parts[row].append(self.engine.logprobs(states[: len(targets)], targets))
                if at < len(prompts[row]) <= at + len(states):
                    last[row] = states[len(prompts[row]) - 1 - at]
        scores = self.engine.fetch([torch.cat(row) for row in parts]) if self.score_prompts else []
        for i, row_scores in itertools.zip_longest(new, scores):
            if row_scores is not None and any(map(math.isnan, row_scores)):
                raise self.engine.not_finite(self.rows[i].index)
            self.rows[i].fresh = False
            self.rows[i].prompt_logprobs = None if row_scores is None else [0.0, *row_scores]
        return self.engine.logits(last)

    def _noise(self, lanes: Optional[torch.Tensor]) -> torch.Tensor:
        """(rows, V). As in Meta's release, rows without a seed take their noise from one draw for all lanes, finished ones
        included: the draws of a row must not depend on which others have ended."""
        device = self.engine.device
        if all(row.generator is not None for row in self.rows):
            noise = torch.empty(len(self.rows), self.vocab_size, dtype=torch.float32, device=device)
        else:
            noise = exponential_noise(self.lanes, self.vocab_size, device, self.generator)
            noise = noise if lanes is None else noise[lanes]
        for i, row in enumerate(self.rows):
            if row.generator is not None:
                noise[i] = exponential_noise(1, self.vocab_size, device, row.generator)[0]
        return noise

    def _read(self, logits: torch.Tensor, chosen: torch.Tensor) -> list[_Decision]:
        """A step's ids on the host. Meanwhile the device goes on with the next step, where it can."""
        self._chosen = chosen
        ahead = self.engine.looks_ahead and not self.draft
        decisions, _ = self._read_with(logits, chosen, meanwhile=self._look_ahead if ahead else None)
        return decisions

    def _read_with(
        self,
        logits: torch.Tensor,
        chosen: torch.Tensor,
        more: Optional[torch.Tensor] = None,
        meanwhile: Optional[Callable[[], None]] = None,
    ) -> tuple[list[_Decision], list[bool]]:
        """With the log-probabilities that were asked for, and whatever else (`more`), in one wait."""
        wanted = [chosen]
        if self.scored:
            wanted.append(token_logprobs(logits, chosen.clamp(min=0)))
        if self.alternatives:
            top = torch.log_softmax(logits, dim=-1).topk(min(self.alternatives, self.vocab_size), dim=-1)
            wanted += [top.indices, top.values]
        if more is not None:
            wanted.append(more)
        tokens, *others = self.engine.fetch(wanted, meanwhile)
        decisions = [_Decision(token) for token in tokens]
        if self.scored:
            for decision, logprob in zip(decisions, others.pop(0)):
                decision.logprob = logprob
        if self.alternatives:
            for decision, ids, values in zip(decisions, others.pop(0), others.pop(0)):
                decision.alternatives = list(zip(ids, values))
        return decisions, others.pop(0) if more is not None else []

    def report(self, decisions: list[_Decision]) -> list[Step]:
        steps = []
        for row, decision in zip(list(self.rows), decisions):
            token = decision.token
            step = Step(row.index, prompt_logprobs=row.prompt_logprobs)
            row.prompt_logprobs = None
            room = self.limit - row.length
            if min(room, row.request.max_new) <= 0:  # nothing was to be generated
                step.finish_reason = "length" if row.request.max_new <= 0 else "context"
            elif token < 0:
                raise self.engine.not_finite(row.index)
            elif token in self.eos:
                step.finish_reason = "stop"
            else:
                row.new.append(token)
                step.token, step.logprob, step.alternatives = token, decision.logprob, decision.alternatives
                if len(row.new) == row.request.max_new:
                    step.finish_reason = "length"
                elif row.length == self.limit:
                    step.finish_reason = "context"
            if step.finish_reason:
                self.cancelled.add(row.index)
            if step.finish_reason or row.index not in self.cancelled:
                steps.append(step)
        return steps
