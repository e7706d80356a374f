"""Llama 2's mathematics (Touvron et al. 2023, https://arxiv.org/abs/2307.09288). Knows no files, prompts or sampling.

Letters in shapes:
    B  rows of the batch                        H  query heads on this rank
    S  new tokens of each row                   K  key/value heads on this rank
    T  cache columns that are looked at         D  size of a head
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
from .runtime import device_kind
from .system.checks import whole
from .system.files import MappedFiles
from .system.printable import shortened

# torch's fused attention on CPUs makes zeros of a row whose scores are all NaN if they do not fill a vector register, which
# holds up to 16, and no mask is added to them. A mask that hides nothing costs less there than any other way to notice.
NAN_COLUMNS = 16


@dataclass
class ModelArgs:
    """The keys of Meta's params.json, and the two limits that size the cache. Prints Meta's ten fields.

    Some folders give head_dim and ffn_dim; Meta's derive them. None means: derive.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: Optional[int] = None  # None: as many as n_heads
    vocab_size: int = -1  # set by the tokenizer
    multiple_of: int = 256  # the feed-forward width is rounded up to a multiple of this
    ffn_dim_multiplier: Optional[float] = None
    norm_eps: float = 1e-5
    max_batch_size: int = 32
    max_seq_len: int = 2048
    rope_theta: float = field(default=10000.0, repr=False)  # Code Llama: 1e6
    head_dim: Optional[int] = field(default=None, repr=False)  # None: dim // n_heads
    ffn_dim: Optional[int] = field(default=None, repr=False)  # None: `feed_forward_width`

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.dim // self.n_heads

    @property
    def ffn_width(self) -> int:
        return self.ffn_dim or feed_forward_width(4 * self.dim, self.multiple_of, self.ffn_dim_multiplier)


def feed_forward_width(hidden_dim: int, multiple_of: int, ffn_dim_multiplier: Optional[float]) -> int:
    """Meta's rule for SwiGLU's inner width: two thirds, times the multiplier, rounded up. Truncates twice, in this order."""
    width = int(2 * hidden_dim / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


def process_counts(args: ModelArgs) -> list[int]:
    """The model-parallel sizes that share this model's heads and matrices evenly, smallest first.

    More processes than key/value heads: neighbours have the same one, so that 4 heads on 8 processes go 0 0 1 1 2 2 3 3.
    """
    shared = (args.n_heads, args.dim, args.vocab_size, args.ffn_width)
    heads = args.kv_heads
    return [
        n for n in range(1, args.n_heads + 1) if all(size % n == 0 for size in shared) and (heads % n == 0 or n % heads == 0)
    ]


def check_args(args: ModelArgs, processes: int, source: Optional[Path] = None) -> None:
    """Refuse, with a ValueError, a shape that cannot be built or cannot be shared by that many processes. source: the folder
    that it was read from."""
    problem = ""
    if args.vocab_size < 1:
        problem = f"vocab_size is {args.vocab_size}; set it to the number of pieces of the tokenizer"
    elif args.head_dim is None and args.dim % args.n_heads:
        problem = f"dim ({args.dim}) must be n_heads ({args.n_heads}) times an even head size"
    elif args.head_size % 2:
        problem = f"dim ({args.dim}) must be n_heads ({args.n_heads}) times an even head size, not {args.head_size}"
    elif args.n_heads % args.kv_heads:
        problem = f"n_heads ({args.n_heads}) must be a multiple of n_kv_heads ({args.kv_heads})"
    elif processes not in (counts := process_counts(args)):
        problem = (
            f"{args.n_heads} query heads, {args.kv_heads} key/value heads and a vocabulary of {args.vocab_size} cannot be "
            f"shared by {processes} processes; use {' or '.join(map(str, counts))}"
        )
    if problem:
        raise ValueError(problem if source is None else f"{source}: {problem}")


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019): normalised in float32, scaled in x's dtype. (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        """x / rms(x), float32."""
        return F.rms_norm(x, x.shape[-1:], None, self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._norm(x.float()).type_as(x) * self.weight

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """`forward` in fewer operators."""
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight


# Meta's functions, and what the model computes the same with: `rotate` and `attend`.


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
    """Turn each adjacent pair (2j, 2j+1) of (B, S, H, D) by its angle, in float32; the dtypes of the inputs come back."""

    def turn(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * reshape_for_broadcast(freqs_cis, pairs)).flatten(-2).type_as(x)

    return turn(xq), turn(xk)


def repeat_kv(x: torch.Tensor, n_rep: int) -> torch.Tensor:
    """(B, T, K, D) -> (B, T, K * n_rep, D), each head n_rep times in a row."""
    return x if n_rep == 1 else x.repeat_interleave(n_rep, dim=2)


def rotate(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """`apply_rotary_emb` for one tensor: x (B, S, H, D), rotary (1 or B, S, 1, D/2, 2) float32 of cosines and sines.

    Compiled graphs have no complex numbers; where nothing is compiled they are three times as fast.
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
    """Whether infinite queries q (B, S, H, D) and their keys are to become NaN, so that the logits show them.

    Attention takes a score of -infinity for a key that is not to be seen, and goes on. float16 overflows from 65504 on; in
    other dtypes only weights that are not finite lead there, of which each prompt tells, in fused attention on CPUs only so.
    A step on a GPU would get another launch.
    """
    on_cpu, several = device_kind(q) == "cpu", q.shape[1] > 1
    return (on_cpu and several) or (q.dtype == torch.float16 and (on_cpu or several))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Optional[torch.Tensor], causal: bool) -> torch.Tensor:
    """Grouped-query attention (Ainslie et al. 2023), softmax in float32.

    q (B, S, H, D); k, v (B, T, K, D); mask (1 or B, S, T), True where a query sees a key; causal: the queries are the last
    S of T places, and each sees the keys up to its own. -> (B, S, H * D)
    """
    B, S, H, D = q.shape
    T, K = k.shape[1:3]
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, K, T, D), contiguous in a row of the cache
    if S > 1:
        seen = None if mask is None else mask[:, None]
        if device_kind(q) == "cuda":
            return _attend_on_gpu(q, k, v, seen, causal)
        q = q.transpose(1, 2)
        causal = causal and S == T and seen is None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal, enable_gqa=K != H)
        return out.transpose(1, 2).reshape(B, S, H * D)
    # One query: the heads of a group stand in as the queries, so that every key is read once.
    q = q.view(B, K, H // K, D)
    mask = None if mask is None else mask[:, None]
    if device_kind(q) == "cpu" and AMX:
        if mask is None and T < NAN_COLUMNS:
            mask = torch.ones(1, 1, 1, T, dtype=torch.bool, device=q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(B, S, H * D)
    # Fused attention takes five times as long here, on one query: on GPUs it leaves most of them idle.
    scores = (q @ k.transpose(2, 3)) / math.sqrt(D)  # (B, K, H/K, T)
    if mask is not None:
        scores = scores.masked_fill_(~mask, -math.inf)
    return (scores.softmax(-1, dtype=torch.float32).type_as(q) @ v).view(B, S, H * D)


def _attend_on_gpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Optional[torch.Tensor], causal: bool
) -> torch.Tensor:
    """`attend` for several queries: q (B, S, H, D); k, v (B, K, T, D); mask (1 or B, 1, S, T) or None -> (B, S, H * D)"""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right  # brings in torch's compiler: a second, for who needs it only

    B, S, H, D = q.shape
    K, T = k.shape[1:3]
    q = q.transpose(1, 2)
    flash = q.dtype != torch.float32 and (mask is None or causal) and torch.cuda.get_device_capability(q.device) >= (8, 0)
    if K != H and not flash:  # only flash attention shares heads; the form with all scores in memory would take its place
        k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
    seen: Any = mask
    if causal and S < T:
        seen = causal_lower_right(S, T)  # the same mask under a name that flash attention knows
    # By name and without cuDNN's, which makes a plan for each new length of prompts.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal and S == T, enable_gqa=K != H and flash)
    return out.transpose(1, 2).reshape(B, S, H * D)


@dataclass
class Window:
    """Where a step's new tokens stand, and what they see. The same for every layer."""

    slots: torch.Tensor  # (B, 1) int64: the rows of the cache that belong to the rows of the batch
    positions: torch.Tensor  # (1 or B, S) int64
    rotary: torch.Tensor  # (1 or B, S, 1, D/2, 2) float32
    keys: Optional[tuple[Any, slice]]  # what to read of the cache; None: the new tokens see only each other
    mask: Optional[torch.Tensor]  # (1 or B, S, T) bool
    causal: bool = False  # the rows stand at the same place, and their S tokens are the last of the T columns


class Attention(nn.Module):
    """Attention with rotary positions over a cache of keys (stored rotated) and values.

    cache_k, cache_v: (max_batch_size, max_seq_len, K, D), a row for each slot; in memory each head's keys lie together.
    """

    cache_k: torch.Tensor
    cache_v: torch.Tensor
    fused: Optional[torch.Tensor]  # wq, wk and wv in one matrix, where `Transformer.fuse` made it
    joined: Optional[Quantized] = None  # the same of quantized layers; hidden from `modules()`, which has its parts

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
        rows, columns, heads, size = self.cache_shape
        for name in ("cache_k", "cache_v"):
            # A column more than is shown: then no span of columns is contiguous, and one compiled graph serves all.
            cache = torch.zeros(rows, heads, columns + 1, size, device=device, dtype=dtype)[:, :, :-1].transpose(1, 2)
            self.register_buffer(name, cache, persistent=False)

    def forward(self, x: torch.Tensor, start_pos: int, freqs_cis: torch.Tensor, mask: Optional[torch.Tensor]) -> torch.Tensor:
        """Meta's way: x (B, S, dim), of rows that all stand at start_pos; freqs_cis complex64 (S, D/2), their rotations;
        mask None or added to the scores, (S, start_pos + S) -> (B, S, dim)."""
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
        # The new keys themselves where gradients may be wanted: what the cache holds has none.
        before = slice(0, start_pos)
        keys, values = (torch.cat((c[:B, before], x), 1) for c, x in ((self.cache_k, xk), (self.cache_v, xv)))
        keys, values = (repeat_kv(x, self.n_rep).transpose(1, 2) for x in (keys, values))  # (B, H, T, D)
        scores = xq.transpose(1, 2) @ keys.transpose(2, 3) / math.sqrt(self.head_dim)
        if mask is not None:
            scores = scores + mask
        out = scores.float().softmax(-1).type_as(xq) @ values
        return self.wo(out.transpose(1, 2).reshape(B, S, -1))

    def fit_cache(self, keys: torch.Tensor) -> None:
        """Let the cache have the dtype and device of the keys that come."""
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
            q, k = q.add_(q, alpha=0), k.add_(k, alpha=0)  # x + 0 x, which is NaN for an infinite x
        with torch.no_grad():
            self.fit_cache(k)
            self.cache_k[window.slots, window.positions] = k
            self.cache_v[window.slots, window.positions] = v
        if window.keys is not None:
            k, v = self.cache_k[window.keys], self.cache_v[window.keys]  # (B, T, K, D)
        return self.wo(attend(q, k, v, window.mask, window.causal))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): w2(silu(w1 x) * w3 x). (..., dim) -> (..., dim)"""

    fused: Optional[torch.Tensor]  # w1 and w3 in one matrix, where `Transformer.fuse` made it
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
        return self.w2(F.silu(self.w1(x)) * self.w3(x))

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """`forward`, with one product for w1 and w3 where they lie in one matrix."""
        gate, up = products(x, self.joined or self.fused, (self.w1, self.w3), any_order=True)
        if torch.is_grad_enabled():
            return self.w2(F.silu(gate) * up)
        return self.w2(F.silu(gate, inplace=True).mul_(up))  # these are the largest tensors of a pass: no more of them


class TransformerBlock(nn.Module):
    def __init__(self, layer_id: int, args: ModelArgs) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.n_heads = args.n_heads
        self.dim = args.dim
        self.head_dim = args.head_size
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args.dim, 4 * args.dim, args.multiple_of, args.ffn_dim_multiplier, width=args.ffn_dim)
        self.attention_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, eps=args.norm_eps)

    def forward(self, x: torch.Tensor, start_pos: int, freqs_cis: torch.Tensor, mask: Optional[torch.Tensor]) -> torch.Tensor:
        """For the arguments see `Attention.forward`."""
        h = x + self.attention(self.attention_norm(x), start_pos, freqs_cis, mask)
        return h + self.feed_forward(self.ffn_norm(h))

    def run(self, x: torch.Tensor, window: Window) -> torch.Tensor:
        """The fast way: no module is called as one, so hooks and replaced parts would not run. See `Transformer.as_built`."""
        h = x + self.attention.run(self.attention_norm.run(x), window)
        return h + self.feed_forward.run(self.ffn_norm.run(h))


class Transformer(nn.Module):
    """The decoder. Raises ValueError for a shape that the processes at hand cannot share.

    freqs_cis: complex64 (2 * max_seq_len, D / 2), Meta's table of rotations. It follows the model to a device, never to a
    dtype; a table that somebody puts in its place counts from then on.
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
        args = self.params
        if device_kind(device) == "meta":  # nothing to compute; and doing so would import torch's compiler
            return torch.empty(2 * args.max_seq_len, args.head_size // 2, dtype=torch.complex64, device=device)
        with torch.device("cpu"):
            table = precompute_freqs_cis(args.head_size, 2 * args.max_seq_len, args.rope_theta)
        # Through pinned memory the host need not wait for a GPU.
        return table.pin_memory().to(device, non_blocking=True) if device_kind(device) == "cuda" else table.to(device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Transformer:
        fused = [module for module, _ in self._fusable() if module.fused is not None or module.joined is not None]
        for module in fused:
            module.fused = vars(module)["joined"] = None  # what moves is its parts
        super()._apply(fn, recurse)
        if fused:
            self.fuse()
        place = self.norm.weight.device
        self.freqs_cis = self._rotations(place) if self.freqs_cis.is_meta else self.freqs_cis.to(place)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_watch": None, "files": None}  # what is copied lies in no file

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch = Watch(ORIGINALS)

    @property
    def as_built(self) -> bool:
        """Whether nothing was put in, patched or hooked since the model was made: then the fast ways compute the same."""
        ours = type(self).forward is FORWARD and "forward" not in vars(self)
        return ours and self._watch.sees_no_change(self)

    def fuse(self, make: Make = torch.cat) -> None:
        """Let wq, wk and wv share one matrix, and w1 and w3 another: two products of a block in place of five.

        For weights that are this process's own: those that lie in a mapped file would be copied. make: see `parallel.join`.
        """
        for module, layers in self._fusable():
            module.fused = fuse(layers, make)
            vars(module)["joined"] = join_quantized(layers, make)  # past nn.Module, which would make it a child

    def keep_fused(self) -> None:
        """Fuse anew where somebody has put other weights into the layers since."""
        for module, layers in self._fusable():
            if module.fused is not None and not is_fused(module.fused, layers):
                module.fused = fuse(layers)
            whole = module.joined
            if whole is not None and not all(is_fused(t, layers, name) for name, t in whole.named_parameters(recurse=False)):
                vars(module)["joined"] = join_quantized(layers)

    def _fusable(self) -> Iterator[tuple[Union[Attention, FeedForward], list[Any]]]:
        for layer in self.layers:  # not `modules()`, whose walk costs a small model 3 % of each step
            attention, feed_forward = getattr(layer, "attention", None), getattr(layer, "feed_forward", None)
            if isinstance(attention, Attention):
                yield attention, [attention.wq, attention.wk, attention.wv]
            if isinstance(feed_forward, FeedForward):
                yield feed_forward, [feed_forward.w1, feed_forward.w3]

    def allocate_weights(self, device: torch.device, dtype: torch.dtype) -> None:
        """Give a model on the meta device weights on another, without numbers yet, joined as `fuse` joins them. Quantized
        layers keep their dtypes."""
        stored = {id(p) for module in self.modules() if isinstance(module, Quantized) for p in module.parameters(recurse=False)}

        def empty(parts: list[torch.Tensor]) -> torch.Tensor:
            wanted = parts[0].dtype if id(parts[0]) in stored else dtype
            return torch.empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=wanted, device=device)

        self.fuse(empty)
        for module in self.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                if p.is_meta:
                    setattr(module, name, nn.Parameter(empty([p]), requires_grad=p.requires_grad))

    def allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make everything that is not a weight: empty caches and the rotary table."""
        for attention in self.attentions():
            attention.allocate_cache(device, dtype)
        self.freqs_cis = self._rotations(device)

    def attentions(self) -> Iterator[Attention]:
        return (module for module in self.modules() if isinstance(module, Attention))

    def forward(
        self,
        tokens: torch.Tensor,
        start_pos: Union[int, torch.Tensor],
        *,
        slots: Optional[torch.Tensor] = None,
        span: Optional[int] = None,
    ) -> torch.Tensor:
        """Logits of the tokens that follow: float32 (B, S, vocab_size). For the arguments see `hidden_states`."""
        return self.output(self.hidden_states(tokens, start_pos, slots=slots, span=span)).float()

    def hidden_states(
        self,
        tokens: torch.Tensor,
        start_pos: Union[int, torch.Tensor],
        *,
        slots: Optional[torch.Tensor] = None,
        span: Optional[int] = None,
        layers: int = -1,
    ) -> torch.Tensor:
        """What `output` turns into logits, (B, S, dim) in the model's dtype; the new keys and values enter the cache.

        tokens (B, S) int64. start_pos: the position of every row's first new token; an int (Meta's), or int64 (B,), one
        for each row. slots int64 (B,): the cache rows that the batch rows own; 0 … B-1 if not given. span: how many
        cache columns to look at, at least every start_pos + S; given, it spares a look at the positions on the device.
        layers: run so many blocks, and no last norm; all if negative.
        """
        if torch.compiler.is_compiling():  # compiled code cannot take locks
            self.cache_use.called = True
            return self._hidden_states(tokens, start_pos, slots, span, layers)
        with self.cache_use.call():
            return self._hidden_states(tokens, start_pos, slots, span, layers)

    def _hidden_states(
        self,
        tokens: torch.Tensor,
        start_pos: Union[int, torch.Tensor],
        slots: Optional[torch.Tensor],
        span: Optional[int],
        layers: int,
    ) -> torch.Tensor:
        blocks = self.layers if layers < 0 else self.layers[:layers]
        h = self._embedded(tokens)
        tokens = tokens.to(h.device)
        start_pos = start_pos.to(h.device) if isinstance(start_pos, torch.Tensor) else start_pos
        slots = None if slots is None else slots.to(h.device)
        if not isinstance(start_pos, torch.Tensor) and whole(start_pos) is None:
            raise ValueError(f"start_pos={shortened(start_pos)} must be a whole number, or a tensor with one for each row")
        if self._watch.sees_no_change(self):
            self.keep_fused()
            window = self._window(tokens, start_pos, slots, span)
            for block in cast(Iterable[TransformerBlock], blocks):
                h = block.run(h, window)
            return self.norm.run(h) if layers < 0 else h
        start_pos = self._only_position(tokens, start_pos, slots)
        S = tokens.shape[1]
        mask = None
        if S > 1:
            mask = torch.full((S, S), -math.inf, dtype=h.dtype, device=h.device).triu(1)
            mask = torch.cat((mask.new_zeros(S, start_pos), mask), 1)
        for layer in blocks:
            h = layer(h, start_pos, self.freqs_cis[start_pos : start_pos + S], mask)
        return self.norm(h) if layers < 0 else h

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """ValueError for what are no ids. On a GPU none are looked for outside the vocabulary: that would wait for it."""
        if not isinstance(tokens, torch.Tensor) or tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
            shape = tuple(getattr(tokens, "shape", ()))
            told = f"{type(tokens).__name__} of {getattr(tokens, 'dtype', None)} and shape {shape}"
            raise ValueError(f"tokens must be ids in an int64 tensor of shape (batch, positions), not a {told}")
        try:
            # Meta's build makes a script's new tensors lie on the GPU. Ours leaves torch's defaults alone, so they may not.
            return self.tok_embeddings(tokens.to(getattr(self.tok_embeddings, "weight", tokens).device))
        except IndexError as error:
            most = self.vocab_size - 1
            if wrong := [i for i in tokens.flatten().tolist() if not 0 <= i <= most]:
                raise ValueError(f"the id {wrong[0]} is outside the vocabulary; ids go from 0 to {most}") from error
            raise

    def _only_position(self, tokens: torch.Tensor, start_pos: Union[int, torch.Tensor], slots: Optional[torch.Tensor]) -> int:
        """Where all rows stand. ValueError if they stand at several places, or in slots of their own: Meta's way has one."""
        B, S = tokens.shape
        starts = set(start_pos.tolist()) if isinstance(start_pos, torch.Tensor) else {index(start_pos)}
        if len(starts) > 1 or (slots is not None and slots.tolist() != list(range(B))):
            raise ValueError(
                f"rows at positions {sorted(starts)} need a model that is as it was built; with hooks, patches or parts of "
                "one's own all rows stand at one start_pos, and row i owns slot i, as in Meta's code"
            )
        self._check_room(B, min(starts), max(starts) + S)
        return starts.pop()

    def _check_room(self, rows: int, first: int, end: int) -> None:
        if first < 0:
            raise ValueError(f"start_pos is {first}; the first position is 0")
        if self.params.max_batch_size < rows or self.params.max_seq_len < end:
            raise ValueError(
                f"{rows} rows up to position {end} do not fit the cache of max_batch_size={self.params.max_batch_size} "
                f"rows of max_seq_len={self.params.max_seq_len}; build the model with larger ones"
            )

    def step(
        self, tokens: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor, rotations: torch.Tensor
    ) -> torch.Tensor:
        """One token of each row, row i in slot i: what runs depends on the shapes alone, so that it can become one graph.

        tokens, positions int64 (B,); columns: 0 … T-1 as int64 (T,), T above every position; rotations: `freqs_cis` as
        real numbers, (max_seq_len, D/2, 2). -> logits float32 (B, vocab_size)
        """
        B, T = tokens.shape[0], columns.shape[0]  # not len(), which would fix them in a graph
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
    ) -> Window:
        B, S = tokens.shape
        device = tokens.device
        if not isinstance(start_pos, torch.Tensor):
            start_pos = index(start_pos)
        first = start_pos if isinstance(start_pos, int) else 0
        if span is None:
            span = S + (first if isinstance(start_pos, int) else int(start_pos.max()))
            first = first if isinstance(start_pos, int) else int(start_pos.min())
        fresh = isinstance(start_pos, int) and start_pos == 0
        self._check_room(B, first, span)
        offsets = torch.arange(S, device=device)
        positions = (start_pos + offsets)[None] if isinstance(start_pos, int) else start_pos[:, None] + offsets
        mask = None
        needed = 1 < S < NAN_COLUMNS and device_kind(device) == "cpu"
        if needed or (not fresh and (S > 1 or not isinstance(start_pos, int))):
            mask = torch.arange(span, device=device) <= positions[:, :, None]
        rows = torch.arange(B, device=device) if slots is None else slots
        keys = None if fresh else (slice(0, B) if slots is None else slots, slice(0, span))
        rotary = torch.view_as_real(self.freqs_cis)[positions][:, :, None]
        causal = S > 1 and isinstance(start_pos, int) and span == start_pos + S
        return Window(rows[:, None], positions, rotary, keys, mask, causal)


FORWARD = Transformer.forward
FORWARD_ONLY = (ParallelEmbedding, ColumnParallelLinear, RowParallelLinear, *QUANTIZED, nn.ModuleList)
ORIGINALS = Originals(
    {
        TransformerBlock: ("forward",), Attention: ("forward",), FeedForward: ("forward",), RMSNorm: ("forward", "_norm"),
        **dict.fromkeys(FORWARD_ONLY, ("forward",)),
    },
    globals(),
    ("apply_rotary_emb", "repeat_kv"),
)  # fmt: skip
