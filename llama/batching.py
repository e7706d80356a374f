"""Many prompts over the slots of the cache: who runs, what is chosen, where a row ends. Ids only.

Row i of the rows that run owns slot i. A row that ends gives its slot to the next prompt that waits; when none does, the
last row moves into it, so that the rows that run always own the first slots and the cache is read in place.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Optional

import torch

from .drafting import Drafter
from .engine import Engine, token_logprobs
from .model import ModelArgs
from .runtime import device_kind
from .sampling import Sampling, exponential_noise, next_token

# How far apart the two best logits must be, in units of their spread, for a pass over several tokens to decide between them.
# Such passes round otherwise than single steps: by up to 4e-6 in float32, 0.06 in bfloat16 and 0.004 in float16 (random and
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
    rounded: Optional[int] = None  # from here on columns come from passes that round otherwise than single steps

    @property
    def ids(self) -> list[int]:
        return self.request.prompt + self.new

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.new)


@dataclass
class _Ahead:
    """A step that was queued before it was known which rows go on."""

    logits: torch.Tensor
    chosen: torch.Tensor
    rows: list[_Row]  # that it was run for
    states: list[tuple[torch.Generator, torch.Tensor]]  # of the generators, before it drew


def check_prompts(prompt_tokens: Sequence[Sequence[int]], args: ModelArgs) -> list[list[int]]:
    """Prompts of ids as lists. ValueError for one that is empty, too long for the cache, or has an unknown id."""
    if not isinstance(prompt_tokens, Sequence):
        raise ValueError(f"prompt_tokens must be a list of lists of ids, not {type(prompt_tokens).__name__}")
    try:
        prompts = [[operator.index(token) for token in prompt] for prompt in prompt_tokens]
    except TypeError as error:
        raise ValueError(f"prompt_tokens must be lists of ids: {error}") from error
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
    ) -> None:
        params = engine.model.params
        self.engine, self.requests, self.sampling, self.eos = engine, requests, sampling, eos
        self.scored, self.alternatives, self.score_prompts = logprobs, alternatives, score_prompts
        self.reused = engine.remembered(requests[0].prompt) if reuse and len(requests) == 1 else 0
        self.generator = generator
        self.limit, self.vocab_size = params.max_seq_len, params.vocab_size
        self.lanes = min(len(requests), params.max_batch_size)
        self.bias = sampling.bias(self.vocab_size, engine.device)
        self.seen = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(self.lanes, self.vocab_size, dtype=torch.bool, device=engine.device)
        if draft is None:
            draft = engine.model.norm.weight.dtype == torch.float32 and device_kind(engine.device) == "cpu"
        self.draft = draft and sampling.temperature == 0 and self.seen is None
        self.rows: list[_Row] = []
        self._ahead: Optional[_Ahead] = None
        self._cancelled: set[int] = set()

    def cancel(self, index: int) -> None:
        """End a prompt before its time; no more steps of it come."""
        self._cancelled.add(index)

    @torch.inference_mode()
    def __iter__(self) -> Iterator[Step]:
        self.engine.take(self)
        try:
            for step in self._run():
                if len(self.requests) == 1:
                    # Its newest id is not in the cache until it was run.
                    self.engine.remember(self.rows[0].ids[:-1] if self.rows[0].new else self.rows[0].ids)
                yield step
        finally:
            self._take_back()

    def _run(self) -> Iterator[Step]:
        waiting = deque(enumerate(self.requests))
        while waiting and len(self.rows) < self.lanes:
            self.rows.append(self._admit(*waiting.popleft(), lane=len(self.rows)))
        chosen = torch.empty(0, dtype=torch.long, device=self.engine.device)
        while self.rows:
            for logits, chosen in self._steps(chosen):  # noqa: B020, each step chooses what the next one runs
                yield from self._report(logits, chosen)
            ended = [i for i, row in enumerate(self.rows) if row.index in self._cancelled]
            keep = chosen.clone()
            for i in reversed(ended):
                if waiting:
                    self.rows[i] = self._admit(*waiting.popleft(), lane=self.rows[i].lane)
                    continue
                last = self.rows.pop()
                if i < len(self.rows):
                    if not last.fresh:
                        self.engine.move(len(self.rows), i, last.length)
                    self.rows[i] = last
                    keep[i] = keep[len(self.rows)]
            chosen = keep[: len(self.rows)]

    def _look_ahead(self, chosen: torch.Tensor) -> None:
        """Queue the next step before the host knows this one's ids: the device need not wait for it. Of rows that turn out
        to have ended, nothing remains of it but columns that are overwritten before they are looked at."""
        rooms = (min(self.limit - row.length, row.request.max_new - len(row.new)) for row in self.rows)
        if self.seen is None and all(room > 1 for room in rooms):
            generators = [self._generator, *(row.generator for row in self.rows if row.generator is not None)]
            states = [(generator, generator.get_state()) for generator in generators] if self.sampling.temperature > 0 else []
            self._ahead = _Ahead(*self._advance(chosen, known=False), list(self.rows), states)

    def _take_back(self) -> None:
        """Undo a step that was queued in vain: what it drew is to be drawn again."""
        for generator, state in self._ahead.states if self._ahead else []:
            generator.set_state(state)
        self._ahead = None

    @property
    def _generator(self) -> torch.Generator:
        """The one that rows without a seed draw with."""
        if self.generator is not None:
            return self.generator
        device = self.engine.device
        return torch.default_generator if device_kind(device) == "cpu" else torch.cuda.default_generators[device.index or 0]

    def _check_owned(self) -> None:
        if not self.engine.owned_by(self):
            raise RuntimeError("another call has used the model since; finish a stream, or leave it, before the next call")

    def _steps(self, chosen: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Logits (rows, V) and ids (rows,) of one step, or of several in turn where drafts of a lone row hold."""
        self._check_owned()
        row = self.rows[0]
        if self._ahead is not None and self._ahead.rows == self.rows:
            ahead, self._ahead = self._ahead, None
            yield ahead.logits, ahead.chosen
            return
        self._take_back()
        if not self.draft or len(self.rows) > 1 or row.fresh:
            yield self._advance(chosen)
            return
        row.drafter.read(row.ids[len(row.drafter.ids) :])
        drafts = row.drafter.draft(min(row.request.max_new - len(row.new), self.limit - row.length) - 1)
        if not drafts:
            logits, chosen = self._advance(chosen)
            if row.rounded is not None and not self._is_clear(logits):
                logits, chosen = self._single_steps(row)
            yield logits, chosen
            return
        start = row.length
        if row.rounded is None:
            row.rounded = start - 1
        # The last place decides an id that no draft foresaw.
        for logits, draft in zip(self.engine.verify([row.ids[-1], *drafts], start - 1).split(1), [*drafts, None]):
            if not self._is_clear(logits):
                yield self._single_steps(row)
                break
            yield logits, next_token(logits, self.sampling, bias=self.bias)
            self._check_owned()
            if row.index in self._cancelled or row.new[-1] != draft:
                break
        agreed = zip(row.ids[start:], drafts)
        row.drafter.judge(len(drafts), sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], agreed)))

    def _is_clear(self, logits: torch.Tensor) -> bool:
        """Whether rounding cannot change which is the best of (1, V)."""
        best, second = (logits if self.bias is None else logits + self.bias).topk(2).values[0].tolist()
        return best - second > CLEAR[self.engine.model.norm.weight.dtype] * logits.std().item()

    def _single_steps(self, row: _Row) -> tuple[torch.Tensor, torch.Tensor]:
        """The newest token's step as it is without drafts. In float32 what was run with drafts is run again before it."""
        first = row.length - 1
        if self.engine.model.norm.weight.dtype == torch.float32 and row.rounded is not None:
            first, row.rounded = row.rounded, None
        for position in range(first, row.length):
            logits = self.engine.decode(torch.tensor([row.ids[position]], device=self.engine.device), [position], [0])
        return logits, next_token(logits, self.sampling, bias=self.bias)

    def _admit(self, index: int, request: Request, lane: int) -> _Row:
        row = _Row(index, request, lane)
        if request.seed is not None:
            row.generator = torch.Generator(self.engine.device).manual_seed(request.seed)
        if self.seen is not None:
            self.seen[lane] = False
            self.seen[lane, torch.tensor(request.prompt, device=self.engine.device)] = True
        return row

    def _advance(self, chosen: torch.Tensor, known: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the rows' newest tokens, whole prompts for those that have just come. -> float32 logits (rows, V), ids (rows,)

        known: whether the rows have the chosen tokens already, or they are only on the device.
        """
        lanes = torch.tensor([row.lane for row in self.rows], device=self.engine.device)
        noise = self._noise(lanes) if self.sampling.temperature > 0 else None
        seen = None if self.seen is None else self.seen[lanes]
        if any(row.fresh for row in self.rows):
            logits = self._join(chosen)
            chosen = next_token(logits, self.sampling, noise, seen, self.bias)
        else:
            # The newest token stands at a row's last position.
            positions = [row.length - known for row in self.rows]
            logits, chosen = self.engine.decode_and_choose(
                chosen.clamp(min=0), positions, self.sampling, noise, seen, self.bias
            )
        if self.seen is not None:
            self.seen[lanes, chosen.clamp(min=0)] = True
        return logits, chosen

    def _join(self, chosen: torch.Tensor) -> torch.Tensor:
        """A step in which prompts join the rows that run. -> float32 logits (rows, V)"""
        logits = torch.empty(len(self.rows), self.vocab_size, device=self.engine.device)
        new = [i for i, row in enumerate(self.rows) if row.fresh]
        old = [i for i, row in enumerate(self.rows) if not row.fresh]
        if new:
            logits[new] = self._prefill(new)
        if old:
            positions = [self.rows[i].length - 1 for i in old]
            logits[old] = self.engine.decode(chosen[old].clamp(min=0), positions, old)
        return logits

    def _prefill(self, new: list[int]) -> torch.Tensor:
        prompts = [self.rows[i].request.prompt for i in new]
        last = torch.empty(
            len(new), self.engine.model.params.dim, dtype=self.engine.model.norm.weight.dtype, device=self.engine.device
        )
        scores: list[list[float]] = [[0.0] for _ in new]
        for rows, hidden, at in self.engine.prefill(prompts, new, self.reused):
            for states, row in zip(hidden, rows):
                prompt = prompts[row]
                if self.score_prompts:
                    targets = torch.tensor(prompt[at + 1 : at + 1 + len(states)], device=self.engine.device)
                    scores[row] += self.engine.logprobs(states[: len(targets)], targets).tolist()
                if at < len(prompt) <= at + len(states):
                    last[row] = states[len(prompt) - 1 - at]
        for i, row_scores in zip(new, scores):
            if any(map(math.isnan, row_scores)):
                raise self._not_finite(self.rows[i].index)
            self.rows[i].fresh = False
            self.rows[i].prompt_logprobs = row_scores if self.score_prompts else None
        return self.engine.logits(last)

    def _not_finite(self, prompt: int) -> ValueError:
        dtype = self.engine.model.norm.weight.dtype
        way = "check the weights" if dtype == torch.float32 else "build it with dtype='float32' (or 'bfloat16')"
        return ValueError(f"the model's logits for prompt {prompt} are not finite in {dtype}; {way}")

    def _noise(self, lanes: torch.Tensor) -> torch.Tensor:
        """(rows, V). Rows without a seed share one draw over all lanes, those that ended too, as in Meta's release: the
        draws of a row must not depend on which others have ended."""
        device = self.engine.device
        if all(row.generator is not None for row in self.rows):
            noise = torch.empty(len(self.rows), self.vocab_size, device=device)
        else:
            noise = exponential_noise(self.lanes, self.vocab_size, device, self.generator)[lanes]
        for i, row in enumerate(self.rows):
            if row.generator is not None:
                noise[i] = exponential_noise(1, self.vocab_size, device, row.generator)[0]
        return noise

    def _report(self, logits: torch.Tensor, chosen: torch.Tensor) -> Iterator[Step]:
        scores, best = [0.0] * len(self.rows), None
        if self.scored:
            scores = token_logprobs(logits, chosen.clamp(min=0)).tolist()
        if self.alternatives:
            top = torch.log_softmax(logits, dim=-1).topk(min(self.alternatives, self.vocab_size), dim=-1)
            best = [list(zip(ids, values)) for ids, values in zip(top.indices.tolist(), top.values.tolist())]
        ahead = self.engine.looks_ahead and not self.draft
        tokens = self.engine.read(chosen, partial(self._look_ahead, chosen) if ahead else None)
        for i, (row, token) in enumerate(zip(list(self.rows), tokens)):
            step = Step(row.index, prompt_logprobs=row.prompt_logprobs)
            row.prompt_logprobs = None
            room = self.limit - row.length
            if min(room, row.request.max_new) <= 0:  # nothing was to be generated
                step.finish_reason = "length" if row.request.max_new <= 0 else "context"
            elif token < 0:
                raise self._not_finite(row.index)
            elif token in self.eos:
                step.finish_reason = "stop"
            else:
                row.new.append(token)
                step.token, step.logprob = token, scores[i]
                step.alternatives = best[i] if best else []
                if len(row.new) == row.request.max_new:
                    step.finish_reason = "length"
                elif row.length == self.limit:
                    step.finish_reason = "context"
            if step.finish_reason:
                self._cancelled.add(row.index)
            if step.finish_reason or row.index not in self._cancelled:
                yield step
