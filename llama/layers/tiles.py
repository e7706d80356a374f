"""Weights in the tiles that `cpu_kernels.cpp` reads in order, and back: `cpu_products.h` says how a tile is made. And
the base of the layers that multiply with them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Optional, cast

import torch
from torch import nn

from . import own_kernels
from .quantized import STORED_ROWS, Quantized
from .rounding import TILE, pairs

FEW_ROWS = {4: STORED_ROWS, 8: 256}  # of activations, by bits; for more, it may pay to make bfloat16 of the weights
UNPACKED = 2**20  # numbers that are unpacked at a time, so that they stay in a cache
SIDE = 512  # rows and columns of the matrix that ways are tried with


class InTiles(Quantized):
    """The base of layers whose weights a CPU may read in tiles. See `Quantized` for the methods."""

    bits: int
    group_columns: Optional[int] = None  # None: whole rows, whose scales lie apart
    in_tiles = False
    rows: int  # rows, and columns of a group, of this rank's matrix; only if it is in tiles
    columns_of_group: int

    def hold_tiles(self, weight: torch.Tensor) -> None:
        """Take a weight that is in tiles, uint8 (tiles, bytes), in place of the stored one."""
        self.rows, columns = cast(torch.Tensor, self.weight).shape
        self.columns_of_group = self.group_columns or columns
        kept = None if self.group_columns else self._parameters["scales"]
        for name in list(self._parameters):
            self._parameters[name] = None
        self._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        if kept is not None:
            self._parameters["scales"] = kept
        self.packed = self.in_tiles = True

    def for_step(self) -> Optional[tuple[torch.Tensor, int, Optional[torch.Tensor]]]:
        return (self._tiles(), self.columns_of_group, self._parameters.get("scales")) if self.in_tiles else None

    def from_tiles(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The weight, and the tensors that the tiles have for each group."""
        return from_tiles(self._tiles(), self.rows, self.bits, self.columns_of_group, 1 if self.bits == 8 else 2)

    def exact_product(self, x: torch.Tensor) -> torch.Tensor:
        """x (M, columns) -> (M, rows), where x is not rounded to 8 bits."""
        scales = self._parameters.get("scales")
        of_rows = x.new_empty(1, 0, dtype=torch.float32) if scales is None else scales.view(1, -1)
        given = self._tiles(), of_rows, self.rows, self.bits, self.columns_of_group
        many = not torch.compiler.is_compiling() and len(x) > FEW_ROWS[self.bits]
        if many and x.dtype == torch.bfloat16:
            return for_many(self.bits)(x.contiguous(), *given)
        known = own_kernels.in_known_type(x).contiguous()
        y: torch.Tensor = torch.ops.llama_cpu.exact_product(known, *given)
        return y.to(x.dtype)

    def _tiles(self) -> torch.Tensor:
        return cast(torch.Tensor, self.weight).detach()


def _unpacked_product(
    x: torch.Tensor, tiles: torch.Tensor, scales: torch.Tensor, rows: int, bits: int, group: int
) -> torch.Tensor:
    """x bfloat16 (M, columns) times the matrix in bfloat16, of which some tiles at a time are unpacked."""
    columns = x.shape[1]
    y = x.new_empty(len(x), rows)
    step = max(1, UNPACKED // (TILE * columns))
    for i in range(0, len(tiles), step):
        some = slice(i * TILE, min(rows, (i + step) * TILE))
        weight = _room(columns, some.stop - some.start)
        torch.ops.llama_cpu.unpack_(weight, tiles[i : i + step], scales[:, some].contiguous(), bits, group)
        torch.mm(x, weight, out=y[:, some])
    return y


_rooms = threading.local()


def _room(rows: int, columns: int) -> torch.Tensor:
    """bfloat16 (rows, columns) without numbers, in memory that this thread keeps for the next one."""
    kept: Optional[torch.Tensor] = getattr(_rooms, "numbers", None)
    if kept is None or len(kept) < rows * columns:
        with torch.inference_mode(False):
            kept = _rooms.numbers = torch.empty(max(UNPACKED, rows * columns), dtype=torch.bfloat16, device="cpu")
    return kept[: rows * columns].view(rows, columns)


@lru_cache
def for_many(bits: int) -> Callable[..., torch.Tensor]:
    """What multiplies more than FEW_ROWS fastest: with weights that become bfloat16, in our own operator, or by torch
    where the processor multiplies matrices of bfloat16 (AMX); where neither is fast, in digits. Each is preferred to
    the next unless it takes twice as long: then no noise decides, and every run has the same numbers."""
    group = SIDE if bits == 8 else TILE
    ones = partial(torch.ones, device="cpu")
    numbers = ones(SIDE, SIDE * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
    of_groups = ones(SIDE, SIDE // group, dtype=torch.bfloat16)
    tiles = to_tiles(numbers, of_groups) if bits == 8 else to_tiles(numbers, of_groups, of_groups)
    given = tiles, ones(1, 0, dtype=torch.float32), SIDE, bits, group
    x = ones(2 * FEW_ROWS[bits], SIDE, dtype=torch.bfloat16)
    cpu = torch.ops.llama_cpu
    best: Callable[..., torch.Tensor] = cpu.bfloat16_product
    least = least_time(partial(best, x, *given))
    for way in (_unpacked_product, cpu.exact_product):
        if (seconds := least_time(partial(way, x, *given))) < least / 2:
            best, least = way, seconds
    return best


def least_time(run: Callable[[], Any], repeats: int = 9) -> float:
    """The least seconds of one thread's own time, since other processes may hold it up."""
    threads, times = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for _ in range(repeats):
            began = time.thread_time()
            run()
            times.append(time.thread_time() - began)
    finally:
        torch.set_num_threads(threads)
    return min(times)


def to_tiles(weight: torch.Tensor, scales: torch.Tensor, zeros: Optional[torch.Tensor] = None) -> torch.Tensor:
    """weight int8 (rows, columns), or uint8 (rows, columns / 2) as int4 is stored; scales, and zeros if it is int4,
    bfloat16 (rows, groups) -> uint8 (tiles, bytes), by an operator of `own_kernels`."""
    made: torch.Tensor = torch.ops.llama_cpu.to_tiles(weight, scales, scales if zeros is None else zeros)
    return made


def from_tiles(
    packed: torch.Tensor, rows: int, bits: int, group: int, count: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The weight and the scales (and zeros, if `count` is 2) that `to_tiles` was given. group: columns of a group."""
    sizes = [TILE * group * bits // 8, *[2 * TILE] * count]
    first, *others = packed.view(len(packed), -1, sum(sizes)).split(sizes, dim=2)
    fours = first.contiguous().view(torch.int32).unflatten(2, (-1, TILE)).permute(0, 3, 1, 2).flatten(2).flatten(0, 1)
    if bits == 8:
        weight = (fours.contiguous().view(torch.uint8) ^ 128).view(torch.int8)
    else:
        halves = fours & 0x0F0F0F0F, fours >> 4 & 0x0F0F0F0F
        weight = pairs(torch.stack(halves, dim=-1).flatten(1).view(torch.uint8))
    of_groups = [part.contiguous().view(torch.bfloat16).transpose(1, 2).flatten(0, 1) for part in others]
    return weight[:rows].contiguous(), [part[:rows].contiguous() for part in of_groups]
