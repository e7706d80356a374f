"""The parts of a decode step in plain torch, for any device. `triton_kernels` has each in one or two launches.

Both files have the same names and arguments, and round at the same places. Letters in shapes:
    B  rows of the batch                  H  query heads          T  columns of the cache
    N, K  rows and columns of a matrix    K  key/value heads      D  size of a head
"""

from __future__ import annotations

import math
from typing import Optional

import torch
import torch.nn.functional as F

from .rounding import dequantized


def add_norm(
    x: torch.Tensor, delta: Optional[torch.Tensor], weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, delta (B, dim), weight (dim,) -> x + delta (x itself if delta is None) and its RMSNorm, (B, dim)."""
    h = x if delta is None else x + delta
    return h, F.rms_norm(h, h.shape[-1:], None, eps) * weight


def rotate_and_store(
    qkv: torch.Tensor,
    rotations: torch.Tensor,
    positions: torch.Tensor,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor,
    slots: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Turn q and k by their positions, and write k and v into the cache: row i of the batch into slot slots[i], or i.

    qkv (B, (H + 2K) * D); rotations float32 (max_seq_len, D/2, 2), cosines and sines; positions, slots int64 (B,);
    cache_k, cache_v (at least B, T, K, D), any strides -> q (B, H, D).
    """
    B, K, D = len(qkv), *cache_k.shape[2:]
    H = qkv.shape[1] // D - 2 * K
    q, k, v = qkv.view(B, -1, D).split((H, K, K), dim=1)
    cos, sin = rotations[positions][:, None].unbind(-1)  # (B, 1, D/2)

    def turn(x: torch.Tensor) -> torch.Tensor:
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)

    slots = torch.arange(B, device=qkv.device) if slots is None else slots
    cache_k[slots, positions] = turn(k)
    cache_v[slots, positions] = v
    return turn(q)


def attend(
    q: torch.Tensor,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor,
    positions: torch.Tensor,
    processors: Optional[int] = None,
    slots: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Grouped-query attention of one query per row over the columns up to its position.

    q (B, H, D); cache_k, cache_v (at least B, T, K, D), any strides; positions int64 (B,) -> (B, H * D).
    processors: used by the Triton form alone. slots int64 (B,): the cache row of each row; 0 … B-1 if not given.
    """
    B, H, D = q.shape
    T, K = cache_k.shape[1:3]
    k, v = ((c[:B] if slots is None else c[slots]).transpose(1, 2) for c in (cache_k, cache_v))  # (B, K, T, D)
    hidden = (torch.arange(T, device=q.device) > positions[:, None])[:, None]  # (B, 1, T)
    scores = (q.view(B, K, H // K, D) @ k.transpose(2, 3)) / math.sqrt(D)  # (B, K, H/K, T)
    weights = scores.masked_fill(hidden[:, None], -math.inf).float().softmax(-1).type_as(q)
    return (weights @ v.masked_fill(hidden[..., None], 0)).view(B, H * D)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """(B, 2 * width), gate and up side by side -> silu(gate) * up, (B, width)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def product(x: torch.Tensor, weight: torch.Tensor, gated: bool = False) -> torch.Tensor:
    """x (B, K), weight (N, K) in x's dtype -> x weightᵀ, (B, N).

    gated: weight is w1 above w3, (2N, K) -> silu(x w1ᵀ) * (x w3ᵀ), (B, N)
    """
    y = F.linear(x, weight)
    return silu_mul(y) if gated else y


def product_int8(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, gated: bool = False) -> torch.Tensor:
    """`product` with weight int8 (N, K) and scales float32 (N,)."""
    # Dividing by 128 is exact, and keeps sums of float16 in range, whose weights go up to 127.
    y = (F.linear(x / 128, weight.type_as(x)) * (scales * 128)).type_as(x)
    return silu_mul(y) if gated else y


def product_int4(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, gated: bool = False
) -> torch.Tensor:
    """`product` with weight uint8 (N, K / 2), the left of two columns in the upper half of a byte, and bfloat16 scales
    and zeros (N, K / group): (n - 8) * scale + zero."""
    return product(x, dequantize_int4(weight, scales, zeros, x.dtype), gated)


def dequantize_int4(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """weight uint8 (N, K / 2), scales and zeros bfloat16 (N, K / group) -> (N, K) in dtype."""
    return dequantized(weight, scales, zeros, dtype)
