"""Checks numbers among a caller's arguments: Python's, numpy's and torch's count, but no truth values and no texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from operator import index
from typing import Any, Optional

from .printable import shortened


def _plain(value: Any) -> Any:
    """The Python number in a scalar of numpy or torch."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def whole(value: Any) -> Optional[int]:
    """The whole number that `value` is, or None."""
    value = _plain(value)
    if isinstance(value, bool):
        return None
    try:
        return index(value)
    except TypeError:
        return None


def real(value: Any) -> Optional[float]:
    """The number that `value` is, or None. NaN counts as no number, because it compares false with everything."""
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return None if math.isnan(number) else number


def list_of_texts(name: str, value: Any) -> Sequence[str]:
    """The argument `name`. ValueError unless it is a list of texts."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise ValueError(f"{name} is a list of texts, not {type(value).__name__}; put one text into a list")
    for i, text in enumerate(value):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{i}] is {shortened(text)}, and not a text; {name} is a list of texts")
    return value


def whole_number(name: str, value: Any, least: int, most: Optional[int] = None, told: str = "") -> int:
    """The argument `name` as an int. ValueError unless it is a whole number from `least` to `most`; `told` words the
    limits."""
    number = whole(value)
    if number is None or number < least or (most is not None and number > most):
        told = told or (f"of {least} or more" if most is None else f"from {least} to {most}")
        raise ValueError(f"{name}={shortened(value)} must be a whole number {told}")
    return number
