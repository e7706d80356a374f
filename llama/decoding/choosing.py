"""The next id of each row, by the row's own options: any mixture of them in one step, and no wait for the device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from copy import copy
from typing import Any, Optional

import torch

from ..runtime import device_kind, to_device
from .calls import Source
from .engine import Engine, token_logprobs
from .requests import Grammar
from .rows import NONE_ALLOWED, NOT_FINITE, Decision, Noise, Row
from .sampling import Drawing, Penalties, draw, exponential_noise, penalize

FORCED = 31  # ids at once; with the newest one, a pass runs 32 tokens of a row


class _Plan:
    """The options of these rows, as tensors; made anew when the rows change."""

    def __init__(self, rows: list[Row], vocab_size: int, device: torch.device) -> None:
        self.rows, self.device = rows, device
        self._indices: dict[tuple[int, ...], torch.Tensor] = {}
        self.counted = self._places(lambda row: row.request.sampling.counts_ids)
        self.biased = self._places(lambda row: bool(row.request.sampling.logit_bias))
        self.ruled = self._places(lambda row: row.grammar is not None and row.forced is None)
        drawn = self._places(lambda row: row.request.draws and row.forced is None)
        self.drawn = [i for i in drawn if rows[i].source.draw is None]
        self.drawn_by_others = [i for i in drawn if rows[i].source.draw is not None]
        self.forced = self._places(lambda row: row.forced is not None)
        self.scored = any(row.request.logprobs for row in rows)
        self.alternatives = max(row.request.alternatives for row in rows)
        # Whose noise a step of these rows draws.
        self.sources = list(dict.fromkeys(row.draws_with for row in rows if row.request.draws and row.noise is None))
        if self.counted:
            some = [rows[i] for i in self.counted]
            self.penalties = Penalties.of([row.request.sampling for row in some], device)
            self.in_prompt = torch.stack([row.in_prompt for row in some if row.in_prompt is not None])
            self.counts = torch.stack([row.counts for row in some if row.counts is not None])
            for row, counts in zip(some, self.counts):
                row.counts = counts  # a view: what is counted in self.counts is counted here
            self.offsets = torch.arange(len(some), device=device) * vocab_size
        if self.biased:
            biases = [rows[i].request.sampling.bias(vocab_size, device) for i in self.biased]
            self.bias = torch.stack([bias for bias in biases if bias is not None])
        if self.drawn:
            self.drawing = Drawing.of([rows[i].request.sampling for i in self.drawn], device)
            guessed = [[rows[i].noise is not None] for i in self.drawn]
            self.by_id = (
                to_device(torch.tensor(guessed, device="cpu"), device) if any(any(row) for row in guessed) else None
            )

    def _places(self, wanted: Callable[[Row], bool]) -> list[int]:
        return [i for i, row in enumerate(self.rows) if wanted(row)]

    def take(self, x: torch.Tensor, places: list[int]) -> torch.Tensor:
        """The rows of x (rows, …) at these places."""
        return x if len(places) == len(x) else x[self._index(places)]

    def put(self, x: torch.Tensor, places: list[int], part: torch.Tensor) -> torch.Tensor:
        """x with the rows of `part` at these places."""
        return part if len(places) == len(x) else x.index_copy(0, self._index(places), part)

    def _index(self, places: list[int]) -> torch.Tensor:
        key = tuple(places)
        if key not in self._indices:
            self._indices[key] = to_device(places, self.device)
        return self._indices[key]


class Chooser:
    """Chooses for the rows of one engine."""

    def __init__(
        self,
        engine: Engine,
        guessed: bool = False,
        never: Collection[int] = (),
        grammars: Callable[[Any], Grammar] = lambda grammar: grammar,
    ) -> None:
        """guessed: whether a draft model is to guess what rows draw. never: ids that are not to be chosen. grammars:
        makes a row's grammar of what its request says."""
        self.engine, self.guessed, self.never, self.grammars = engine, guessed, never, grammars
        self._last: Optional[_Plan] = None
        self._never_there: Optional[torch.Tensor] = None  # `never`, on the device

    @property
    def _vocab_size(self) -> int:
        return int(self.engine.model.params.vocab_size)

    def _plan(self, rows: list[Row]) -> _Plan:
        if self._last is None or self._last.rows != rows:
            self._last = _Plan(list(rows), self._vocab_size, self.engine.device)
        return self._last

    def let_go(self) -> None:
        """Forget the rows that were chosen for last, and their tensors."""
        self._last = None

    def admit(self, row: Row) -> None:
        """Give a new row what its options need."""
        device = self.engine.device
        if row.request.grammar is not None:
            row.grammar = self.grammars(row.request.grammar)
        if self.guessed and row.request.draws and row.request.draft is not False and row.source.draw is None:
            seed = row.request.seed
            if seed is None:
                seed = int(torch.randint(2**62, (), device=device, generator=row.source.generator))
            row.noise = Noise(seed, device)
        elif row.request.seed is not None:
            row.generator = torch.Generator(device).manual_seed(row.request.seed)
        if row.request.sampling.counts_ids:
            row.in_prompt = torch.zeros(self._vocab_size, dtype=torch.bool, device=device)
            row.in_prompt.index_fill_(0, to_device(row.request.prompt, device), True)
            row.counts = torch.zeros(self._vocab_size, dtype=torch.float32, device=device)

    def recount(self, row: Row) -> None:
        """Count the row's ids anew, and tell them to a grammar of our own making anew."""
        if row.grammar is not row.request.grammar:
            row.grammar = self.grammars(row.request.grammar)
            for token in row.ids[row.prompt_length :]:
                row.grammar.accept(token)
        if row.counts is not None:
            new = to_device(row.ids[row.prompt_length :], self.engine.device)
            row.counts = torch.bincount(new, minlength=self._vocab_size).float()

    def places(self, row: Row, guesses: Sequence[int]) -> list[Row]:
        """Copies of a row that stand for it as it is, and after each of these guesses: for choosing, and nothing
        else."""
        made = [copy(row) for _ in range(len(guesses) + 1)]
        for ahead, place in enumerate(made):
            place.ahead = ahead
            if row.counts is not None and ahead:
                new = to_device(guesses[:ahead], row.counts.device)
                place.counts = row.counts.index_add(0, new, torch.ones_like(new, dtype=torch.float32))
        return made

    def forced(self, row: Row) -> list[int]:
        """The ids that the row's grammar forces next, at most FORCED. Nothing is forced at the row's beginning,
        where the prompt's last state makes a choice at no cost. Nor is an id that has a bias or ends the row, or
        behind which no choice could follow."""
        find = getattr(row.grammar, "forced", None)
        if find is None or not self.engine.joins_passes or not row.generated or row.room < 2:
            return []
        chosen = (self.never, row.request.ends, row.request.sampling.logit_bias or ())
        try:
            ids = find()[: min(FORCED, row.room - 1)]
        except Exception as error:
            row.call.error = error
            return []
        return list(itertools.takewhile(lambda token: not any(token in some for some in chosen), ids))

    def forced_places(self, row: Row, ids: Sequence[int]) -> list[Row]:
        """`places` for each of these ids, which are forced, and for the choice behind them."""
        *forced, free = places = self.places(row, ids)
        for place, token in zip(forced, ids):
            place.forced = token
        try:
            free.grammar = row.grammar.behind(ids) if ids else row.grammar  # type: ignore[union-attr]
        except Exception as error:
            row.call.error = error
        return places

    def choose(self, logits: torch.Tensor, rows: list[Row]) -> torch.Tensor:
        """The next id of each row, float32 (rows, V) -> int64 (rows,); NOT_FINITE if a row's logits are not,
        NONE_ALLOWED if its grammar allows none. What somebody's own grammar or function raises is the error of the
        row's call."""
        plan = self._plan(rows)
        finite = logits.sum(dim=-1).isfinite()  # a sum with a number that is not finite is not finite
        logits = self._adjusted(logits, plan)
        all_drawn = len(plan.drawn) == len(plan.rows)
        ids = torch.empty(0) if all_drawn else logits.argmax(dim=-1)
        if plan.drawn:
            noise = self._noise([plan.rows[i] for i in plan.drawn])
            some = self._draw(plan.take(logits, plan.drawn), plan, noise)
            ids = some if all_drawn else plan.put(ids, plan.drawn, some)
        if plan.drawn_by_others:
            self._draw_by_others(logits, plan, ids)
        if plan.ruled:
            ids = ids.where((logits > -torch.inf).any(dim=-1), NONE_ALLOWED)
        if plan.forced:
            ids = plan.put(ids, plan.forced, to_device([rows[i].forced for i in plan.forced], ids.device))
        return ids.where(finite, NOT_FINITE)

    def error(self, row: Row, token: int, slot: Optional[int] = None) -> ValueError:
        """The error of a row that got NOT_FINITE or NONE_ALLOWED in place of an id. slot: see `Engine.not_finite`."""
        if token == NONE_ALLOWED:
            return ValueError(f"the grammar of prompt {row.index} allows no id")
        return self.engine.not_finite(row.index, slot=slot)

    def count(self, ids: torch.Tensor, rows: list[Row], times: int = 1) -> None:
        """Let penalties count ids (rows,), one for each row; times=-1 takes that back."""
        plan = self._plan(rows)
        if plan.counted:
            flat = plan.take(ids, plan.counted).clamp(min=0) + plan.offsets
            plan.counts.view(-1).index_add_(0, flat, torch.full_like(flat, times, dtype=torch.float32))

    def count_decided(self, rows: list[Row], decided: list[list[Decision]]) -> None:
        """Let penalties count all that was decided in a pass over several ids."""
        for row, decisions in zip(rows, decided):
            for decision in decisions if row.counts is not None else ():
                self.count(to_device([decision.token], self.engine.device), [row])

    def _adjusted(self, logits: torch.Tensor, plan: _Plan) -> torch.Tensor:
        """Logits with the rows' penalties, biases and grammars."""
        logits = self._weighed(logits, plan)
        if plan.ruled:
            allowed = self._allowed([plan.rows[i] for i in plan.ruled])
            logits = plan.put(logits, plan.ruled, plan.take(logits, plan.ruled).masked_fill(~allowed, -torch.inf))
        return logits

    def _weighed(self, logits: torch.Tensor, plan: _Plan) -> torch.Tensor:
        """Logits with the rows' penalties and biases, and without what is never chosen."""
        if self.never:
            logits = logits.index_fill(-1, self._never(logits.device), -torch.inf)
        if plan.counted:
            some = penalize(plan.take(logits, plan.counted), plan.in_prompt, plan.counts, plan.penalties)
            logits = plan.put(logits, plan.counted, some)
        if plan.biased:
            logits = plan.put(logits, plan.biased, plan.take(logits, plan.biased) + plan.bias)
        return logits

    def _never(self, device: torch.device) -> torch.Tensor:
        if self._never_there is None or self._never_there.device != device:
            self._never_there = to_device(sorted(self.never), device)
        return self._never_there

    def lead(self, logits: torch.Tensor, rows: list[Row]) -> torch.Tensor:
        """How far the best id of each row leads the second, in standard deviations of its logits: (rows, V) -> (rows,).
        As if there were no grammars."""
        best, second = self._weighed(logits, self._plan(rows)).topk(2).values.unbind(-1)
        return (best - second) / logits.std(-1)

    def _allowed(self, rows: Sequence[Row]) -> torch.Tensor:
        """What the rows' grammars allow: bool (rows, V)"""
        words = -(-self._vocab_size // 32)
        bits = torch.zeros(len(rows), words, dtype=torch.int32, device="cpu")
        for row, line in zip(rows, bits):
            assert row.grammar is not None
            try:
                row.grammar.fill(line)
            except Exception as error:
                row.call.error = error
        bits = to_device(bits, self.engine.device)
        each = bits[:, :, None] >> torch.arange(32, dtype=torch.int32, device=bits.device)
        return (each & 1).flatten(1)[:, : self._vocab_size].bool()

    def _noise(self, rows: Sequence[Row]) -> torch.Tensor:
        """The rows' noise, (rows, V). A row with a seed draws its own; the others take their lane of their source's
        draw."""
        unguessed = [row for row in rows if row.noise is None]
        if len(unguessed) == len(rows):
            return self._noise_of_sources(rows)
        others = iter(self._noise_of_sources(unguessed) if unguessed else ())
        size = self._vocab_size
        return torch.stack(
            [row.noise.of(row.generated + row.ahead, size) if row.noise else next(others) for row in rows]
        )

    def _noise_of_sources(self, rows: Sequence[Row]) -> torch.Tensor:
        device, drawn = self.engine.device, {}
        for source in dict.fromkeys(row.draws_with for row in rows):
            lanes = source.lanes if isinstance(source, Source) else 1
            drawn[source] = exponential_noise(lanes, self._vocab_size, device, source.generator)
        places = [row.lane if row.generator is None else 0 for row in rows]
        if len(drawn) == 1:
            noise = drawn[rows[0].draws_with]
            return noise if places == list(range(len(noise))) else noise[to_device(places, device)]
        return torch.stack([drawn[row.draws_with][place] for row, place in zip(rows, places)])

    def _draw(self, logits: torch.Tensor, plan: _Plan, noise: torch.Tensor) -> torch.Tensor:
        if not self.engine.batch_invariant:
            return draw(logits, plan.drawing, noise, plan.by_id)
        parts = (*plan.drawing, plan.by_id)
        given = [i for i, part in enumerate(parts) if part is not None]

        def one(logits: torch.Tensor, noise: torch.Tensor, *some: torch.Tensor) -> torch.Tensor:
            place = dict(zip(given, some))
            *drawing, by_id = (place.get(i) for i in range(len(parts)))
            return draw(logits, Drawing(*drawing), noise, by_id)  # type: ignore[arg-type]

        return self.engine.of_rows(one, logits, noise, *(part for part in parts if part is not None))

    def _draw_by_others(self, logits: torch.Tensor, plan: _Plan, ids: torch.Tensor) -> None:
        """Call somebody's own function, once for all rows of a call, and put the ids that it draws into `ids`."""
        for source in dict.fromkeys(plan.rows[i].source for i in plan.drawn_by_others):
            together = [i for i in plan.drawn_by_others if plan.rows[i].source is source]
            sampling = plan.rows[together[0]].request.sampling
            probs = torch.softmax(plan.take(logits, together) / sampling.temperature, dim=-1)
            assert source.draw is not None
            try:
                ids.copy_(plan.put(ids, together, source.draw(probs, sampling.top_p).reshape(-1)))
            except Exception as error:
                plan.rows[together[0]].call.error = error

    def generators(self, rows: list[Row]) -> list[torch.Generator]:
        """The generators that a step of these rows draws with."""
        return [source.generator or self._device_generator for source in self._plan(rows).sources]

    @property
    def _device_generator(self) -> torch.Generator:
        device = self.engine.device
        return (
            torch.default_generator
            if device_kind(device) == "cpu"
            else torch.cuda.default_generators[device.index or 0]
        )

    def read(
        self,
        logits: torch.Tensor,
        chosen: torch.Tensor,
        rows: list[Row],
        *,
        more: Optional[torch.Tensor] = None,
        meanwhile: Optional[Callable[[], None]] = None,
    ) -> tuple[list[Decision], list[Any]]:
        """The chosen ids on the host, with the log-probabilities that were asked for, and the numbers of `more`, in one
        wait. meanwhile: see `Engine.fetch`. If the places are all of one row, its options count for each."""
        plan = self._plan(rows)
        wanted = [chosen]
        if plan.scored:
            wanted.append(self.engine.of_rows(token_logprobs, logits, chosen.clamp(min=0)))
        if plan.alternatives:
            wanted += self.engine.best(logits, plan.alternatives)
        if more is not None:
            wanted.append(more)
        tokens, *others = self.engine.fetch(wanted, meanwhile)
        decisions = [Decision(token) for token in tokens]
        if plan.scored:
            for decision, logprob in zip(decisions, others.pop(0)):
                decision.logprob = logprob
        if plan.alternatives:
            places = rows if len(rows) == len(decisions) else [rows[0]] * len(decisions)
            for decision, row, ids, values in zip(decisions, places, others.pop(0), others.pop(0)):
                decision.alternatives = list(zip(ids, values))[: row.request.alternatives]
        return decisions, others.pop(0) if more is not None else []
