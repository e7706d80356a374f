"""An engine in which a row's numbers are the same to the bit whatever else runs: `batch_invariant=True`.

Every token is computed in one way, whether it is read with a prompt, in whichever piece, decoded, or verified as a
draft. Its products are those of blocks of a fixed size; its attention has a shape that depends on its position alone;
all else is computed row by row. It reads the model's tensors itself and calls no module, so it runs only while the
model is as it was built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Optional, cast

import torch
import torch.nn.functional as F

from .. import runtime
from ..layers import proven
from ..layers.invariant import Products, silu_mul
from ..layers.parallel import sum_in_order
from ..model import Attention, Transformer, TransformerBlock
from ..runtime import device_kind, to_device
from .compiled import Recorded, rotations
from .engine import CHUNK, PASS, Engine, without_onednn

TILE = 16  # queries that attend together: those of one row whose positions differ only in the last 4 bits
PROGRAMS = 256  # programs of Triton's attention for one query, over all key/value heads
ON_GPU = 512  # most tokens of one pass on a GPU, whose attention takes memory for each

INVARIANT_AS_BUILT = (
    "batch_invariant=True holds for a model as it was built, and hooks, patches, parts or a sample_top_p of one's own "
    "are in use; remove them, or build without batch_invariant"
)


def check_invariant(device: torch.device, compile: Optional[bool]) -> None:
    """ValueError if batch_invariant=True cannot be kept."""
    if compile:
        raise ValueError("compile=True and batch_invariant=True exclude each other: leave one of them out")
    if device_kind(device) not in ("cpu", "cuda"):
        raise ValueError(f"batch_invariant=True is known to hold on cpu and cuda, not on {device}; leave it out")


class Run(NamedTuple):
    """Tokens of one row that follow each other."""

    slot: int
    start: int  # position of the first one
    length: int


class InvariantEngine(Engine):
    """See above. ValueError for a model or an option with which it cannot be kept."""

    batch_invariant = True

    def __init__(self, model: Any, compile: Optional[bool] = None) -> None:
        if not isinstance(model, Transformer):
            raise ValueError(f"batch_invariant=True needs a model of this library, not {type(model).__name__}")
        check_invariant(model.norm.weight.device, compile)
        self._products = Products()
        super().__init__(model, compile)

    def _make_graph(self, compile: Optional[bool]) -> None:
        self._by_kernels = proven.usable(self.model.norm.weight)
        recorded = self._by_kernels and compile is not False and self.model.params.max_seq_len >= 4
        self.graph = Recorded(self.model, step=self._step) if recorded else None
        self._made_for = self._form()

    def forward(self, tokens: torch.Tensor, start_pos: int) -> torch.Tensor:
        raise ValueError(INVARIANT_AS_BUILT)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        slots: Sequence[int],
        start: int = 0,
        *,
        layers: int = -1,
        pass_length: int = 0,
    ) -> Iterator[tuple[list[int], torch.Tensor, int]]:
        table = self._table(max(map(len, prompts)), pass_length)
        on_gpu = device_kind(self.device) == "cuda"
        chunk = max(1, ON_GPU // len(prompts)) if on_gpu else max(CHUNK, PASS // len(prompts))
        for at in range(start, max(map(len, prompts)), chunk):
            rows = [row for row, prompt in enumerate(prompts) if len(prompt) > at]
            parts = [prompts[row][at : at + chunk] for row in rows]
            runs = [Run(slots[row], at, len(part)) for row, part in zip(rows, parts)]
            hidden = self._pass([token for part in parts for token in part], runs, layers, table)
            by_row = hidden.split([len(part) for part in parts])
            yield rows, torch.nn.utils.rnn.pad_sequence(list(by_row), batch_first=True), at

    def decode(self, tokens: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        if self._ready is not None:
            with self._explained(), runtime.current(self.device):
                return self._ready(tokens, positions)
        return self.logits(self._pass(tokens, [Run(slot, position, 1) for slot, position in enumerate(positions)]))

    def verify(
        self, tokens: Sequence[Sequence[int]], positions: Sequence[int], slots: Optional[Sequence[int]] = None
    ) -> torch.Tensor:
        S = len(tokens[0])
        runs = [Run(slot, at, S) for slot, at in zip(range(len(tokens)) if slots is None else slots, positions)]
        return self.logits(self._pass([token for row in tokens for token in row], runs)).unflatten(0, (len(tokens), S))

    def run_each(self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int]) -> torch.Tensor:
        return self.logits(self._pass(tokens, [Run(slot, at, 1) for slot, at in zip(slots, positions)]))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        with self._explained(), runtime.current(self.device), self._same_kernels():
            return self._head(hidden)

    def of_rows(self, function: Callable[..., torch.Tensor], *rows: torch.Tensor) -> torch.Tensor:
        """One row at a time, each in memory of its own: a row's place can decide how a GPU sums it."""
        parts = [function(*(x[i : i + 1].clone() for x in rows)) for i in range(len(rows[0]))]
        return torch.cat(parts) if parts else function(*rows)

    def _same_kernels(self) -> AbstractContextManager[None]:
        """Other models' threads turn oneDNN off for the whole process."""
        on_cpu = device_kind(self.device) == "cpu"
        return without_onednn.kept_out() if on_cpu and self.dtype == torch.bfloat16 else nullcontext()

    def _table(self, end: int, pass_length: int) -> torch.Tensor:
        """`rotations` for tokens in front of `end`, of which those in front of pass_length are read as one."""
        scaling = self.model.params.rope_scaling
        if scaling is None or not scaling.one_pass(pass_length):
            return rotations(self.model)
        return torch.view_as_real(self.model.turns(0, end, pass_length))

    def _pass(
        self, tokens: Any, runs: Sequence[Run], layers: int = -1, table: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """Run tokens, those of each run after those of the one before -> hidden states (tokens, dim). table: of
        rotations, if it is not the model's."""
        slots = [run.slot for run in runs for _ in range(run.length)]
        positions = [position for run in runs for position in range(run.start, run.start + run.length)]
        ids = tokens if isinstance(tokens, torch.Tensor) else to_device(list(tokens), self.device)
        count = len(positions)
        # Kernels are compared with their plain form for each number of rows. Repeating the last token up to a power of
        # two keeps these numbers few.
        if self._by_kernels:
            more = (1 << (count - 1).bit_length()) - count
            slots, positions = slots + slots[-1:] * more, positions + positions[-1:] * more
            ids = torch.cat((ids, ids[-1:].expand(more)))
        places = to_device(positions, self.device), to_device(slots, self.device)
        attend = (
            self._attend_by_kernel(*places)
            if self._by_kernels
            else _Tiles(runs, self.model.params.max_seq_len, self.device)
        )
        with self._explained(), runtime.current(self.device), self._same_kernels():
            table = rotations(self.model) if table is None else table
            return self._states(ids, *places, table, attend, layers)[:count]

    def _step(
        self, tokens: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor, rotations: torch.Tensor
    ) -> torch.Tensor:
        """`Transformer.step`"""
        slots = torch.arange(len(tokens), device=tokens.device)
        return self._head(self._states(tokens, positions, slots, rotations, self._attend_by_kernel(positions, slots)))

    def _states(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        rotations: torch.Tensor,
        attend: Callable[[torch.Tensor, Attention], torch.Tensor],
        layers: int = -1,
    ) -> torch.Tensor:
        """tokens, positions, slots int64 (N,); attend: q (N, H, D) and a layer's cache -> (N, H * D). -> (N, dim)"""
        model, product = self.model, self._products
        group, on_cpu = model.output.group, device_kind(tokens) == "cpu"
        h = model.tok_embeddings(tokens)
        delta: Optional[torch.Tensor] = None  # the next summand of h
        for layer in cast(Iterable[TransformerBlock], model.layers if layers < 0 else model.layers[:layers]):
            attention, ffn = layer.attention, layer.feed_forward
            h, x = proven.add_norm(h, delta, layer.attention_norm.weight, layer.attention_norm.eps)
            qkv = self._joined(x, attention, (attention.wq, attention.wk, attention.wv))
            if on_cpu or qkv.dtype == torch.float16:
                qkv = qkv.add(qkv, alpha=0)  # see `hides_infinity`
            q = proven.rotate_and_store(qkv, rotations, positions, attention.cache_k, attention.cache_v, slots)
            delta = sum_in_order(product(attend(q, attention), attention.wo), group)
            h, x = proven.add_norm(h, delta, layer.ffn_norm.weight, layer.ffn_norm.eps)
            gate_up = self._joined(x, ffn, (ffn.w1, ffn.w3))
            x = silu_mul(gate_up) if on_cpu else proven.silu_mul(gate_up)
            delta = sum_in_order(product(x, ffn.w2), group)
        if layers >= 0:
            return h if delta is None else h + delta
        return cast(torch.Tensor, proven.add_norm(h, delta, model.norm.weight, model.norm.eps)[1])

    def _joined(self, x: torch.Tensor, block: Any, layers: Sequence[Any]) -> torch.Tensor:
        """The products with layers of one input, side by side."""
        whole = block.fused if block.joined is None else block.joined
        if whole is not None:
            return self._products(x, whole)
        return torch.cat([self._products(x, layer) for layer in layers], dim=-1)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.output.gathered(self._products(hidden, self.model.output)).float()

    def _attend_by_kernel(
        self, positions: torch.Tensor, slots: torch.Tensor
    ) -> Callable[[torch.Tensor, Attention], torch.Tensor]:
        """Triton's kernel. The same number of programs shares the keys of each query."""

        def attend(q: torch.Tensor, attention: Attention) -> torch.Tensor:
            processors = len(q) * PROGRAMS // 4  # what makes the kernel take PROGRAMS / K of them
            x = proven.attend(q, attention.cache_k, attention.cache_v, positions, processors, slots)
            if proven.attend.refused:
                raise ValueError(
                    "batch_invariant=True needs the kernel of attention, which is not used here: build without it"
                )
            return cast(torch.Tensor, x)

        return attend


class _Tiles:
    """Attention in plain torch: queries of one row, at positions that begin at a multiple of TILE, over the columns up
    to the last of these positions. Places where no query is asked for hold zeros."""

    def __init__(self, runs: Sequence[Run], columns: int, device: torch.device) -> None:
        """columns: of the cache."""
        self.tiles: list[tuple[Run, torch.Tensor, int]] = []  # a run within one tile, its mask, how many columns
        masks: dict[int, torch.Tensor] = {}
        for slot, start, count in runs:
            for first in range(start - start % TILE, start + count, TILE):
                begin, end = max(start, first), min(start + count, first + TILE)
                span = min(first + TILE, columns)
                if first not in masks:
                    places = torch.arange(first, first + TILE, device=device)
                    masks[first] = torch.arange(span, device=device) <= places[:, None]
                self.tiles.append((Run(slot, begin, end - begin), masks[first], span))

    def __call__(self, q: torch.Tensor, attention: Attention) -> torch.Tensor:
        parts, at = [], 0
        for (slot, start, count), mask, span in self.tiles:
            before = start % TILE
            some = F.pad(q[at : at + count], (0, 0, 0, 0, before, TILE - before - count))  # (TILE, H, D)
            k, v = (_aligned(cache[slot, :span].transpose(0, 1)) for cache in (attention.cache_k, attention.cache_v))
            out = F.scaled_dot_product_attention(
                some.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, enable_gqa=len(k) != q.shape[1]
            )
            parts.append(out[0, :, before : before + count].transpose(0, 1).flatten(1))
            at += count
        return torch.cat(parts)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x (K, T, D), or a copy if its rows begin elsewhere in the processor's vectors in one slot than in another."""
    return x if x.shape[-1] * x.element_size() % 64 == 0 else x.clone(memory_format=torch.contiguous_format)
