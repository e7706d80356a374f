"""Guesses at what comes next, several verified in a pass, so that they change no id.

They are looked up in a row's own ids, or come from a draft model. The model chooses at each place as if the guesses
before it were right, drawn ids too: see `Noise`. A row takes what was chosen up to the first guess that was wrong.

A pass over several tokens rounds differently from single steps. Where that could decide between two ids, single steps
do; in float32 they also run again what passes have left in the cache, so that it is to the bit as if there had been no
guesses. In 16 bits the neighbours of a row decide as much, so there single steps are taken only for a row that runs
alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Optional

import torch

from ..runtime import device_kind, to_device
from .choosing import Chooser
from .draft_model import DraftModel
from .engine import Engine
from .held import common_prefix
from .pace import Pace
from .rows import Decision, Row

# A pass may pick the best id only if it leads the second by this many standard deviations of the logits. Passes differ
# from single steps by up to 4e-6 in float32, 0.06 in bfloat16 and 0.004 in float16 (random and trained weights, 5 to 12
# layers).
CLEAR = {torch.float32: 3e-5, torch.bfloat16: 0.08, torch.float16: 0.01}
# At least this share of a pass's places must hold guesses; that limits how wide it is. On a CPU a place costs up to
# 0.15 of a step of 1 to 8 rows (0.003 to 0.15, demo model and stories260K), whether it holds a guess or not.
FILLED = 0.25


class Verifier:
    """Decides the next ids of rows that run, row i in slot i, all but the newest of whose ids are in the cache."""

    def __init__(self, engine: Engine, chooser: Chooser, pace: Pace, draft_model: Optional[DraftModel] = None) -> None:
        self.engine, self.chooser, self.pace, self.draft_model = engine, chooser, pace, draft_model

    def takes(self, rows: list[Row]) -> bool:
        """Whether any of the rows is to have guesses."""
        return bool(self._looking_up(rows)) or any(map(self._asks, rows))

    def _looking_up(self, rows: list[Row]) -> list[int]:
        """The rows that are to have guesses that their own ids suggest."""
        allowed = [i for i, row in enumerate(rows) if row.request.looks_up]
        if not allowed or all(rows[i].request.draft for i in allowed):
            return allowed
        changes_no_id = self.engine.dtype == torch.float32 or self.engine.batch_invariant
        if changes_no_id and device_kind(self.engine.device) == "cpu":
            return allowed
        return [i for i in allowed if rows[i].request.draft]

    def _asks(self, row: Row) -> bool:
        """Whether the row gets guesses of the draft model."""
        if self.draft_model is None or not self.draft_model.usable:
            return False
        guessable = row.noise is not None or not row.request.draws
        return guessable and row.request.draft is not False and row.request.grammar is None

    def decide(self, rows: list[Row]) -> Optional[list[list[Decision]]]:
        """What comes next in each row: one id, or several if guesses hold. None for what a plain step decides as
        well."""
        limit = self.engine.model.params.max_seq_len
        # A row can have no guess for the last id that there is room for, and none has columns behind the end of the
        # cache.
        end = min(limit - len(row.ids) for row in rows)
        most = [min(row.room - 1, end) for row in rows]
        guesses = self._look_up(rows, most)
        asking = [i for i, row in enumerate(rows) if most[i] > 0 and not guesses[i] and self._asks(row)]
        if self.draft_model is not None and asking:
            count = self.draft_model.count(rows, self.pace)
            wanted = [min(count, most[i]) if i in asking else 0 for i in range(len(rows))]
            guesses = [a or b for a, b in zip(guesses, self.draft_model.guess(rows, wanted))]
        if any(guesses):
            decided = self._verify(rows, guesses, asking)
        elif len(rows) == 1 and rows[0].rounded is not None and not rows[0].request.draws:
            decided = [[self._checked_step(rows[0])]]
        else:
            return None
        self.chooser.count_decided(rows, decided)
        return decided

    def _look_up(self, rows: list[Row], most: list[int]) -> list[list[int]]:
        """What the rows' own ids suggest. most: how many for each row, at most."""
        guesses: list[list[int]] = [[] for _ in rows]
        for i in self._looking_up(rows):
            drafter = rows[i].drafter
            drafter.read(rows[i].ids[len(drafter.ids) :])
            guesses[i] = drafter.draft(most[i])
        width = max(map(len, guesses))
        while width and sum(min(len(some), width) for some in guesses) < FILLED * width * len(rows):
            width -= 1
        return [some[:width] for some in guesses]

    def _verify(self, rows: list[Row], guesses: list[list[int]], asked: list[int]) -> list[list[Decision]]:
        began, width = time.perf_counter(), max(map(len, guesses))
        for row, some in zip(rows, guesses):
            if some and row.rounded is None:
                row.rounded = len(row.ids) - 1
        tokens = [[row.ids[-1], *some, *[0] * (width - len(some))] for row, some in zip(rows, guesses)]
        logits = self.engine.verify(tokens, [len(row.ids) - 1 for row in rows])
        places = [place for row, some in zip(rows, guesses) for place in self.chooser.places(row, some)]
        logits = logits.flatten(0, 1)
        if len(places) < len(logits):
            used = [i * (width + 1) + j for i, some in enumerate(guesses) for j in range(len(some) + 1)]
            logits = logits[to_device(used, logits.device)]
        chosen = self.chooser.choose(logits, places)
        decisions, clear = self.chooser.read(logits, chosen, places, more=self._clear(logits, places))
        decided, first = [], 0
        for slot, (row, some) in enumerate(zip(rows, guesses)):
            behind = slice(first, first + len(some) + 1)
            decided.append(self._accept(row, slot, some, decisions[behind], clear[behind]))
            first = behind.stop
            right = common_prefix([decision.token for decision in decided[-1]], some)
            if self.draft_model is None or slot not in asked:
                row.drafter.judge(len(some), right)
            elif some:
                self.draft_model.judge(row, len(some), right)
        if self.draft_model is not None:
            self.draft_model.saw_pass(len(rows), width, time.perf_counter() - began)
        return decided

    def _accept(
        self, row: Row, slot: int, guesses: list[int], decisions: list[Decision], clear: list[bool]
    ) -> list[Decision]:
        """The row's decisions up to the first that was not guessed, or ends it."""
        decided: list[Decision] = []
        # Nothing was guessed for the last place.
        for decision, is_clear, guess in zip(decisions, clear, [*guesses, None]):
            if not is_clear:
                decision = self._single_step(row, slot, [each.token for each in decided])
            decided.append(decision)
            if not is_clear or decision.token != guess or decision.token in row.request.ends:
                break
        return decided

    def _clear(self, logits: torch.Tensor, places: list[Row]) -> torch.Tensor:
        """Whether rounding cannot change what is chosen at each place: bool (places,)"""
        if self.engine.batch_invariant:  # a pass gives the bits of single steps
            return torch.ones(len(places), dtype=torch.bool, device=logits.device)
        drawn = to_device(torch.tensor([place.request.draws for place in places], device="cpu"), logits.device)
        several = any(place.number != places[0].number for place in places)
        if (several and self.engine.dtype != torch.float32) or all(place.request.draws for place in places):
            return torch.ones_like(drawn)
        return drawn | (self.chooser.lead(logits, places) > CLEAR[self.engine.dtype])

    def _checked_step(self, row: Row) -> Decision:
        """The next id of a row that runs alone, and some of whose columns passes have left."""
        logits = self.engine.decode(to_device(row.ids[-1:], self.engine.device), [len(row.ids) - 1])
        [decision], [clear] = self.chooser.read(
            logits, self.chooser.choose(logits, [row]), [row], more=self._clear(logits, [row])
        )
        return decision if clear else self._single_step(row, 0, [])

    def _single_step(self, row: Row, slot: int, accepted: Sequence[int]) -> Decision:
        """What follows a row and the guesses that held, as it is without guesses; in float32 after what was run in
        passes, which is run again."""
        ids = [*row.ids, *accepted]
        first = len(ids) - 1
        if self.engine.dtype == torch.float32 and row.rounded is not None:
            first, row.rounded = row.rounded, None
        for at in range(first, len(ids)):
            if slot == 0:
                logits = self.engine.decode(to_device(ids[at : at + 1], self.engine.device), [at])
            else:
                logits = self.engine.verify([ids[at : at + 1]], [at], [slot])[:, 0]
        place = self.chooser.places(row, accepted)[-1]
        [decision], _ = self.chooser.read(logits, self.chooser.choose(logits, [place]), [place])
        return decision
