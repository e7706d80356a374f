"""w8a8 and w4a8 layers, for CPUs: weights of 8 or 4 bits, and activations that are rounded to 8 bits before they
multiply.

Both are cut into the same groups of neighbouring columns. A group of activations is n * unit, n in -127 … 127; a group
of weights n * scale with n in -127 … 127 (w8a8), or (n - 8) * scale + zero as in int4 (w4a8). A product of two groups
is

    (sum of n m) * (scale * unit)  [+ (sum of m) * unit * zero]

whose sums are whole numbers, exact in any order. Groups are added in float32, from left to right, each with one
rounding. So neither the number of rows nor of threads changes a bit, and the plain form here gives the bits of
`cpu_kernels.cpp`.

One scale for a whole row of activations would be simpler, but a few large numbers of a row would cost all others their
digits: on a small model of the Llama family it loses 3 % of perplexity, where groups lose 0.4 % (benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from torch import nn

from ..runtime import device_kind
from . import own_kernels
from .int4 import Int4
from .parallel import ColumnParallelLinear, RowParallelLinear
from .quantized import refuse_gradients
from .rounding import to_groups, unpair
from .tiles import InTiles, to_tiles

LEAST = 1e-30  # smallest size of a group's largest activation


class Digits(NamedTuple):
    """Activations (M, columns) as whole numbers, times the unit of their group."""

    numbers: torch.Tensor  # int8 (M, columns)
    unit: torch.Tensor  # float32 (M, groups)


def in_digits(x: torch.Tensor, group: int) -> Digits:
    """x (M, columns) in groups of columns. Infinity and NaN go into the unit, and so into the result."""
    parts = x.float().unflatten(1, (-1, group))
    largest = parts.abs().amax(-1).clamp_min(LEAST)
    numbers = (parts * (127 / largest)[..., None]).round()
    return Digits(torch.where(largest.isfinite()[..., None], numbers, 0).to(torch.int8).flatten(1), largest * (1 / 127))


def multiplied(
    digits: Digits, numbers: torch.Tensor, scales: torch.Tensor, zeros: Optional[torch.Tensor]
) -> torch.Tensor:
    """digits of x (M, columns), whole numbers of weights int8 (rows, columns), scales and zeros (rows, groups) ->
    float32 (M, rows). See the formula above."""
    y = scales.new_zeros(len(digits.numbers), len(numbers))
    group = numbers.shape[1] // scales.shape[1]
    for g, (x, w) in enumerate(zip(digits.numbers.float().split(group, 1), numbers.split(group, 1))):
        unit = digits.unit[:, g, None]
        y = _fused(x @ w.float().t(), scales[:, g].float() * unit, y)
        if zeros is not None:
            y = _fused(x.sum(1, keepdim=True) * unit, zeros[:, g].float(), y)
    return y


def _fused(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c in float32, rounded once: float64 has the product exactly."""
    return (a.double() * b.double() + c.double()).float()


class OneDigit(InTiles):
    """The base of both kinds. See `Quantized` for the methods."""

    group_columns: int
    weight: nn.Parameter  # the stored form, or tiles, uint8 (tiles, bytes)

    def pack(self, dtype: torch.dtype) -> list[torch.Tensor]:
        self.packed = self.in_tiles = False
        if device_kind(self.device) != "cpu" or not own_kernels.loaded():
            return []
        before = [tensor.detach() for tensor in self.plain().values()]
        self.hold_tiles(to_tiles(*before))
        return before

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Raises ValueError if `.to()` would move it where it cannot multiply."""
        self.quantization.check_device(fn(torch.empty(0, dtype=torch.bfloat16, device=self.device)).device)
        return super()._apply(fn, recurse)

    def plain(self) -> dict[str, torch.Tensor]:
        if not self.packed:
            return {name: tensor for name, tensor in self._parameters.items() if tensor is not None}
        weight, of_groups = self.from_tiles()
        return {"weight": weight, **dict(zip(("scales", "zeros"), of_groups))}

    def shared(self, x: torch.Tensor) -> Digits:
        flat = x.reshape(-1, x.shape[-1])
        if not self.packed:
            return in_digits(flat, self.group_columns)
        known = own_kernels.in_known_type(flat).contiguous()
        return Digits(*torch.ops.llama_cpu.round_groups(known, self.group_columns))

    def product(self, x: torch.Tensor, shared: Optional[Digits] = None, any_order: bool = False) -> torch.Tensor:
        refuse_gradients(x)
        digits = shared or self.shared(x)
        if self.packed:
            known = x.dtype if x.dtype in own_kernels.TYPES else torch.float32
            number = own_kernels.TYPES.index(known)
            y = torch.ops.llama_cpu.product(digits.numbers, digits.unit, self.weight, self.rows, self.bits, number)
        else:
            stored = self.plain()
            numbers = stored["weight"] if self.bits == 8 else unpair(stored["weight"]).view(torch.int8) - 8
            y = multiplied(digits, numbers, stored["scales"], stored.get("zeros"))
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])


class W8A8(OneDigit):
    """n * scale for the weights."""

    kind = "w8a8"
    bits = 8

    def empty(self, rows: int, columns: int, device: torch.device) -> dict[str, torch.Tensor]:
        group = self.quantization.group(self.in_features)
        assert group is not None
        self.group_columns = group
        return {
            "weight": torch.empty(rows, columns, dtype=torch.int8, device=device),
            "scales": torch.empty(rows, columns // group, dtype=torch.bfloat16, device=device),
        }

    def rounded(self, weight: torch.Tensor, maxima: Optional[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        made: tuple[torch.Tensor, ...] = torch.ops.llama_cpu.round_w8a8(weight, self.group_columns)
        return made

    def round(self, block: torch.Tensor, maxima: Optional[torch.Tensor], into: dict[str, torch.Tensor]) -> None:
        for name, numbers in zip(("weight", "scales"), to_groups(block, self.group_columns)):
            into[name].copy_(numbers)


class W4A8(OneDigit, Int4):
    """(n - 8) * scale + zero for the weights: the tensors of int4."""

    kind = "w4a8"
    bits = 4


class W8A8ColumnParallelLinear(W8A8, ColumnParallelLinear):
    """Each rank has some rows, with their scales."""

    shard_dims = {"weight": 0, "scales": 0}  # noqa: RUF012


class W8A8RowParallelLinear(W8A8, RowParallelLinear):
    """Each rank has some columns, in whole groups."""

    shard_dims = {"weight": 1, "scales": 1}  # noqa: RUF012


class W4A8ColumnParallelLinear(W4A8, ColumnParallelLinear):
    """Each rank has some rows, with their scales and zeros."""

    shard_dims = {"weight": 0, "scales": 0, "zeros": 0}  # noqa: RUF012


class W4A8RowParallelLinear(W4A8, RowParallelLinear):
    """Each rank has some columns, in whole groups."""

    shard_dims = {"weight": 1, "scales": 1, "zeros": 1}  # noqa: RUF012
