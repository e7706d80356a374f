"""Ids that rows' grammars force, run in one pass with each row's newest id: the keys of a JSON object, for example.

Nothing is chosen or drawn for them. Each row still makes one choice in each step, behind what is forced: so what it
draws does not depend on whether others have forced ids, and rows that draw together stay together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch

from .choosing import Chooser
from .engine import Engine
from .rows import Decision, Row

# Columns of the cache that a pass may copy, since each of its tokens looks at a copy of its slot: 256 MB of a layer of
# 7B.
COPIED = 2**14


class Forcing:
    """Decides what is forced, and what comes behind it."""

    def __init__(self, engine: Engine, chooser: Chooser) -> None:
        self.engine, self.chooser = engine, chooser

    def decide(
        self,
        rows: list[Row],
        forced: list[list[int]],
        slots: list[int],
        logits_of: Callable[[list[Row]], torch.Tensor],
        doubt: Optional[torch.Tensor],
    ) -> tuple[list[list[Decision]], list[Any]]:
        """What comes next in each row: the ids that are forced there, and a choice. slots: of the rows. logits_of: runs
        the newest ids of rows. doubt: a tensor to read in the same wait; its numbers come second."""
        passes = self._passes(rows, forced)
        alone = [i for i in range(len(rows)) if not any(i in together for together in passes)]
        # Those alone come first: that may write behind the columns of the others.
        parts = dict(zip(alone, logits_of([rows[i] for i in alone])[:, None])) if alone else {}
        for together in passes:
            runs = [(i, [rows[i].ids[-1], *forced[i]]) for i in together]
            tokens = [(token, len(rows[i].ids) - 1 + at, slots[i]) for i, run in runs for at, token in enumerate(run)]
            logits = self.engine.run_each(*zip(*tokens))
            parts.update(zip(together, logits.split([len(run) for _, run in runs])))
        logits = torch.cat([parts[i] for i in range(len(rows))])
        places = [place for row, ids in zip(rows, forced) for place in self.chooser.forced_places(row, ids)]
        decisions, changed = self.chooser.read(logits, self.chooser.choose(logits, places), places, more=doubt)
        left = iter(decisions)
        return [[next(left) for _ in range(len(ids) + 1)] for ids in forced], changed

    def _passes(self, rows: list[Row], forced: list[list[int]]) -> list[list[int]]:
        """The rows of each pass over several tokens: those with forced ids, and others if there is room for all of
        them."""
        most = COPIED // (max(len(row.ids) + len(ids) for row, ids in zip(rows, forced)))
        passes, used = list[list[int]](), most
        for i, ids in enumerate(forced):
            if ids:
                if used + len(ids) + 1 > most:
                    passes.append([])
                    used = 0
                passes[-1].append(i)
                used += len(ids) + 1
        others = [i for i, row in enumerate(rows) if not forced[i] and row.last is None and self._joins(row)]
        if used + len(others) <= most:
            passes[-1] += others
        return passes

    def _joins(self, row: Row) -> bool:
        """Whether a row with nothing forced may run in such a pass. In float32 one without a grammar does not: its
        numbers are those of steps, to the bit."""
        return row.grammar is not None or self.engine.dtype != torch.float32
