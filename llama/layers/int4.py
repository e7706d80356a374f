"""int4 layers. A CPU multiplies few rows of activations, in digits as int8 has, with weights in tiles, which it unpacks
for many; or with torch's packed form, where the tiles' operators cannot be compiled.

One prompt is decoded at more than twice the speed of bfloat16 (docs/SPEED.md).
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import nn

from ..runtime import device_kind
from . import own_kernels, proven
from .parallel import ColumnParallelLinear, RowParallelLinear
from .quantized import STORED_ROWS, WIDENED, refuse_gradients
from .rounding import REFINEMENTS, dequantized, pairs, to_int4, unpair
from .tiles import InTiles, to_tiles


class Int4(InTiles):
    """(n - 8) * scale + zero, with a scale and a zero for each group of a row. See `Quantized` for the methods."""

    kind = "int4"
    bits = 4
    weight: nn.Parameter  # uint8 (rows, columns / 2), or tiles, uint8 (tiles, bytes), or torch's packed form
    scales: Optional[nn.Parameter]  # bfloat16 (rows, columns / group); None if packed
    zeros: Optional[nn.Parameter]  # the same
    scales_and_zeros: nn.Parameter  # bfloat16 (columns / group, rows, 2); only in torch's form
    group_columns: int

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

    def rounded(self, weight: torch.Tensor, maxima: Optional[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        made: tuple[torch.Tensor, ...] = torch.ops.llama_cpu.round_int4(weight, self.group_columns, REFINEMENTS)
        return made

    def round(self, block: torch.Tensor, maxima: Optional[torch.Tensor], into: dict[str, torch.Tensor]) -> None:
        numbers, scales, zeros = to_int4(block, self.group_columns)
        for name, made in (("weight", pairs(numbers)), ("scales", scales), ("zeros", zeros)):
            into[name].copy_(made)

    def plain(self) -> dict[str, torch.Tensor]:
        if not self.packed:
            assert self.scales is not None
            assert self.zeros is not None
            return {"weight": self.weight, "scales": self.scales, "zeros": self.zeros}
        if self.in_tiles:
            weight, (scales, zeros) = self.from_tiles()
            return {"weight": weight, "scales": scales, "zeros": zeros}
        scales, zeros = self.scales_and_zeros.permute(2, 1, 0).contiguous()
        # The product with a unit matrix shows the numbers, whatever the packed layout is.
        ones = torch.zeros_like(self.scales_and_zeros)
        ones[..., 0] = 1
        columns = len(self.scales_and_zeros) * self.group_columns
        unit = torch.eye(columns, dtype=torch.bfloat16, device=self.device)
        shown = [self._torchs(some, ones).t() for some in unit.split(64)]
        return {"weight": pairs(torch.cat(shown, 1).add_(8).to(torch.uint8)), "scales": scales, "zeros": zeros}

    def pack(self, dtype: torch.dtype) -> list[torch.Tensor]:
        assert self.scales is not None
        assert self.zeros is not None
        before = [self.weight.detach(), self.scales.detach(), self.zeros.detach()]
        self.in_tiles = False
        if device_kind(self.device) == "cpu" and own_kernels.loaded():
            self.hold_tiles(to_tiles(*before))
            return before
        packed = None if dtype == torch.float32 else self._packed_weight()
        self.packed = packed is not None
        if packed is not None:
            both = torch.stack((self.scales.detach().t(), self.zeros.detach().t()), dim=-1).contiguous()
            self.scales = self.zeros = None
            self.weight = nn.Parameter(packed, requires_grad=False)
            self.scales_and_zeros = nn.Parameter(both, requires_grad=False)
            return before
        return []

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
        elif self.in_tiles:
            y = self.exact_product(flat)
        else:
            y = self._torchs(flat.bfloat16(), self.scales_and_zeros).to(x.dtype)
        return y.view(*x.shape[:-1], -1)

    def _torchs(self, x: torch.Tensor, scales_and_zeros: torch.Tensor) -> torch.Tensor:
        return torch._weight_int4pack_mm_for_cpu(x.contiguous(), self.weight, self.group_columns, scales_and_zeros)

    def _generic(self, x: torch.Tensor) -> torch.Tensor:
        """x (M, columns) -> (M, rows) in x's own dtype. A CPU dequantizes some rows of the matrix at a time."""
        assert self.scales is not None
        assert self.zeros is not None
        if device_kind(x) == "cuda":
            if len(x) <= STORED_ROWS:
                return proven.product_int4(x.contiguous(), self.weight, self.scales, self.zeros)
            return F.linear(x, proven.dequantize_int4(self.weight, self.scales, self.zeros, x.dtype))
        step = max(1, WIDENED // x.shape[1]) if device_kind(x) == "cpu" else len(self.weight)
        parts = zip(self.weight.split(step), self.scales.split(step), self.zeros.split(step))
        return torch.cat([F.linear(x, dequantized(*part, x.dtype)) for part in parts], dim=-1)


class Int4ColumnParallelLinear(Int4, ColumnParallelLinear):
    """Each rank has some rows, with their scales and zeros."""

    shard_dims = {"weight": 0, "scales": 0, "zeros": 0}  # noqa: RUF012


class Int4RowParallelLinear(Int4, RowParallelLinear):
    """Each rank has some columns, in whole groups."""

    shard_dims = {"weight": 1, "scales": 1, "zeros": 1}  # noqa: RUF012
