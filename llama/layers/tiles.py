"""Weights in the tiles that `cpu_kernels.cpp` reads in order, and back. That file says how a tile is made."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .rounding import TILE, pairs, unpair


def to_tiles(weight: torch.Tensor, *of_groups: torch.Tensor) -> torch.Tensor:
    """weight int8 (rows, columns), or uint8 (rows, columns / 2) as int4 is stored; scales, and zeros if there are any,
    bfloat16 (rows, groups) -> uint8 (tiles, bytes). The weights go four at a time, as one number of 32 bits."""
    weight, *padded = (F.pad(t, (0, 0, 0, -len(weight) % TILE)) for t in (weight, *of_groups))
    tiles, groups = len(weight) // TILE, padded[0].shape[1]
    if weight.dtype == torch.int8:
        fours = (weight.view(torch.uint8) ^ 128).view(torch.int32)
    else:
        left, right = unpair(weight).view(torch.int32).unflatten(1, (-1, 2)).unbind(-1)
        fours = left | right << 4
    parts = [fours.view(tiles, TILE, groups, -1).permute(0, 2, 3, 1).flatten(2).view(torch.uint8)]
    parts += [t.view(tiles, TILE, groups).transpose(1, 2).contiguous().view(torch.uint8) for t in padded]
    return torch.cat(parts, dim=2).flatten(1)


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
