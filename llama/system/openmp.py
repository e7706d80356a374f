"""The threads that OpenMP keeps for each thread that computes.

Between two products they wait in a loop, which is fast. Where more of them live than there are processors, all sleep
after each product and are woken for the next, also those of the thread that computes now: on 2 cores, because another
thread had loaded the model, a step of 134 million weights took 32.7 ms in place of 29.2 (`benchmarks/LOG.md`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Optional

import torch

SOFT = 1  # `omp_pause_soft` of OpenMP 5.0: what was set stays set


@cache
def _pause() -> Optional[Callable[[int], int]]:
    """OpenMP's own function, of the library that torch computes with, if it has one."""
    try:
        pause: Callable[[int], int] = ctypes.CDLL(torch._C.__file__).omp_pause_resource_all
    except (AttributeError, OSError):
        return None
    return pause


def rest() -> None:
    """Let this thread's helpers end, since another thread computes from now on. They are made anew when this one
    does."""
    if (pause := _pause()) is not None:
        pause(SOFT)
