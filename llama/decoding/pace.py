"""How fast steps and prompts run here, as seen so far, and how much of a prompt to read between two steps."""

from __future__ import annotations

from typing import Optional

LEAST, FIRST, MOST = 16, 32, 512  # tokens of a prompt between two steps: at least, before anything was measured, at most
PATIENCE = 3.0  # steps: reading a piece is to take no longer
WEIGHT = 0.3  # of the newest measurement in the mean


class Pace:
    def __init__(self) -> None:
        self.step: Optional[float] = None  # seconds of a step that reads nothing
        self.token: Optional[float] = None  # seconds to read one token of a prompt

    def saw(self, read: int, rows: int, seconds: float) -> None:
        """A step took this long, which read so many tokens of prompts, and ran so many rows."""
        if not read:
            self.step = _mean(self.step, seconds)
        elif read >= LEAST and (not rows or self.step is not None):  # of fewer tokens it says little
            self.token = _mean(self.token, max(seconds - (self.step or 0) * (rows > 0), 0) / read)

    @property
    def piece(self) -> int:
        """Tokens, a power of two, so that there are few shapes."""
        if not self.step or not self.token:
            return FIRST
        return min(max(1 << (int(PATIENCE * self.step / self.token) or 1).bit_length() - 1, LEAST), MOST)


def _mean(before: Optional[float], seconds: float) -> float:
    return seconds if before is None else (1 - WEIGHT) * before + WEIGHT * seconds
