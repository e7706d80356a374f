"""x Wᵀ in bfloat16 on a CPU, faster than torch's `F.linear`, which multiplies everything else.

The gain: one row reads the weights at up to 1.4 times the speed. On processors that multiply tiles, few rows are 1.2 to
1.6 times as fast, and up to 640 rows 1.1 times, if their result may lie in any order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..runtime import device_kind

# Whether the processor multiplies tiles (Intel's AMX). If so, oneDNN and fused attention are the fastest for one row
# too; on other processors they are far from it.
AMX: bool = getattr(torch.cpu, "_is_amx_tile_supported", bool)()

# With AMX, W Xᵀ is faster than X Wᵀ for up to FEW rows of x; also for up to MANY, if the result need not be put in
# order and W has at least WIDE rows and columns.
FEW, MANY, WIDE = 128, 640, 2048

# Most columns of W that Inductor's own loop sums in a compiled step of one row. For more it writes another loop.
SUMMED = 4096


def product(x: torch.Tensor, weight: torch.Tensor, any_order: bool = False) -> torch.Tensor:
    """x Wᵀ: x (..., in_features), weight (out_features, in_features) -> (..., out_features).

    any_order: the result may lie in memory feature by feature, if that is faster; elementwise operations are as fast on
    it.
    """
    if x.dtype != torch.bfloat16 or weight.dtype != x.dtype or device_kind(x) != "cpu":  # autocast: two dtypes
        return F.linear(to_memory(x), weight)
    flat = x.reshape(-1, x.shape[-1])  # (M, in_features)
    if flat.shape[0] == 1:
        return _one_row(flat[0], weight).view(*x.shape[:-1], -1)
    few = torch.compiler.is_compiling() or flat.shape[0] <= FEW  # a compiled step has a size that is not known yet
    if AMX and (few or is_by_feature(x) or (any_order and flat.shape[0] <= MANY and min(weight.shape) >= WIDE)):
        # oneDNN rearranges its second matrix before it multiplies: in W Xᵀ that is the small one.
        y = torch.mm(weight, flat.t()).t()
        return (y if any_order else y.contiguous()).unflatten(0, x.shape[:-1])
    return F.linear(x, weight)


def to_memory(x: torch.Tensor) -> torch.Tensor:
    """x, forced into memory; otherwise Inductor recomputes the norm or SiLU that made x for every row of W."""
    return x.as_strided(x.shape, x.stride()) if torch.compiler.is_compiling() else x


def is_by_feature(x: torch.Tensor) -> bool:
    """Whether x lies in memory feature by feature, not row by row."""
    return x.stride(-1) != 1


def _one_row(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(in_features,) -> (out_features,): a product of a matrix and a vector, not of two matrices."""
    if not torch.compiler.is_compiling():
        return torch.mv(weight, x)
    # A compiler would write a slower loop for `mv`; it cannot look into an operator.
    if not AMX:
        return one_row(x, weight)
    if weight.shape[1] <= SUMMED:
        # Eight chunks: oneDNN needs 20 microseconds to begin, which is as long as a small matrix takes.
        x32 = to_memory(x.float())
        return torch.cat([(some.float() * x32).sum(-1) for some in weight.chunk(8)]).to(x.dtype)
    return torch.mm(weight, x.expand(2, -1).t())[:, 0]  # a product of two equal rows is as fast as `mv`


@torch.library.custom_op("llama::one_row", mutates_args=())
def one_row(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`torch.mv` that no compiler looks into."""
    return torch.mv(weight, x)


@one_row.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(weight.shape[0])
