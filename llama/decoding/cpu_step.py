"""`Transformer.step` on a CPU as one operator: `layers/cpu_step.h` runs all layers for a few rows, without a return to
Python.

It reads the model's tensors where they lie and calls no module, so it is used only while the model is as it was built.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any, Optional, cast

import torch

from .. import runtime
from ..layers import own_kernels
from ..layers.parallel import ColumnParallelLinear, RowParallelLinear, all_agree, group_size, messages_of
from ..layers.products import AMX
from ..layers.quantized import Quantized
from ..model import RMSNorm, Transformer, TransformerBlock

MOST_ROWS = 32  # of cpu_step.h
PLAIN_ROWS = 4  # most rows for plain weights on a processor that multiplies tiles (AMX); for more, torch's are faster


def make_step(model: Transformer, wanted: Optional[bool]) -> Optional[CpuStep]:
    """The step for a model on a CPU. None on other devices, and if `wanted`, which is that of `make_graph`, is False;
    if it is True, call it on all ranks alike."""
    if wanted is False or runtime.device_kind(model.norm.weight) != "cpu":
        return None
    step = CpuStep(model)
    if wanted:
        step.refresh()  # what it cannot run is compiled on all ranks, or on none
    return step


class CpuStep:
    """The step of a model, for up to `MOST_ROWS` rows. All ranks run it, or none: their messages are not those of the
    step operator by operator."""

    def __init__(self, model: Transformer) -> None:
        self.model, self._group = model, model.output.group
        self._plan = self._made_plan()

    def refresh(self) -> None:
        """Look up the weights and caches, which may have been replaced since the last call. A collective: call it
        before the first step."""
        plan = self._made_plan()
        agreed = all_agree(plan is not None, self._group)
        self._plan = plan if agreed else None

    def _made_plan(self) -> Optional[_Plan]:
        """None if this rank cannot run the step."""
        if not self.model.as_built or runtime.cpp_compiler() is None or not own_kernels.loaded():
            return None
        for attention in self.model.attentions():
            attention.fit_cache(self.model.norm.weight)  # autocast may have left it in another dtype
        try:
            return _Plan(self.model)
        except _UnknownForm:
            return None

    def takes(self, rows: int) -> bool:
        """Whether it runs so many rows of the model as it was at the last `refresh`."""
        if self._plan is None:
            return False
        return rows <= (PLAIN_ROWS if AMX and self._plan.has_plain else MOST_ROWS)

    def __call__(self, tokens: torch.Tensor, positions: Sequence[int], slots: Sequence[int]) -> torch.Tensor:
        """tokens int64 (N,), each at its position of its slot -> logits float32 (N, vocab_size). Tokens of one slot see
        each other as far as they stand before."""
        assert self._plan is not None
        places = torch.tensor([list(positions), list(slots)], device="cpu")  # whatever the default is
        logits = torch.ops.llama_cpu.step(self._plan.tensor, tokens.contiguous().view(1, -1), places[:1], places[1:])
        return cast(torch.Tensor, logits[:, : self.model.vocab_size])  # the ranks' even parts may be more


class _UnknownForm(Exception):
    """A tensor of the model is of a kind or shape, or lies in memory in a way, that cpu_step.h does not know."""


class _Plan:
    """What cpu_step.h must know of this rank's part of a model: its sizes, and where its tensors lie. They stay there
    while this lives."""

    def __init__(self, model: Transformer) -> None:
        """Raises _UnknownForm."""
        self.dtype = model.norm.weight.dtype
        self.has_plain = type(model.output) is ColumnParallelLinear
        self._kept: list[torch.Tensor] = []
        self._numbers: list[int] = []
        group = model.output.group
        ranks, messages = group_size(group), messages_of(group)
        if messages is None:
            raise _UnknownForm
        self._numbers += [ranks, *messages]
        if self.dtype not in (torch.float32, torch.bfloat16) or not len(model.layers):
            raise _UnknownForm
        args, table, attention = model.params, torch.view_as_real(model.freqs_cis), next(model.attentions())
        dim, heads, kv_heads = args.dim, attention.n_local_heads, attention.n_local_kv_heads
        queries, keys, width = heads * args.head_size, kv_heads * args.head_size, args.ffn_width // ranks
        cache = attention.cache_k
        slot, key, head, one = cache.stride()
        if one != 1 or cache.shape[2:] != (kv_heads, args.head_size):
            raise _UnknownForm
        self._numbers += [own_kernels.TYPES.index(self.dtype), dim, heads, kv_heads, args.head_size]
        self._numbers += [len(model.tok_embeddings.weight), len(cache), min(cache.shape[1], len(table))]
        self._add(model.tok_embeddings.weight, (len(model.tok_embeddings.weight), dim // ranks))
        self._add(table, (len(table), args.head_size // 2, 2), torch.float32)
        self._numbers += [slot, head, key, len(model.layers)]
        for layer in cast(Iterable[TransformerBlock], model.layers):
            attention, ffn = layer.attention, layer.feed_forward
            self._add_norm(layer.attention_norm, dim)
            for matrix, rows in ((attention.wq, queries), (attention.wk, keys), (attention.wv, keys)):
                self._add_matrix(matrix, rows, dim)
            self._add_matrix(attention.wo, dim, queries)
            for each in (attention.cache_k, attention.cache_v):
                self._add(each, cache.shape, strides=cache.stride())
            self._add_norm(layer.ffn_norm, dim)
            for matrix in (ffn.w1, ffn.w3):
                self._add_matrix(matrix, width, dim)
            self._add_matrix(ffn.w2, dim, width)
        self._add_norm(model.norm, dim)
        self._add_matrix(model.output, model.output.output_size_per_partition, dim)
        self.tensor = torch.tensor([self._numbers], device="cpu")

    def _add(
        self,
        tensor: torch.Tensor,
        shape: tuple[int, ...],
        dtype: Optional[torch.dtype] = None,
        strides: Optional[tuple[int, ...]] = None,
    ) -> None:
        """Its address. shape, strides: those that it must have, as cpu_step.h reads it; strides only if it is not
        contiguous."""
        in_place = tensor.is_contiguous() if strides is None else tensor.stride() == strides
        if (
            tensor.shape != shape
            or tensor.dtype != (dtype or self.dtype)
            or not in_place
            or runtime.device_kind(tensor) != "cpu"
        ):
            raise _UnknownForm
        self._kept.append(tensor.detach())
        self._numbers.append(tensor.data_ptr())

    def _add_norm(self, norm: RMSNorm, dim: int) -> None:
        self._add(norm.weight, (dim,))
        self._numbers += struct.unpack("i", struct.pack("f", norm.eps))

    def _add_matrix(self, layer: Any, rows: int, columns: int) -> None:
        """rows, columns: of this rank's part."""
        here = (
            getattr(layer, "output_size_per_partition", layer.out_features),
            getattr(layer, "input_size_per_partition", layer.in_features),
        )
        if here != (rows, columns):
            raise _UnknownForm
        if type(layer) in (ColumnParallelLinear, RowParallelLinear):
            kind, weight, group, scales = "plain", layer.weight, columns, None
        elif isinstance(layer, Quantized) and (form := layer.for_step()) is not None:
            kind, (weight, group, scales) = layer.kind, form
        else:
            raise _UnknownForm
        self._numbers.append(own_kernels.FORMS.index(kind))
        if kind == "plain":
            self._add(weight, (rows, columns))
        else:
            self._add(weight, weight.shape, torch.uint8)  # as the layer has packed it
        self._numbers += [rows, columns, group]
        if scales is None:
            self._numbers.append(0)
        else:
            self._add(scales, scales.shape, torch.float32)
