"""int4 layers. A CPU multiplies few rows of activations with torch's packed form; for many, it unpacks that form in
blocks.

One prompt is decoded at twice the speed of bfloat16 (docs/SPEED.md). Plain ATen, because torchao's int4 has no form for
CPUs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import nn

from ..runtime import device_kind
from . import proven
from .parallel import ColumnParallelLinear, RowParallelLinear
from .quantized import STORED_ROWS, Quantized, refuse_gradients
from .rounding import TILE, dequantized, pairs, to_int4, unpair

# For more rows of activations, the packed product (170 GFLOP/s on two cores) loses to dequantized blocks.
FEW_ROWS = 64
DEQUANTIZED = 2**21  # numbers that are unpacked at a time; with fewer, calls cost more than the cache saves


class Int4(Quantized):
    """(n - 8) * scale + zero, with a scale and a zero for each group of a row. See `Quantized` for the methods."""

    kind = "int4"
    weight: nn.Parameter  # uint8 (rows, columns / 2), or torch's packed form
    scales: Optional[nn.Parameter]  # bfloat16 (rows, columns / group); None if packed
    zeros: Optional[nn.Parameter]  # the same
    scales_and_zeros: nn.Parameter  # bfloat16 (columns / group, rows, 2); only if packed
    group_columns: int

    @property
    def columns(self) -> int:
        """The columns of this rank's matrix, whatever form it has."""
        if self.packed:
            return len(self.scales_and_zeros) * self.group_columns
        return 2 * self.weight.shape[1]

    def empty(self, rows: int, columns: int, device: torch.device) -> dict[str, torch.Tensor]:
        group = self.quantization.group(self.in_features)
        assert group is not None
        self.group_columns = group
        shape = rows, columns // group
        return {
            "weight": torch.empty(rows, columns // 2, dtype=torch.uint8, device=device),
            "scales": torch.empty(shape, dtype=torch.bfloat16, device=device),
            "zeros": torch.empty(shape, dtype=torch.bfloat16, device=device),
        }

    def round(self, block: torch.Tensor, maxima: torch.Tensor, into: dict[str, torch.Tensor]) -> None:
        numbers, scales, zeros = to_int4(block, self.group_columns)
        for name, made in (("weight", pairs(numbers)), ("scales", scales), ("zeros", zeros)):
            into[name].copy_(made)

    def plain(self) -> dict[str, torch.Tensor]:
        if not self.packed:
            assert self.scales is not None
            assert self.zeros is not None
            return {"weight": self.weight, "scales": self.scales, "zeros": self.zeros}
        scales, zeros = self.scales_and_zeros.permute(2, 1, 0).contiguous()
        # The product with a unit matrix shows the numbers, whatever the packed layout is.
        ones = torch.zeros_like(self.scales_and_zeros)
        ones[..., 0] = 1
        unit = torch.eye(self.columns, dtype=torch.bfloat16, device=self.device)
        shown = [self._few(some, ones).t() for some in unit.split(64)]
        return {"weight": pairs(torch.cat(shown, 1).add_(8).to(torch.uint8)), "scales": scales, "zeros": zeros}

    def pack(self, dtype: torch.dtype) -> list[torch.Tensor]:
        assert self.scales is not None
        assert self.zeros is not None
        before = [self.weight.detach(), self.scales.detach(), self.zeros.detach()]
        packed = None if dtype == torch.float32 else self._packed_weight()
        self.packed = packed is not None
        if packed is not None:
            both = torch.stack((self.scales.detach().t(), self.zeros.detach().t()), dim=-1).contiguous()
            self.scales = self.zeros = None
            self.weight = nn.Parameter(packed, requires_grad=False)
            self.scales_and_zeros = nn.Parameter(both, requires_grad=False)
            return before
        return []

    def for_step(self) -> Optional[tuple[torch.Tensor, int, Optional[torch.Tensor]]]:
        in_order = self.packed and packed_layout() == (2 * TILE, (slice(0, TILE, 1), slice(TILE, 2 * TILE, 1)))
        return (self.weight, self.group_columns, self.scales_and_zeros) if in_order else None

    def _packed_weight(self) -> Optional[torch.Tensor]:
        """The form for torch's own product, which a CPU has for bfloat16 and groups of 32 or more; else None."""
        weight, device = self.weight.detach(), self.device
        rows = len(weight)
        if self.group_columns < 32:
            return None
        if device_kind(device) == "cpu" and hasattr(torch, "_weight_int4pack_mm_for_cpu") and rows % 64 == 0:
            return torch._convert_weight_to_int4pack_for_cpu(unpair(weight).int(), 1)
        return None

    def product(self, x: torch.Tensor, shared: Any = None, any_order: bool = False) -> torch.Tensor:
        refuse_gradients(x)
        flat = x.reshape(-1, x.shape[-1])  # (M, columns)
        if not self.packed:
            y = self._generic(flat)
        elif len(flat) <= FEW_ROWS or packed_layout() is None:
            y = self._few(flat.bfloat16(), self.scales_and_zeros).to(x.dtype)
        else:
            y = self._many(flat.bfloat16()).to(x.dtype)
        return y.view(*x.shape[:-1], -1)

    def _few(self, x: torch.Tensor, scales_and_zeros: torch.Tensor) -> torch.Tensor:
        return torch._weight_int4pack_mm_for_cpu(x.contiguous(), self.weight, self.group_columns, scales_and_zeros)

    def _generic(self, x: torch.Tensor) -> torch.Tensor:
        """x (M, columns) -> (M, rows) in x's own dtype. A CPU dequantizes some rows of the matrix at a time."""
        assert self.scales is not None
        assert self.zeros is not None
        if device_kind(x) == "cuda":
            if len(x) <= STORED_ROWS:
                return proven.product_int4(x.contiguous(), self.weight, self.scales, self.zeros)
            return F.linear(x, proven.dequantize_int4(self.weight, self.scales, self.zeros, x.dtype))
        step = max(1, 2**22 // self.columns) if device_kind(x) == "cpu" else len(self.weight)
        parts = zip(self.weight.split(step), self.scales.split(step), self.zeros.split(step))
        return torch.cat([F.linear(x, dequantized(*part, x.dtype)) for part in parts], dim=-1)

    def _many(self, x: torch.Tensor) -> torch.Tensor:
        """x bfloat16 (M, columns) -> (M, rows). The packed form is dequantized in pieces that fit a cache: (n - 8) *
        scale; the zeros are rows of their own, which multiply the sums of x over each group."""
        layout = packed_layout()
        assert layout is not None
        height, halves = layout
        group, groups = self.group_columns, self.columns // self.group_columns
        x = torch.cat((x, x.unflatten(1, (groups, group)).sum(-1)), dim=1)
        packed = self.weight.view(-1, groups, group, height // 2)  # two rows of a block of `height` in each byte
        scales, zeros = self.scales_and_zeros.detach().unbind(-1)
        # (blocks, groups, 1, height)
        scales = scales.unflatten(1, (-1, height)).transpose(0, 1).contiguous()[:, :, None]
        blocks = min(max(1, 2048 // height), len(packed))
        piece = max(1, DEQUANTIZED // (blocks * height * group))
        y = x.new_empty(len(x), len(packed) * height)
        whole = x.new_empty(x.shape[1], blocks * height)
        for i in range(0, len(packed), blocks):
            some = slice(i, i + blocks)
            columns = slice(i * height, (i + blocks) * height)
            weight = whole[:, : y[:, columns].shape[1]]
            weight[self.columns :] = zeros[:, columns]
            target = weight[: self.columns].view(groups, group, -1, height).permute(2, 0, 1, 3)
            for j in range(0, groups, piece):
                part = slice(j, j + piece)
                numbers = packed[some, part]
                for rows, half in zip(halves, (numbers & 15, numbers >> 4)):
                    centred = half.view(torch.int8).sub_(8).to(x.dtype)
                    torch.mul(centred, scales[some, part, :, rows], out=target[:, part, :, rows])
            y[:, columns] = x @ weight
        return y


@lru_cache
def packed_layout() -> Optional[tuple[int, tuple[slice, slice]]]:
    """How torch packs int4 on this CPU, found out by packing known numbers: the height of a block of rows, and its rows
    that lie in the lower and in the upper halves of the bytes. None if the layout is another one."""
    rows, columns = 256, 32
    number = torch.arange(rows)[:, None].expand(rows, columns)
    digits = [torch._convert_weight_to_int4pack_for_cpu(d.int().contiguous(), 1) for d in (number % 16, number // 16)]
    for height in (64, 32, 16):
        first, second = (d.view(rows // height, columns, -1) for d in digits)
        found = [(first & 15).int() + 16 * (second & 15), (first >> 4).int() + 16 * (second >> 4)]
        halves = []
        for half in found:
            order = half[0, 0].tolist()
            rows_of_half = slice(order[0], order[-1] + 1, max(1, order[1] - order[0]))
            expected = half[0, 0] + height * torch.arange(rows // height)[:, None, None]
            if order == list(range(height))[rows_of_half] and torch.equal(half, expected.expand_as(half).int()):
                halves.append(rows_of_half)
        if len(halves) == 2:
            columns_too = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
            packed = torch._convert_weight_to_int4pack_for_cpu(columns_too, 1).view(rows // height, columns, -1)
            back = torch.empty(rows // height, columns, height, dtype=torch.int32)
            back[:, :, halves[0]], back[:, :, halves[1]] = packed & 15, packed >> 4
            return (
                (height, (halves[0], halves[1]))
                if torch.equal(back.transpose(1, 2).flatten(0, 1), columns_too)
                else None
            )
    return None


class Int4ColumnParallelLinear(Int4, ColumnParallelLinear):
    """Each rank has some rows, with their scales and zeros."""

    shard_dims = {"weight": 0, "scales": 0, "zeros": 0}  # noqa: RUF012


class Int4RowParallelLinear(Int4, RowParallelLinear):
    """Each rank has some columns, in whole groups."""

    shard_dims = {"weight": 1, "scales": 1, "zeros": 1}  # noqa: RUF012
