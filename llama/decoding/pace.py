"""How much of a prompt to read between two steps of others, by how long pieces of each size have taken so far."""

from __future__ import annotations

import math
from typing import Optional

LEAST, FIRST, MOST = 16, 32, 512  # tokens to read between two steps: at least, before any measurement, at most
PATIENCE = 3.0  # a piece may take as long as this many steps
CHEAP = 1.6  # a piece may also take this many times as long as half of it: few tokens leave a GPU idle
RETRY = 16  # pieces after which a measurement counts as out of date, and a longer piece is tried again
WEIGHT = 0.3  # share of the newest measurement in the mean


class Pace:
    """Measures steps, and says how large the next piece may be."""

    def __init__(self) -> None:
        self.step: Optional[float] = None  # seconds of a step that reads nothing
        self.steps: dict[int, float] = {}  # the same by the number of rows that it ran
        self.pieces: dict[int, float] = {}  # tokens, rounded to a power of two -> seconds to read them
        self._seen = 0  # pieces
        self._last: dict[int, int] = {}  # tokens -> how many pieces had been seen when the last of this size was

    def saw(self, read: int, rows: int, seconds: float) -> None:
        """Take in how many seconds a step took that read `read` tokens of prompts and ran `rows` rows."""
        if not read:
            self.step = mean(self.step, seconds)
            self.steps[rows] = mean(self.steps.get(rows), seconds)
        elif read >= LEAST and (not rows or self.step is not None):  # fewer tokens say little
            self._seen += 1
            size = 1 << round(math.log2(read))
            before = self.pieces.get(size) if self._seen - self._last.get(size, 0) < RETRY else None
            running = (self.step or 0) if rows else 0  # seconds that the rows took
            self.pieces[size] = mean(before, max(seconds - running, 0) * size / read)
            self._last[size] = self._seen

    @property
    def piece(self) -> int:
        """Tokens to read between two steps: the largest size that streams have the patience for, or that costs little
        more than half of it. A size that was not measured yet is tried. Sizes are powers of two, so that there are few
        shapes."""
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


def mean(before: Optional[float], seconds: float) -> float:
    """The mean of what was seen so far and the newest value."""
    return seconds if before is None else (1 - WEIGHT) * before + WEIGHT * seconds
