"""The functions of `kernels`, run by Triton if it has proven right on this device, and else in plain torch.

A kernel must not answer wrongly in silence on a GPU that never ran it. At its first use for a shape it is compared with
its plain form, computed in float32. If it fails or differs, one line says so, and the plain form runs for that shape.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any, Optional

import torch

from ..runtime import device_kind, to_device
from ..system.printable import escaped
from . import kernels
from .parallel import is_first_process

# How far two ways to compute the same may lie apart. For a whole model: a part of a vector's length, five times what is
# seen. For a kernel: in units of the numbers' spread, four steps of the dtype.
STEP_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}
KERNEL_TOLERANCE = {torch.bfloat16: 2**-5, torch.float16: 2**-8}
ROUNDED_ONCE = ("rotate_and_store", "dequantize_int4")  # kernels whose plain form rounds once too
SAMPLED = 1024  # rows of each half of a matrix that a product is compared on


@lru_cache
def triton_kernels() -> Optional[ModuleType]:
    """The Triton forms; None if Triton is not installed."""
    try:
        from . import triton_kernels as module
    except ImportError:
        return None
    return module


def usable(x: torch.Tensor, dtype: Optional[torch.dtype] = None) -> bool:
    """Whether x lies on a GPU with Triton forms for activations in `dtype` (x's own if not given)."""
    if device_kind(x) != "cuda" or (dtype or x.dtype) not in KERNEL_TOLERANCE or triton_kernels() is None:
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (8, 0)


def is_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Whether two ways to compute the same agree in every number, but for rounding. Waits for the device."""
    difference, size = _difference_and_size(found, expected)
    spread = _length(size.flatten()) / size.numel() ** 0.5
    return bool((difference <= tolerance * spread + tolerance * size).all())


def vectors_are_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """`is_near` for whole vectors, those of the last dimension: of many million numbers that went through many layers
    some are always far away. Waits for the device."""
    difference, size = _difference_and_size(found, expected)
    length = _length(size)
    return bool((_length(difference) <= tolerance * (length + length.mean()) / 2).all())


def _difference_and_size(found: torch.Tensor, expected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32: how far each number is from the expected one, and how large that is, 0 if it is not finite.

    Infinity and NaN are at 0 from their like; from anything else they are at infinity or NaN, which is below no bound.
    """
    found, expected = found.float(), expected.float()
    same = (found == expected) | (found.isnan() & expected.isnan())
    return (found - expected).abs_().masked_fill_(same, 0.0), expected.abs().nan_to_num_(0.0, 0.0)


def _length(vectors: torch.Tensor) -> torch.Tensor:
    """float32 (..., n) -> float64 (...): in float32 the squares of large numbers would be infinite."""
    return torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float64)


class Proven:
    """A function of `kernels`, with its arguments and results: Triton's form for the shapes that it has proven right
    for."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain, self.name = plain, plain.__name__
        self._verdicts: dict[Any, bool] = {}  # key: device, shapes, dtypes and options

    @property
    def refused(self) -> bool:
        """Whether the plain form runs for some shape."""
        return not all(self._verdicts.values())

    def __call__(self, *args: Any, **options: Any) -> Any:
        dtype = args[-1] if isinstance(args[-1], torch.dtype) else args[0].dtype  # the activations' dtype
        if not usable(args[0], dtype):
            return self.plain(*args, **options)
        fast = getattr(triton_kernels(), self.name)
        # The number of rows is rounded up to a power of two, since prompts have any number.
        rows = 1 << (len(args[0]) - 1).bit_length()
        key = args[0].device, rows, args[0].shape[1:], dtype, *map(_signature, args[1:]), *options.items()
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = self._verdicts[key] = self._compare(fast, args, options, KERNEL_TOLERANCE[dtype])
        return (fast if verdict else self.plain)(*args, **options)

    def _compare(self, fast: Callable[..., Any], args: Any, options: Any, tolerance: float) -> bool:
        try:
            pairs = [(self.results(fast, trial, options), self.exact(trial, options)) for trial in self._trials(args)]
            near = all(is_near(a, b, tolerance) for found, expected in pairs for a, b in zip(found, expected))
            problem = None if near else "it gives other numbers"
        except Exception as error:  # whatever a compiler, a driver or a lack of memory may raise
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        if problem is not None:
            where = sys.stdout if is_first_process() else sys.stderr  # nobody sees what another process prints
            print(
                f"The kernel {self.name} is not used here, torch's own run in its place: {escaped(problem)}", file=where
            )
        return problem is None

    def _trials(self, args: Any) -> list[Any]:
        """Arguments to compare with: those at hand, but of a large matrix some rows, since memory may be short. For
        attention, which loops over the keys: random numbers, and positions all over a cache of two rows."""
        if self.name.startswith("product"):
            x, *parts = args
            half = len(parts[0]) // 2
            few = [torch.cat((part[:SAMPLED], part[half : half + SAMPLED])) for part in parts]
            return [(x, *few)] if half > SAMPLED else [args]
        if self.name != "attend":
            return [args]
        q, cache_k, cache_v, _, *more = args
        generator = torch.Generator(q.device).manual_seed(0)
        last = cache_k.shape[1] - 1
        rows = min(2, len(cache_k))
        caches = []
        for cache in (cache_k, cache_v):
            like = torch.empty_strided((rows, *cache.shape[1:]), cache.stride(), dtype=q.dtype, device=q.device)
            caches.append(like.normal_(generator=generator))
        q = torch.empty(rows, *q.shape[1:], dtype=q.dtype, device=q.device).normal_(generator=generator)
        places = [(last, last // 2), (min(63, last), min(64, last)), (last * 3 // 4, 0)]
        if more:  # processors and slots
            more[1] = to_device(list(range(rows))[::-1], q.device)
        return [(q, *caches, to_device(list(pair[:rows]), q.device), *more) for pair in places]

    def exact(self, args: Any, options: Any) -> list[torch.Tensor]:
        """The results of the plain form in float32, without rounding on the way."""
        if self.name not in ROUNDED_ONCE:
            half = (torch.bfloat16, torch.float16)
            args = [x.float() if isinstance(x, torch.Tensor) and x.dtype in half else x for x in args]
        return self.results(self.plain, args, options)

    def results(self, function: Callable[..., Any], args: Any, options: Any) -> list[torch.Tensor]:
        """The tensors that the function returns, and those that it writes into the cache."""
        out = function(*args, **options)
        results = list(out) if isinstance(out, tuple) else [out]
        if self.name == "rotate_and_store":
            positions, *caches = args[2:5]
            slots = args[5] if len(args) > 5 else torch.arange(len(positions), device=positions.device)
            results += [cache[slots, positions] for cache in caches]
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
