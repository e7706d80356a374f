"""Meta's folders: params.json -> ModelArgs; consolidated.NN.pth, mapped -> the full matrices that they are parts of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Optional

import torch

from ..layers.rounding import KINDS, Quantization
from ..model import ModelArgs
from ..runtime import DTYPES
from ..system.files import MappedFiles, Number, contents, listed, read_json
from ..system.printable import escaped, shortened
from .archive import map_tensors
from .huggingface import LLAMA_3, LLAMA_3_VOCABULARY
from .rope import read_meta_rope

IGNORED = "rope.freqs"  # Meta's files carry this table, 7B's of LLaMA 1 in each layer; it is computed here

# The numbers of params.json. The last two are not Meta's: converted models may need them.
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
    """params.json as `ModelArgs`, without limits; vocab_size is -1 if only the tokenizer tells it.

    ValueError if it is missing, no JSON object, or has keys or values that no Llama 2 has.
    """
    path = ckpt_dir / "params.json"
    params = read_json(path, "a params.json has a few hundred bytes")
    problems = [
        f"unknown key {key!r}" for key in params if key not in PARAMS and key not in ("quantization", "rope_scaling")
    ]
    problems += [problem for key, number in PARAMS.items() for problem in number.problem(key, params)]
    scaling = None
    if (stated := params.get("rope_scaling")) is not None:
        try:
            scaling = read_meta_rope(stated)
        except ValueError as error:
            problems.append(str(error))
    if "use_scaled_rope" in params or params.get("vocab_size") == LLAMA_3_VOCABULARY:
        problems.append(LLAMA_3)
    if problems:
        raise ValueError(f"{path}: {listed(problems)}; a Llama 2 checkpoint has {', '.join(PARAMS)}")
    return ModelArgs(**{key: params[key] for key in PARAMS if params.get(key) is not None}, rope_scaling=scaling)


def read_quantization(ckpt_dir: Path) -> Optional[Quantization]:
    """The entry "quantization" of params.json, {"kind": "int8"} or {"kind": "int4", "group_size": 32}, or another kind
    in groups; None without one.

    ValueError for any other value.
    """
    path = ckpt_dir / "params.json"
    stated = read_json(path, "a params.json has a few hundred bytes").get("quantization")
    if stated is None:
        return None
    keys = {kind: {"kind"} if kind == "int8" else {"kind", "group_size"} for kind in KINDS}
    kind = stated.get("kind") if isinstance(stated, dict) else None
    if not isinstance(kind, str) or set(stated) != keys.get(kind):
        raise ValueError(f"{path}: quantization={shortened(stated)} is not {{'kind': 'int8'}} or "
                         "{'kind': 'int4', 'group_size': 32}")  # fmt: skip
    try:
        return Quantization(**stated)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def find_shards(ckpt_dir: Path) -> list[Path]:
    """consolidated.00.pth, consolidated.01.pth, … ValueError if there is none, or one of the sequence is missing."""
    found = sorted(
        p.name for p in ckpt_dir.glob("consolidated.*.pth") if re.fullmatch(r"consolidated\.\d+\.pth", p.name)
    )
    if not found:
        raise ValueError(
            f"no checkpoint files found in {ckpt_dir}: it needs consolidated.00.pth and so on, and holds "
            f"{contents(ckpt_dir)}"
        )
    names = [f"consolidated.{i:02d}.pth" for i in range(len(found))]
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{ckpt_dir} has {listed(found)}, but not {listed(missing)}; download it again")
    return [ckpt_dir / name for name in names]


def map_shard(path: Path, quantized: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of one .pth file, by name, mapped into memory. Nothing in it is run. ValueError if it is damaged, or
    holds other things or other dtypes. quantized: int8 and uint8 are allowed."""
    tensors = map_tensors(path)
    known = [*DTYPES.values(), *((torch.int8, torch.uint8) if quantized else ())]
    other = [
        f"{name} is {t.dtype}" for name, t in tensors.items() if t.dtype not in known and not name.endswith(IGNORED)
    ]
    if other:
        raise ValueError(
            f"{path} has weights in a form that is not computed here: {listed(other)}; use {' or '.join(DTYPES)}"
        )
    return tensors


class MetaCheckpoint:
    """The mapped shards of a folder as full matrices. It is a `checkpoint.Checkpoint`, which documents its methods."""

    format = "Meta"
    config = "params.json"
    tied = False
    positions: Optional[int] = None

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
                    raise ValueError(f"{path.name} and {self.paths[0].name} in {ckpt_dir} disagree about "
                                     f"{escaped(name)}; "
                                     "they are not shards of one model")  # fmt: skip
        self.dtypes = {name: tensor.dtype for name, tensor in first.items() if not name.endswith(IGNORED)}
        self.tables = {name: tensor.dtype for name, tensor in first.items() if name.endswith(IGNORED)}
        if "tok_embeddings.weight" not in first:
            raise ValueError(f"{self.paths[0]} has no tok_embeddings.weight, but {listed(sorted(first)) or 'nothing'}; "
                             "it is not a checkpoint in Meta's format")  # fmt: skip
        self.dtype = self.dtypes["tok_embeddings.weight"]
        if (shape := first["tok_embeddings.weight"].shape)[1:] == ():
            raise ValueError(f"{self.paths[0]} has tok_embeddings.weight in shape {list(shape)}; it is no matrix")
        self._refuse_doubles()

    def _refuse_doubles(self) -> None:
        """ValueError if a shard was copied over another: names and shapes are right, but a row of a cut matrix is the
        same."""
        rows = [shard["tok_embeddings.weight"][:1] for shard in self.shards]
        for i, row in enumerate(rows):
            for j in range(i):
                if row.any() and torch.equal(row, rows[j]):
                    names = f"{self.paths[j].name} and {self.paths[i].name}"
                    raise ValueError(f"{names} in {self.folder} are the same shard; download them again")

    def leave_out_ids(self, pieces: int) -> bool:
        return False

    def missing_shards(self, width: int) -> int:
        each = self.shards[0]["tok_embeddings.weight"].shape[1]
        return width // each - len(self.shards) if 0 < each * len(self.shards) < width and width % each == 0 else 0

    def shape(self, name: str, shard_dim: Optional[int]) -> list[int]:
        shape = list(self.shards[0][name].shape)
        if shard_dim is not None and shard_dim < len(shape):
            shape[shard_dim] *= len(self.shards)
        return shape

    def check_copies(self, name: str) -> None:
        if any(not torch.equal(shard[name], self.shards[0][name]) for shard in self.shards[1:]):
            raise ValueError(f"the shards in {self.folder} have different {name}; they are not shards of one model")

    def parts(self, name: str, shard_dim: Optional[int], start: int, stop: int) -> list[torch.Tensor]:
        """The parts in the order of the shards.

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
        """A view of the mapping if one shard has all of it, or else a copy."""
        parts = self.parts(name, shard_dim, start, stop)
        if shard_dim is None or len(parts) == 1:
            return parts[0]
        shape = list(parts[0].shape)
        shape[shard_dim] = stop - start
        whole = torch.empty(shape, dtype=parts[0].dtype)
        for part, place in zip(parts, whole.split([part.shape[shard_dim] for part in parts], dim=shard_dim)):
            self.mapped.copy(part, place)
        return whole
