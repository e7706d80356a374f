"""Triton kernels for one decoding step on NVIDIA GPUs of compute capability 8.0 and higher, in bfloat16 or float16.

`kernels` has the same functions in plain torch, and says what each computes. This file needs Triton; under
TRITON_INTERPRET=1 the kernels run on the CPU, for tests. No function waits for the device or copies from the host, and
launches depend on shapes alone, so all can be recorded in a CUDA graph. Activations and weights must be contiguous.

Letters in shapes:
    B  rows of the batch                  H  query heads          T  columns of the cache
    N, K  rows and columns of a matrix    K  key/value heads      D  size of a head
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple, Optional, Union

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama.runtime import current, device_kind  # not relative: the tests load this file on its own


class Tiles(NamedTuple):
    """How one program of a product works: on `rows` rows of the weight, `columns` of each at a time, with `stages`
    loads under way at once. If a multiprocessor gets fewer programs than `programs`, several share the columns of a
    row."""

    rows: int
    columns: int
    warps: int
    stages: int = 1
    programs: int = 1


# Block sizes: the best over the matrices of Llama 2 7B on an H200 (benchmarks/gpu.py --part tune).
# One activation row takes small programs, so that the last ones end together; each loads all of its rows at once.
ONE = {16: Tiles(4, 1024, 2), 8: Tiles(4, 1024, 2, 2), 4: Tiles(8, 4096, 4, 2)}
# Several activation rows are multiplied on tensor cores.
SEVERAL = {16: Tiles(32, 256, 4, 4, 2), 8: Tiles(32, 256, 4, 3, 2), 4: Tiles(16, 256, 2, 3, 8)}
MOST_SHARES = 8  # most programs that share the columns of a row
DOT_ROWS = 16  # least rows that tl.dot takes; fewer activation rows or query heads are padded
KEYS = 64  # keys that attention reads at a time: 16 KB at D = 128
SPLITS_PER_PROCESSOR = 4  # programs of attention for each multiprocessor, if there are enough keys
MOST_SPLITS = 64  # most programs that share the keys of one group
WARPS = 4  # of a program, where nothing else is said
ELEMENTS = 1024  # results of one program of silu_mul, dequantize_int4 or add_parts


@lru_cache
def processor_count(device: torch.device) -> int:
    """The multiprocessors of a GPU; in tests on a CPU, an H200's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device_kind(device) == "cuda" else 132


@lru_cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel can be started while the one before it still runs (programmatic dependent launch, from Hopper
    on)."""
    return device_kind(device) == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launching(device: torch.device, warps: int = WARPS) -> dict[str, Union[int, bool]]:
    """The options of each launch. Triton 3.9 warns if the first is missing."""
    overlap = overlaps(device)
    return {"enable_fp_fusion": True, "num_warps": warps, "launch_pdl": overlap, "OVERLAP": overlap}


@triton.jit
def _wait(OVERLAP: tl.constexpr):
    """Wait for the end of earlier kernels: before it nothing that they write may be read, nor what they read be
    written."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def _let_next_start(OVERLAP: tl.constexpr):
    """A long kernel calls it at its end: earlier, the next kernel's programs would crowd on the first free
    multiprocessors."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def _follow(OVERLAP: tl.constexpr):
    """A short kernel calls it at its start."""
    _let_next_start(OVERLAP)
    _wait(OVERLAP)


@triton.jit
def _silu(x):
    """float32 -> float32"""
    return x / (1 + tl.exp(-x))


@triton.jit
def _add_norm(
    x, delta, weight, h, normed, dim, eps, ADD: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    _follow(OVERLAP)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    at = tl.program_id(0) * dim + columns
    value = tl.load(x + at, inside, 0.0)
    scale = tl.load(weight + columns, inside, 0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(delta + at, inside, 0.0).to(tl.float32)).to(value.dtype)
        tl.store(h + at, value, inside)
    wide = value.to(tl.float32)
    unit = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / dim + eps)).to(value.dtype)
    tl.store(normed + at, (unit.to(tl.float32) * scale.to(tl.float32)).to(value.dtype), inside)


def add_norm(
    x: torch.Tensor, delta: Optional[torch.Tensor], weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, delta (B, dim), weight (dim,) -> x + delta (x itself if delta is None) and its RMSNorm, (B, dim). One
    launch."""
    B, dim = x.shape
    h = x if delta is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    block = triton.next_power_of_2(dim)
    with current(x.device):
        _add_norm[(B,)](
            x,
            delta,
            weight,
            h,
            normed,
            dim,
            eps,
            delta is not None,
            block,
            **launching(x.device, min(16, max(1, block // 512))),
        )
    return h, normed


@triton.jit
def _rotate_and_store(
    qkv, rotations, positions, slots, cache_k, cache_v, q, H, K,
    k_row, k_column, k_head, k_item, v_row, v_column, v_head, v_item,
    D: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    _follow(OVERLAP)
    row, head = tl.program_id(0), tl.program_id(1)
    pair = tl.arange(0, BLOCK)
    inside = pair < D // 2
    position = tl.load(positions + row)
    slot = row.to(tl.int64)
    if slots is not None:
        slot = tl.load(slots + row)
    at = qkv + (row * (H + 2 * K) + head) * D + 2 * pair
    even, odd = tl.load(at, inside), tl.load(at + 1, inside)
    if head >= H + K:
        to_v = cache_v + slot * v_row + position * v_column + (head - H - K) * v_head
        tl.store(to_v + 2 * pair * v_item, even, inside)
        tl.store(to_v + (2 * pair + 1) * v_item, odd, inside)
    else:
        angle = rotations + position * D + 2 * pair
        cos, sin = tl.load(angle, inside), tl.load(angle + 1, inside)
        x, y = even.to(tl.float32), odd.to(tl.float32)
        left, right = (x * cos - y * sin).to(even.dtype), (x * sin + y * cos).to(even.dtype)
        if head >= H:
            to_k = cache_k + slot * k_row + position * k_column + (head - H) * k_head
            tl.store(to_k + 2 * pair * k_item, left, inside)
            tl.store(to_k + (2 * pair + 1) * k_item, right, inside)
        else:
            to_q = q + (row * H + head) * D + 2 * pair
            tl.store(to_q, left, inside)
            tl.store(to_q + 1, right, inside)


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
    cache_k, cache_v (at least B, T, K, D), any strides -> q (B, H, D). One launch.
    """
    B = len(qkv)
    K, D = cache_k.shape[2:]
    H = qkv.shape[1] // D - 2 * K
    q = qkv.new_empty(B, H, D)
    with current(qkv.device):
        _rotate_and_store[(B, H + 2 * K)](
            qkv, rotations, positions, slots, cache_k, cache_v, q, H, K, *cache_k.stride(), *cache_v.stride(),
            D, triton.next_power_of_2(D // 2), **launching(qkv.device, 1),
        )  # fmt: skip
    return q


@triton.jit
def _attend(
    q, cache_k, cache_v, positions, slots, out, parts, sums, scale,
    k_row, k_column, k_head, k_item, v_row, v_column, v_head, v_item,
    K: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr,
    SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Attention of one group's queries over one part of the keys. Each block has a key that is seen, so its largest
    score is -inf only if a real score is."""
    _wait(OVERLAP)
    row, kv_head = tl.program_id(0) // K, tl.program_id(0) % K
    split = tl.program_id(1)
    slot = row.to(tl.int64)
    if slots is not None:
        slot = tl.load(slots + row)
    length = tl.load(positions + row).to(tl.int32) + 1
    share = tl.cdiv(tl.cdiv(length, SPLITS), KEYS) * KEYS
    first, last = split * share, tl.minimum(length, (split + 1) * share)
    head, item, key = tl.arange(0, HEADS), tl.arange(0, SIZE), tl.arange(0, KEYS)
    lines = (row * K + kv_head) * GROUP + head  # lines of q and out
    own = head < GROUP
    whole = own[:, None] & (item < D)[None, :]
    query = tl.load(q + lines[:, None] * D + item[None, :], whole, 0.0)
    at_k = cache_k + slot * k_row + kv_head * k_head + item[:, None] * k_item
    at_v = cache_v + slot * v_row + kv_head * v_head + item[None, :] * v_item
    most = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    mixed = tl.zeros((HEADS, SIZE), tl.float32)
    for start in range(first, last, KEYS):
        column = start + key
        seen = column < last
        k = tl.load(at_k + column[None, :].to(tl.int64) * k_column, (item < D)[:, None] & seen[None, :], 0.0)
        v = tl.load(at_v + column[:, None].to(tl.int64) * v_column, seen[:, None] & (item < D)[None, :], 0.0)
        scores = tl.where(seen[None, :], tl.dot(query, k) * scale, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(most - higher)
        total = total * shrink + tl.sum(p, 1)
        mixed = tl.dot(p.to(v.dtype), v, mixed * shrink[:, None])
        most = higher
    _let_next_start(OVERLAP)
    if SPLITS == 1:
        tl.store(out + lines[:, None] * D + item[None, :], (mixed / total[:, None]).to(out.dtype.element_ty), whole)
    else:
        part = lines * SPLITS + split
        tl.store(parts + part[:, None] * D + item[None, :], mixed, whole)
        tl.store(sums + part * 2, most, own)
        tl.store(sums + part * 2 + 1, total, own)


@triton.jit
def _combine(
    parts, sums, out, D: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr
):  # fmt: skip
    """Add up the parts of one head. The largest score of a part without keys is -inf, so it weighs nothing."""
    _follow(OVERLAP)
    split, item = tl.arange(0, BLOCK), tl.arange(0, SIZE)
    part = tl.program_id(0) * SPLITS + split
    inside = split < SPLITS
    most = tl.load(sums + part * 2, inside, float("-inf"))
    weight = tl.exp2(most - tl.max(most, 0))
    total = tl.sum(tl.load(sums + part * 2 + 1, inside, 0.0) * weight, 0)
    whole = inside[:, None] & (item < D)[None, :]
    mixed = tl.load(parts + part[:, None] * D + item[None, :], whole, 0.0)
    mean = tl.sum(mixed * weight[:, None], 0) / total
    tl.store(out + tl.program_id(0) * D + item, mean.to(out.dtype.element_ty), item < D)


def splits_of(groups: int, T: int, processors: int) -> int:
    """How many programs share the keys of one group, so that all of them fill the GPU."""
    return max(1, min(triton.cdiv(T, KEYS), SPLITS_PER_PROCESSOR * processors // groups, MOST_SPLITS))


def attend(
    q: torch.Tensor,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor,
    positions: torch.Tensor,
    processors: Optional[int] = None,
    slots: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Grouped-query attention of one query per row over the columns up to its position; nothing beyond is read.

    q (B, H, D); cache_k, cache_v (at least B, T, K, D), any strides; positions int64 (B,) -> (B, H * D). Two launches,
    or one if there is one split. processors: the GPU's multiprocessors; None: ask the GPU. slots int64 (B,): the cache
    row of each row; 0 … B-1 if not given.
    """
    B, H, D = q.shape
    T, K = cache_k.shape[1:3]
    splits = splits_of(B * K, T, processors or processor_count(q.device))
    out = q.new_empty(B, H * D)
    parts = q.new_empty((B * H, splits, D) if splits > 1 else 0, dtype=torch.float32)
    sums = q.new_empty((B * H, splits, 2) if splits > 1 else 0, dtype=torch.float32)
    size = max(16, triton.next_power_of_2(D))
    with current(q.device):
        _attend[(B * K, splits)](
            q, cache_k, cache_v, positions, slots, out, parts, sums, math.log2(math.e) / math.sqrt(D),
            *cache_k.stride(), *cache_v.stride(), K, H // K, D, max(DOT_ROWS, triton.next_power_of_2(H // K)), size,
            KEYS,
            splits, **launching(q.device),
        )  # fmt: skip
        if splits > 1:
            _combine[(B * H,)](parts, sums, out, D, size, splits, triton.next_power_of_2(splits), **launching(q.device))
    return out


@triton.jit
def _silu_mul(gate_up, out, width, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    _follow(OVERLAP)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = gate_up + tl.program_id(0) * 2 * width + column
    gate, up = tl.load(at, inside, 0.0), tl.load(at + width, inside, 0.0)
    gate = _silu(gate.to(tl.float32)).to(up.dtype)
    tl.store(out + tl.program_id(0) * width + column, (gate.to(tl.float32) * up.to(tl.float32)).to(up.dtype), inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """(B, 2 * width), gate and up side by side -> silu(gate) * up, (B, width). One launch."""
    B, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(B, width)
    with current(gate_up.device):
        _silu_mul[(B, triton.cdiv(width, ELEMENTS))](gate_up, out, width, ELEMENTS, **launching(gate_up.device))
    return out


@triton.jit
def _left(pair, DTYPE: tl.constexpr):
    """The first of two 16-bit numbers in an int32, as float32."""
    bits = pair << 16 if DTYPE == tl.bfloat16 else pair.to(tl.int16)
    return bits.to(tl.float32 if DTYPE == tl.bfloat16 else DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _right(pair, DTYPE: tl.constexpr):
    """The second of two 16-bit numbers in an int32, as float32."""
    bits = pair & -65536 if DTYPE == tl.bfloat16 else (pair >> 16).to(tl.int16)
    return bits.to(tl.float32 if DTYPE == tl.bfloat16 else DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _top(words, BYTE: tl.constexpr):
    """Move a byte of each int32 to bits 15 ... 22, the highest of a float32's fraction."""
    return words << (15 - 8 * BYTE) if BYTE < 2 else words >> (8 * BYTE - 15)


@triton.jit
def _whole(words, BYTE: tl.constexpr, bits):
    """A signed byte n as 1.5 + n / 256. bits: those of 1.5"""
    return ((_top(words, BYTE) & 0x7F8000) ^ bits).to(tl.float32, bitcast=True)


@triton.jit
def _upper(words, BYTE: tl.constexpr, bits):
    """The upper half of a byte, n, as 1 + n / 16. bits: those of 1"""
    return ((_top(words, BYTE) & 0x780000) | bits).to(tl.float32, bitcast=True)


@triton.jit
def _lower(words, BYTE: tl.constexpr, bits):
    """The lower half of a byte, n, as 1 + n / 256. bits: those of 1"""
    return ((_top(words, BYTE) & 0x078000) | bits).to(tl.float32, bitcast=True)


@triton.jit
def _rows(first, N, ROWS: tl.constexpr, GATED: tl.constexpr):
    """The weight rows of a program; gated: each row of w1 before its partner of w3. Past the end the last row is
    repeated."""
    r = tl.arange(0, ROWS)
    return tl.minimum(first + r // 2, N - 1) + (r % 2) * N if GATED else tl.minimum(first + r, N - 1)


@triton.jit
def _gated(gate, up):
    return (_silu(gate.to(tl.float32)).to(up.dtype).to(tl.float32) * up.to(tl.float32)).to(up.dtype)


@triton.jit
def _add_int8(sums, offset, words, pairs, bits, DTYPE: tl.constexpr):
    """`_one` for int8: sums plus v x, and offset plus 1.5 x, of the columns in a row's words."""
    a, b = tl.split(pairs.reshape(offset.shape[0], 2))
    x0, x1, x2, x3 = _left(a, DTYPE), _right(a, DTYPE), _left(b, DTYPE), _right(b, DTYPE)
    offset += 1.5 * ((x0 + x1) + (x2 + x3))
    sums += _whole(words, 0, bits) * x0[None, :]
    sums += _whole(words, 1, bits) * x1[None, :]
    sums += _whole(words, 2, bits) * x2[None, :]
    sums += _whole(words, 3, bits) * x3[None, :]
    return sums, offset


@triton.jit
def _int4_sums(words, pairs, bits, DTYPE: tl.constexpr):
    """`_one` for int4, sums over each word: (n - 8) x / 16 (ROWS, WORDS); x of left columns, 16 x of right ones
    (WORDS,)."""
    ac, bd = tl.split(pairs.reshape(words.shape[1], 2, 2))
    a, c = tl.split(ac)
    b, d = tl.split(bd)
    # The left columns are the upper halves of the bytes; the lower halves count 16 times less.
    x0, x2, x4, x6 = _left(a, DTYPE), _left(b, DTYPE), _left(c, DTYPE), _left(d, DTYPE)
    x1, x3, x5, x7 = _right(a, DTYPE) * 16, _right(b, DTYPE) * 16, _right(c, DTYPE) * 16, _right(d, DTYPE) * 16
    left, right = (x0 + x2) + (x4 + x6), (x1 + x3) + (x5 + x7)
    s = _upper(words, 0, bits) * x0[None, :] - (1.5 * left + 1.03125 * right)[None, :]  # 1 and 8 / 16, 1 and 8 / 256
    s += _upper(words, 1, bits) * x2[None, :]
    s += _upper(words, 2, bits) * x4[None, :]
    s += _upper(words, 3, bits) * x6[None, :]
    s += _lower(words, 0, bits) * x1[None, :]
    s += _lower(words, 1, bits) * x3[None, :]
    s += _lower(words, 2, bits) * x5[None, :]
    s += _lower(words, 3, bits) * x7[None, :]
    return s, left, right


@triton.jit
def _one(
    x, weight, scales, zeros, out, N, K: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One activation row, by multiply-and-add.

    x and weight are read as int32: words of 2, 4 or 8 weights, pairs of activations. No instruction converts an
    integer: its bits become a fraction, v = 1.5 + n / 256 (or alike) for weight n, and the sum is that of v x less that
    of 1.5 x. Each lane subtracts over its own few columns, before anything is lost to cancellation.
    """
    DTYPE: tl.constexpr = out.dtype.element_ty
    PER_WORD: tl.constexpr = 32 // KIND
    LINE: tl.constexpr = K // PER_WORD
    WORDS: tl.constexpr = COLUMNS // PER_WORD
    CHUNK: tl.constexpr = min(GROUP, 32)  # int4 columns that one thread sums before it scales them
    CHUNKS: tl.constexpr = COLUMNS // CHUNK
    # The bits of 1.5 or 1. The second index is 0; adding it keeps the bits in a register, which saves an instruction a
    # weight.
    bits = (0x3FC00000 if KIND == 8 else 0x3F800000) + tl.program_id(1)
    first = tl.program_id(0) * (ROWS // 2 if GATED else ROWS)
    row = _rows(first, N, ROWS, GATED)
    word, pair, chunk = tl.arange(0, WORDS), tl.arange(0, COLUMNS // 2), tl.arange(0, CHUNKS)
    start = first.to(tl.int64)
    at = weight + start * LINE + (row - first)[:, None] * LINE + word[None, :]
    sums = tl.zeros((ROWS, CHUNKS if KIND == 4 else WORDS), tl.float32)
    offset = tl.zeros((WORDS,), tl.float32)
    _wait(OVERLAP)
    for k in tl.range(0, LINE, WORDS, loop_unroll_factor=STAGES):
        inside = (k + word < LINE)[None, :]
        # Past the end x is 0, and any integer becomes a finite v.
        w = tl.load(at + k, inside, 0) if KIND == 16 else tl.load(at + k, inside)
        p = tl.load(x + k * (PER_WORD // 2) + pair, k * (PER_WORD // 2) + pair < K // 2, 0)
        if KIND == 16:
            sums += _left(w, DTYPE) * _left(p, DTYPE)[None, :]
            sums += _right(w, DTYPE) * _right(p, DTYPE)[None, :]
        elif KIND == 8:
            sums, offset = _add_int8(sums, offset, w, p, bits, DTYPE)
        else:
            s, left, right = _int4_sums(w, p, bits, DTYPE)
            group = (k * PER_WORD + chunk * CHUNK) // GROUP
            known = (group < K // GROUP)[None, :]
            places = (row - first)[:, None] * (K // GROUP) + group[None, :]
            scale = tl.load(scales + start * (K // GROUP) + places, known, 0.0).to(tl.float32) * 16
            zero = tl.load(zeros + start * (K // GROUP) + places, known, 0.0).to(tl.float32)
            total = tl.sum((left + 0.0625 * right).reshape(CHUNKS, CHUNK // 8), 1)
            sums += tl.sum(s.reshape(ROWS, CHUNKS, CHUNK // 8), 2) * scale + total[None, :] * zero
    _let_next_start(OVERLAP)
    y = tl.sum(sums - offset[None, :], 1) * (tl.load(scales + row) * 256) if KIND == 8 else tl.sum(sums, 1)
    y = y.to(DTYPE)
    column = first + tl.arange(0, ROWS // 2 if GATED else ROWS)
    if GATED:
        gate, up = tl.split(y.reshape(ROWS // 2, 2))
        y = _gated(gate, up)
    tl.store(out + column, y, column < N)


@triton.jit
def _float(numbers):
    """Small int32 -> float32, by an addition to the fraction of 1.5 * 2**23. GPUs convert integers slowly."""
    return (numbers + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def _several(
    x, weight, scales, zeros, out, parts, B, N, K: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    GATED: tl.constexpr,
    BATCH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Up to BATCH activation rows, on tensor cores; weights are first rounded to the activations' dtype. With several
    splits each program sums some of the columns, into parts, float32 (SPLITS, B, N)."""
    _wait(OVERLAP)
    DTYPE: tl.constexpr = out.dtype.element_ty
    CHUNK: tl.constexpr = min(GROUP, 32)
    CHUNKS: tl.constexpr = COLUMNS // CHUNK
    SHARE: tl.constexpr = (K + COLUMNS * SPLITS - 1) // (COLUMNS * SPLITS) * COLUMNS  # columns of a split
    first = tl.program_id(0) * (ROWS // 2 if GATED else ROWS)
    row = _rows(first, N, ROWS, GATED)
    line, column, byte, chunk = (
        tl.arange(0, BATCH),
        tl.arange(0, COLUMNS),
        tl.arange(0, COLUMNS // 2),
        tl.arange(0, CHUNKS),
    )
    start = row.to(tl.int64)[:, None]
    sums = tl.zeros((BATCH, ROWS), tl.float32)
    begin = tl.program_id(1) * SHARE
    if KIND == 4:
        places, known = (
            start * (K // GROUP) + ((begin + chunk * CHUNK) // GROUP)[None, :],
            (begin + chunk * CHUNK < K)[None, :],
        )
        scale, zero = tl.load(scales + places, known, 0.0), tl.load(zeros + places, known, 0.0)
    for k in range(begin, tl.minimum(begin + SHARE, K), COLUMNS):
        inside = (k + column < K)[None, :]
        a = tl.load(x + line[:, None] * K + (k + column)[None, :], (line < B)[:, None] & inside, 0.0)
        if KIND == 4:
            numbers = tl.load(
                weight + start * (K // 2) + (k // 2 + byte)[None, :], (k // 2 + byte < K // 2)[None, :], 0
            )
            numbers = numbers.to(tl.int32)
            v = tl.interleave(_upper(numbers, 0, 0x3F800000), _upper(numbers << 4, 0, 0x3F800000))  # 1 + n / 16
            slope, offset = scale.to(tl.float32) * 16, zero.to(tl.float32) - scale.to(tl.float32) * 24
            w = v.reshape(ROWS, CHUNKS, CHUNK) * slope[:, :, None] + offset[:, :, None]
            w = w.reshape(ROWS, COLUMNS).to(DTYPE)
            # The next trip's scales are loaded here: the compiler loads ahead only what feeds a product directly.
            ahead = k + COLUMNS + chunk * CHUNK
            places, known = start * (K // GROUP) + (ahead // GROUP)[None, :], (ahead < K)[None, :]
            scale, zero = tl.load(scales + places, known, 0.0), tl.load(zeros + places, known, 0.0)
        elif KIND == 8:
            n = tl.load(weight + start * K + (k + column)[None, :], inside, 0)
            w = _float(n.to(tl.int32)).to(DTYPE)
        else:
            w = tl.load(weight + start * K + (k + column)[None, :], inside, 0.0)
        sums = tl.dot(a, tl.trans(w), sums)
    _let_next_start(OVERLAP)
    if KIND == 8:
        sums *= tl.load(scales + row)[None, :]
    y = sums if SPLITS > 1 else sums.to(DTYPE)
    column = first + tl.arange(0, ROWS // 2 if GATED else ROWS)
    if GATED:
        gate, up = tl.split(y.reshape(BATCH, ROWS // 2, 2))
        y = _gated(gate, up)
    at = line[:, None] * N + column[None, :]
    place = parts + tl.program_id(1) * B * N + at if SPLITS > 1 else out + at
    tl.store(place, y, (line < B)[:, None] & (column < N)[None, :])


@triton.jit
def _add_parts(parts, out, SIZE, SPLITS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    _follow(OVERLAP)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        sums += tl.load(parts + split * SIZE + at, at < SIZE, 0.0)
    tl.store(out + at, sums.to(out.dtype.element_ty), at < SIZE)


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: Optional[torch.Tensor],
    zeros: Optional[torch.Tensor],
    kind: int,
    gated: bool,
) -> torch.Tensor:
    """x weightᵀ for the three functions below. kind: bits of a weight, 16, 8 or 4."""
    B, K = x.shape
    N = len(weight) // (2 if gated else 1)
    group = 32 if zeros is None else K * len(weight) // zeros.numel()
    out = x.new_empty(B, N)
    one = B == 1 and K % (32 // kind) == 0  # a row of weights is read in whole words
    tiles = ONE[kind] if one else SEVERAL[kind]
    grid = (triton.cdiv(N, tiles.rows // (2 if gated else 1)),)
    options = {"num_stages": tiles.stages, **launching(x.device, tiles.warps)}
    with current(x.device):
        if one:
            words = x.view(torch.int32), weight.view(torch.int32)
            _one[grid](
                *words, scales, zeros, out, N, K, kind, group, gated, tiles.rows, tiles.columns, tiles.stages, **options
            )
        else:
            batch = max(DOT_ROWS, triton.next_power_of_2(B))
            # More rows of x leave memory for fewer stages.
            options["num_stages"] = max(2, tiles.stages * DOT_ROWS // batch)
            splits = 1 if gated else max(1, min(MOST_SHARES, tiles.programs * processor_count(x.device) // grid[0]))
            parts = x.new_empty((splits, B, N) if splits > 1 else 0, dtype=torch.float32)
            _several[(*grid, splits)](
                x, weight, scales, zeros, out, parts, B, N, K, kind, group, gated, batch, tiles.rows, tiles.columns,
                splits,
                **options,
            )  # fmt: skip
            if splits > 1:
                _add_parts[(triton.cdiv(B * N, ELEMENTS),)](parts, out, B * N, splits, ELEMENTS, **launching(x.device))
    return out


def product(x: torch.Tensor, weight: torch.Tensor, gated: bool = False) -> torch.Tensor:
    """x (B, K) for B up to 64, weight (N, K) in x's dtype -> x weightᵀ, (B, N), summed in float32. One launch, or two
    if several programs share the columns of a row.

    gated: weight is w1 above w3, (2N, K) -> silu(x w1ᵀ) * (x w3ᵀ), (B, N), rounded as separate products would be.
    """
    return _product(x, weight, None, None, 16, gated)


def product_int8(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, gated: bool = False) -> torch.Tensor:
    """`product` with weight int8 (N, K) and scales float32 (N,). Infinite x gives NaN."""
    return _product(x, weight, scales, None, 8, gated)


def product_int4(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, gated: bool = False
) -> torch.Tensor:
    """`product` with weight uint8 (N, K / 2), the left of two columns in the upper half of a byte, and bfloat16 scales
    and zeros (N, K / group): (n - 8) * scale + zero, which is not rounded if B is 1. Infinite x gives NaN."""
    return _product(x, weight, scales, zeros, 4, gated)


@triton.jit
def _dequantize_int4(
    weight, scales, zeros, out, CHUNKS, CHUNK: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr
):  # fmt: skip
    _follow(OVERLAP)
    DTYPE: tl.constexpr = out.dtype.element_ty
    chunk = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = chunk < CHUNKS
    byte, column = tl.arange(0, CHUNK // 2)[None, :], tl.arange(0, CHUNK)[None, :]
    numbers = tl.load(weight + chunk[:, None] * (CHUNK // 2) + byte, inside[:, None], 0).to(tl.int32)
    group = chunk * CHUNK // GROUP
    scale = tl.load(scales + group, inside, 0.0).to(DTYPE).to(tl.float32)[:, None]
    zero = tl.load(zeros + group, inside, 0.0).to(DTYPE).to(tl.float32)[:, None]
    w = tl.interleave(_float((numbers >> 4) - 8), _float((numbers & 15) - 8)) * scale + zero
    tl.store(out + chunk[:, None] * CHUNK + column, w.to(DTYPE), inside[:, None])


def dequantize_int4(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """weight uint8 (N, K / 2), scales and zeros bfloat16 (N, K / group) -> (N, K) in dtype, for prompts. One launch."""
    N, K = len(weight), 2 * weight.shape[1]
    out = torch.empty(N, K, dtype=dtype, device=weight.device)
    group = out.numel() // scales.numel()
    chunk = min(group, 32)
    chunks, block = out.numel() // chunk, ELEMENTS // chunk
    with current(weight.device):
        _dequantize_int4[(triton.cdiv(chunks, block),)](
            weight, scales, zeros, out, chunks, chunk, group, block, **launching(weight.device)
        )
    return out
