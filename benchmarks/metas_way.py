"""The arithmetic of Meta's release, step by step, on our model's weights: what the library is measured against. One
process.

Rotary positions in complex numbers, a cache that grows by slices, repeated key/value heads, scores of the whole square,
the output head on every position.
"""

from __future__ import annotations

import math
from typing import Optional

import torch
import torch.nn.functional as F

from llama import Transformer
from llama.model import FeedForward, RMSNorm, TransformerBlock, apply_rotary_emb, repeat_kv


def _attention(
    block: TransformerBlock, x: torch.Tensor, start: int, freqs: torch.Tensor, mask: Optional[torch.Tensor]
) -> torch.Tensor:
    attention = block.attention
    B, S, _ = x.shape
    q, k, v = (
        F.linear(x, w.weight).view(B, S, -1, attention.head_dim) for w in (attention.wq, attention.wk, attention.wv)
    )
    q, k = apply_rotary_emb(q, k, freqs)
    attention.cache_k[:B, start : start + S] = k
    attention.cache_v[:B, start : start + S] = v
    keys = repeat_kv(attention.cache_k[:B, : start + S], attention.n_rep).transpose(1, 2)
    values = repeat_kv(attention.cache_v[:B, : start + S], attention.n_rep).transpose(1, 2)
    scores = q.transpose(1, 2) @ keys.transpose(2, 3) / math.sqrt(attention.head_dim)
    if mask is not None:
        scores = scores + mask
    out = F.softmax(scores.float(), dim=-1).type_as(q) @ values
    return F.linear(out.transpose(1, 2).reshape(B, S, -1), attention.wo.weight)


def _norm(norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + norm.eps)).type_as(x) * norm.weight


def _feed_forward(layer: FeedForward, x: torch.Tensor) -> torch.Tensor:
    return F.linear(F.silu(F.linear(x, layer.w1.weight)) * F.linear(x, layer.w3.weight), layer.w2.weight)


@torch.inference_mode()
def forward(model: Transformer, tokens: torch.Tensor, start: int) -> torch.Tensor:
    """`Transformer.forward` as Meta computes it: float32 (B, S, vocab_size)."""
    S = tokens.shape[1]
    h = model.tok_embeddings(tokens)
    freqs = model.freqs_cis[start : start + S]
    mask = None
    if S > 1:
        mask = torch.full((S, S), -math.inf, device=h.device).triu(1)
        mask = torch.hstack([torch.zeros(S, start, device=h.device), mask]).type_as(h)
    for block in model.layers:
        assert isinstance(block, TransformerBlock)
        h = h + _attention(block, _norm(block.attention_norm, h), start, freqs, mask)
        h = h + _feed_forward(block.feed_forward, _norm(block.ffn_norm, h))
    return F.linear(_norm(model.norm, h), model.output.weight).float()


def generate(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """The greedy continuation of one prompt, as Meta's loop gives it."""
    return generate_batch(model, [prompt], count, eos=-1)[0]


def generate_batch(model: Transformer, prompts: list[list[int]], count: int, eos: int) -> list[list[int]]:
    """Greedy continuations as Meta's loop gives them: the shortest prompt's length is prefilled, longer prompts are fed
    token by token, and all rows run until the last has ended."""
    lengths = [len(prompt) for prompt in prompts]
    total = min(model.params.max_seq_len, max(lengths) + count)
    device = model.norm.weight.device
    ids = torch.full((len(prompts), total), -1, device=device)
    for row, prompt in zip(ids, prompts):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
    given = ids != -1
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    start = 0
    for at in range(min(lengths), total):
        best = forward(model, ids[:, start:at], start)[:, -1].argmax(-1)
        ids[:, at] = torch.where(given[:, at], ids[:, at], best)
        ended |= ~given[:, at] & (best == eos)
        start = at
        if ended.all():
            break
    outputs = [row[length : length + count].tolist() for row, length in zip(ids, lengths)]
    return [out[: out.index(eos)] if eos in out else out for out in outputs]
