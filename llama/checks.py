"""What counts as a number among a caller's arguments: Python's own and numpy's, but no truth values and no texts."""

from __future__ import annotations

from numbers import Real
from operator import index
from typing import Any, Optional


def whole(value: Any) -> Optional[int]:
    """The whole number that `value` is, or None."""
    if isinstance(value, bool):
        return None
    try:
        return index(value)
    except TypeError:
        return None


def real(value: Any) -> Optional[float]:
    """The number that `value` is, or None."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return None
