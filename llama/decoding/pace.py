"""How much of a prompt to read between two steps of others, by how long pieces of each size have taken so far."""

from __future__ import annotations

import math
from typing import Optional

LEAST, FIRST, MOST = 16, 32, 512  # tokens of a prompt between two steps: at least, before anything was measured, at most
PATIENCE = 3.0  # steps: reading a piece is to take no longer
CHEAP = 1.6  # or twice the tokens are to take less than so many times as long: a GPU needs many, to be busy at all
RETRY = 16  # pieces, after which what was measured of another size may be out of date, and a longer one is tried again
WEIGHT = 0.3  # of the newest measurement in the mean


class Pace:
    def __init__(self) -> None:
        self.step: Optional[float] = None  # seconds of a step that reads nothing
        self.pieces: dict[int, float] = {}  # tokens, about: the next power of two -> seconds to read them
        self._seen = 0  # pieces
        self._last: dict[int, int] = {}  # tokens -> how many pieces had been seen when one of this size was last

    def saw(self, read: int, rows: int, seconds: float) -> None:
        """A step took this long, which read so many tokens of prompts, and ran so many rows."""
        if not read:
            self.step = _mean(self.step, seconds)
        elif read >= LEAST and (not rows or self.step is not None):  # of fewer tokens it says little
            self._seen += 1
            size = 1 << round(math.log2(read))
            before = self.pieces.get(size) if self._seen - self._last.get(size, 0) < RETRY else None
            self.pieces[size] = _mean(before, max(seconds - (self.step or 0) * (rows > 0), 0))
            self._last[size] = self._seen

    @property
    def piece(self) -> int:
        """Tokens, a power of two, so that there are few shapes: of the longest that streams have the patience for, or that
        costs little more than a shorter one. A size that was not measured yet is tried."""
        if not self.step or not self.pieces:
            return FIRST
        size, patience = min(self.pieces), PATIENCE * self.step
        if self.pieces[size] > patience and size > LEAST:
            return size // 2
        while size < MOST:
            longer = self.pieces.get(2 * size, 0)
            if longer > max(patience, CHEAP * self.pieces[size]):
                return size if self._seen % RETRY else 2 * size
            size *= 2
            if not longer:
                break
        return size


def _mean(before: Optional[float], seconds: float) -> float:
    return seconds if before is None else (1 - WEIGHT) * before + WEIGHT * seconds
