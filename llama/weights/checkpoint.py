"""Files -> this rank's weights: fills a model from a `Checkpoint`, a folder of either format, on any number of ranks.

Files are mapped, not read: a tensor that is used whole and in its own dtype on a CPU stays in the mapping, and of all
others each rank copies only its own slices.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional, Protocol

import torch

from ..layers.parallel import group_rank, group_size, model_parallel_group
from ..layers.quantization import quantize_layers
from ..layers.quantized import Quantized
from ..layers.rounding import Quantization, row_maxima
from ..memory import return_freed
from ..model import ModelArgs, Transformer
from ..runtime import device_kind
from ..system.files import MappedFiles, contents, is_there, listed
from ..system.printable import counted
from ..system.progress import bar
from .gguf import GGUFCheckpoint
from .huggingface import HuggingFaceCheckpoint, has_weights
from .meta import MetaCheckpoint
from .places import check_place, find_gguf
from .staging import Job, Sender, run_jobs


class Checkpoint(Protocol):
    """The weights of a folder as full matrices under Meta's names, whatever files they lie in. `shard_dim` is the
    dimension that a layer's matrix is cut along, None for a tensor that every process holds whole."""

    format: str  # "Meta", "Hugging Face", or "GGUF" with its kinds of numbers
    config: str  # the name of what `args` come from: a file of the folder, or a part of the one file
    folder: Path  # the name that was given; GGUF's is a file
    paths: list[Path]  # the files of weights
    mapped: MappedFiles
    args: ModelArgs  # the stored shape, without limits; vocab_size is -1 if only the tokenizer tells it
    # How many positions the model was made for, if the files say so; scaled ones stand in args.rope_scaling.
    positions: Optional[int]
    tied: bool  # whether the embedding is the output matrix too
    quantization: Optional[Quantization]  # the stored kind of numbers; None: not quantized
    dtype: torch.dtype  # the embedding's
    dtypes: dict[str, torch.dtype]  # name of a weight -> dtype
    tables: dict[str, torch.dtype]  # the same for tensors that this library computes itself

    def leave_out_ids(self, pieces: int) -> bool:
        """Whether ids from `pieces` on can be left out. If so, `shape`, `parts` and `read` end before them from now
        on."""

    def missing_shards(self, width: int) -> int:
        """How many more shards like those that are here would make the embedding `width` wide; 0 if none would."""

    def check_copies(self, name: str) -> None:
        """ValueError if a tensor that every file has whole is not the same in all: they are of different models."""

    def shape(self, name: str, shard_dim: Optional[int]) -> list[int]:
        """The shape of the full matrix."""

    def parts(self, name: str, shard_dim: Optional[int], start: int, stop: int) -> list[torch.Tensor]:
        """Entries start … stop of the full matrix along `shard_dim` (all of a tensor that is not cut), as views of the
        mapping, in order along `shard_dim`. All dimensions of a part but the last count rows."""

    def read(self, name: str, shard_dim: Optional[int], start: int, stop: int) -> torch.Tensor:
        """The same entries as one tensor, which may be a view of the mapping."""


def open_checkpoint(ckpt_dir: Path) -> Checkpoint:
    """Map the weights of a folder in either format, or of a GGUF file, and read the shape of their model. Copies no
    weight.

    A folder with both formats counts as Meta's, and one with GGUF files counts as theirs if it has no others.
    ValueError if it has none, is damaged, or holds a model that this library does not compute.
    """
    if find_gguf(ckpt_dir):
        return GGUFCheckpoint(ckpt_dir)
    check_place(ckpt_dir)
    metas = [is_there(ckpt_dir / "params.json"), any(ckpt_dir.glob("consolidated.*.pth"))]
    theirs = is_there(ckpt_dir / "config.json")
    if theirs and (not all(metas)) and has_weights(ckpt_dir):  # one of Meta's files alone is a stray
        return HuggingFaceCheckpoint(ckpt_dir)
    if not (any(metas) or theirs or is_there(ckpt_dir / "adapter_config.json")):
        raise ValueError(
            f"no model in {ckpt_dir}: params.json is missing, as is config.json, and the folder holds "
            f"{contents(ckpt_dir)}; "
            "pass the one with consolidated.00.pth and params.json, or model.safetensors and config.json, or a GGUF "
            "file"
        )
    if any(metas):
        return MetaCheckpoint(ckpt_dir)
    return HuggingFaceCheckpoint(ckpt_dir)


def known_ids(checkpoint: Checkpoint) -> Optional[int]:
    """How many ids a folder says that its model has; None if it does not say so, or its weights have another number."""
    stated = checkpoint.args.vocab_size
    return stated if [stated] == checkpoint.shape("tok_embeddings.weight", 1)[:1] else None


def fit_vocabulary(checkpoint: Checkpoint, pieces: int) -> ModelArgs:
    """The checkpoint's args with vocab_size=pieces, the tokenizer's ids. ValueError if the folder says another
    number."""
    stated = checkpoint.args.vocab_size
    if stated not in (-1, pieces):
        raise ValueError(
            f"{checkpoint.folder} says vocab_size={stated}, but the tokenizer has {pieces} pieces; "
            "pass the tokenizer that belongs to the checkpoint"
        )
    return replace(checkpoint.args, vocab_size=pieces)


def cut(model: Transformer) -> dict[str, tuple[list[int], Optional[int], int]]:
    """For every parameter: the shape of the full matrix, the dimension it is cut along, and how many ranks hold a
    part."""
    ranks = group_size(model_parallel_group())
    plan = {}
    for prefix, module in model.named_modules():
        dims, copies = getattr(module, "shard_dims", None), getattr(module, "copies", 1)
        # The rows of the matrix itself. Its parts may have more, which only fill them up.
        rows = module.out_features if getattr(module, "gather_output", False) else math.inf
        for name, parameter in module.named_parameters(recurse=False):
            dim = getattr(module, "shard_dim", None) if dims is None else dims[name]
            shape = [int(min(n * (ranks // copies), rows)) if i == dim else n for i, n in enumerate(parameter.shape)]
            plan[f"{prefix}.{name}"] = shape, dim, copies
    return plan


def choose_quantization(checkpoint: Checkpoint, quantize: Optional[str]) -> Optional[Quantization]:
    """`quantize`, or else the checkpoint's own kind of numbers. ValueError if that is another quantized kind."""
    chosen, stored = None if quantize is None else Quantization(quantize), checkpoint.quantization
    if chosen is not None and stored is not None and chosen.kind != stored.kind:
        raise ValueError(
            f"{checkpoint.folder} is already {stored.kind} and cannot become {chosen.kind}; "
            "leave quantize out, or take the folder with the original weights"
        )
    return stored or chosen


def prepare(model: Transformer, checkpoint: Checkpoint, quantize: Optional[str] = None) -> Optional[Quantization]:
    """Make a model on the meta device ready for `fill`: check the weights, and put quantized layers in, if needed.

    quantize: one of `rounding.KINDS`, or None for the checkpoint's own kind. Returns the model's kind. ValueError if
    the weights do not fit the model, or are of another quantized kind, or the processes cannot share the groups.
    """
    quantization = choose_quantization(checkpoint, quantize)
    if checkpoint.quantization is None:
        check_weights(model, checkpoint)
    if quantization is not None:
        quantize_layers(model, quantization)
    if checkpoint.quantization is not None:
        check_weights(model, checkpoint)
    return quantization


def check_weights(model: Transformer, checkpoint: Checkpoint) -> None:
    """ValueError, which lists the problems, unless the checkpoint's names, shapes and stored dtypes are the model's."""
    plan, names = cut(model), checkpoint.dtypes.keys()
    problems = [f"{name} is missing" for name in plan if name not in names]
    problems += [f"{name} is unexpected" for name in sorted(names - plan.keys())]
    for name, (shape, dim, _) in plan.items():
        if name in names and (found := checkpoint.shape(name, dim)) != shape:
            problems.append(f"{name} has shape {found} instead of {shape}")
    for prefix, layer in quantized_layers(model).items():
        for name, tensor in layer.named_parameters(prefix, recurse=False):
            if name in names and (found_dtype := checkpoint.dtypes[name]) != tensor.dtype:
                problems.append(f"{name} is {found_dtype} instead of {tensor.dtype}")
    if problems:
        hint = ""
        whole = plan["tok_embeddings.weight"][0]
        found = checkpoint.shape("tok_embeddings.weight", 1)
        if len(found) == 2 and found[0] != whole[0]:
            hint = f"; the tokenizer has {whole[0]} pieces and the weights are for {found[0]}: pass their own tokenizer"
        elif len(found) == 2 and (missing := checkpoint.missing_shards(whole[1])):
            hint = f"; are {missing} more shards missing?"
        raise ValueError(
            f"the weights in {checkpoint.folder} ({counted(len(checkpoint.paths), 'file')}) are not those that its "
            f"{checkpoint.config} and tokenizer describe{hint}: {listed(problems, 8)}"
        )
    for name, (_, dim, _) in plan.items():
        if dim is None:
            checkpoint.check_copies(name)


def quantized_layers(model: Transformer) -> dict[str, Quantized]:
    """Name -> layer, for each quantized layer of a model."""
    return {prefix: module for prefix, module in model.named_modules() if isinstance(module, Quantized)}


def quantized(
    checkpoint: Checkpoint, prefix: str, layer: Quantized, start: int, stop: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """The stored tensors of a layer, by name, for entries start … stop along its `shard_dim`: read, rounded, and its
    pages given back."""
    name = f"{prefix}.weight"
    dim = layer.shard_dim
    maxima = None
    if layer.kind == "int8" and dim == 1:  # a scale belongs to the full row, and this is a part of it
        columns, part = checkpoint.shape(name, dim)[1], stop - start
        pieces = (checkpoint.read(name, dim, i, i + part) for i in range(0, columns, part))
        maxima = torch.stack([_released_maxima(piece, checkpoint) for piece in pieces]).amax(0).to(device)
    weight = checkpoint.read(name, dim, start, stop)
    made = layer.quantize(weight, maxima, device)
    checkpoint.mapped.release(weight)
    return made


def _released_maxima(piece: torch.Tensor, checkpoint: Checkpoint) -> torch.Tensor:
    maxima = row_maxima(piece)
    checkpoint.mapped.release(piece)
    return maxima


def check_scales(name: str, tensor: torch.Tensor, checkpoint: Checkpoint) -> None:
    """ValueError if scales or zeros, on the host, cannot come from rounding numbers. Other tensors pass."""
    what = name.rpartition(".")[2]
    if what in ("scales", "zeros"):
        least, most = (x.item() for x in tensor.aminmax())
        if not (math.isfinite(least) and math.isfinite(most) and (least > 0 or what == "zeros")):
            raise ValueError(
                f"{checkpoint.folder}: {name} goes from {least} to {most}; scales are finite and above 0, and zeros "
                f"finite: "
                "the file is damaged, or the weights that were rounded have NaN or infinity in them"
            )


def fill(model: Transformer, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Give a model on the meta device, which `prepare` has passed, its weights and its cache on `device`.

    ValueError if the files are written to meanwhile, or scales are wrong."""
    if device_kind(device) == "cpu":
        _fill_on_host(model, checkpoint, dtype)
    else:
        _fill_on_device(model, checkpoint, device, dtype)
    checkpoint.mapped.check_unchanged()
    model.allocate(device, dtype)


def _progress(tensors: int) -> Any:
    """A bar of the tensors that are there."""
    return bar(total=tensors, desc="Loading", unit="tensor")


class Part(NamedTuple):
    """This rank's part of one tensor of the checkpoint: entries start … stop along `dim`, filled up to `size` with
    zeros."""

    name: str
    dim: Optional[int]
    start: int
    stop: int
    size: int
    layer: Optional[Quantized]  # rounds the weight, if given; its other tensors then have no parts of their own

    @property
    def prefix(self) -> str:
        """The name of the layer that the tensor belongs to."""
        return self.name.rpartition(".")[0]

    def filled(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with zeros behind its rows, if it has fewer than the part."""
        missing = self.size - (self.stop - self.start)
        return torch.cat((tensor, tensor.new_zeros(missing, *tensor.shape[1:]))) if missing else tensor


def _parts(model: Transformer, checkpoint: Checkpoint) -> list[Part]:
    group = model_parallel_group()
    rank, ranks = group_rank(group), group_size(group)
    to_round = quantized_layers(model) if checkpoint.quantization is None else {}
    parts = []
    for name, (shape, dim, copies) in cut(model).items():
        prefix, _, what = name.rpartition(".")
        layer = to_round.get(prefix)
        if layer is not None and what != "weight":
            continue
        full = 0 if dim is None else shape[dim]
        size = -(-full * copies // ranks)
        if layer is not None and dim == 1:
            # These count numbers; `shape` counts bytes, each of which may hold two.
            full, size = layer.in_features, layer.in_features // ranks
        start, stop = (min(i * size, full) for i in (rank // copies, rank // copies + 1))
        parts.append(Part(name, dim, start, stop, size, layer))
    return parts


def _fill_on_device(model: Transformer, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    model.allocate_weights(device, dtype)
    jobs = _jobs(model, checkpoint)
    with _progress(len(jobs)) as progress:
        for _ in run_jobs(jobs, device, checkpoint.mapped):
            progress.update()


def _jobs(model: Transformer, checkpoint: Checkpoint) -> list[Job]:
    """A job for each part of the checkpoint, which brings it into the weights that the model has on a device."""
    weights = dict(model.named_parameters())
    jobs: list[Job] = []
    for part in _parts(model, checkpoint):
        if part.layer is None:
            jobs.append(partial(_copy_part, checkpoint, part, weights[part.name].detach()))
        else:
            jobs.append(partial(_round_part, checkpoint, part, part.layer))
    return jobs


def _copy_part(checkpoint: Checkpoint, part: Part, weight: torch.Tensor, sender: Sender) -> None:
    stored = checkpoint.parts(part.name, part.dim, part.start, part.stop)
    for tensor in stored:
        check_scales(part.name, tensor, checkpoint)
    for rows, piece in sender.pieces(stored, part.dim):
        weight[rows].copy_(piece)  # the device converts it
    if part.dim == 0:
        weight[part.stop - part.start :].zero_()


def _round_part(checkpoint: Checkpoint, part: Part, layer: Quantized, sender: Sender) -> None:
    start, stop, columns = part.start, part.stop, slice(None)
    if layer.kind == "int8" and part.dim == 1:  # a scale belongs to the full row, so all of it is sent
        start, stop, columns = 0, layer.in_features, slice(part.start, part.stop)
    weights = {name: tensor.detach() for name, tensor in layer.named_parameters(recurse=False)}
    for rows, piece in sender.pieces(checkpoint.parts(part.name, part.dim, start, stop), part.dim):
        into = {name: tensor[rows] for name, tensor in weights.items()}
        layer.round(piece[:, columns].to(layer.device, torch.float32), row_maxima(piece).to(layer.device), into)
    if part.dim == 0:
        for tensor in weights.values():
            tensor[part.stop - part.start :].zero_()


def _fill_on_host(model: Transformer, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Fill a model on a CPU. A tensor that needs no change stays in the mapping."""
    layers = quantized_layers(model)
    weights: dict[str, torch.Tensor] = {}
    any_mapped = False
    parts = _parts(model, checkpoint)
    with _progress(len(parts)) as progress:
        for part in parts:
            progress.update()
            if part.layer is not None:
                _round_on_host(checkpoint, part, part.layer, dtype)
                continue
            weights[part.name], is_mapped = _read_on_host(checkpoint, part, None if part.prefix in layers else dtype)
            any_mapped = any_mapped or is_mapped
    # `check_weights` has seen the names. Layers that were rounded have their tensors already.
    model.load_state_dict(weights, strict=all(part.layer is None for part in parts), assign=True)
    weights.clear()  # no other reference keeps the tensors that are packed next
    if checkpoint.quantization is not None:
        for layer in layers.values():
            for tensor in layer.pack(dtype):
                checkpoint.mapped.release(tensor)
    if layers:
        return_freed()
    if any_mapped:
        model.files = checkpoint.mapped
    else:
        model.fuse()


def _round_on_host(checkpoint: Checkpoint, part: Part, layer: Quantized, dtype: torch.dtype) -> None:
    made = quantized(checkpoint, part.prefix, layer, part.start, part.stop, torch.device("cpu"))
    for what in made:
        check_scales(f"{part.prefix}.{what}", made[what], checkpoint)
    layer.load_state_dict({what: part.filled(tensor) for what, tensor in made.items()}, assign=True)
    del made  # no other reference keeps the tensors that are packed next
    layer.pack(dtype)
    return_freed()


def _read_on_host(checkpoint: Checkpoint, part: Part, dtype: Optional[torch.dtype]) -> tuple[torch.Tensor, bool]:
    """The tensor in `dtype` (None: the stored one), and whether it needed no change and lies in the mapping."""
    stored = checkpoint.read(part.name, part.dim, part.start, part.stop)
    check_scales(part.name, stored, checkpoint)
    stored = part.filled(stored)
    if dtype in (None, stored.dtype) and stored.is_contiguous():
        return stored, checkpoint.mapped.holds(stored)
    copy = torch.empty(stored.shape, dtype=dtype or stored.dtype, device="cpu")
    checkpoint.mapped.copy(stored, copy)
    return copy, False
