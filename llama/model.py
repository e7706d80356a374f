"""Llama 2's mathematics (Touvron et al. 2023, https://arxiv.org/abs/2307.09288). Knows no files, prompts or sampling.

Letters in shapes:
    B  rows of the batch                        H  query heads on this rank
    S  new tokens of each row                   K  key/value heads on this rank
    T  cache columns that are read              D  size of a head
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import Any, Optional, Union, cast

import torch
import torch.nn.functional as F
from torch import nn

from .as_built import Originals, Watch
from .cache_use import CacheUse
from .layers import own_kernels
from .layers.parallel import (
    ColumnParallelLinear,
    Make,
    ParallelEmbedding,
    RowParallelLinear,
    fuse,
    group_size,
    is_fused,
    model_parallel_group,
    products,
)
from .layers.products import AMX
from .layers.quantization import QUANTIZED, join_quantized
from .layers.quantized import Quantized
from .rotary import RotaryScaling, scaled_freqs_cis
from .runtime import device_kind
from .system.checks import whole
from .system.files import MappedFiles
from .system.printable import counted, shortened

# Without a mask, torch's fused attention on CPUs turns NaN scores into zeros if they do not fill a vector register. A
# register holds up to 16. With fewer columns a mask is passed that hides nothing; no cheaper way keeps NaN.
NAN_COLUMNS = 16


@dataclass
class ModelArgs:
    """The keys of Meta's params.json, and the two limits that size the cache. Prints Meta's ten fields.

    Attributes:
        dim, n_layers, n_heads: width, blocks and query heads.
        n_kv_heads: key/value heads. Default: as many as n_heads.
        vocab_size: set by the tokenizer.
        multiple_of, ffn_dim_multiplier: Meta's rule for the feed-forward width, `feed_forward_width`.
        norm_eps: added to the mean square in RMSNorm.
        max_batch_size, max_seq_len: rows and columns of the cache.
        rope_theta: base of the rotary positions; Code Llama has 1e6.
        head_dim, ffn_dim: head size and feed-forward width, which some folders give. Default: derived, as Meta's.
        rope_scaling: how rotary positions are scaled for longer texts. Default: they are not.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: Optional[int] = None
    vocab_size: int = -1
    multiple_of: int = 256
    ffn_dim_multiplier: Optional[float] = None
    norm_eps: float = 1e-5
    max_batch_size: int = 32
    max_seq_len: int = 2048
    rope_theta: float = field(default=10000.0, repr=False)
    head_dim: Optional[int] = field(default=None, repr=False)
    ffn_dim: Optional[int] = field(default=None, repr=False)
    rope_scaling: Optional[RotaryScaling] = field(default=None, repr=False)

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_size(self) -> int:
        """Numbers of a query, key or value."""
        return self.head_dim or self.dim // self.n_heads

    @property
    def ffn_width(self) -> int:
        """Inner width of the feed-forward layers."""
        return self.ffn_dim or feed_forward_width(4 * self.dim, self.multiple_of, self.ffn_dim_multiplier)


def feed_forward_width(hidden_dim: int, multiple_of: int, ffn_dim_multiplier: Optional[float]) -> int:
    """Meta's rule for SwiGLU's inner width: two thirds, times the multiplier, rounded up. Truncates twice, in this
    order."""
    width = int(2 * hidden_dim / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


def process_counts(args: ModelArgs) -> list[int]:
    """The model-parallel sizes that share this model's heads and matrices evenly, smallest first.

    With more processes than key/value heads, neighbours hold the same one: 4 heads on 8 processes lie 0 0 1 1 2 2 3 3.
    """
    shared = (args.n_heads, args.dim, args.ffn_width)
    heads = args.kv_heads
    return [
        n
        for n in range(1, args.n_heads + 1)
        if all(size % n == 0 for size in shared) and (heads % n == 0 or n % heads == 0)
    ]


def check_args(args: ModelArgs, processes: int, source: Optional[Path] = None, what: str = "processes") -> None:
    """ValueError for a shape that cannot be built, or be shared by `processes`, which the message calls `what`. source:
    the folder that it comes from."""
    problem = ""
    if args.vocab_size < 1:
        problem = f"vocab_size is {args.vocab_size}; set it to the number of pieces of the tokenizer"
    elif args.head_dim is None and args.dim % args.n_heads:
        problem = f"dim ({args.dim}) must be n_heads ({args.n_heads}) times an even head size"
    elif args.head_size % 2:
        problem = f"dim ({args.dim}) must be n_heads ({args.n_heads}) times an even head size, not {args.head_size}"
    elif args.n_heads % args.kv_heads:
        problem = f"n_heads ({args.n_heads}) must be a multiple of n_kv_heads ({args.kv_heads})"
    elif args.rope_scaling is not None and (args.head_size < 4 or args.rope_theta <= 1):
        problem = f"scaled rotary positions need heads of 4 or more, not {args.head_size}, and a rope_theta above 1"
    elif processes not in (counts := process_counts(args)):
        problem = (
            f"{args.n_heads} query heads, {args.kv_heads} key/value heads, a width of {args.dim} and one of "
            f"{args.ffn_width} cannot be shared by {processes} {what}; use {' or '.join(map(str, counts))}"
        )
    if problem:
        raise ValueError(problem if source is None else f"{source}: {problem}")


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019): normalised in float32, scaled in x's dtype. (..., dim) -> (...,
    dim)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        """x / rms(x), float32."""
        return F.rms_norm(x, x.shape[-1:], None, self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Meta's way, with the steps that people patch."""
        return self._norm(x.float()).type_as(x) * self.weight

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """`forward` in fewer operators."""
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight


# Meta's functions. The model itself computes the same with `rotate` and `attend`.


def precompute_freqs_cis(dim: int, end: int, theta: float = 10000.0) -> torch.Tensor:
    """e^(i t theta^(-2j/dim)) for t < end, j < dim/2 (RoFormer, Su et al. 2021): complex64 (end, dim // 2)."""
    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2)[: dim // 2].float() / dim))
    angles = torch.outer(torch.arange(end), freqs).float()
    return torch.polar(torch.ones_like(angles), angles)


def reshape_for_broadcast(freqs_cis: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(S, D/2) viewed as (1, S, 1, ..., D/2), to multiply x (B, S, ..., D/2)."""
    if x.ndim < 2 or freqs_cis.shape != (x.shape[1], x.shape[-1]):
        raise ValueError(f"freqs_cis of shape {tuple(freqs_cis.shape)} does not fit x of shape {tuple(x.shape)}")
    return freqs_cis.view(*(n if i in (1, x.ndim - 1) else 1 for i, n in enumerate(x.shape)))


def apply_rotary_emb(xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn each adjacent pair (2j, 2j+1) of (B, S, H, D) by its angle, in float32. The results have the inputs'
    dtypes."""

    def turn(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * reshape_for_broadcast(freqs_cis, pairs)).flatten(-2).type_as(x)

    return turn(xq), turn(xk)


def repeat_kv(x: torch.Tensor, n_rep: int) -> torch.Tensor:
    """(B, T, K, D) -> (B, T, K * n_rep, D), each head n_rep times in a row."""
    return x if n_rep == 1 else x.repeat_interleave(n_rep, dim=2)


def rotate(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """`apply_rotary_emb` for one tensor: x (B, S, H, D), rotary (1 or B, S, 1, D/2, 2) float32 of cosines and sines.

    Complex numbers are three times as fast, but compiled graphs have none.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        even, odd = pairs.unbind(-1)
        cos, sin = rotary.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotary))
    return turned.flatten(-2).type_as(x)


def hides_infinity(q: torch.Tensor) -> bool:
    """Whether to turn infinite queries q (B, S, H, D) and their keys into NaN, so that the logits show them.

    Attention would take a score of -infinity for a hidden key. float16 overflows from 65504 on; in other dtypes only
    weights that are not finite lead there. Every prompt shows those; with fused attention on CPUs it does only thanks
    to this NaN. A step on a GPU is left alone, because it would take another launch.
    """
    if q.dtype == torch.float16:
        return q.shape[1] > 1 or device_kind(q) == "cpu"
    return q.shape[1] > 1 and device_kind(q) == "cpu"


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Optional[torch.Tensor], causal: bool
) -> torch.Tensor:
    """Grouped-query attention (Ainslie et al. 2023), softmax in float32.

    q (B, S, H, D); k, v (B, T, K, D); mask (1 or B, S, T), True for a key that a query sees; causal: the queries are
    the last S of T positions, and each sees the keys up to its own. -> (B, S, H * D)
    """
    B, S, H, D = q.shape
    T, K = k.shape[1:3]
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, K, T, D), contiguous in a row of the cache
    if S > 1:
        seen = None if mask is None else mask[:, None]
        if device_kind(q) == "cuda":
            return _attend_on_gpu(q, k, v, seen, causal)
        if causal and own_kernels.attends(q, k):
            return cast(torch.Tensor, torch.ops.llama_cpu.attend(q, k.transpose(1, 2), v.transpose(1, 2))).flatten(2)
        q = q.transpose(1, 2)
        causal = causal and S == T and seen is None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal, enable_gqa=K != H)
        return out.transpose(1, 2).reshape(B, S, H * D)
    # For one query, the heads of a group take the place of the queries, so that every key is read once.
    q = q.view(B, K, H // K, D)
    mask = None if mask is None else mask[:, None]
    if AMX and device_kind(q) == "cpu":
        if mask is None and T < NAN_COLUMNS:
            mask = torch.ones(1, 1, 1, T, dtype=torch.bool, device=q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(B, S, H * D)
    # Fused attention takes five times as long for one query: it leaves most of a GPU idle.
    scores = (q @ k.transpose(2, 3)) / math.sqrt(D)  # (B, K, H/K, T)
    if mask is not None:
        scores = scores.masked_fill_(~mask, -math.inf)
    return (scores.softmax(-1, dtype=torch.float32).type_as(q) @ v).view(B, S, H * D)


def _attend_on_gpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Optional[torch.Tensor], causal: bool
) -> torch.Tensor:
    """`attend` for several queries: q (B, S, H, D); k, v (B, K, T, D); mask (1 or B, 1, S, T) or None -> (B, S, H *
    D)"""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right  # imports torch's compiler, which takes a second

    B, S, H, D = q.shape
    K, T = k.shape[1:3]
    q = q.transpose(1, 2)
    flash = (
        q.dtype != torch.float32 and (mask is None or causal) and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )
    if K != H and not flash:  # only flash attention shares heads; else a form with all scores in memory would run
        k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
    seen: Any = mask
    if causal and S < T:
        seen = causal_lower_right(S, T)  # the same mask, in a form that flash attention knows
    # cuDNN's backend is left out: it makes a plan for each new length of prompts.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=causal and S == T, enable_gqa=K != H and flash
        )
    return out.transpose(1, 2).reshape(B, S, H * D)


@dataclass
class Window:
    """The places of a step's new tokens, and the keys that they see. The same for every layer."""

    slots: torch.Tensor  # (B, 1) int64: the cache row of each row of the batch
    positions: torch.Tensor  # (1 or B, S) int64
    rotary: torch.Tensor  # (1 or B, S, 1, D/2, 2) float32
    keys: Optional[tuple[Union[slice, torch.Tensor], slice]]  # cache rows and columns to read; None: only the new keys
    mask: Optional[torch.Tensor]  # (1 or B, S, T) bool
    causal: bool = False  # the rows stand at one position, and their S tokens are the last of the T columns


class Attention(nn.Module):
    """Attention with rotary positions over a cache of keys (stored rotated) and values.

    cache_k, cache_v: (max_batch_size, max_seq_len, K, D), a row for each slot. In memory each head's keys lie together.
    """

    cache_k: torch.Tensor
    cache_v: torch.Tensor
    fused: Optional[torch.Tensor]  # one matrix of wq, wk and wv, if `Transformer.fuse` made it
    joined: Optional[Quantized] = None  # one layer of quantized ones; hidden from `modules()`, which has its parts

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.n_kv_heads = args.kv_heads
        ranks = group_size(model_parallel_group())
        parts = min(ranks, self.n_kv_heads)
        self.n_local_heads = args.n_heads // ranks
        self.n_local_kv_heads = self.n_kv_heads // parts
        self.n_rep = self.n_local_heads // self.n_local_kv_heads
        self.head_dim = args.head_size
        self.wq = ColumnParallelLinear(args.dim, args.n_heads * self.head_dim, gather_output=False)
        self.wk = ColumnParallelLinear(args.dim, self.n_kv_heads * self.head_dim, gather_output=False, parts=parts)
        self.wv = ColumnParallelLinear(args.dim, self.n_kv_heads * self.head_dim, gather_output=False, parts=parts)
        self.wo = RowParallelLinear(args.n_heads * self.head_dim, args.dim)
        self.register_buffer("fused", None, persistent=False)
        self.cache_shape = (args.max_batch_size, args.max_seq_len, self.n_local_kv_heads, self.head_dim)
        self.allocate_cache(self.wq.weight.device, self.wq.weight.dtype)

    def allocate_cache(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make new caches, full of zeros."""
        slots, columns, heads, size = self.cache_shape
        for name in ("cache_k", "cache_v"):
            # One hidden column: then no span of columns is contiguous, and one compiled graph serves all.
            cache = torch.zeros(slots, heads, columns + 1, size, device=device, dtype=dtype)[:, :, :-1].transpose(1, 2)
            self.register_buffer(name, cache, persistent=False)

    def forward(
        self, x: torch.Tensor, start_pos: int, freqs_cis: torch.Tensor, mask: Optional[torch.Tensor]
    ) -> torch.Tensor:
        """Meta's way, for rows that all stand at start_pos: x (B, S, dim); freqs_cis complex64 (S, D/2), their
        rotations; mask None or (S, start_pos + S), added to the scores -> (B, S, dim)."""
        B, S, _ = x.shape
        xq, xk, xv = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis=freqs_cis)
        if xk.dtype == torch.float16:
            xk = torch.add(xk, xk, alpha=0)  # see `hides_infinity`
        end = start_pos + S
        with torch.no_grad():
            self.fit_cache(xk)
            self.cache_k[:B, start_pos:end] = xk
            self.cache_v[:B, start_pos:end] = xv
        # The new keys and values are taken from x, not from the cache, which has no gradients.
        before = slice(0, start_pos)
        keys, values = (torch.cat((c[:B, before], x), 1) for c, x in ((self.cache_k, xk), (self.cache_v, xv)))
        keys, values = (repeat_kv(x, self.n_rep).transpose(1, 2) for x in (keys, values))  # (B, H, T, D)
        scores = xq.transpose(1, 2) @ keys.transpose(2, 3) / math.sqrt(self.head_dim)
        if mask is not None:
            scores = scores + mask
        out = scores.float().softmax(-1).type_as(xq) @ values
        return self.wo(out.transpose(1, 2).reshape(B, S, -1))

    def fit_cache(self, keys: torch.Tensor) -> None:
        """Move the cache to the dtype and device of new keys."""
        if self.cache_k.dtype != keys.dtype or self.cache_k.device != keys.device:
            held = self.cache_k, self.cache_v
            self.allocate_cache(keys.device, keys.dtype)
            self.cache_k.copy_(held[0])
            self.cache_v.copy_(held[1])

    def run(self, x: torch.Tensor, window: Window) -> torch.Tensor:
        """The fast way, for rows that stand anywhere: (B, S, dim) -> (B, S, dim)"""
        projected = products(x, self.joined or self.fused, (self.wq, self.wk, self.wv))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)  # (B, S, H or K, D)
        q, k = rotate(q, window.rotary), rotate(k, window.rotary)
        if hides_infinity(q):
            q, k = q.add_(q, alpha=0), k.add_(k, alpha=0)  # x + 0 x is NaN for an infinite x
        with torch.no_grad():
            self.fit_cache(k)
            self.cache_k[window.slots, window.positions] = k
            self.cache_v[window.slots, window.positions] = v
        if window.keys is not None:
            k, v = self.cache_k[window.keys], self.cache_v[window.keys]  # (B, T, K, D)
        return self.wo(attend(q, k, v, window.mask, window.causal))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): w2(silu(w1 x) * w3 x). (..., dim) -> (..., dim)"""

    fused: Optional[torch.Tensor]  # one matrix of w1 and w3, if `Transformer.fuse` made it
    joined: Optional[Quantized] = None  # see `Attention`

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        multiple_of: int,
        ffn_dim_multiplier: Optional[float],
        *,
        width: Optional[int] = None,
    ) -> None:
        super().__init__()
        width = width or feed_forward_width(hidden_dim, multiple_of, ffn_dim_multiplier)
        self.w1 = ColumnParallelLinear(dim, width, gather_output=False)
        self.w2 = RowParallelLinear(width, dim)
        self.w3 = ColumnParallelLinear(dim, width, gather_output=False)
        self.register_buffer("fused", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Meta's way."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The fast way, with one product for w1 and w3 if they lie in one matrix."""
        gate, up = products(x, self.joined or self.fused, (self.w1, self.w3), any_order=True)
        if torch.is_grad_enabled():
            return self.w2(F.silu(gate) * up)
        return self.w2(F.silu(gate, inplace=True).mul_(up))  # in place: these are the largest tensors of a pass


class TransformerBlock(nn.Module):
    """Attention and a feed-forward layer, each after a norm and added to its input. (B, S, dim) -> (B, S, dim)"""

    def __init__(self, layer_id: int, args: ModelArgs) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.n_heads = args.n_heads
        self.dim = args.dim
        self.head_dim = args.head_size
        self.attention = Attention(args)
        self.feed_forward = FeedForward(
            args.dim, 4 * args.dim, args.multiple_of, args.ffn_dim_multiplier, width=args.ffn_dim
        )
        self.attention_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, eps=args.norm_eps)

    def forward(
        self, x: torch.Tensor, start_pos: int, freqs_cis: torch.Tensor, mask: Optional[torch.Tensor]
    ) -> torch.Tensor:
        """Meta's way. `Attention.forward` says what the arguments are."""
        h = x + self.attention(self.attention_norm(x), start_pos, freqs_cis, mask)
        return h + self.feed_forward(self.ffn_norm(h))

    def run(self, x: torch.Tensor, window: Window) -> torch.Tensor:
        """The fast way: it calls no module, so hooks and replaced parts would not run. See `Transformer.as_built`."""
        h = x + self.attention.run(self.attention_norm.run(x), window)
        return h + self.feed_forward.run(self.ffn_norm.run(h))


class Transformer(nn.Module):
    """The decoder. ValueError for a shape that this launcher's processes cannot share.

    freqs_cis: complex64 (2 * max_seq_len, D / 2), Meta's table of rotations, by `rope_scaling` if there is one. It
    follows the model to a device, never to a dtype. The model uses a table that is put in its place.
    """

    def __init__(self, params: ModelArgs) -> None:
        check_args(params, group_size(model_parallel_group()))
        super().__init__()
        self.params = params
        self.vocab_size = params.vocab_size
        self.n_layers = params.n_layers
        self.tok_embeddings = ParallelEmbedding(params.vocab_size, params.dim)
        self.layers = nn.ModuleList(TransformerBlock(i, params) for i in range(params.n_layers))
        self.norm = RMSNorm(params.dim, eps=params.norm_eps)
        self.output = ColumnParallelLinear(params.dim, params.vocab_size, gather_output=True)
        self.freqs_cis = self._rotations(self.norm.weight.device)
        self.cache_use = CacheUse()
        self.files: Optional[MappedFiles] = None  # the files that its weights are mapped from
        self._watch = Watch(ORIGINALS)

    def _rotations(self, device: torch.device) -> torch.Tensor:
        args, rows = self.params, 2 * self.params.max_seq_len
        if device_kind(device) == "meta":  # computing there would only import torch's compiler
            return torch.empty(rows, args.head_size // 2, dtype=torch.complex64, device=device)
        if args.rope_scaling is not None:
            return self._scaled(device, 0, rows)
        with torch.device("cpu"):
            return _placed(precompute_freqs_cis(args.head_size, rows, args.rope_theta), device)

    def _scaled(self, device: torch.device, start: int, end: int, pass_length: int = 0) -> torch.Tensor:
        """`scaled_freqs_cis`"""
        scaling = self.params.rope_scaling
        assert scaling is not None
        table = scaled_freqs_cis(self.params.head_size, start, end, self.params.rope_theta, scaling, pass_length)
        return _placed(table, device)

    def turns(self, start: int, end: int, pass_length: Optional[int]) -> torch.Tensor:
        """The rotations of positions start … end - 1: complex64 (S, D / 2). pass_length: see `hidden_states`."""
        table, scaling = self.freqs_cis[start:end], self.params.rope_scaling
        length = end if pass_length is None else pass_length
        if scaling is None or not scaling.one_pass(length):
            return table
        ours = self._scaled(table.device, start, end)
        is_ours = torch.allclose(table, ours, rtol=0, atol=0.1)  # otherwise somebody has put another table in its place
        return self._scaled(table.device, start, end, length) if is_ours else table

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Transformer:
        fused = [module for module, _ in self._fusable() if module.fused is not None or module.joined is not None]
        for module in fused:
            module.fused = vars(module)["joined"] = None  # only its parts move
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if fused:
            self.fuse()
        place = self.norm.weight.device
        self.freqs_cis = self._rotations(place) if self.freqs_cis.is_meta else self.freqs_cis.to(place)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_watch": None, "files": None}  # a copy lies in no file

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._watch = Watch(ORIGINALS)

    @property
    def as_built(self) -> bool:
        """Whether nothing was replaced, patched or hooked since the model was made: then the fast ways compute the
        same."""
        ours = type(self).forward is FORWARD and "forward" not in vars(self)
        return ours and self._watch.sees_no_change(self)

    @property
    def parts(self) -> list[nn.Module]:
        """All modules in it: as `modules()`, which takes longer to find them."""
        self._watch.sees_no_change(self)
        return self._watch.parts

    def fuse(self, make: Make = torch.cat) -> None:
        """Let wq, wk and wv share one matrix, and w1 and w3 another: a block then has two products in place of five.

        Do not call it for weights in a mapped file: they would be copied. make: see `parallel.join`.
        """
        for module, layers in self._fusable():
            module.fused = fuse(layers, make)
            vars(module)["joined"] = join_quantized(layers, make)  # setattr would make it a child module

    def keep_fused(self) -> None:
        """Fuse the layers again whose weights were replaced, and let the table of rotations follow the model."""
        if self.freqs_cis.device != self.norm.weight.device:  # somebody has assigned one, from the CPU
            self.freqs_cis = self.freqs_cis.to(self.norm.weight.device)
        for module, layers in self._fusable():
            if module.fused is not None and not is_fused(module.fused, layers):
                module.fused = fuse(layers)
            whole = module.joined
            if whole is not None and not all(
                is_fused(t, layers, name) for name, t in whole.named_parameters(recurse=False)
            ):
                vars(module)["joined"] = join_quantized(layers)

    def _fusable(self) -> Iterator[tuple[Union[Attention, FeedForward], list[Any]]]:
        """Each attention and feed-forward, with its layers that have the same input."""
        for layer in self.layers:  # `modules()` would cost a small model 3 % of each step
            attention, feed_forward = getattr(layer, "attention", None), getattr(layer, "feed_forward", None)
            if isinstance(attention, Attention):
                yield attention, [attention.wq, attention.wk, attention.wv]
            if isinstance(feed_forward, FeedForward):
                yield feed_forward, [feed_forward.w1, feed_forward.w3]

    def allocate_weights(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the weights of a model from the meta device to another, without numbers yet, and fuse them. Quantized
        layers keep their dtypes."""
        stored = {
            id(p)
            for module in self.modules()
            if isinstance(module, Quantized)
            for p in module.parameters(recurse=False)
        }

        def empty(parts: list[torch.Tensor]) -> torch.Tensor:
            wanted = parts[0].dtype if id(parts[0]) in stored else dtype
            return torch.empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=wanted, device=device)

        self.fuse(empty)
        for module in self.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                if p.is_meta:
                    setattr(module, name, nn.Parameter(empty([p]), requires_grad=p.requires_grad))

    def allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make all tensors that are not weights: empty caches and the rotary table."""
        for attention in self.attentions():
            attention.allocate_cache(device, dtype)
        self.freqs_cis = self._rotations(device)

    def attentions(self) -> Iterator[Attention]:
        """All attention layers, those in replaced parts too."""
        return (module for module in self.modules() if isinstance(module, Attention))

    def forward(
        self,
        tokens: torch.Tensor,
        start_pos: Union[int, torch.Tensor],
        *,
        slots: Optional[torch.Tensor] = None,
        span: Optional[int] = None,
    ) -> torch.Tensor:
        """Logits of the next tokens: float32 (B, S, vocab_size). New keys and values enter the cache.

        Args:
            tokens: int64 (B, S).
            start_pos: the position of every row's first new token, as in Meta's release; or int64 (B,), one for each
                row.
            slots: int64 (B,), the cache rows of the batch rows. Default: 0 … B-1.
            span: for a tensor of start_pos, how many cache columns to read, at least its maximum + S. Without it the
                host waits for that maximum.

        Raises:
            ValueError: tokens that are no ids, or rows and positions that the cache has no room for.
        """
        return self.output(self.hidden_states(tokens, start_pos, slots=slots, span=span)).float()

    def hidden_states(
        self,
        tokens: torch.Tensor,
        start_pos: Union[int, torch.Tensor],
        *,
        slots: Optional[torch.Tensor] = None,
        span: Optional[int] = None,
        layers: int = -1,
        pass_length: Optional[int] = None,
    ) -> torch.Tensor:
        """The states that `output` turns into logits, (B, S, dim) in the model's dtype. New keys and values enter the
        cache.

        tokens (B, S) int64. start_pos: the position of every row's first new token; an int (Meta's), or int64 (B,), one
        for each row. slots int64 (B,): the cache rows of the batch rows; by default 0 … B-1. Tokens of one cache row
        may be batch rows of their own: each sees those of this call that stand before it. span, for a tensor of
        start_pos: how many cache columns to read, at least its maximum + S; without it the host must wait for that
        maximum. layers: how many blocks to run, without the last norm; negative: all. pass_length: for dynamic scaling
        of positions, how many tokens are read as one, from position 0 on, though in several calls; if not given, each
        row's end with this call, as in transformers; 0: each token comes alone. ValueError for tokens that are no ids,
        and for rows and positions that the cache has no room for.
        """
        if torch.compiler.is_compiling():  # compiled code cannot take locks
            self.cache_use.called = True
            return self._hidden_states(tokens, start_pos, slots, span, layers, pass_length)
        with self.cache_use.call():
            return self._hidden_states(tokens, start_pos, slots, span, layers, pass_length)

    def _hidden_states(
        self,
        tokens: torch.Tensor,
        start_pos: Union[int, torch.Tensor],
        slots: Optional[torch.Tensor],
        span: Optional[int],
        layers: int,
        pass_length: Optional[int],
    ) -> torch.Tensor:
        blocks = self.layers if layers < 0 else self.layers[:layers]
        h = self._embedded(tokens)
        tokens = tokens.to(h.device)
        start_pos = start_pos.to(h.device) if isinstance(start_pos, torch.Tensor) else start_pos
        slots = None if slots is None else slots.to(h.device)
        if not isinstance(start_pos, torch.Tensor) and whole(start_pos) is None:
            raise ValueError(
                f"start_pos={shortened(start_pos)} must be a whole number, or a tensor with one for each row"
            )
        if self._watch.sees_no_change(self):
            self.keep_fused()
            window = self._window(tokens, start_pos, slots, span, pass_length)
            for block in cast(Iterable[TransformerBlock], blocks):
                h = block.run(h, window)
            return self.norm.run(h) if layers < 0 else h
        start_pos = self._only_position(tokens, start_pos, slots)
        S, mask = tokens.shape[1], None
        rotations = self.turns(start_pos, start_pos + S, pass_length).to(h.device)
        if S > 1:
            mask = torch.full((S, S), -math.inf, dtype=h.dtype, device=h.device).triu(1)
            mask = torch.cat((mask.new_zeros(S, start_pos), mask), 1)
        for layer in blocks:
            h = layer(h, start_pos, rotations, mask)
        return self.norm(h) if layers < 0 else h

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, S) -> (B, S, dim). ValueError if they are no ids. On a GPU only dtype and shape are checked, without a
        wait."""
        if not isinstance(tokens, torch.Tensor) or tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
            told = type(tokens).__name__
            if isinstance(tokens, torch.Tensor):
                told += f" of {tokens.dtype} and shape {tuple(tokens.shape)}"
            raise ValueError(f"tokens must be ids in an int64 tensor of shape (batch, positions), not a {told}")
        try:
            # A script's tensors may lie on the CPU: unlike Meta's build, ours does not make the GPU torch's default.
            return self.tok_embeddings(tokens.to(getattr(self.tok_embeddings, "weight", tokens).device))
        except IndexError as error:
            most = self.vocab_size - 1
            if wrong := [i for i in tokens.flatten().tolist() if not 0 <= i <= most]:
                raise ValueError(f"the id {wrong[0]} is outside the vocabulary; ids go from 0 to {most}") from error
            raise

    def _only_position(
        self, tokens: torch.Tensor, start_pos: Union[int, torch.Tensor], slots: Optional[torch.Tensor]
    ) -> int:
        """The position of all rows. ValueError if they have several, or slots of their own: Meta's way has one
        position."""
        B, S = tokens.shape
        starts = set(start_pos.tolist()) if isinstance(start_pos, torch.Tensor) else {index(start_pos)}
        if len(starts) > 1 or (slots is not None and slots.tolist() != list(range(B))):
            raise ValueError(
                f"rows at positions {sorted(starts)} need a model that is as it was built; with hooks, patches or "
                f"parts of "
                "one's own all rows stand at one start_pos, and row i owns slot i, as in Meta's code"
            )
        self._check_room(B, min(starts), max(starts) + S)
        return starts.pop()

    def _check_room(self, rows: int, first: int, end: int) -> None:
        """ValueError unless the cache has room for `rows` rows and for positions first … end - 1."""
        if first < 0:
            raise ValueError(f"start_pos is {first}; the first position is 0")
        if self.params.max_batch_size < rows or self.params.max_seq_len < end:
            raise ValueError(
                f"{counted(rows, 'row')} up to position {end} do not fit the cache of "
                f"max_batch_size={self.params.max_batch_size} rows of max_seq_len={self.params.max_seq_len}; build the "
                "model with larger ones"
            )

    def step(
        self, tokens: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor, rotations: torch.Tensor
    ) -> torch.Tensor:
        """One token of each row, row i in slot i. The operators depend on the shapes alone, so that they can become one
        graph.

        tokens, positions int64 (B,); columns: 0 … T-1 as int64 (T,), T above every position; rotations: `freqs_cis` as
        real numbers, (max_seq_len, D/2, 2). -> logits float32 (B, vocab_size)
        """
        B, T = tokens.shape[0], columns.shape[0]  # len() would fix them in a graph
        window = Window(
            slots=torch.arange(B, device=tokens.device)[:, None],
            positions=positions[:, None],
            rotary=rotations[positions][:, None, None],
            keys=(slice(0, B), slice(0, T)),
            mask=columns <= positions[:, None, None],
        )
        h = self.tok_embeddings(tokens[:, None])
        for block in cast(Iterable[TransformerBlock], self.layers):
            h = block.run(h, window)
        return self.output(self.norm.run(h))[:, 0].float()

    def _window(
        self,
        tokens: torch.Tensor,
        start_pos: Union[int, torch.Tensor],
        slots: Optional[torch.Tensor],
        span: Optional[int],
        pass_length: Optional[int],
    ) -> Window:
        """`hidden_states` says what the arguments are."""
        S, scaling = tokens.shape[1], self.params.rope_scaling
        if isinstance(start_pos, torch.Tensor):
            window = self._window_apart(tokens, start_pos, slots, span)
        else:
            window = self._window_together(tokens, index(start_pos), slots)
        if scaling is not None and scaling.kind == "dynamic" and (S > 1 if pass_length is None else pass_length > 0):
            starts = start_pos.tolist() if isinstance(start_pos, torch.Tensor) else [index(start_pos)]
            turns = torch.stack([self.turns(start, start + S, pass_length) for start in starts])
            window.rotary = torch.view_as_real(turns)[:, :, None]
        return window

    def _window_together(self, tokens: torch.Tensor, start: int, slots: Optional[torch.Tensor]) -> Window:
        """The window of rows that all stand at one position."""
        B, S = tokens.shape
        end = start + S
        self._check_room(B, start, end)
        positions = torch.arange(start, end, device=tokens.device)[None]
        written, read = _cache_rows(B, slots, tokens.device)
        keys = (read, slice(0, end)) if start > 0 else None
        is_short = S < NAN_COLUMNS and device_kind(tokens) == "cpu"
        mask = _up_to(positions, end) if S > 1 and (keys is not None or is_short) else None
        return Window(written, positions, self._rotary(positions), keys, mask, causal=S > 1)

    def _window_apart(
        self, tokens: torch.Tensor, starts: torch.Tensor, slots: Optional[torch.Tensor], span: Optional[int]
    ) -> Window:
        """The window of rows that stand at positions of their own: starts int64 (B,). Waits for the device without a
        span."""
        B, S = tokens.shape
        first, end = (int(starts.min()), int(starts.max()) + S) if span is None else (0, span)
        self._check_room(B if slots is None else 1, first, end)
        positions = starts[:, None] + torch.arange(S, device=tokens.device)
        written, read = _cache_rows(B, slots, tokens.device)
        return Window(written, positions, self._rotary(positions), (read, slice(0, end)), _up_to(positions, end))

    def _rotary(self, positions: torch.Tensor) -> torch.Tensor:
        """(1 or B, S) -> float32 (1 or B, S, 1, D/2, 2)"""
        return torch.view_as_real(self.freqs_cis)[positions][:, :, None]


def _placed(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A table from the CPU on the device. Pinned memory spares the host a wait for the GPU."""
    return table.pin_memory().to(device, non_blocking=True) if device_kind(device) == "cuda" else table.to(device)


def _cache_rows(
    B: int, slots: Optional[torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, Union[slice, torch.Tensor]]:
    """The cache rows of a batch: int64 (B, 1) to write to, and an index to read with, which copies nothing without
    `slots`."""
    if slots is None:
        return torch.arange(B, device=device)[:, None], slice(0, B)
    return slots[:, None], slots


def _up_to(positions: torch.Tensor, end: int) -> torch.Tensor:
    """The mask that shows each position (1 or B, S) the columns up to it: bool (1 or B, S, end)."""
    return torch.arange(end, device=positions.device) <= positions[:, :, None]


FORWARD = Transformer.forward
FORWARD_ONLY = (ParallelEmbedding, ColumnParallelLinear, RowParallelLinear, *QUANTIZED, nn.ModuleList)
ORIGINALS = Originals(
    {
        TransformerBlock: ("forward",), Attention: ("forward",), FeedForward: ("forward",),
        RMSNorm: ("forward", "_norm"),
        **dict.fromkeys(FORWARD_ONLY, ("forward",)),
    },
    globals(),
    ("apply_rotary_emb", "repeat_kv"),
)  # fmt: skip
