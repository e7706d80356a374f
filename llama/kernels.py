"""Products with quantised weights in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .rounding import dequantized


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
    """As `product`, with weight int8 (N, K) and scales float32 (N,)."""
    y = (F.linear(x.float(), weight.float()) * scales).type_as(x)
    return silu_mul(y) if gated else y


def product_int4(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, gated: bool = False
) -> torch.Tensor:
    """As `product`, with weight uint8 (N, K / 2), the left of two columns in the upper half of a byte, and bfloat16 scales
    and zeros (N, K / group): (n - 8) * scale + zero."""
    return product(x, dequantize_int4(weight, scales, zeros, x.dtype), gated)


def dequantize_int4(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight uint8 (N, K / 2), scales and zeros bfloat16 (N, K / group) -> (N, K) in dtype."""
    return dequantized(weight, scales, zeros, dtype)
