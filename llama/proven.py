"""The functions of `kernels`, run by Triton where that has proven right on this device, and in plain torch elsewhere.

A kernel that no GPU of this kind has run before must not answer wrongly in silence: at its first use for a shape it is
compared with its plain form. If it fails or differs, one line says so, and the plain form runs for that shape.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any, Optional

import torch

from . import kernels
from .parallel import is_first_process
from .runtime import device_kind

# How far two ways to compute the same may lie apart, in units of the numbers' spread.
STEP_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}  # a whole model: five times what is seen
KERNEL_TOLERANCE = {torch.bfloat16: 2**-5, torch.float16: 2**-8}  # four steps of the dtype


@lru_cache
def triton_kernels() -> Optional[ModuleType]:
    """The Triton forms; None where Triton is not installed."""
    try:
        from . import triton_kernels as module
    except ImportError:
        return None
    return module


def usable(x: torch.Tensor, dtype: Optional[torch.dtype] = None) -> bool:
    """Whether there are Triton forms where x lies, for activations in `dtype` (x's own if not given)."""
    if device_kind(x) != "cuda" or (dtype or x.dtype) not in KERNEL_TOLERANCE or triton_kernels() is None:
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (8, 0)


def is_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Whether two ways to compute the same agree, but for rounding. Waits for the device."""
    found, expected = found.float(), expected.float()
    same = (found == expected) | (found.isnan() & expected.isnan())
    spread = expected.nan_to_num(0.0, 0.0, 0.0).square().mean().sqrt()
    return bool((same | ((found - expected).abs() <= tolerance * (spread + expected.abs()))).all())


class Proven:
    """A function of `kernels`, with its arguments and results."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain, self.name = plain, plain.__name__
        self._verdicts: dict[Any, bool] = {}  # by device, shapes, dtypes and options

    def __call__(self, *args: Any, **options: Any) -> Any:
        dtype = args[-1] if isinstance(args[-1], torch.dtype) else args[0].dtype  # of the activations
        if not usable(args[0], dtype):
            return self.plain(*args, **options)
        fast = getattr(triton_kernels(), self.name)
        key = args[0].device, *map(_signature, args), *options.items()
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = self._verdicts[key] = self._compare(fast, args, options, KERNEL_TOLERANCE[dtype])
        return (fast if verdict else self.plain)(*args, **options)

    def _compare(self, fast: Callable[..., Any], args: Any, options: Any, tolerance: float) -> bool:
        try:
            found = self._results(fast, args, options)
            expected = self._results(self.plain, args, options)
            problem = None if all(map(is_near, found, expected, [tolerance] * len(found))) else "it gives other numbers"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler or a driver may raise
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        if problem is not None and is_first_process():
            print(f"The kernel {self.name} is not used here, torch's own run in its place: {problem}")
        return problem is None

    def _results(self, function: Callable[..., Any], args: Any, options: Any) -> list[torch.Tensor]:
        """What it returns, and what it writes into the cache."""
        out = function(*args, **options)
        results = list(out) if isinstance(out, tuple) else [out]
        if self.name == "rotate_and_store":
            positions, *caches = args[2:]
            rows = torch.arange(len(positions), device=positions.device)
            results += [cache[rows, positions] for cache in caches]
        return results


def _signature(value: Any) -> Any:
    return (value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value


add_norm = Proven(kernels.add_norm)
rotate_and_store = Proven(kernels.rotate_and_store)
attend = Proven(kernels.attend)
silu_mul = Proven(kernels.silu_mul)
product = Proven(kernels.product)
product_int8 = Proven(kernels.product_int8)
product_int4 = Proven(kernels.product_int4)
dequantize_int4 = Proven(kernels.dequantize_int4)
