"""Drafts of a lone greedy row, verified several in a pass, so that they change no id.

A pass over several tokens rounds differently from single steps. Where that could decide between two ids, single steps do; in
float32 they also run again what passes have left in the cache, so that it is to the bit as if there had been no drafts.
"""

from __future__ import annotations

import torch

from ..runtime import device_kind, to_device
from .choosing import Chooser
from .engine import Engine
from .held import common_prefix
from .rows import Decision, Row

# A pass may pick the best id only if it leads the second by this many standard deviations of the logits. Passes differ from
# single steps by up to 4e-6 in float32, 0.06 in bfloat16 and 0.004 in float16 (random and trained weights, 5 to 12 layers).
CLEAR = {torch.float32: 3e-5, torch.bfloat16: 0.08, torch.float16: 0.01}


class Verifier:
    """Decides the next ids of a row that runs alone, in slot 0, all but the newest of whose ids are in the cache."""

    def __init__(self, engine: Engine, chooser: Chooser) -> None:
        self.engine, self.chooser = engine, chooser

    def takes(self, row: Row) -> bool:
        """Whether the row is to have drafts."""
        wanted, sampling = row.request.draft, row.request.sampling
        if wanted is None:
            changes_no_id = self.engine.dtype == torch.float32 or self.engine.batch_invariant
            wanted = changes_no_id and device_kind(self.engine.device) == "cpu"
        return wanted and not row.request.draws and not sampling.counts_ids and row.request.grammar is None

    def decide(self, row: Row) -> list[Decision]:
        """What comes next: one id, or several if drafts hold."""
        ids = list(row.ids)
        row.drafter.read(ids[len(row.drafter.ids) :])
        drafts = row.drafter.draft(row.room(self.engine.model.params.max_seq_len) - 1)
        if not drafts:
            logits = self.engine.decode(to_device(ids[-1:], self.engine.device), [len(ids) - 1])
            unsure = None if row.rounded is None else self._is_clear(logits, row).logical_not()
            decisions, again = self.chooser.read(logits, self.chooser.best(logits, row), [row], more=unsure)
            return [self._single_steps(row, ids)] if any(again) else decisions
        if row.rounded is None:
            row.rounded = len(ids) - 1
        logits = self.engine.verify([ids[-1], *drafts], len(ids) - 1)
        decisions, clear = self.chooser.read(logits, self.chooser.best(logits, row), [row], more=self._is_clear(logits, row))
        decided: list[Decision] = []
        for decision, is_clear, draft in zip(decisions, clear, [*drafts, None]):  # the last place has no draft
            decided.append(decision if is_clear else self._single_steps(row, ids + [each.token for each in decided]))
            if not is_clear or decision.token != draft or decision.token in row.request.ends:
                break
        row.drafter.judge(len(drafts), common_prefix([decision.token for decision in decided], drafts))
        return decided

    def _is_clear(self, logits: torch.Tensor, row: Row) -> torch.Tensor:
        """Whether rounding cannot change which is the best: (N, V) -> bool (N,)."""
        if self.engine.batch_invariant:  # a pass gives the bits of single steps
            return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        best, second = self.chooser.biased(logits, row).topk(2).values.unbind(-1)
        return best - second > CLEAR[self.engine.dtype] * logits.std(-1)

    def _single_steps(self, row: Row, ids: list[int]) -> Decision:
        """The newest id's step as it is without drafts; in float32 after what was run with drafts, which is run again."""
        first = len(ids) - 1
        if self.engine.dtype == torch.float32 and row.rounded is not None:
            first = row.rounded
        tokens = to_device(ids[first:], self.engine.device)
        for at in range(len(tokens)):
            logits = self.engine.decode(tokens[at : at + 1], [first + at])
        if self.engine.dtype == torch.float32:
            row.rounded = None
        [decision], _ = self.chooser.read(logits, self.chooser.best(logits, row), [row])
        return decision
