"""Hugging Face folders: config.json -> ModelArgs, their names and row order <-> Meta's, safetensors read slice by
slice."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open

from ..layers.parallel import is_first_process
from ..layers.rounding import Quantization
from ..model import ModelArgs
from ..runtime import DTYPES
from ..system.checks import whole
from ..system.files import MappedFiles, Number, check_file, contents, is_there, listed, read_json
from ..system.printable import escaped, shortened
from .archive import map_tensors
from .rope import read_rope

# Meta's name of a tensor (without ".weight") and Hugging Face's; N is the layer.
NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "layers.N.attention_norm": "model.layers.N.input_layernorm",
    "layers.N.attention.wq": "model.layers.N.self_attn.q_proj",
    "layers.N.attention.wk": "model.layers.N.self_attn.k_proj",
    "layers.N.attention.wv": "model.layers.N.self_attn.v_proj",
    "layers.N.attention.wo": "model.layers.N.self_attn.o_proj",
    "layers.N.ffn_norm": "model.layers.N.post_attention_layernorm",
    "layers.N.feed_forward.w1": "model.layers.N.mlp.gate_proj",
    "layers.N.feed_forward.w2": "model.layers.N.mlp.down_proj",
    "layers.N.feed_forward.w3": "model.layers.N.mlp.up_proj",
    "norm": "model.norm",
    "output": "lm_head",
}
_META_NAMES = {theirs: meta for meta, theirs in NAMES.items()}
SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROTATED = ("attention.wq.weight", "attention.wk.weight")  # the two formats order their rows differently

# The numbers of config.json: its key, the field of ModelArgs, and what is allowed.
_CONFIG = [
    ("hidden_size", "dim", Number(int, 1, 2**20, True)),
    ("num_hidden_layers", "n_layers", Number(int, 1, 1000, True)),
    ("num_attention_heads", "n_heads", Number(int, 1, 2**16, True)),
    ("num_key_value_heads", "n_kv_heads", Number(int, 1, 2**16)),
    ("intermediate_size", "ffn_dim", Number(int, 1, 2**24, True)),
    ("vocab_size", "vocab_size", Number(int, 1, 2**24, True)),
    ("rms_norm_eps", "norm_eps", Number(float, 1e-12, 1.0)),
    ("head_dim", "head_dim", Number(int, 2, 2**16)),
    ("rope_theta", "rope_theta", Number(float, 1.0, 1e12)),
]
FILES = {"model.safetensors": ".safetensors", "pytorch_model.bin": ".bin"}  # one file, and how several end
INDEX = ".index.json"
IGNORED = "rotary_emb.inv_freq"  # old folders carry this table, which is computed here
LLAMA_3_VOCABULARY = 128256
LLAMA_3 = "this is a Llama 3 model, with another tokenizer and chat format; this library runs Llama 2 and Code Llama"


def other_name(name: str, names: Mapping[str, str]) -> Optional[str]:
    """A tensor's name in the other format, by `names`; None for a name that is not in it."""
    layer = re.search(r"\blayers\.(0|[1-9]\d{0,5})\.", name)
    pattern = name.replace(layer[0], "layers.N.") if layer else name
    if not pattern.endswith(".weight") or pattern.removesuffix(".weight") not in names:
        return None
    return names[pattern.removesuffix(".weight")].replace("N", layer[1] if layer else "") + ".weight"


def to_meta_rows(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k, whole heads: halves (all even entries, then all odd) -> adjacent pairs, as Meta rotates them."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def to_hf_rows(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """`to_meta_rows` backwards."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def read_config(folder: Path) -> tuple[ModelArgs, bool, Optional[int]]:
    """config.json as `ModelArgs` (without limits), whether the embedding is the output matrix too, and how many
    positions it states.

    ValueError, with every reason in one message, if it describes a model that this library does not compute.
    """
    path = folder / "config.json"
    if not is_there(path) and is_there(folder / "adapter_config.json"):
        raise ValueError(f"{path} is missing; {adapter_alone(folder)}")
    config = read_json(path, "a config.json has a few hundred bytes")
    theta, scaling, rope_problems = read_rope(config)
    values = {**config, "rope_theta": theta}
    problems = [problem for key, _, number in _CONFIG for problem in number.problem(key, values)]
    problems += rope_problems + _unsupported(config)
    if problems:
        raise ValueError(f"{path} describes a model that cannot be run here: {'; '.join(problems)}")
    found = {name: values[key] for key, name, _ in _CONFIG if values.get(key) is not None}
    if "norm_eps" not in found:
        found["norm_eps"] = 1e-6  # transformers' default; Meta's differs
    if found.get("head_dim") == found["dim"] / found["n_heads"]:
        del found["head_dim"]
    positions = whole(config.get("max_position_embeddings"))
    return ModelArgs(**found, rope_scaling=scaling), config.get("tie_word_embeddings") is True, positions


def base_of_adapter(folder: Path) -> str:
    """What the config of an adapter says of its base, for a message."""
    try:
        config = read_json(folder / "adapter_config.json", "an adapter_config.json has a thousand bytes")
    except ValueError:
        return "its config does not say which"
    return shortened(config.get("base_model_name_or_path"))


def adapter_alone(folder: Path) -> str:
    """What to do with a folder that holds an adapter and no weights of a base, for a message."""
    asked = f"build(ckpt_dir=BASE, adapter={escaped(str(folder))!r}), or --ckpt_dir and --adapter"
    return f"it holds an adapter alone, which is added to its base ({base_of_adapter(folder)}) by {asked}"


def _unsupported(config: dict[str, Any]) -> list[str]:
    problems = []
    architectures = config.get("architectures") or ["LlamaForCausalLM"]
    ours = str(architectures).lower() == "['llamaforcausallm']"  # once spelled LLaMAForCausalLM
    if config.get("model_type") != "llama" or not ours:
        problems.append(
            f"its architecture is {shortened(architectures)} (model_type {shortened(config.get('model_type'))}), "
            "only 'LlamaForCausalLM' (model_type 'llama') is computed: Llama 2, Code Llama, and what was made of them"
        )
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key) not in (None, False):
            problems.append(f"{key}={shortened(config[key])}, but biases are not computed")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        problems.append(f"hidden_act={shortened(config['hidden_act'])}, but only 'silu' is computed")
    if (quantized := config.get("quantization_config")) is not None:
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else quantized
        problems.append(
            f"its weights are quantized ({shortened(method)}); take the folder with the original ones, with "
            f"quantize='int8' or "
            "'int4' if memory is short"
        )
    if config.get("tie_word_embeddings") not in (None, True, False):
        problems.append(f"tie_word_embeddings={shortened(config['tie_word_embeddings'])} is neither true nor false")
    if config.get("vocab_size") == LLAMA_3_VOCABULARY:
        problems.append(LLAMA_3)
    return problems


def has_weights(folder: Path) -> bool:
    """Whether a folder has files of weights in this format, or an index of them."""
    return any(is_there(folder / f"{name}{index}") for name in FILES for index in ("", INDEX))


def find_parts(folder: Path) -> tuple[list[Path], Optional[dict[str, str]]]:
    """The files of weights of a folder, and its index, name -> file (None: one file without index). safetensors come
    first, then pickled ones.

    ValueError if a file or the index is missing or wrong.
    """
    for name in FILES:
        if is_there(folder / name):
            return [folder / name], None
        if is_there(folder / (name + INDEX)):
            return _indexed(folder / (name + INDEX), FILES[name])
    way_out = adapter_alone(folder) if is_there(folder / "adapter_config.json") else f"it holds {contents(folder)}"
    raise ValueError(f"{folder} has neither {' nor '.join(FILES)}, nor an index of several such files; {way_out}")


def _indexed(path: Path, suffix: str) -> tuple[list[Path], dict[str, str]]:
    folder = path.parent
    index = read_json(path, "an index has some hundred thousand bytes at most", 2**26).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(part, str) for part in index.values()):
        raise ValueError(f"{path} has no weight_map from names to files")
    for part in sorted(set(index.values())):
        if not re.fullmatch(r"[\w.+-]+", part, flags=re.ASCII) or not part.endswith(suffix):
            raise ValueError(f"{path} points to {shortened(part)}, which is not a {suffix} file of this folder")
        if not is_there(folder / part):
            raise ValueError(f"{path} points to {part}, which is missing from {folder}; download it again")
    return [folder / part for part in sorted(set(index.values()))], index


class _Pickled:
    """The tensors of a file of torch.save, as safetensors' `safe_open` gives them."""

    def __init__(self, path: Path) -> None:
        self._tensors = map_tensors(path)

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def get_slice(self, name: str) -> _PickledSlice:
        return _PickledSlice(self._tensors[name])


class _PickledSlice:
    """One of them, which is read in parts."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return next(
            (name for name, dtype in SAFETENSORS_DTYPES.items() if dtype == self._tensor.dtype), str(self._tensor.dtype)
        )

    def __getitem__(self, place: Any) -> torch.Tensor:
        return self._tensor[place]


def map_part(path: Path) -> Any:
    """A file of weights, mapped. ValueError if it is damaged, or a pickle that holds more than tensors."""
    check_file(path)
    if path.suffix == ".bin":
        return _Pickled(path)
    try:
        return safe_open(path, framework="pt", device="cpu").__enter__()
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{path} cannot be read: it is cut short, damaged, or no safetensors file ({escaped(str(error))}); "
            "download or save it again"
        ) from error


class HuggingFaceCheckpoint:
    """The mapped weights of a Hugging Face folder, under Meta's names and in Meta's order of rows. It is a
    `checkpoint.Checkpoint`, which documents its methods."""

    format = "Hugging Face"
    config = "config.json"
    quantization: Optional[Quantization] = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.args, self.tied, self.positions = read_config(folder)
        self.ids = self.args.vocab_size  # rows of the embedding and the output that count
        self.paths, index = find_parts(folder)
        self.mapped = MappedFiles(self.paths)
        self._parts: dict[str, Any] = {}  # Meta's name -> the open file that has it
        self._theirs: dict[str, str] = {}  # Meta's name -> theirs
        for path in self.paths:
            part = map_part(path)
            found = set(part.keys())
            named = found if index is None else {name for name, file in index.items() if file == path.name}
            if missing := [name for name in sorted(named - found) if not name.endswith(IGNORED)]:
                raise ValueError(f"{path} has no {listed(missing)}, which the index beside it names; download again")
            for theirs in found:
                if not theirs.endswith(IGNORED) and (theirs in named or theirs not in (index or {})):
                    name = other_name(theirs, _META_NAMES) or repr(theirs)
                    self._parts[name], self._theirs[name] = part, theirs
        if self.tied and "tok_embeddings.weight" in self._parts:
            self._tie()
        self.dtypes = {name: self._dtype(name) for name in self._parts}
        self.tables: dict[str, torch.dtype] = {}
        if "tok_embeddings.weight" not in self.dtypes:
            raise ValueError(f"{folder} has no model.embed_tokens.weight, but {listed(sorted(self._theirs.values()))}; "
                             "it is not a Llama checkpoint")  # fmt: skip
        self.dtype = self.dtypes["tok_embeddings.weight"]
        for name in ("tok_embeddings.weight", "output.weight"):
            if name in self._parts and (rows := self._shape(name)[:1]) != [self.ids]:
                raise ValueError(
                    f"{folder}: config.json says vocab_size={self.ids}, but {self._theirs[name]} has "
                    f"{listed(map(str, rows))} "
                    "rows; correct vocab_size there, or take the config.json that belongs to the weights"
                )

    def _tie(self) -> None:
        """Let the embedding be the output matrix too, unless another one is stored: then that counts, as in
        transformers 5."""
        stored = [self._whole(name) for name in ("tok_embeddings.weight", "output.weight") if name in self._parts]
        if len(stored) == 2 and not torch.equal(*stored):
            self.tied = False
            if is_first_process():
                warnings.warn(
                    f"{escaped(str(self.folder))}: config.json says that the embedding is the output matrix too, but "
                    f"another "
                    "lm_head.weight is stored, which is used",
                    stacklevel=6,
                )
            return
        self._parts["output.weight"] = self._parts["tok_embeddings.weight"]
        self._theirs["output.weight"] = self._theirs["tok_embeddings.weight"]

    def _shape(self, name: str) -> list[int]:
        return list(self._parts[name].get_slice(self._theirs[name]).get_shape())

    def _whole(self, name: str) -> torch.Tensor:
        return self._parts[name].get_slice(self._theirs[name])[:]

    def _dtype(self, name: str) -> torch.dtype:
        stored = self._parts[name].get_slice(self._theirs[name]).get_dtype()
        if stored in SAFETENSORS_DTYPES:
            return SAFETENSORS_DTYPES[stored]
        raise ValueError(
            f"{self._theirs[name]} in {self.folder} is stored as {stored}, which is not computed here; "
            f"use {' or '.join(DTYPES)}"
        )

    def leave_out_ids(self, pieces: int) -> bool:
        """Fine-tunes have rows for ids without a piece: padding, and tokens that were added later."""
        self.ids = pieces
        return True

    def missing_shards(self, width: int) -> int:
        return 0

    def check_copies(self, name: str) -> None:
        """Nothing to compare: each tensor is there once."""

    def shape(self, name: str, shard_dim: Optional[int]) -> list[int]:
        shape = self._shape(name)
        if name in ("tok_embeddings.weight", "output.weight") and shape:
            shape[0] = min(shape[0], self.ids)
        return shape

    def parts(self, name: str, shard_dim: Optional[int], start: int, stop: int) -> list[torch.Tensor]:
        """One part; for q and k it is (heads, D/2, 2, columns)."""
        if shard_dim == 1 or not name.endswith(ROTATED):
            return [self.read(name, shard_dim, start, stop)]
        half = self.args.head_size // 2
        low, high = (start, stop) if shard_dim == 0 else (0, self.shape(name, shard_dim)[0])  # whole heads
        rows = self._parts[name].get_slice(self._theirs[name])[low:high]
        return [rows.view(-1, 2, half, rows.shape[-1]).transpose(1, 2)]

    def read(self, name: str, shard_dim: Optional[int], start: int, stop: int) -> torch.Tensor:
        """A view of the mapping, except for rows of q and k, which are put in order."""
        weight = self._parts[name].get_slice(self._theirs[name])
        rows = self.shape(name, shard_dim)[0]
        if shard_dim == 1:
            return weight[:rows, start:stop]
        low, high = (start, stop) if shard_dim == 0 else (0, rows)
        if not name.endswith(ROTATED):
            return weight[low:high]
        head = self.args.head_size  # whole heads are read, because their rows are interleaved
        first, last = low // head * head, -(-high // head) * head
        mapped = weight[first:last]
        ordered = to_meta_rows(mapped, head)
        self.mapped.release(mapped)
        return ordered[low - first : high - first]
