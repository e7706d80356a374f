"""Products that give each row of activations the same bits, whatever the other rows hold and however many there are.

Libraries multiply another number of rows with another kernel, or cut the sums in another way. So what counts here is
the product of a block of a fixed number of rows; the last block is filled up. Other sizes of blocks are used too, once
they have given the same bits for a shape: a kernel that sums in another order shows in some of the many sums of random
numbers. Measured (CPU without AMX): bfloat16 gives the same bits from 2 rows on, float32 from 16 on, float16 and int8
at any number, so prompts lose little.
"""

from __future__ import annotations

from copy import copy
from typing import Any, Union, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..runtime import device_kind
from .quantized import STORED_ROWS, Quantized
from .rounding import pairs

Matrix = Union[torch.Tensor, nn.Module]  # a plain weight (out_features, in_features), or a layer

BLOCK = 16
CUBLAS_BLOCK = 64  # rows of a block that cuBLAS multiplies: they cost what one row does
MOST = 512  # rows of the largest block
# torch's elementwise operators on CPUs treat the last few numbers of a thread's share in another way, with another exp.
# So each call gets whole vectors, and too few for a second thread.
VECTORS, ONE_THREAD = 64, 32768


class Products:
    """Products with the matrices of one model."""

    def __init__(self) -> None:
        # A shape and a size of blocks -> whether this gives the bits of `BLOCK` rows
        self._same: dict[Any, bool] = {}
        self._plans: dict[Any, list[int]] = {}  # key: a shape and a number of rows -> the sizes of their blocks

    def __call__(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """x (N, in_features) -> (N, out_features)"""
        x = x.contiguous()
        weight = matrix if isinstance(matrix, torch.Tensor) else cast(torch.Tensor, matrix.weight)
        key = (
            *(type(matrix), weight.shape, weight.dtype),
            *((weight.stride(), weight.data_ptr() % 64) if not weight.is_mkldnn else ()),
            *(x.shape[1], x.dtype, x.device, torch.get_num_threads()),
        )
        plan = self._plans.get((key, len(x)))
        if plan is None:
            plan = self._plans[key, len(x)] = self._plan(len(x), key, x, matrix)
        parts, at = [], 0
        for size in plan:
            some = x[at : at + size]
            parts.append(_product(_filled(some, size), matrix)[: len(some)])
            at += size
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _plan(self, rows: int, key: Any, x: torch.Tensor, matrix: Matrix) -> list[int]:
        block, least, most = _sizes(x, matrix)
        if not self._gives_same_bits(block, key, x, matrix):
            raise ValueError(
                f"batch_invariant=True cannot be kept here: on {x.device} products in {x.dtype} depend on where a row "
                f"stands among {block}; build without it, or in another dtype"
            )
        plan: list[int] = []
        while (left := rows - sum(plan)) > 0:
            if left > block:
                sizes = [size for size in _powers(block, most)[::-1] if size <= left]
            else:
                sizes = [size for size in _powers(least, block) if size >= left]
            plan.append(next(size for size in sizes if self._gives_same_bits(size, key, x, matrix)))
        return plan

    def _gives_same_bits(self, size: int, key: Any, x: torch.Tensor, matrix: Matrix) -> bool:
        if (key, size) not in self._same:
            block = _sizes(x, matrix)[0]
            for count in (block, size):  # kernels prove themselves at first use: not with sums of nothing but rounding
                _product(_normal(count, x), matrix)
            rows, trial = _trial(x, matrix, max(size, block))
            expected = _in_blocks(rows, block, trial)
            if size != block:
                same = torch.equal(_in_blocks(rows, size, trial), expected)
            else:  # at every place, and beside what is not finite
                beside = rows.clone()
                beside[::2] = torch.nan
                same = torch.equal(_in_blocks(beside, block, trial)[1::2], expected[1::2]) and all(
                    torch.equal(_in_blocks(rows.roll(by, 0), block, trial), expected.roll(by, 0))
                    for by in range(1, block)
                )
            self._same[key, size] = same
        return self._same[key, size]


def _trial(x: torch.Tensor, matrix: Matrix, multiple: int) -> tuple[torch.Tensor, Matrix]:
    """As many random rows like those of x, and a matrix of this one's shape to multiply them with: every sum is that of
    terms and of the same terms with the other sign, in any order. What is left is nothing but rounding, so that even a
    result in 16 bits shows in which order it was summed."""
    generator, columns = torch.Generator(x.device).manual_seed(0), x.shape[1]
    order = torch.randperm(columns, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(x.device)

    def doubled(terms: torch.Tensor, sign: int, into: torch.Tensor) -> torch.Tensor:
        half = terms.shape[1]
        into[:, order[:half]], into[:, order[half : 2 * half]] = terms, terms * sign
        return into

    def normal(rows: int) -> torch.Tensor:
        return torch.empty(rows, columns // 2, dtype=x.dtype, device=x.device).normal_(generator=generator)

    rows = doubled(normal(multiple), -1, x.new_zeros(multiple, columns))
    if not isinstance(matrix, Quantized):
        weight = matrix if isinstance(matrix, torch.Tensor) else cast(torch.Tensor, matrix.weight)
        offset = weight.data_ptr() % 64 // weight.element_size()
        room = torch.zeros(weight.numel() + offset, dtype=weight.dtype, device=x.device)
        return rows, doubled(normal(len(weight)), 1, room[offset:].view(weight.shape))
    kind, least, end = (torch.uint8, 0, 16) if matrix.kind in ("int4", "w4a8") else (torch.int8, -127, 128)
    outputs = _product(x.new_zeros(BLOCK, columns), matrix).shape[1]
    terms = torch.empty(outputs, columns // 2, dtype=kind, device=x.device).random_(least, end, generator=generator)
    numbers = doubled(terms, 1, torch.zeros(outputs, columns, dtype=kind, device=x.device))
    twin = copy(matrix)  # shares its dictionaries, so its parameters get one of their own
    twin.packed, stored = False, matrix.empty(outputs, columns, x.device)
    stored["weight"] = numbers if kind == torch.int8 else pairs(numbers)
    stored["scales"].fill_(1)
    if "zeros" in stored:
        stored["zeros"].zero_()
    twin._parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in stored.items()}
    twin.pack(x.dtype)
    return rows, twin


def _normal(rows: int, x: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator(x.device).manual_seed(0)
    return torch.empty(rows, x.shape[1], dtype=x.dtype, device=x.device).normal_(generator=generator)


def _in_blocks(x: torch.Tensor, size: int, matrix: Matrix) -> torch.Tensor:
    return torch.cat([_product(some, matrix) for some in x.split(size)])


def _sizes(x: torch.Tensor, matrix: Matrix) -> tuple[int, int, int]:
    """The block that counts; the least and the largest that are tried."""
    on_gpu = device_kind(x) == "cuda"
    if isinstance(matrix, Quantized):
        return BLOCK, BLOCK if on_gpu else 1, STORED_ROWS
    return (CUBLAS_BLOCK, CUBLAS_BLOCK, MOST) if on_gpu else (BLOCK, 1, MOST)


def _powers(least: int, most: int) -> list[int]:
    """The powers of two from one to another."""
    return [1 << bits for bits in range(least.bit_length() - 1, most.bit_length())]


def _filled(x: torch.Tensor, rows: int) -> torch.Tensor:
    return x if len(x) == rows else F.pad(x, (0, 0, 0, rows - len(x)))


def _product(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    if isinstance(matrix, Quantized):
        return cast(torch.Tensor, cast(Any, matrix).product(x))
    return F.linear(x, matrix if isinstance(matrix, torch.Tensor) else cast(torch.Tensor, matrix.weight))


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`kernels.silu_mul` on a CPU: (N, 2 * width) -> (N, width)"""
    gate, up = gate_up.chunk(2, dim=-1)
    width = gate.shape[1]
    gate, up = (F.pad(x, (0, -width % VECTORS)) for x in (gate, up))
    some = zip(gate.flatten().split(ONE_THREAD), up.flatten().split(ONE_THREAD))
    return torch.cat([F.silu(part).mul_(other) for part, other in some]).view_as(gate)[:, :width]
