"""`Transformer.step` on a GPU: nine launches a layer for one row, up to eleven for more, in place of twenty-eight.

It reads the model's tensors itself and calls no module, so it is used only while the model is as it was built.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Optional, Union, cast

import torch
import torch.nn.functional as F

from ..layers import proven
from ..layers.int4 import Int4
from ..layers.int8 import Int8
from ..layers.parallel import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear, all_reduce
from ..layers.quantized import STORED_ROWS, Quantized
from ..model import Attention, FeedForward, RMSNorm, Transformer, TransformerBlock

LAYERS = (ParallelEmbedding, ColumnParallelLinear, RowParallelLinear)
OURS = (Transformer, TransformerBlock, Attention, FeedForward, RMSNorm, torch.nn.ModuleList, *LAYERS)

CUBLAS_ROWS = 17  # rows of activations from which on cuBLAS multiplies with plain weights


def suits(model: Transformer) -> bool:
    """Whether the model has only modules that are known here, with joined matrices, on a GPU that has the kernels."""
    ours = all(type(module) in OURS or isinstance(module, Quantized) for module in model.modules())
    blocks = [module for module in model.modules() if isinstance(module, (Attention, FeedForward))]
    return ours and all(_joined(block) is not None for block in blocks) and proven.usable(model.norm.weight)


def step(
    model: Transformer, tokens: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor, rotations: torch.Tensor
) -> torch.Tensor:
    """`Transformer.step`, but without need of `columns`: the positions tell how much of the cache to read."""
    group = model.output.group
    h = model.tok_embeddings(tokens)  # (B, dim)
    delta: Optional[torch.Tensor] = None  # the next summand of h
    for layer in cast(Iterable[TransformerBlock], model.layers):
        attention, feed_forward = layer.attention, layer.feed_forward
        h, x = proven.add_norm(h, delta, layer.attention_norm.weight, layer.attention_norm.eps)
        qkv = multiply(x, _joined(attention))
        q = proven.rotate_and_store(qkv, rotations, positions, attention.cache_k, attention.cache_v)
        x = proven.attend(q, attention.cache_k, attention.cache_v, positions)
        delta = all_reduce(multiply(x, attention.wo), group)
        h, x = proven.add_norm(h, delta, layer.ffn_norm.weight, layer.ffn_norm.eps)
        x = multiply(x, _joined(feed_forward), gated=True)
        delta = all_reduce(multiply(x, feed_forward.w2), group)
    h, x = proven.add_norm(h, delta, model.norm.weight, model.norm.eps)
    return model.output.gathered(multiply(x, model.output)).float()


def _joined(block: Union[Attention, FeedForward]) -> Any:
    """One matrix of all layers that have the block's input."""
    return block.joined or block.fused


def multiply(x: torch.Tensor, matrix: Any, gated: bool = False) -> torch.Tensor:
    """x (B, K) -> (B, N). matrix: a layer, or a plain weight (N, K). gated: it is w1 above w3; the result is
    silu(x w1ᵀ) * (x w3ᵀ)."""
    if isinstance(matrix, Int4) and len(x) <= STORED_ROWS:
        return proven.product_int4(x, matrix.weight, matrix.scales, matrix.zeros, gated=gated)
    if isinstance(matrix, Int8) and len(x) <= STORED_ROWS:
        return proven.product_int8(x, matrix.weight, matrix.scales, gated=gated)
    if isinstance(matrix, Quantized):
        y = cast(Any, matrix).product(x)
    else:
        weight = matrix if isinstance(matrix, torch.Tensor) else matrix.weight
        if len(x) < CUBLAS_ROWS:
            return proven.product(x, weight, gated=gated)
        y = F.linear(x, weight)
    return proven.silu_mul(y) if gated else y
