"""int8 layers. CPUs multiply int8 with int8 fast, and exactly, so there activations are first written as int8 digits.
Weights lie in tiles, or as oneDNN packs them, whichever is faster.

One prompt is decoded at 1.5 times the speed of bfloat16 (docs/SPEED.md). torchao's int8 reads 1 to 10 billion weights a
second on a CPU, where this reads 25 on two cores.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import nn

from ..runtime import device_kind
from . import kernels, own_kernels, proven
from .parallel import ColumnParallelLinear, RowParallelLinear
from .quantized import PIECE, STORED_ROWS, WIDENED, refuse_gradients
from .rounding import row_maxima, to_int8
from .tiles import SIDE, InTiles, least_time, to_tiles

FEW_ROWS = 64  # rows of activations; for more, reading the weights once for all digits no longer pays
BASE = 254  # base of the activations' digits: each is off by at most half a step; the next one carries the remainder
BLOCK_ROWS = 2048  # rows of activations that the product takes at a time, because their digits take twice their memory
PLAIN = 2**21  # most numbers of a matrix that oneDNN need not pack


class Digits(NamedTuple):
    """Activations (M, columns): each number is a whole number in base 254, the highest digit first, times its row's
    unit."""

    numbers: torch.Tensor  # int8 (2 or 3, M, columns)
    unit: torch.Tensor  # float32 (M, 1)


def in_digits(x: torch.Tensor) -> Digits:
    """x (M, columns) as whole numbers: of 15 bits in 2 digits, or for float32 of 23 bits in 3."""
    count = 3 if x.dtype == torch.float32 else 2
    numbers = x.new_empty((count, *x.shape), dtype=torch.int8)
    unit = x.new_empty(len(x), 1, dtype=torch.float32)
    step = max(1, 2 * PIECE // x.shape[-1])
    for i in range(0, len(x), step):
        some = slice(i, i + step)
        rest = x[some].float()
        largest = rest.abs().amax(-1, keepdim=True).clamp_min_(1e-30)  # infinity and NaN go from here into the result
        torch.mul(largest, 1 / (127 * BASE ** (count - 1)), out=unit[some])
        rest = rest * (127 / largest)
        numbers[0, some] = rounded = rest.round()
        for digit in numbers[1:, some]:
            digit.copy_(rounded := rest.sub_(rounded).mul_(BASE).round())
    return Digits(numbers, unit)


class Int8(InTiles):
    """n * scale, with one scale for each row. See `Quantized` for the methods."""

    kind = "int8"
    bits = 8
    weight: nn.Parameter  # int8 (rows, columns), or oneDNN's packed form, or tiles, uint8 (tiles, bytes)
    scales: nn.Parameter  # float32 (rows,)

    def empty(self, rows: int, columns: int, device: torch.device) -> dict[str, torch.Tensor]:
        return {
            "weight": torch.empty(rows, columns, dtype=torch.int8, device=device),
            "scales": torch.empty(rows, dtype=torch.float32, device=device),
        }

    def rounded(self, weight: torch.Tensor, maxima: Optional[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        of_rows = weight.new_empty(1, 0, dtype=torch.float32) if maxima is None else maxima.view(1, -1)
        made: tuple[torch.Tensor, ...] = torch.ops.llama_cpu.round_int8(weight, of_rows)
        return made

    def round(self, block: torch.Tensor, maxima: Optional[torch.Tensor], into: dict[str, torch.Tensor]) -> None:
        for name, numbers in zip(("weight", "scales"), to_int8(block, row_maxima(block) if maxima is None else maxima)):
            into[name].copy_(numbers)

    def plain(self) -> dict[str, torch.Tensor]:
        weight = self.weight.detach()
        if self.in_tiles:
            weight, _ = self.from_tiles()
        elif weight.is_mkldnn:
            weight = weight.to_dense().t().contiguous()
        return {"weight": weight, "scales": self.scales}

    def pack(self, dtype: torch.dtype) -> list[torch.Tensor]:
        before = self.weight.detach()
        self.in_tiles = False
        on_cpu = device_kind(before) == "cpu"
        takes_onednn = on_cpu and onednn_is_exact()
        if on_cpu and before.shape[1] % 8 == 0 and own_kernels.loaded() and not (takes_onednn and onednn_is_fast()):
            ones = before.new_ones(len(before), 1, dtype=torch.bfloat16)  # the scales of whole rows stay as they are
            self.hold_tiles(to_tiles(before, ones))
            return [before]
        self.packed = takes_onednn
        if takes_onednn and before.numel() > PLAIN and onednn_is_fast():
            self.weight = nn.Parameter(torch.ops.onednn.qlinear_prepack(before, None), requires_grad=False)
            return [before]
        return []

    def shared(self, x: torch.Tensor) -> Optional[Digits]:
        flat = x.reshape(-1, x.shape[-1])
        takes_digits = self.packed and not self.in_tiles
        return in_digits(flat) if takes_digits and len(flat) <= BLOCK_ROWS else None

    def product(self, x: torch.Tensor, shared: Optional[Digits] = None, any_order: bool = False) -> torch.Tensor:
        refuse_gradients(x)
        flat = x.reshape(-1, x.shape[-1])  # (M, columns)
        if not self.packed:
            y = self._generic(flat)
        elif self.in_tiles:
            y = self.exact_product(flat)
        elif len(flat) <= BLOCK_ROWS:
            y = self._of_digits(shared or in_digits(flat), x.dtype)
        else:
            y = torch.cat([self._of_digits(in_digits(some), x.dtype) for some in flat.split(BLOCK_ROWS)])
        return y.view(*x.shape[:-1], -1)

    def _of_digits(self, digits: Digits, dtype: torch.dtype) -> torch.Tensor:
        product = int8_product_op if torch.compiler.is_compiling() else int8_product
        return product(digits.numbers, self.weight, self.scales).mul_(digits.unit).to(dtype)

    def _generic(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if device_kind(weight) == "cpu" and len(x) <= FEW_ROWS and hasattr(torch, "_weight_int8pack_mm"):
            ones = torch.ones(len(weight), dtype=x.dtype)
            y = torch._weight_int8pack_mm(x.contiguous(), weight, ones)
        elif device_kind(weight) == "cpu":  # the whole matrix never lies in memory in the wider dtype
            step = max(1, WIDENED // weight.shape[1])
            y = torch.cat([F.linear(x, part.to(x.dtype)) for part in weight.split(step)], dim=-1)
        else:
            product = proven.product_int8 if len(x) <= STORED_ROWS else kernels.product_int8
            return product(x.contiguous(), weight, self.scales)
        return (y * self.scales).to(x.dtype)


def int8_product(digits: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """digits int8 (count, M, columns) of activations x, weight int8 (rows, columns) or prepacked, scales float32
    (rows,)
    -> x (weight * scales)ᵀ: float32 (M, rows)"""
    count, M, columns = digits.shape
    if not weight.is_mkldnn:
        flat = digits.view(-1, columns)
        whole = torch._int_mm(weight, flat.t()).t().contiguous() if M <= FEW_ROWS else torch._int_mm(flat, weight.t())
        y, *lower = (whole * scales).view(count, M, -1).unbind()
    elif M <= FEW_ROWS:  # one product of all digits reads the weights once
        y, *lower = _qlinear(digits, weight, scales).unbind()
    else:  # each product adds to the one before
        y = _qlinear(digits[0], weight, scales, BASE ** (count - 1))
        for i in range(1, count):
            y = _qlinear(digits[i], weight, scales, BASE ** (count - 1 - i), y)
        return y
    for digit in lower:
        y = torch.add(digit, y, alpha=BASE)
    return y


def _qlinear(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, unit: float = 1.0, plus: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """x int8 (..., columns), packed int8 (columns, rows), scales float32 (rows,) -> float32 (..., rows), added to
    `plus`."""
    zeros = _no_zero_points(len(scales))
    if plus is None:
        return torch.ops.onednn.qlinear_pointwise(
            x, unit, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
    return torch.ops.onednn.qlinear_pointwise.binary(
        x, unit, 0, packed, scales, zeros, plus, None, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], ""
    )


# An operator, because the compiler does not know the layout of packed weights. It costs some microseconds a call.
int8_product_op = torch.library.custom_op("llama::int8_product", int8_product, mutates_args=())


@int8_product_op.register_fake
def _(digits: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return scales.new_empty(digits.shape[1], len(scales))


@lru_cache
def _no_zero_points(rows: int) -> torch.Tensor:
    return torch.zeros(rows, dtype=torch.int32, device="cpu")


@lru_cache
def onednn_is_exact() -> bool:
    """Whether oneDNN multiplies int8 fast on this CPU and without saturating: older CPUs add pairs in 16 bits."""
    if not torch.backends.mkldnn.is_available() or not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        return False
    try:
        weight = torch.full((64, 256), 127, dtype=torch.int8, device="cpu")
        weight[1::2] = -127
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        scales = torch.ones(64, dtype=torch.float32, device="cpu")
        for rows in (1, 2, FEW_ROWS + 1):
            digits = torch.full((2, rows, 256), -128, dtype=torch.int8, device="cpu")
            digits[0] = 1
            digits[1, :, ::2] = 127 * (torch.arange(rows, device="cpu")[:, None] % 2)
            expected = (BASE * digits[0].float() + digits[1].float()) @ weight.float().t()  # all below 2^24
            if not all(torch.equal(int8_product(digits, form, scales), expected) for form in (weight, packed)):
                return False
        return torch.equal(packed.to_dense().t(), weight)
    except (AttributeError, RuntimeError):
        return False


@lru_cache
def onednn_is_fast() -> bool:
    """Whether oneDNN's packed int8 is faster here than tiles, or without them than its plain form. On processors that
    multiply bytes of one sign with bytes of another only, it takes 200 times as long (measured: 50 ms for a row of 768
    x 768)."""
    ones = partial(torch.ones, device="cpu")
    weight, scales = ones(SIDE, SIDE, dtype=torch.int8), ones(SIDE, dtype=torch.float32)
    x = ones(16, SIDE, dtype=torch.bfloat16)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    tiles = own_kernels.loaded() and to_tiles(weight, ones(SIDE, 1, dtype=torch.bfloat16))

    def otherwise(x: torch.Tensor) -> torch.Tensor:
        if tiles is False:
            return int8_product(in_digits(x).numbers, weight, scales)
        return torch.ops.llama_cpu.exact_product(x, tiles, scales.view(1, -1), SIDE, 8, SIDE)

    def of_onednn(x: torch.Tensor) -> torch.Tensor:
        return int8_product(in_digits(x).numbers, packed, scales)

    # For an answer, and for several. Where both are alike, noise must not decide: their last bits differ.
    return all(least_time(partial(of_onednn, x[:n])) < 0.7 * least_time(partial(otherwise, x[:n])) for n in (1, len(x)))


class Int8ColumnParallelLinear(Int8, ColumnParallelLinear):
    """Each rank has some rows, with their scales."""

    shard_dims = {"weight": 0, "scales": 0}  # noqa: RUF012


class Int8RowParallelLinear(Int8, RowParallelLinear):
    """Each rank has some columns, and the scales of the full rows."""

    shard_dims = {"weight": 1, "scales": None}  # noqa: RUF012
