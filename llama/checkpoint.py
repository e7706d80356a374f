"""Files -> this rank's weights: a folder in Meta's format, with any number of shards, onto any number of ranks.

Files are mapped, not read: a tensor that is used whole and in its own dtype on a CPU stays in the mapping, and of all
others each rank copies its own slices only.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from tqdm import tqdm

from .model import ModelArgs, Transformer
from .parallel import group_rank, group_size, is_first_process, model_parallel_group
from .runtime import DTYPES

IGNORED = {"rope.freqs"}  # a table that Meta's files carry and that is computed here

# What params.json may hold: type, least, most, and whether it must be there.
_PARAMS: dict[str, tuple[type, float, float, bool]] = {
    "dim": (int, 1, 2**20, True),
    "n_layers": (int, 1, 10_000, True),
    "n_heads": (int, 1, 2**16, True),
    "n_kv_heads": (int, 1, 2**16, False),
    "vocab_size": (int, -1, 2**24, False),
    "multiple_of": (int, 1, 2**20, False),
    "ffn_dim_multiplier": (float, 1e-3, 1e3, False),
    "norm_eps": (float, 1e-12, 1.0, False),
    "rope_theta": (float, 1.0, 1e12, False),
}
_OPTIONAL = {"n_kv_heads", "ffn_dim_multiplier"}  # may be null


def listed(items: list[str], most: int = 12) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def read_args(ckpt_dir: Path, **limits: int) -> ModelArgs:
    """params.json as `ModelArgs`, with `limits` (max_seq_len, max_batch_size, vocab_size) put in.

    ValueError where it is missing, no JSON object, or has keys or values that Llama 2 has not.
    """
    path = ckpt_dir / "params.json"
    if not ckpt_dir.is_dir():
        raise ValueError(f"no checkpoint folder at {ckpt_dir}; pass the folder that holds consolidated.00.pth and params.json")
    if not path.is_file():
        raise ValueError(f"{path} is missing; it comes with the checkpoint, and the folder holds {_contents(ckpt_dir)}")
    if path.stat().st_size > 2**20:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a params.json has a few hundred")
    try:
        params = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(params, dict):
        raise ValueError(f"{path} holds a {type(params).__name__}, not an object of parameters")
    problems = [f"unknown key {key!r}" for key in params if key not in _PARAMS]
    for key, (kind, least, most, required) in _PARAMS.items():
        if key not in params:
            problems += [f"missing key {key!r}"] * required
        elif not (params[key] is None and key in _OPTIONAL) and not _is_number(params[key], kind, least, most):
            kinds = "a whole number" if kind is int else "a number"
            problems.append(f"{key}={params[key]!r} is not {kinds} from {least} to {most}")
    if problems:
        raise ValueError(f"{path}: {listed(problems)}; a Llama 2 checkpoint has {', '.join(_PARAMS)}")
    stated = params.get("vocab_size", -1)
    if stated != -1 and stated != limits["vocab_size"]:
        raise ValueError(
            f"{path} says vocab_size={stated}, but the tokenizer has {limits['vocab_size']} pieces; "
            "pass the tokenizer that belongs to the checkpoint"
        )
    return ModelArgs(**{**params, **limits})


def _contents(folder: Path) -> str:
    return listed(sorted(p.name for p in folder.iterdir())) or "nothing"


def _is_number(value: Any, kind: type, least: float, most: float) -> bool:
    kinds = (int,) if kind is int else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value) and least <= value <= most


def find_shards(ckpt_dir: Path) -> list[Path]:
    """consolidated.00.pth, consolidated.01.pth, … ValueError where there is none, or one of the sequence is missing."""
    found = sorted(p.name for p in ckpt_dir.glob("consolidated.*.pth") if re.fullmatch(r"consolidated\.\d+\.pth", p.name))
    if not found:
        raise ValueError(
            f"no checkpoint files found in {ckpt_dir}: it needs consolidated.00.pth and so on, and holds {_contents(ckpt_dir)}"
        )
    names = [f"consolidated.{i:02d}.pth" for i in range(len(found))]
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{ckpt_dir} has {listed(found)}, but not {listed(missing)}; download it again")
    return [ckpt_dir / name for name in names]


def map_shard(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one .pth file, mapped into memory. Nothing in it is run. ValueError where it is damaged."""
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds something other than tensors, which could run code, so it was not loaded") from error
    except Exception as error:  # a damaged archive raises almost anything
        raise ValueError(
            f"{path} cannot be read: it is cut short, damaged, or not in the zip format of torch.save "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); download or save it again"
        ) from error
    if not isinstance(tensors, Mapping) or not all(
        isinstance(name, str) and isinstance(t, torch.Tensor) and t.layout == torch.strided for name, t in tensors.items()
    ):
        raise ValueError(f"{path} is not a flat dictionary of tensors; pass a checkpoint in Meta's format")
    other = [f"{name} is {t.dtype}" for name, t in tensors.items() if t.dtype not in DTYPES.values() and name not in IGNORED]
    if other:
        raise ValueError(f"{path} has weights in a form that is not computed here: {listed(other)}; use {' or '.join(DTYPES)}")
    return dict(tensors)


class MetaCheckpoint:
    """The mapped shards of one folder, seen as the full matrices that they were cut from."""

    def __init__(self, ckpt_dir: Path) -> None:
        self.folder = ckpt_dir
        self.paths = find_shards(ckpt_dir)
        self.shards = [map_shard(path) for path in self.paths]
        first = self.shards[0]
        for path, shard in zip(self.paths, self.shards):
            for name in sorted(first.keys() | shard.keys()):
                a, b = first.get(name), shard.get(name)
                if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
                    raise ValueError(f"{path.name} and {self.paths[0].name} in {ckpt_dir} disagree about {name}; "
                                     "they are not shards of one model")  # fmt: skip
        self.names = set(first) - IGNORED
        if "tok_embeddings.weight" not in first:
            raise ValueError(f"{self.paths[0]} has no tok_embeddings.weight, but {listed(sorted(first)) or 'nothing'}; "
                             "it is not a checkpoint in Meta's format")  # fmt: skip
        self.dtype = first["tok_embeddings.weight"].dtype

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

    def read(self, name: str, shard_dim: Optional[int], start: int, stop: int) -> torch.Tensor:
        """Entries start … stop of the full matrix along `shard_dim`; a view of the mapping where one shard has them all.

        4 shards on 2 ranks: rank 1 asks for the second half, which is shards 2 and 3. 2 shards on 4 ranks: rank 1 asks
        for the second quarter, which is the second half of shard 0.
        """
        pieces = [shard[name] for shard in self.shards]
        if shard_dim is None:
            return pieces[0]
        each = pieces[0].shape[shard_dim]
        parts = []
        for i, piece in enumerate(pieces):
            low, high = max(start, i * each), min(stop, (i + 1) * each)
            if low < high:
                parts.append(piece.narrow(shard_dim, low - i * each, high - low))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=shard_dim)


def fill(model: Transformer, checkpoint: MetaCheckpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Give a model that was built on the meta device its weights, and make its cache.

    Every parameter is filled from one name, and every name is used; ValueError lists all that do not fit, before any
    weight is copied.
    """
    group = model_parallel_group()
    rank, ranks = group_rank(group), group_size(group)
    shard_dims = {
        f"{prefix}.{name}": getattr(module, "shard_dim", None)
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    expected = {
        name: [n * ranks if dim == shard_dims[name] else n for dim, n in enumerate(parameter.shape)]
        for name, parameter in model.named_parameters()
    }
    problems = [f"{name} is missing" for name in expected if name not in checkpoint.names]
    problems += [f"{name} is unexpected" for name in sorted(checkpoint.names - expected.keys())]
    for name, shape in expected.items():
        if name in checkpoint.names and (found := checkpoint.shape(name, shard_dims[name])) != shape:
            problems.append(f"{name} has shape {found} instead of {shape}")
    if problems:
        shards = len(checkpoint.paths)
        hint = ""
        whole = expected["tok_embeddings.weight"]
        found = checkpoint.shape("tok_embeddings.weight", 1)
        if found[0] != whole[0]:
            hint = f"; the tokenizer has {whole[0]} pieces and the weights are for {found[0]}: pass their own tokenizer"
        elif found[1] < whole[1] and whole[1] * shards % found[1] == 0:
            hint = f"; are {whole[1] * shards // found[1] - shards} more shards missing?"
        raise ValueError(
            f"the weights in {checkpoint.folder} ({shards} shard{'s' * (shards > 1)}) are not those that its params.json and "
            f"tokenizer describe{hint}: {', '.join(problems)}"
        )
    for name, shard_dim in shard_dims.items():
        if shard_dim is None:
            checkpoint.check_copies(name)
    weights = {}
    # Shown after a second and a half, and only on a terminal of the rank that speaks.
    for name, shape in tqdm(
        expected.items(), "Loading", unit="tensor", delay=1.5, leave=False, disable=None if is_first_process() else True
    ):
        dim = shard_dims[name]
        part = 0 if dim is None else shape[dim] // ranks
        weight = checkpoint.read(name, dim, rank * part, (rank + 1) * part)
        weights[name] = weight.to(device, dtype).contiguous()
    model.load_state_dict(weights, strict=True, assign=True)
    model.allocate(device, dtype)
