"""GGUF files, llama.cpp's: metadata -> ModelArgs, their names <-> Meta's; tensors mapped, or dequantized a part at a
time.

Rows of q and k are in Meta's order there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import torch

from ..layers.rounding import Quantization
from ..model import ModelArgs
from ..rotary import RotaryScaling
from ..system.checks import whole
from ..system.files import COPY_BYTES, MappedFiles, Number, listed
from ..system.printable import escaped, shortened
from .gguf_header import Header, TensorInfo, read_header
from .gguf_rope import CONTEXT, TABLE, gguf_rope, read_gguf_rope, read_table
from .huggingface import LLAMA_3, LLAMA_3_VOCABULARY
from .places import find_gguf as find_gguf

# Meta's name of a tensor (without ".weight") and GGUF's; N is the layer.
NAMES = {
    "tok_embeddings": "token_embd",
    "layers.N.attention_norm": "blk.N.attn_norm",
    "layers.N.attention.wq": "blk.N.attn_q",
    "layers.N.attention.wk": "blk.N.attn_k",
    "layers.N.attention.wv": "blk.N.attn_v",
    "layers.N.attention.wo": "blk.N.attn_output",
    "layers.N.ffn_norm": "blk.N.ffn_norm",
    "layers.N.feed_forward.w1": "blk.N.ffn_gate",
    "layers.N.feed_forward.w2": "blk.N.ffn_down",
    "layers.N.feed_forward.w3": "blk.N.ffn_up",
    "norm": "output_norm",
    "output": "output",
}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # kinds that are not quantized

# The numbers of the metadata: the key, the field of ModelArgs, and what is allowed.
_METADATA = [
    ("llama.embedding_length", "dim", Number(int, 1, 2**20, True)),
    ("llama.block_count", "n_layers", Number(int, 1, 1000, True)),
    ("llama.attention.head_count", "n_heads", Number(int, 1, 2**16, True)),
    ("llama.attention.head_count_kv", "n_kv_heads", Number(int, 1, 2**16)),
    ("llama.feed_forward_length", "ffn_dim", Number(int, 1, 2**24, True)),
    ("llama.vocab_size", "vocab_size", Number(int, 1, 2**24)),
    ("llama.attention.layer_norm_rms_epsilon", "norm_eps", Number(float, 1e-12, 1.0, True)),
    ("llama.attention.key_length", "head_dim", Number(int, 2, 2**16)),
    ("llama.rope.freq_base", "rope_theta", Number(float, 1.0, 1e12)),
]
# Keys of what is not computed here, unless they have this value.
_UNCOMPUTED = {
    "llama.expert_count": 0, "llama.attention.sliding_window": 0, "llama.attention.causal": True,
    "llama.logit_scale": 1,
    "llama.residual_scale": 1, "llama.embedding_scale": 1, "llama.attention.scale": 0,
    "llama.use_parallel_residual": False,
    "llama.attention.clamp_kqv": 0, "llama.rope.scaling.alpha": 0, "llama.rope.scaling.yarn_log_multiplier": 0,
}  # fmt: skip


def read_headers(paths: list[Path]) -> list[Header]:
    """The headers of a model's files; the first has the model's metadata. ValueError if they are not those of one
    model."""
    headers = [read_header(path) for path in paths]
    for i, (path, header) in enumerate(zip(paths, headers)):
        no, count = (header.metadata.get(f"split.{key}", default) for key, default in (("no", 0), ("count", 1)))
        if (no, max(1, count) if type(count) is int else count) != (i, len(paths)):
            raise ValueError(f"{path} says that it is part {shortened(no)} (from 0) of {shortened(count)}, and not "
                             f"part {i} of {len(paths)}; give the parts their names back, as "
                             f"name-00001-of-00003.gguf")  # fmt: skip
    total = headers[0].metadata.get("split.tensors.count")
    if total is not None and total != sum(len(header.tensors) for header in headers):
        raise ValueError(f"{paths[0]} says that the parts have {shortened(total)} tensors, and they have another "
                         f"number; "
                         "they are not parts of one model")  # fmt: skip
    return headers


def read_args(path: Path, metadata: dict[str, Any], tensors: dict[str, TensorInfo]) -> ModelArgs:
    """The metadata of a model as `ModelArgs`, without limits; vocab_size is the number of rows if nothing says it.

    ValueError, with every reason in one message, if they describe a model that this library does not compute.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama" or metadata.get("general.type", "model") != "model":
        what = shortened(architecture if architecture != "llama" else metadata["general.type"])
        raise ValueError(
            f"{path} holds {what}, and only models of the architecture 'llama' are computed; take one of those"
        )
    problems = [problem for key, _, number in _METADATA for problem in number.problem(key, metadata)]
    scaling, rope_problems = read_gguf_rope(metadata)
    problems += _unsupported(metadata) + rope_problems + _foreign(tensors)
    if not problems:
        found = {name: metadata[key] for key, name, _ in _METADATA if metadata.get(key) is not None}
        args = ModelArgs(**found, rope_scaling=scaling)
        if args.head_dim is not None and args.head_dim * args.n_heads == args.dim:
            args.head_dim = None
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if (size := metadata.get(key, args.head_size)) != args.head_size:
                problems.append(f"{key}={shortened(size)}, and only all of a head, {args.head_size}, is computed")
    if problems:
        raise ValueError(f"{path} describes a model that cannot be run here: {listed(problems)}")
    if args.vocab_size == -1 and "token_embd.weight" in tensors:
        args.vocab_size = tensors["token_embd.weight"].shape[0]
    return args


def _unsupported(metadata: dict[str, Any]) -> list[str]:
    problems = [
        f"{key}={shortened(metadata[key])}, which is not computed"
        for key, usual in _UNCOMPUTED.items()
        if metadata.get(key, usual) != usual
    ]
    if metadata.get("llama.vocab_size") == LLAMA_3_VOCABULARY:
        problems.append(LLAMA_3)
    return problems


def _foreign(tensors: dict[str, TensorInfo]) -> list[str]:
    """What is wrong with tensors that no Llama 2 has."""
    experts = [name for name in tensors if "_exps." in name or "ffn_gate_inp" in name]
    biases = [name for name in tensors if name.endswith(".bias")]
    problems = [f"it has experts ({shortened(experts[0])}), which are not computed"] if experts else []
    return problems + ([f"it has biases ({shortened(biases[0])}), which are not computed"] if biases else [])


def metas_names(layers: int) -> dict[str, str]:
    """GGUF's name -> Meta's, of all tensors of a model."""
    pairs = {f"{theirs}.weight": f"{name}.weight" for name, theirs in NAMES.items()}
    inner = {theirs: name for theirs, name in pairs.items() if "N" in theirs}
    for i in range(layers):
        pairs.update((theirs.replace("N", str(i)), name.replace("N", str(i))) for theirs, name in inner.items())
    return {theirs: name for theirs, name in pairs.items() if theirs not in inner}


def describe(args: ModelArgs, positions: int) -> dict[str, Any]:
    """`read_args` backwards. positions: how many the model was made for."""
    values = {
        "dim": args.dim, "n_layers": args.n_layers, "n_heads": args.n_heads, "n_kv_heads": args.kv_heads,
        "ffn_dim": args.ffn_width, "vocab_size": args.vocab_size, "norm_eps": args.norm_eps, "head_dim": args.head_size,
        "rope_theta": float(args.rope_theta),
    }  # fmt: skip
    return {
        "general.architecture": "llama",
        **{key: values[name] for key, name, _ in _METADATA},
        "llama.attention.value_length": args.head_size,
        "llama.rope.dimension_count": args.head_size,
        **gguf_rope(args.rope_scaling, args.rope_theta, positions),
    }


def to_q8_0(weight: torch.Tensor) -> torch.Tensor:
    """(rows, columns) -> uint8 (rows, columns / 32 * 34): blocks of a float16 scale and 32 numbers of 8 bits."""
    blocks = weight.float().unflatten(-1, (-1, 32))
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    sizes = (blocks * torch.where(scales == 0, 0, 1 / scales)).abs_()
    whole = sizes.floor()
    numbers = torch.copysign(whole + (2 * (sizes - whole)).floor(), blocks)  # halves away from zero
    return torch.cat([scales.half().view(torch.uint8), numbers.to(torch.int8).view(torch.uint8)], dim=-1).flatten(-2)


def dequantized(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    """Rows of blocks, uint8 -> their numbers, float32."""
    import numpy
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    with numpy.errstate(all="ignore"):  # scales that are not finite; the caller sees what comes of them
        return torch.from_numpy(dequantize(numpy.ascontiguousarray(blocks.numpy()), GGMLQuantizationType[kind]))


class GGUFCheckpoint:
    """The mapped weights of GGUF files, under Meta's names. It is a `checkpoint.Checkpoint`, which documents its
    methods.

    A quantized tensor is read as float32, which has every number exactly. Its `dtypes` are float16, in which it is
    computed and stored if nobody asks for another: the scales have that dtype, so the numbers have its range, and more
    digits than bfloat16 has would be lost.
    """

    config = "metadata"
    quantization: Optional[Quantization] = None

    def __init__(self, path: Path) -> None:
        self.folder = path
        self.paths = find_gguf(path)
        self.mapped = MappedFiles(self.paths)
        headers = read_headers(self.paths)
        # Meta's name -> what the tensor is, and its mapped bytes
        self._tensors: dict[str, tuple[TensorInfo, torch.Tensor]] = {}
        found: dict[str, TensorInfo] = {}
        for file, header in zip(self.paths, headers):
            for name in header.tensors.keys() & found.keys():
                raise ValueError(f"{file} has {shortened(name)}, as another part of that model has; download it again")
            found.update(header.tensors)
        self.args = read_args(path, headers[0].metadata, found)
        context = whole(headers[0].metadata.get(CONTEXT))
        self.positions = context if context is not None and 1 <= context < 2**31 else None
        self.ids = self.args.vocab_size  # rows of the embedding and the output that count
        names = metas_names(self.args.n_layers)
        for file, header in zip(self.paths, headers):
            storage: Any = torch.UntypedStorage.from_file(str(file), False, file.stat().st_size)  # a private mapping
            mapped = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
            for theirs, info in header.tensors.items():
                self._tensors[names.get(theirs, repr(theirs))] = info, mapped[info.start : info.stop]
        if "tok_embeddings.weight" not in self._tensors:
            raise ValueError(
                f"{path} has no token_embd.weight, but {listed(sorted(found)) or 'nothing'}; it is not a Llama model"
            )
        if info_and_bytes := self._tensors.pop(repr(TABLE), None):
            self.args.rope_scaling = self._scaling(*info_and_bytes)
        self.tied = "output.weight" not in self._tensors
        if self.tied:
            self._tensors["output.weight"] = self._tensors["tok_embeddings.weight"]
        self.dtypes = {name: DTYPES.get(info.kind.name, torch.float16) for name, (info, _) in self._tensors.items()}
        self.tables: dict[str, torch.dtype] = {}
        kinds = [info.kind.name for info, _ in self._tensors.values()]
        self.format = f"GGUF ({', '.join(sorted(set(kinds), key=lambda kind: (-kinds.count(kind), kind)))})"
        quantized = any(kind not in DTYPES for kind in kinds)
        if quantized:
            self._need_package()
        self.dtype = torch.float16 if quantized else self.dtypes["tok_embeddings.weight"]

    def _need_package(self) -> None:
        try:
            import gguf.quants  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"{self.folder} is quantized, {self.format}, which needs the package gguf; pip install 'gguf>=0.17'"
            ) from error

    def _scaling(self, info: TensorInfo, numbers: torch.Tensor) -> Optional[RotaryScaling]:
        """The scaling of a table of factors. ValueError if the metadata have another one, or the table is of no known
        rule."""
        told = self.args.rope_scaling
        if info.kind.name != "F32" or info.shape != [self.args.head_size // 2] or told is not None:
            more = "" if told is None else f", and by its metadata ({told.kind}), which is not computed together"
            raise ValueError(f"{self.folder}: its rotary positions are scaled by {TABLE}, {info.kind.name} "
                             f"{info.shape}{more}; "
                             "take another model")  # fmt: skip
        try:
            return read_table(numbers.view(torch.float32), self.args.rope_theta, self.positions)
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from error

    def leave_out_ids(self, pieces: int) -> bool:
        """Fine-tunes have rows for ids without a piece: padding, and tokens that were added later."""
        self.ids = pieces
        return True

    def missing_shards(self, width: int) -> int:
        return 0

    def check_copies(self, name: str) -> None:
        """Nothing to compare: each tensor is there once."""

    def shape(self, name: str, shard_dim: Optional[int]) -> list[int]:
        shape = list(self._tensors[name][0].shape)
        if name in ("tok_embeddings.weight", "output.weight"):
            shape[0] = min(shape[0], self.ids)
        return shape

    def parts(self, name: str, shard_dim: Optional[int], start: int, stop: int) -> list[torch.Tensor]:
        """One part. It lies in the mapping unless it is quantized."""
        return [self.read(name, shard_dim, start, stop)]

    def read(self, name: str, shard_dim: Optional[int], start: int, stop: int) -> torch.Tensor:
        """A view of the mapping, or in float32 what was quantized: the blocks that hold the entries, some rows at a
        time."""
        info, numbers = self._tensors[name]
        shape = self.shape(name, shard_dim)
        if shard_dim is not None:
            shape[shard_dim] = stop - start
        rows = slice(start, stop) if shard_dim == 0 else slice(0, shape[0])
        columns = slice(start, stop) if shard_dim == 1 else slice(0, shape[-1])
        if (dtype := DTYPES.get(info.kind.name)) is not None:
            weight = numbers.view(dtype).view(info.shape)
            return weight[rows] if len(info.shape) == 1 else weight[rows, columns]
        _, block, nbytes = info.kind
        first, last = columns.start // block, -(-columns.stop // block)
        blocks = numbers.view(-1, info.shape[-1] // block * nbytes)[rows, first * nbytes : last * nbytes]
        made = torch.empty(shape, dtype=torch.float32, device="cpu")
        into = made.view(-1, shape[-1])
        step = max(1, COPY_BYTES // (4 * block * (last - first)))
        for i in range(0, len(blocks), step):
            piece = dequantized(blocks[i : i + step], info.kind.name)
            into[i : i + step] = piece[:, columns.start - first * block : columns.stop - first * block]
            self.mapped.release(blocks[i : i + step])
        if not all(bool(end.isfinite()) for end in made.aminmax()):
            raise ValueError(
                f"{escaped(str(self.folder))}: {name} has NaN or infinity in it: the file is damaged; download it again"
            )
        return made
