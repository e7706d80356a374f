"""The kinds of quantized numbers, and how weights are rounded to them.

int8: w = n * scale, one scale for each row of the full matrix.
int4: w = (n - 8) * scale + zero with n in 0 … 15, a scale and a zero for each group of neighbours in a row.
w8a8: w = n * scale, a scale for each group. w4a8: as int4. Both round activations too (see `one_digit`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch

from ..system.checks import whole
from ..system.printable import shortened

KINDS = ("int8", "int4", "w8a8", "w4a8")
EXACT = ("int8", "int4")  # the kinds that keep activations as they are; they run on any device
ALSO_CALLED = {"8": "int8", "4": "int4"}  # in text or as a number
GROUP_SIZE = 32  # with groups of 64 a 1.1B model is read 15 % faster, at 1.6 times the loss of quality
LEAST_GROUP = 16
TILE = 32  # rows of a tile, as CPUs read weights; the last tile is filled up. R of cpu_products.h
REFINEMENTS = 6


@dataclass(frozen=True)
class Quantization:
    """The kind of a model's quantized numbers, one of KINDS (or 8, 4); all but int8 use group_size. ValueError for
    others."""

    kind: str
    group_size: int = GROUP_SIZE

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", ALSO_CALLED.get(str(self.kind), self.kind))
        if self.kind not in KINDS:
            raise ValueError(
                f"quantize={shortened(self.kind)} is not supported; use {', '.join(map(repr, KINDS))}, or None"
            )
        size = whole(self.group_size)
        if size is None or not LEAST_GROUP <= size <= 256 or size & (size - 1):
            raise ValueError(
                f"group_size={shortened(self.group_size)} must be a power of two from {LEAST_GROUP} to 256"
            )
        object.__setattr__(self, "group_size", size)

    def group(self, in_features: int) -> Optional[int]:
        """The group size of a matrix with in_features columns: group_size, or the largest smaller power of two that
        divides.

        None if the matrix is int8: because of `kind`, or because its rows cannot be cut into groups of 16 or more.
        """
        largest = min(self.group_size, in_features & -in_features)
        return largest if self.kind != "int8" and largest >= LEAST_GROUP else None

    def kind_of(self, in_features: int, is_output: bool = False) -> str:
        """The kind of a matrix with in_features columns. The output matrix, which matters most for quality, has 8
        bits."""
        if self.group(in_features) is None:
            return "int8"
        return {"int4": "int8", "w4a8": "w8a8"}.get(self.kind, self.kind) if is_output else self.kind

    def check_device(self, device: torch.device) -> None:
        """ValueError if this kind cannot multiply on the device."""
        if self.kind not in EXACT and device.type not in ("cpu", "meta"):
            raise ValueError(
                f"{self.kind} multiplies on CPUs only, not on {device}; use quantize={EXACT[self.kind == 'w4a8']!r} "
                f"and the "
                "original weights, or device='cpu'"
            )

    def shares(self, in_features: int, parts: int) -> bool:
        """Whether rows of in_features numbers can be cut into `parts` of whole groups."""
        return in_features // parts % (self.group(in_features) or 1) == 0

    def check_parts(self, in_features: int, parts: int, what: str = "processes") -> None:
        """ValueError if rows cannot be shared by `parts`, which the message calls `what`; see `shares`."""
        if not self.shares(in_features, parts):
            group = self.group(in_features)
            good = [str(n) for n in range(1, parts) if in_features % n == 0 and self.shares(in_features, n)]
            raise ValueError(
                f"rows of {in_features} numbers in {self.kind} groups of {group} cannot be cut into whole groups by "
                f"{parts} {what}; use {' or '.join(good)}, or int8"
            )

    def nbytes(self, rows: int, columns: int, in_features: int, is_output: bool = False) -> int:
        """The bytes of `rows` x `columns` of a matrix with in_features columns."""
        group, kind = self.group(in_features), self.kind_of(in_features, is_output)
        if group is None or kind == "int8":
            return rows * (columns + 4)
        rows = -(-rows // TILE) * TILE
        return rows * (columns + 2 * columns // group if kind == "w8a8" else columns // 2 + 2 * 2 * columns // group)


def row_maxima(weight: torch.Tensor) -> torch.Tensor:
    """(rows, columns) -> float32 (rows,): the largest size in each row."""
    low, high = weight.aminmax(dim=1)
    return torch.maximum(-low, high).float()


def to_int8(weight: torch.Tensor, maxima: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (rows, columns) and its full rows' largest sizes (rows,) -> int8 of the same shape, float32 scales
    (rows,)."""
    scales = (maxima / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


def to_groups(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (rows, columns) -> int8 of the same shape, scales bfloat16 (rows, columns / group)."""
    parts = weight.reshape(len(weight), -1, group)
    scales = _stored(parts.abs().amax(-1) / 127, 2.0**-100)
    return (parts / scales[..., None]).round_().clamp_(-127, 127).to(torch.int8).view(weight.shape), scales.bfloat16()


def to_int4(weight: torch.Tensor, group: int, refinements: int = REFINEMENTS) -> tuple[torch.Tensor, ...]:
    """float32 (rows, columns) -> numbers 0 … 15 as uint8 (rows, columns), scales and zeros bfloat16 (rows, columns /
    group).

    Plain rounding spreads 16 steps evenly over a group's range. Each refinement fits scale and zero to the rounded
    numbers by least squares, and rounds again with them; each group keeps what gave the least squared error. This
    alternation is that of HQQ (Badri & Shaji 2023), which moves the zero alone, towards a robust norm: measured, that
    loses more quality (see benchmarks/quality.py for what this one loses).
    """
    w = weight.reshape(-1, group)
    low, high = w.aminmax(dim=1, keepdim=True)
    mean = w.mean(1, keepdim=True)
    centred = w - mean
    tiny = 2.0**-100
    scale, zero = _stored((high - low) / 15, tiny), torch.empty_like(low)
    zero = _bfloat16(low + 8 * scale)
    best = [torch.full_like(low, torch.inf), scale, zero]
    for step in range(refinements + 1):
        n = torch.addcmul(-zero / scale, w, 1 / scale).round_().clamp_(-8, 7)
        error = torch.addcmul(w - zero, n, scale, value=-1).square_().sum(1, keepdim=True)
        better = error < best[0]
        best = [torch.where(better, new, old) for new, old in zip((error, scale, zero), best)]
        if step < refinements:
            middle = n.mean(1, keepdim=True)
            spread = n.square().sum(1, keepdim=True) - group * middle.square()
            slope = n.mul_(centred).sum(1, keepdim=True) / spread.clamp_min(1e-6)
            scale = _stored(torch.where(spread > 0.5, slope, scale), tiny)
            zero = _bfloat16(mean - scale * middle)
    _, scale, zero = best
    n = torch.addcmul(-zero / scale, w, 1 / scale).round_().clamp_(-8, 7).add_(8).to(torch.uint8)
    shape = len(weight), -1
    return n.view(weight.shape), scale.bfloat16().view(shape), zero.bfloat16().view(shape)


def _bfloat16(x: torch.Tensor) -> torch.Tensor:
    """x as it will be stored: the numbers are rounded with that."""
    return x.bfloat16().float()


def _stored(scale: torch.Tensor, least: float) -> torch.Tensor:
    return _bfloat16(scale.clamp_min(least))


def pairs(numbers: torch.Tensor) -> torch.Tensor:
    """0 … 15 (rows, columns) -> uint8 (rows, columns / 2), the left one of each two in the upper half."""
    return numbers[:, ::2] << 4 | numbers[:, 1::2]


def unpair(packed: torch.Tensor) -> torch.Tensor:
    """`pairs` backwards: uint8 (rows, columns / 2) -> (rows, columns)."""
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1)


def dequantized(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight uint8 (rows, columns / 2), scales and zeros bfloat16 (rows, columns / group) -> (rows, columns) in
    `dtype`."""
    numbers = unpair(weight).view(torch.int8).sub_(8).to(dtype).unflatten(1, (scales.shape[1], -1))
    return torch.addcmul(zeros.to(dtype)[..., None], numbers, scales.to(dtype)[..., None]).flatten(1)
