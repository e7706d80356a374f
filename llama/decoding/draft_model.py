"""A smaller model of the same vocabulary, which guesses what comes next in each row; and how many guesses pay."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from copy import copy

import torch

from ..layers.parallel import Group, all_agree, least
from ..runtime import to_device
from .choosing import Chooser
from .engine import Engine
from .held import common_prefix
from .pace import Pace, mean
from .rows import Row

MOST = 8  # guesses for a pass
FIRST = 3  # guesses before anything was measured
LIKELY = 0.7  # the share of guesses that are taken to be right, before any was judged
WEIGHT = 0.1  # weight of the newest guess in that share
LATE = 4  # ids at the end of a row that are read in the step that guesses
WORTH = 16  # columns: to bring fewer from another slot takes longer than to read them
SHORTEST_REST, LONGEST_REST = 16, 512  # steps after guesses that did not pay, before one more is tried
PERIOD = 64  # passes after which a plain step is measured again


class DraftModel:
    """The engine of a draft model, with a cache as large as the model's, and rows in the same slots."""

    def __init__(self, engine: Engine, group: Group = None, never: Collection[int] = ()) -> None:
        """group: the processes that share both models. never: ids that are not to be guessed."""
        self.engine, self.group = engine, group
        self.chooser = Chooser(engine, never=never)
        self.usable = False  # whether it can guess for what the model has become; `refresh` looks
        self.agreement = LIKELY  # share of right guesses in all rows
        self._holds: list[list[int]] = [[] for _ in range(engine.model.params.max_batch_size)]  # the ids in each slot
        self._step: dict[int, float] = {}  # rows -> seconds for a guess
        self._pass: dict[int, dict[int, float]] = {}  # rows -> guesses -> seconds of the pass that verifies them
        self._rest, self._next_rest, self._passes = 0, SHORTEST_REST, 0

    def refresh(self, model: Engine) -> None:
        """Look at what it has become, and the model that it guesses for. All processes do so together."""
        self.engine.refresh()
        self.chooser.let_go()
        ours, theirs = self.engine.model.params, model.model.params
        fits = ours.vocab_size == theirs.vocab_size and self.engine.device == model.device
        fits = fits and ours.max_seq_len >= theirs.max_seq_len and ours.max_batch_size >= theirs.max_batch_size
        self.usable = all_agree(fits and self.engine.as_built, self.group)

    # How many

    def count(self, rows: list[Row], pace: Pace) -> int:
        """The number of guesses with which these rows come forward fastest, as far as was seen. The same on all
        processes."""
        if self._rest:
            self._rest -= 1
            return 0 if self._rest else 1
        self._passes += 1
        plain = pace.steps.get(len(rows))
        best = least(-1 if plain is None or not self._passes % PERIOD else self._best(rows, plain), self.group)
        if best > 0:
            self._next_rest = SHORTEST_REST
        elif best == 0:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, LONGEST_REST)
        return max(best, 0)

    def _best(self, rows: list[Row], plain: float) -> int:
        """The best number of guesses if a plain step takes `plain` seconds; 0 if none pay."""
        guess, passes = self._step.get(len(rows)), self._pass.get(len(rows))
        if guess is None or not passes:
            return FIRST

        def speed(count: int) -> float:
            """Ids in a plain step's time."""
            near = min(passes, key=lambda other: abs(other - count))
            seconds = plain + max(passes[near] - plain, 0) * count / near + count * guess
            shares = [self.agreement if row.agreement is None else row.agreement for row in rows]
            return sum(sum(share**i for i in range(count + 1)) for share in shares) / len(shares) * plain / seconds

        best = max(range(1, MOST + 1), key=speed)
        return best if speed(best) > 1 else 0

    def saw_pass(self, rows: int, guesses: int, seconds: float) -> None:
        """Note how long a pass took over this number of rows, with at most this number of guesses for each."""
        passes = self._pass.setdefault(rows, {})
        passes[guesses] = mean(passes.get(guesses), seconds)

    def judge(self, row: Row, guessed: int, right: int) -> None:
        """The first `right` of the guesses for a row were right. What would have come of those behind is not known."""
        before = self.agreement if row.agreement is None else row.agreement
        judged = min(right + 1, guessed)
        kept = (1 - WEIGHT) ** judged
        row.agreement = kept * before + (1 - kept) * right / judged
        self.agreement = kept * self.agreement + (1 - kept) * right / judged

    # Guessing

    def guess(self, rows: list[Row], wanted: Sequence[int]) -> list[list[int]]:
        """`wanted` guesses for each row, row i in slot i. They are drawn with the row's options and its noise."""
        count = max(wanted)
        if not count:
            return [[] for _ in rows]
        with self.engine.turn():
            if not self.engine.take(self):
                self._holds = [[] for _ in self._holds]
            asking = [i for i, number in enumerate(wanted) if number]
            for slot in asking:
                self._find(slot, rows)
                self._read(slot, rows[slot])
            began = time.perf_counter()
            guessed = self._run(rows[: asking[-1] + 1], asking, count)
            self._step[len(rows)] = mean(self._step.get(len(rows)), (time.perf_counter() - began) / count)
        guesses: list[list[int]] = [[] for _ in rows]
        for slot, some in zip(asking, guessed):
            good = next((i for i, token in enumerate(some) if token < 0), count)  # before logits that are not finite
            guesses[slot] = some[: min(good, wanted[slot])]
            self._holds[slot] = [*rows[slot].ids, *some[:-1]]
            if good < count:  # a value that is NaN would stay in the cache
                self.engine.clear(slot)
                self._holds[slot] = []
        return guesses

    def _find(self, slot: int, rows: list[Row]) -> None:
        """Let a slot begin with as many of its row's ids as any does: rows move, come and go, and share beginnings."""
        beginning = rows[slot].ids[:-1]
        common = common_prefix(self._holds[slot], beginning)
        if common + WORTH <= len(beginning):
            shared = [common_prefix(ids, beginning) for ids in self._holds]
            best = max(range(len(shared)), key=lambda other: shared[other])
            if shared[best] >= common + WORTH:
                if best < len(rows):  # its row goes on there
                    self.engine.copy(best, slot, shared[best])
                    self._holds[slot] = self._holds[best]
                else:
                    self.engine.swap(slot, best, (len(self._holds[slot]), len(self._holds[best])))
                    self._holds[slot], self._holds[best] = self._holds[best], self._holds[slot]
                common = shared[best]
        self._holds[slot] = self._holds[slot][:common]

    def _read(self, slot: int, row: Row) -> None:
        """Read what is missing of a row's ids before the newest, if it is much."""
        held = len(self._holds[slot])
        if held + LATE < len(row.ids):
            for _ in self.engine.prefill([row.ids[:-1]], [slot], held, pass_length=row.prompt_length):
                pass
            self._holds[slot] = row.ids[:-1]

    def _run(self, rows: list[Row], asking: list[int], count: int) -> list[list[int]]:
        """`count` ids behind each row that asks. The others take part, with tokens behind what their slots hold."""
        places = [copy(rows[i]) for i in asking]
        ends = [len(row.ids) for row in rows]
        late = max(ends[i] - len(self._holds[i]) for i in asking)
        for i in sorted(set(range(len(rows))) - set(asking)):
            ends[i] = min(max(len(self._holds[i]), late) + late, self.engine.model.params.max_seq_len - count + 1)
            self._holds[i] = self._holds[i][: max(ends[i] - late, 0)]
        logits = self._behind(rows, ends, late)
        guesses: list[torch.Tensor] = []
        index = to_device(asking, self.engine.device)
        for ahead in range(count):
            if ahead:
                tokens = guesses[-1].clamp(min=0)
                if len(asking) < len(rows):
                    tokens = tokens.new_zeros(len(rows)).index_copy(0, index, tokens)
                logits = self._decode(tokens, [end - 1 + ahead for end in ends])
            chosen = self.chooser.choose(logits if len(asking) == len(rows) else logits[index], places)
            self.chooser.count(chosen, places)
            guesses.append(chosen)
            for place in places:
                place.ahead += 1
        [fetched] = self.engine.fetch([torch.stack(guesses, dim=1)])
        return list(fetched)

    def _behind(self, rows: list[Row], ends: list[int], late: int) -> torch.Tensor:
        """Run the last ids of each row, some of which may have run before. -> the logits behind them, (rows, V)"""
        ids = [row.ids if end == len(row.ids) else [0] * end for row, end in zip(rows, ends)]
        if late > 1 and late <= min(ends) and not self.engine.fills_up:
            return self.engine.verify([some[-late:] for some in ids], [end - late for end in ends])[:, -1]
        for back in range(late, 0, -1):
            positions = [max(end - back, 0) for end in ends]
            tokens = to_device([some[at] for some, at in zip(ids, positions)], self.engine.device)
            logits = self._decode(tokens, positions)
        return logits

    def _decode(self, tokens: torch.Tensor, positions: list[int]) -> torch.Tensor:
        if self.engine.fills_up:
            self.engine.keep_columns([len(ids) for ids in self._holds])
        return self.engine.decode(tokens, positions)
