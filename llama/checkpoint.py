"""Files -> this rank's weights: Meta's format with any number of shards, or a Hugging Face folder, onto any number of ranks.

Files are mapped, not read: a tensor that is used whole and in its own dtype on a CPU stays in the mapping, and of all
others each rank copies its own slices only.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
from tqdm import tqdm

from .archive import Foreign, read_archive
from .files import MappedFiles, Number, check_file, contents, is_there, listed, read_json
from .huggingface import LLAMA_3, LLAMA_3_VOCABULARY, HuggingFaceCheckpoint
from .memory import return_freed
from .model import ModelArgs, Transformer
from .parallel import group_rank, group_size, is_first_process, model_parallel_group
from .printable import escaped, shortened
from .quantization import quantize_layers
from .quantized import Quantized
from .rounding import Quantization, row_maxima
from .runtime import DTYPES, device_kind
from .staging import Job, Sender, run_jobs

IGNORED = {"rope.freqs"}  # a table that Meta's files carry and that is computed here

# What params.json may hold. The last two are not Meta's: converted models may need them.
PARAMS = {
    "dim": Number(int, 1, 2**20, required=True),
    "n_layers": Number(int, 1, 1000, required=True),
    "n_heads": Number(int, 1, 2**16, required=True),
    "n_kv_heads": Number(int, 1, 2**16),
    "vocab_size": Number(int, -1, 2**24),
    "multiple_of": Number(int, 1, 2**20),
    "ffn_dim_multiplier": Number(float, 1e-3, 1e3),
    "norm_eps": Number(float, 1e-12, 1.0),
    "rope_theta": Number(float, 1.0, 1e12),
    "head_dim": Number(int, 2, 2**16),
}


def read_params(ckpt_dir: Path) -> ModelArgs:
    """params.json as `ModelArgs`, without limits; vocab_size is -1 where the tokenizer is to tell it.

    ValueError where it is missing, no JSON object, or has keys or values that Llama 2 has not.
    """
    path = ckpt_dir / "params.json"
    params = read_json(path, "a params.json has a few hundred bytes")
    problems = [f"unknown key {key!r}" for key in params if key not in PARAMS and key != "quantization"]
    problems += [problem for key, number in PARAMS.items() for problem in number.problem(key, params)]
    if "use_scaled_rope" in params or params.get("vocab_size") == LLAMA_3_VOCABULARY:
        problems.append(LLAMA_3)
    if problems:
        raise ValueError(f"{path}: {listed(problems)}; a Llama 2 checkpoint has {', '.join(PARAMS)}")
    return ModelArgs(**{key: params[key] for key in PARAMS if params.get(key) is not None})


def read_quantization(ckpt_dir: Path) -> Optional[Quantization]:
    """What params.json says about the numbers of the matrices, {"kind": "int8"} or {"kind": "int4", "group_size": 32}.

    None where it says nothing. ValueError where it says something else.
    """
    path = ckpt_dir / "params.json"
    stated = read_json(path, "a params.json has a few hundred bytes").get("quantization")
    if stated is None:
        return None
    keys = {"int8": {"kind"}, "int4": {"kind", "group_size"}}
    kind = stated.get("kind") if isinstance(stated, dict) else None
    if not isinstance(kind, str) or set(stated) != keys.get(kind):
        raise ValueError(f"{path}: quantization={shortened(stated)} is not {{'kind': 'int8'}} or "
                         "{'kind': 'int4', 'group_size': 32}")  # fmt: skip
    try:
        return Quantization(**stated)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def find_shards(ckpt_dir: Path) -> list[Path]:
    """consolidated.00.pth, consolidated.01.pth, … ValueError where there is none, or one of the sequence is missing."""
    found = sorted(p.name for p in ckpt_dir.glob("consolidated.*.pth") if re.fullmatch(r"consolidated\.\d+\.pth", p.name))
    if not found:
        raise ValueError(
            f"no checkpoint files found in {ckpt_dir}: it needs consolidated.00.pth and so on, and holds {contents(ckpt_dir)}"
        )
    names = [f"consolidated.{i:02d}.pth" for i in range(len(found))]
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{ckpt_dir} has {listed(found)}, but not {listed(missing)}; download it again")
    return [ckpt_dir / name for name in names]


def map_shard(path: Path, quantized: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of one .pth file, mapped into memory. Nothing in it is run. ValueError where it is damaged."""
    check_file(path)
    try:
        tensors = read_archive(path)
    except Foreign as error:
        raise ValueError(
            f"{path} holds something other than tensors, which could run code, so it was not loaded ({error}); save a "
            "dictionary of plain tensors that lie on the CPU"
        ) from error
    except Exception as error:  # a damaged archive raises almost anything
        raise ValueError(
            f"{path} cannot be read: it is cut short, damaged, or not in the zip format of torch.save "
            f"({escaped(str(error).splitlines()[0]) if str(error) else type(error).__name__}); download or save it again"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ValueError(f"{path} is not a flat dictionary of tensors; pass a checkpoint in Meta's format")
    known = [*DTYPES.values(), *((torch.int8, torch.uint8) if quantized else ())]
    other = [f"{name} is {t.dtype}" for name, t in tensors.items() if t.dtype not in known and name not in IGNORED]
    if other:
        raise ValueError(f"{path} has weights in a form that is not computed here: {listed(other)}; use {' or '.join(DTYPES)}")
    return tensors


class MetaCheckpoint:
    """The mapped shards of one folder, seen as the full matrices that they were cut from."""

    format = "Meta"
    tied = False

    def __init__(self, ckpt_dir: Path) -> None:
        self.folder = ckpt_dir
        self.args = read_params(ckpt_dir)
        self.quantization = read_quantization(ckpt_dir)
        self.paths = find_shards(ckpt_dir)
        self.mapped = MappedFiles(self.paths)
        self.shards = [map_shard(path, self.quantization is not None) for path in self.paths]
        first = self.shards[0]
        for path, shard in zip(self.paths, self.shards):
            for name in sorted(first.keys() | shard.keys()):
                a, b = first.get(name), shard.get(name)
                if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
                    raise ValueError(f"{path.name} and {self.paths[0].name} in {ckpt_dir} disagree about {escaped(name)}; "
                                     "they are not shards of one model")  # fmt: skip
        self.dtypes = {name: tensor.dtype for name, tensor in first.items() if name not in IGNORED}
        if "tok_embeddings.weight" not in first:
            raise ValueError(f"{self.paths[0]} has no tok_embeddings.weight, but {listed(sorted(first)) or 'nothing'}; "
                             "it is not a checkpoint in Meta's format")  # fmt: skip
        self.dtype = self.dtypes["tok_embeddings.weight"]
        if (shape := first["tok_embeddings.weight"].shape)[1:] == ():
            raise ValueError(f"{self.paths[0]} has tok_embeddings.weight in shape {list(shape)}; it is no matrix")
        self._refuse_doubles()

    def _refuse_doubles(self) -> None:
        """A shard copied over another has all the right names and shapes. One row of a matrix that is cut tells."""
        rows = [shard["tok_embeddings.weight"][:1] for shard in self.shards]
        for i, row in enumerate(rows):
            for j in range(i):
                if row.any() and torch.equal(row, rows[j]):
                    names = f"{self.paths[j].name} and {self.paths[i].name}"
                    raise ValueError(f"{names} in {self.folder} are the same shard; download them again")

    def shape(self, name: str, shard_dim: Optional[int]) -> list[int]:
        """The shape of the full matrix."""
        shape = list(self.shards[0][name].shape)
        if shard_dim is not None and shard_dim < len(shape):
            shape[shard_dim] *= len(self.shards)
        return shape

    def check_copies(self, name: str) -> None:
        """ValueError where a tensor that every shard has whole is not the same in all: they are of different models."""
        if any(not torch.equal(shard[name], self.shards[0][name]) for shard in self.shards[1:]):
            raise ValueError(f"the shards in {self.folder} have different {name}; they are not shards of one model")

    def parts(self, name: str, shard_dim: Optional[int], start: int, stop: int) -> list[torch.Tensor]:
        """Entries start … stop of the full matrix along `shard_dim`, as views of the mapping in the order of the shards.

        4 shards on 2 ranks: rank 1 asks for the second half, which is shards 2 and 3. 2 shards on 4 ranks: rank 1 asks
        for the second quarter, which is the second half of shard 0.
        """
        pieces = [shard[name] for shard in self.shards]
        if shard_dim is None:
            return pieces[:1]
        each = pieces[0].shape[shard_dim]
        parts = []
        for i, piece in enumerate(pieces):
            low, high = max(start, i * each), min(stop, (i + 1) * each)
            if low < high:
                parts.append(piece.narrow(shard_dim, low - i * each, high - low))
        return parts

    def read(self, name: str, shard_dim: Optional[int], start: int, stop: int) -> torch.Tensor:
        """The `parts` as one tensor, which is a view of the mapping if one shard has all of it."""
        parts = self.parts(name, shard_dim, start, stop)
        if shard_dim is None or len(parts) == 1:
            return parts[0]
        shape = list(parts[0].shape)
        shape[shard_dim] = stop - start
        whole = torch.empty(shape, dtype=parts[0].dtype)
        for part, place in zip(parts, whole.split([part.shape[shard_dim] for part in parts], dim=shard_dim)):
            self.mapped.copy(part, place)
        return whole


Checkpoint = Union[MetaCheckpoint, HuggingFaceCheckpoint]


def open_checkpoint(ckpt_dir: Path) -> Checkpoint:
    """Map the weights of a folder in either format, and read what model they are of. Copies no weight.

    A folder with both formats is Meta's. ValueError where it has neither, or is damaged, or is of a model that is not
    computed here.
    """
    if not os.path.isdir(ckpt_dir):
        raise ValueError(
            f"no checkpoint folder at {ckpt_dir}; pass the folder that holds consolidated.00.pth and params.json, "
            "or config.json and model.safetensors"
        )
    metas = is_there(ckpt_dir / "params.json") or any(ckpt_dir.glob("consolidated.*.pth"))
    if metas or not (is_there(ckpt_dir / "config.json") or is_there(ckpt_dir / "adapter_config.json")):
        return MetaCheckpoint(ckpt_dir)
    return HuggingFaceCheckpoint(ckpt_dir)


def fit_vocabulary(checkpoint: Checkpoint, pieces: int) -> ModelArgs:
    """The checkpoint's args with as many ids as the tokenizer has pieces.

    Fine-tunes in Hugging Face's format may have rows for ids that the tokenizer has no piece for (padding, tokens added
    later): those are left out, with a warning. Any other difference is a ValueError.
    """
    stated = checkpoint.args.vocab_size
    if isinstance(checkpoint, HuggingFaceCheckpoint) and stated > pieces:
        if is_first_process():
            warnings.warn(
                f"{escaped(str(checkpoint.folder))} has {stated} ids, but the tokenizer has {pieces} pieces; "
                "the ids beyond are left out",
                stacklevel=3,
            )
    elif stated not in (-1, pieces):
        raise ValueError(
            f"{checkpoint.folder} says vocab_size={stated}, but the tokenizer has {pieces} pieces; "
            "pass the tokenizer that belongs to the checkpoint"
        )
    checkpoint.args = replace(checkpoint.args, vocab_size=pieces)
    return checkpoint.args


def cut(model: Transformer) -> dict[str, tuple[list[int], Optional[int], int]]:
    """Of every parameter: the shape of the full matrix, the dimension it is cut along, and how many ranks share a part."""
    ranks = group_size(model_parallel_group())
    plan = {}
    for prefix, module in model.named_modules():
        dims, copies = getattr(module, "shard_dims", None), getattr(module, "copies", 1)
        for name, parameter in module.named_parameters(recurse=False):
            dim = getattr(module, "shard_dim", None) if dims is None else dims[name]
            shape = [n * (ranks // copies) if i == dim else n for i, n in enumerate(parameter.shape)]
            plan[f"{prefix}.{name}"] = shape, dim, copies
    return plan


def choose_quantization(checkpoint: Checkpoint, quantize: Optional[str]) -> Optional[Quantization]:
    """`quantize`, or else what the checkpoint is stored as. ValueError where it is stored as another kind."""
    chosen, stored = None if quantize is None else Quantization(quantize), stored_quantization(checkpoint)
    if chosen is not None and stored is not None and chosen.kind != stored.kind:
        raise ValueError(
            f"{checkpoint.folder} is stored as {stored.kind}, so it cannot be had as {chosen.kind}; "
            "leave quantize out, or take the folder with the original weights"
        )
    return stored or chosen


def prepare(model: Transformer, checkpoint: Checkpoint, quantize: Optional[str] = None) -> Optional[Quantization]:
    """Make a model on the meta device ready for `fill`: check the weights, and give its layers the form they are to have.

    quantize: "int8" or "int4", or None for what the checkpoint is stored as. Returns what the model is then. ValueError
    where the weights do not fit the model, or are stored as another kind, or the processes cannot share the groups.
    """
    quantization, stored = choose_quantization(checkpoint, quantize), stored_quantization(checkpoint)
    if stored is None:
        check_weights(model, checkpoint)
    if quantization is not None:
        quantize_layers(model, quantization)
    if stored is not None:
        check_weights(model, checkpoint)
    return quantization


def stored_quantization(checkpoint: Checkpoint) -> Optional[Quantization]:
    return checkpoint.quantization if isinstance(checkpoint, MetaCheckpoint) else None


def check_weights(model: Transformer, checkpoint: Checkpoint) -> None:
    """ValueError, with all that does not fit, unless every parameter is filled from one name, and every name is used."""
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
        config = "params.json" if isinstance(checkpoint, MetaCheckpoint) else "config.json"
        files = len(checkpoint.paths)
        hint = ""
        whole = plan["tok_embeddings.weight"][0]
        found = checkpoint.shape("tok_embeddings.weight", 1)
        if len(found) == 2 and found[0] != whole[0]:
            hint = f"; the tokenizer has {whole[0]} pieces and the weights are for {found[0]}: pass their own tokenizer"
        elif (
            isinstance(checkpoint, MetaCheckpoint)
            and len(found) == 2
            and found[1] < whole[1]
            and whole[1] * files % found[1] == 0
        ):
            hint = f"; are {whole[1] * files // found[1] - files} more shards missing?"
        raise ValueError(
            f"the weights in {checkpoint.folder} ({files} file{'s' * (files > 1)}) are not those that its {config} and "
            f"tokenizer describe{hint}: {listed(problems, 40)}"
        )
    if isinstance(checkpoint, MetaCheckpoint):
        for name, (_, dim, _) in plan.items():
            if dim is None:
                checkpoint.check_copies(name)


def quantized_layers(model: Transformer) -> dict[str, Quantized]:
    return {prefix: module for prefix, module in model.named_modules() if isinstance(module, Quantized)}


def quantized(
    checkpoint: Checkpoint, prefix: str, layer: Quantized, start: int, stop: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Entries start … stop along its `shard_dim` of a layer's full matrix, read and rounded some rows at a time, as the
    layer stores them."""
    name = f"{prefix}.weight"
    dim = layer.shard_dim
    maxima = None
    if layer.kind == "int8" and dim == 1:  # a scale belongs to the full row, of which this is a part
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
    """ValueError where scales or zeros (of the host; other tensors pass) are not what rounding makes of numbers."""
    kind = name.rpartition(".")[2]
    if kind in ("scales", "zeros"):
        least, most = (x.item() for x in tensor.aminmax())
        if not (math.isfinite(least) and math.isfinite(most) and (least > 0 or kind == "zeros")):
            raise ValueError(
                f"{checkpoint.folder}: {name} goes from {least} to {most}; scales are finite and above 0, and zeros finite: "
                "the file is damaged, or the weights that were rounded have NaN or infinity in them"
            )


def fill(model: Transformer, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Give a model that was built on the meta device, and that `prepare` passed, its weights, and make its cache.

    ValueError where the files are written to meanwhile, or scales are wrong."""
    if device_kind(device) == "cpu":
        _fill_mapped(model, checkpoint, dtype)
    else:
        model.allocate_weights(device, dtype)
        jobs = _jobs(model, checkpoint)
        with _progress(len(jobs)) as progress:
            for _ in run_jobs(jobs, device, checkpoint.mapped):
                progress.update()
    checkpoint.mapped.check_unchanged()
    model.allocate(device, dtype)


def _progress(tensors: int) -> Any:
    """Shown after a second and a half, and only on a terminal of the rank that speaks."""
    quiet = None if is_first_process() else True
    return tqdm(total=tensors, desc="Loading", unit="tensor", delay=1.5, leave=False, disable=quiet)


class Part(NamedTuple):
    """What this rank reads of one tensor of the checkpoint: entries start … stop along `dim`."""

    name: str
    dim: Optional[int]
    start: int
    stop: int
    layer: Optional[Quantized]  # that rounds what is read. Its other tensors have no parts of their own


def _parts(model: Transformer, checkpoint: Checkpoint) -> list[Part]:
    group = model_parallel_group()
    rank, ranks = group_rank(group), group_size(group)
    to_round = quantized_layers(model) if stored_quantization(checkpoint) is None else {}
    parts = []
    for name, (shape, dim, copies) in cut(model).items():
        prefix, _, kind = name.rpartition(".")
        layer = to_round.get(prefix)
        if layer is not None and kind != "weight":
            continue
        size = 0 if dim is None else shape[dim] * copies // ranks
        if layer is not None and dim == 1:
            size = layer.in_features // ranks  # of the numbers, of which a byte may hold two
        parts.append(Part(name, dim, rank // copies * size, (rank // copies + 1) * size, layer))
    return parts


def _jobs(model: Transformer, checkpoint: Checkpoint) -> list[Job]:
    """For each part of the checkpoint: bring it into the weights that the model has on a device."""
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
        weight[rows].copy_(piece)  # which converts it, on the device


def _round_part(checkpoint: Checkpoint, part: Part, layer: Quantized, sender: Sender) -> None:
    start, stop, columns = part.start, part.stop, slice(None)
    if layer.kind == "int8" and part.dim == 1:  # a scale belongs to the full row, so that is sent
        start, stop, columns = 0, layer.in_features, slice(part.start, part.stop)
    weights = {name: tensor.detach() for name, tensor in layer.named_parameters(recurse=False)}
    for rows, piece in sender.pieces(checkpoint.parts(part.name, part.dim, start, stop), part.dim):
        into = {name: tensor[rows] for name, tensor in weights.items()}
        layer.round(piece[:, columns].to(layer.device, torch.float32), row_maxima(piece).to(layer.device), into)


def _fill_mapped(model: Transformer, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """On a CPU, a tensor that needs no change stays in the mapping."""
    device = torch.device("cpu")
    layers = quantized_layers(model)
    weights: dict[str, torch.Tensor] = {}
    rounded: set[str] = set()
    mapped = False
    parts = _parts(model, checkpoint)
    with _progress(len(parts)) as progress:
        for name, dim, start, stop, layer in parts:
            progress.update()
            prefix = name.rpartition(".")[0]
            if layer is not None:
                made = quantized(checkpoint, prefix, layer, start, stop, device)
                for kind, tensor in made.items():
                    check_scales(f"{prefix}.{kind}", tensor, checkpoint)
                layer.load_state_dict(made, assign=True)
                del made  # what is packed next is to be freed
                layer.pack(dtype)  # at once, to free the tensors that were packed
                return_freed()
                rounded.add(prefix)
                continue
            stored = checkpoint.read(name, dim, start, stop)
            check_scales(name, stored, checkpoint)
            wanted = stored.dtype if prefix in layers else dtype
            if stored.dtype == wanted and stored.is_contiguous():
                weights[name], mapped = stored, True
            else:
                weights[name] = torch.empty(stored.shape, dtype=wanted, device=device)
                checkpoint.mapped.copy(stored, weights[name])
    model.load_state_dict(weights, strict=not rounded, assign=True)  # the names are right: `check_weights` saw them
    weights.clear()
    for prefix in layers.keys() - rounded:
        for tensor in layers[prefix].pack(dtype):
            checkpoint.mapped.release(tensor)
    if layers:
        return_freed()
    if mapped:
        model.files = checkpoint.mapped
    else:
        model.fuse()
