"""How a CPU multiplies activations with a matrix, x Wᵀ in bfloat16; everything else goes to torch's `F.linear`.

The gain over `F.linear`: one row reads the weights at up to 1.4 times the speed. On processors that multiply tiles, few rows
are 1.2 to 1.6 times as fast, and up to 640 rows 1.1 times, if their result may lie in any order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..runtime import device_kind

# Whether the processor multiplies tiles (Intel's AMX). There oneDNN and fused attention are the fastest with one row too,
# which they are far from being elsewhere.
AMX: bool = getattr(torch.cpu, "_is_amx_tile_supported", bool)()

# Where W Xᵀ is faster than X Wᵀ there: with few rows of x always, with more if the result need not be put in order and
# neither side of W is short.
FEW, MANY, WIDE = 128, 640, 2048

# One row, compiled: rows of up to so many numbers are summed in Inductor's own loop, which it writes differently for longer.
SUMMED = 4096


def product(x: torch.Tensor, weight: torch.Tensor, any_order: bool = False) -> torch.Tensor:
    """x Wᵀ: x (..., in_features), weight (out_features, in_features) -> (..., out_features).

    any_order: the numbers of a feature may lie together in the result, if it is faster so. (To elementwise operations it
    is all the same.)
    """
    if device_kind(x) != "cpu" or x.dtype != torch.bfloat16 or weight.dtype != x.dtype:  # autocast: two dtypes
        return F.linear(to_memory(x), weight)
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 1:
        return _one_row(rows[0], weight).view(*x.shape[:-1], -1)
    few = torch.compiler.is_compiling() or rows.shape[0] <= FEW  # compiled is a step of the batch, of any size
    if AMX and (few or is_by_feature(x) or (any_order and rows.shape[0] <= MANY and min(weight.shape) >= WIDE)):
        # W Xᵀ: oneDNN rearranges its second matrix before it multiplies, here the small one.
        y = torch.mm(weight, rows.t()).t()
        return (y if any_order else y.contiguous()).unflatten(0, x.shape[:-1])
    return F.linear(x, weight)


def to_memory(x: torch.Tensor) -> torch.Tensor:
    """Keeps Inductor from computing what made x, a norm or SiLU, anew for every row of the matrix that x is multiplied with."""
    return x.as_strided(x.shape, x.stride()) if torch.compiler.is_compiling() else x


def is_by_feature(x: torch.Tensor) -> bool:
    """Whether the numbers of a feature lie together, not those of a row."""
    return x.stride(-1) != 1


def _one_row(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(in_features,) -> (out_features,): a product of a matrix and a vector, not of two matrices."""
    if not torch.compiler.is_compiling():
        return torch.mv(weight, x)
    # Compilers make something slower of that, unless they are kept from looking into it.
    if not AMX:
        return one_row(x, weight)
    if weight.shape[1] <= SUMMED:
        # Eight rows at a time: oneDNN takes 20 microseconds to begin, as long as a small matrix takes.
        x32 = to_memory(x.float())
        return torch.cat([(some.float() * x32).sum(-1) for some in weight.chunk(8)]).to(x.dtype)
    return torch.mm(weight, x.expand(2, -1).t())[:, 0]  # of two rows, as fast as `mv`


@torch.library.custom_op("llama::one_row", mutates_args=())
def one_row(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.mv(weight, x)


@one_row.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(weight.shape[0])
