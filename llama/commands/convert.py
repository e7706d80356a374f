"""A checkpoint in one format -> a new folder in the other, or with other shards, or in another dtype, or quantized; or
-> a GGUF file.

At no time is more than one tensor in memory. Everything is written into a folder with another name, the config last,
and that folder is renamed at the very end; an interrupted run leaves nothing that looks whole.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch

from .. import runtime
from ..chat_formats import LLAMA2
from ..chat_template import boundaries
from ..gguf_tokenizer import vocabulary_metadata
from ..layers.quantized import Quantized
from ..layers.rounding import ALSO_CALLED, Quantization
from ..layers.rounding import KINDS as OURS
from ..loading import trained_positions
from ..model import ModelArgs, Transformer, check_args, feed_forward_width
from ..rotary import metas_positions
from ..system.checks import whole_number
from ..system.files import user_path
from ..system.printable import escaped, gigabytes, shortened
from ..system.progress import bar
from ..tokenizer import Tokenizer
from ..tokenizer_files import find_tokenizer, open_tokenizer
from ..tokenizer_json import hf_tokenizer, whole_model
from ..verification.checksums import record
from ..weights.adapter import add_adapter, tokenizer_folder
from ..weights.checkpoint import (
    Checkpoint,
    cut,
    fit_vocabulary,
    known_ids,
    open_checkpoint,
    prepare,
    quantized,
    quantized_layers,
)
from ..weights.gguf import describe, metas_names, to_q8_0
from ..weights.gguf_header import KINDS
from ..weights.gguf_rope import TABLE, factors
from ..weights.huggingface import NAMES, ROTATED, other_name, to_hf_rows
from ..weights.rope import meta_rope, rope_settings, stated_positions
from ..weights.writers import GGUF_CODES, Entry, write_gguf, write_pth, write_safetensors
from .console import note
from .fetching import named_places

# dtype -> what GGUF's header calls a file of such tensors; uint8 stands for Q8_0
GGUF_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32, torch.uint8: 7}
QUANTIZED = {"meta": OURS, "hf": (), "gguf": ("q8_0",)}  # format -> the kinds of numbers that are written in it
PART_BYTES = 5 * 2**30  # a file of a Hugging Face folder is no larger, unless a single tensor is


def command(args: Namespace) -> None:
    """The command convert."""
    (source, adapter, given), target = named_places(args.src, args), user_path(args.dst)
    tokenizer = find_tokenizer(tokenizer_folder(source, adapter, given), given)
    dtype = (
        None if args.dtype in (None, "auto") else runtime.choose_dtype(args.dtype, torch.float32, torch.device("cpu"))
    )
    convert(source, target, args.to, args.shards, dtype, tokenizer, args.quantize, adapter)
    if tokenizer is None and args.to == "hf":
        told = f"no tokenizer.model in {source} or above it: copy one into {target}, or pass --tokenizer_path"
        note(escaped(told))
    print(escaped(f"{target} is written"))


def convert(
    source: Path,
    target: Path,
    to: str,
    shards: int = 1,
    dtype: Optional[torch.dtype] = None,
    tokenizer_path: Optional[Path] = None,
    quantize: Optional[str] = None,
    adapter: Optional[Path] = None,
) -> None:
    """Write the checkpoint `source` into the new folder `target`, to="meta" (with `shards`) or "hf", or the new file
    `target`, to="gguf".

    dtype: of all weights; each keeps its own if not given, and GGUF's matrices become float16 (its vectors are always
    float32). tokenizer_path: is copied too; a Hugging Face folder and a GGUF file need it. quantize: one of
    `rounding.KINDS` for the matrices of Meta's format, "q8_0" for those of GGUF with rows of whole blocks; if not
    given, quantized matrices stay as they are in Meta's format, whatever `dtype` says. adapter: a folder of PEFT, whose
    adapter is added. ValueError if an argument or the source is wrong, the target exists, or the disk has too little
    room; then nothing is written.
    """
    if to not in QUANTIZED:
        raise ValueError(f"to={shortened(to)} must be 'meta', 'hf' or 'gguf'")
    if quantize is not None and ALSO_CALLED.get(str(quantize), quantize) not in QUANTIZED[to]:
        kinds = "; ".join(
            f"to={form!r} takes {', '.join(map(repr, kinds)) or 'none'}" for form, kinds in QUANTIZED.items()
        )
        raise ValueError(f"quantize={shortened(quantize)} is no kind for to={to!r}: {kinds}")
    if to == "gguf":
        _check_gguf(source, target, tokenizer_path)
    if os.path.lexists(target):
        raise ValueError(f"{target} exists, and nothing is written over; name another folder, or remove it")
    checkpoint = add_adapter(open_checkpoint(source), adapter)
    home = tokenizer_folder(source, adapter, tokenizer_path)
    tokenizer = open_tokenizer(home, tokenizer_path, known_ids(checkpoint)) if tokenizer_path else None
    args = _full_args(checkpoint, tokenizer)
    check_args(args, 1, source)
    with torch.device("meta"):
        model = Transformer(args)
    quantization = prepare(model, checkpoint, None if to == "gguf" else quantize)
    if quantization is not None and to != "meta":
        raise ValueError(
            f"{source} is stored as {quantization.kind}, which is for Meta's format alone; convert to='meta', or the "
            f"original weights to={to!r}"
        )
    write: Callable[..., None] = write_safetensors if to == "hf" else write_pth
    if to == "gguf":
        assert tokenizer is not None
        files = {target.name: _gguf_entries(checkpoint, model, dtype or torch.float16, quantize is not None)}
        positions = trained_positions(checkpoint) or metas_positions(args.rope_theta)
        write = partial(write_gguf, metadata=_gguf_metadata(args, positions, files[target.name], tokenizer))
    else:
        files = _hf_files(checkpoint, model, dtype) if to == "hf" else _meta_files(checkpoint, model, shards, dtype)
    nbytes = sum(entry.nbytes for entries in files.values() for entry in entries)
    with _new_folder(target, nbytes, target.name if to == "gguf" else "") as folder:
        with bar(total=sum(map(len, files.values())), desc="Converting", unit="tensor", stays=True) as progress:
            for name, entries in files.items():
                write(folder / name, entries, progress)
        if to == "gguf":
            return
        if to == "hf":
            _write_hf_config(folder, args, dtype or checkpoint.dtype, files, tokenizer, checkpoint.tied)
        else:
            if tokenizer:
                _write_meta_tokenizer(folder, tokenizer)
            _write_json(folder / "params.json", meta_params(args) | quantization_params(quantization))
            record(folder, sorted(folder.iterdir()))


def _full_args(checkpoint: Checkpoint, tokenizer: Optional[Tokenizer]) -> ModelArgs:
    if tokenizer is not None:
        return replace(fit_vocabulary(checkpoint, tokenizer.n_words), max_seq_len=1, max_batch_size=1)
    rows = checkpoint.shape("tok_embeddings.weight", 1)[0]
    return replace(checkpoint.args, vocab_size=rows, max_seq_len=1, max_batch_size=1)


def _check_gguf(source: Path, target: Path, tokenizer_path: Optional[Path]) -> None:
    if target.suffix != ".gguf":
        raise ValueError(f"{target} is to be a GGUF file; give it a name that ends in .gguf")
    if tokenizer_path is None:
        raise ValueError(
            f"a GGUF file has its tokenizer in it, and there is none in {source} or above it; pass tokenizer_path"
        )


@contextmanager
def _new_folder(target: Path, nbytes: int, file: str = "") -> Iterator[Path]:
    """A folder beside `target` to write into. It, or the one file in it, becomes `target` if the block succeeds, and is
    removed if it fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < nbytes:
        raise ValueError(
            f"the disk of {target} has {gigabytes(free)} free, and {gigabytes(nbytes)} are to be written; free some"
        )
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o755)
        (folder / file).rename(target)
        if file:
            folder.rmdir()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _meta_files(
    checkpoint: Checkpoint, model: Transformer, shards: int, dtype: Optional[torch.dtype]
) -> dict[str, list[Entry]]:
    """consolidated.NN.pth: shard i has the i-th part of every matrix, along the dimension in which its layer is cut."""
    kv_heads = model.params.kv_heads
    shards = whole_number("shards", shards, 1)
    check_args(model.params, shards, what="shards")
    if model.params.vocab_size % shards:
        raise ValueError(f"{model.params.vocab_size} ids cannot be cut into {shards} shards; use a divisor")
    if kv_heads % shards:
        raise ValueError(f"{kv_heads} key/value heads cannot be cut into {shards} shards; use a divisor of {kv_heads}")
    plan = {name: (shape, dim) for name, (shape, dim, _) in cut(model).items()}
    plan.update((name, (checkpoint.shape(name, None), None)) for name in checkpoint.tables)
    layers = quantized_layers(model)
    for layer in layers.values():
        if layer.shard_dim == 1:
            layer.quantization.check_parts(layer.in_features, shards, "shards")
    rounded = _Rounded(checkpoint, layers, shards) if checkpoint.quantization is None else None
    dtypes = checkpoint.dtypes | checkpoint.tables
    files: dict[str, list[Entry]] = {}
    for i in range(shards):
        entries = files[f"consolidated.{i:02d}.pth"] = []
        for name, (full, dim) in plan.items():
            shape = [n // shards if j == dim else n for j, n in enumerate(full)]
            prefix = name.rpartition(".")[0]
            read = _reader(checkpoint, name, shape, dim, i)
            if prefix not in layers:
                stored = dtype or dtypes[name]
            else:
                stored = model.get_parameter(name).dtype
                read = read if rounded is None else rounded.reader(name, i)
            entries.append(Entry(name, stored, shape, read, checkpoint.mapped.release))
    return files


class _Rounded:
    """The rounded tensors of one part of a layer at a time. They are made when the first of them is read."""

    def __init__(self, checkpoint: Checkpoint, layers: dict[str, Quantized], shards: int) -> None:
        self.checkpoint, self.layers, self.shards = checkpoint, layers, shards
        self.at: Optional[tuple[str, int]] = None
        self.made: dict[str, torch.Tensor] = {}

    def reader(self, name: str, shard: int) -> Callable[[], torch.Tensor]:
        return lambda: self._read(name, shard)

    def _read(self, name: str, shard: int) -> torch.Tensor:
        prefix, _, kind = name.rpartition(".")
        if self.at != (prefix, shard):
            layer = self.layers[prefix]
            full = layer.in_features if layer.shard_dim == 1 else layer.out_features
            part = full // self.shards
            self.made = {}
            self.made = quantized(self.checkpoint, prefix, layer, shard * part, (shard + 1) * part, torch.device("cpu"))
            self.at = prefix, shard
        return self.made[kind]


def _hf_files(checkpoint: Checkpoint, model: Transformer, dtype: Optional[torch.dtype]) -> dict[str, list[Entry]]:
    """model.safetensors, or several files of at most PART_BYTES."""
    parts: list[list[Entry]] = [[]]
    for name, (shape, dim, _) in cut(model).items():
        if checkpoint.tied and name == "output.weight":
            continue
        read = _reader(checkpoint, name, shape, dim)
        if name.endswith(ROTATED):
            read = _in_hf_order(read, model.params.head_size, checkpoint)
        theirs = other_name(name, NAMES)
        assert theirs is not None
        entry = Entry(theirs, dtype or checkpoint.dtypes[name], shape, read, checkpoint.mapped.release)
        if parts[-1] and sum(e.nbytes for e in parts[-1]) + entry.nbytes > PART_BYTES:
            parts.append([])
        parts[-1].append(entry)
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, start=1)}


def _gguf_entries(checkpoint: Checkpoint, model: Transformer, dtype: torch.dtype, q8_0: bool) -> list[Entry]:
    """The tensors of a GGUF file. llama.cpp wants float32 for those of one dimension."""
    theirs = {name: other for other, name in metas_names(model.params.n_layers).items()}
    if checkpoint.tied:
        del theirs["output.weight"]
    block = KINDS[GGUF_CODES[torch.uint8]]
    entries, args = [], model.params
    if (scaling := args.rope_scaling) is not None and scaling.kind == "llama3":
        table = factors(scaling, args.head_size, args.rope_theta)
        entries.append(Entry(TABLE, table.dtype, list(table.shape), lambda: table, checkpoint.mapped.release))
    for name, (shape, dim, _) in cut(model).items():
        if name not in theirs:
            continue
        read, stored = _reader(checkpoint, name, shape, dim), dtype
        if len(shape) == 1:
            stored = torch.float32
        elif q8_0 and shape[-1] % block.block == 0:
            read, stored = _in_q8_0(read, checkpoint), torch.uint8
            shape = [*shape[:-1], shape[-1] // block.block * block.nbytes]
        entries.append(Entry(theirs[name], stored, shape, read, checkpoint.mapped.release))
    return entries


def _in_q8_0(read: Callable[[], torch.Tensor], checkpoint: Checkpoint) -> Callable[[], torch.Tensor]:
    def rounded() -> torch.Tensor:
        stored = read()
        weight = to_q8_0(stored)
        checkpoint.mapped.release(stored)
        return weight

    return rounded


def _gguf_metadata(args: ModelArgs, positions: int, entries: list[Entry], tokenizer: Tokenizer) -> dict[str, Any]:
    quantized = {"general.quantization_version": 2} if any(entry.dtype is torch.uint8 for entry in entries) else {}
    most = torch.uint8 if quantized else max((entry.dtype for entry in entries if len(entry.shape) > 1), key=str)
    told = {"general.file_type": GGUF_FILE_TYPES[most], **quantized}
    return describe(args, positions) | told | vocabulary_metadata(tokenizer)


def _reader(
    checkpoint: Checkpoint, name: str, shape: list[int], dim: Optional[int], part: int = 0
) -> Callable[[], torch.Tensor]:
    """What reads a part of this shape, or the whole tensor if it is not cut."""
    size = shape[dim or 0]
    return lambda: checkpoint.read(name, dim, part * size, (part + 1) * size)


def _in_hf_order(read: Callable[[], torch.Tensor], head_dim: int, checkpoint: Checkpoint) -> Callable[[], torch.Tensor]:
    def ordered() -> torch.Tensor:
        stored = read()
        weight = to_hf_rows(stored, head_dim)
        checkpoint.mapped.release(stored)
        return weight

    return ordered


def meta_params(args: ModelArgs) -> dict[str, Any]:
    """params.json. If the feed-forward width was given, a multiple and a multiplier are found that give it by Meta's
    rule."""
    multiple_of, multiplier = args.multiple_of, args.ffn_dim_multiplier
    if args.ffn_dim is not None:
        exact = (args.ffn_dim + 0.5) / int(8 * args.dim / 3)  # the rule rounds its product down
        rules = [(2**power, factor) for factor in (None, 1.3) for power in reversed(range(13))] + [(1, exact)]
        multiple_of, multiplier = next(r for r in rules if feed_forward_width(4 * args.dim, *r) == args.ffn_dim)
    params = {
        "dim": args.dim, "n_layers": args.n_layers, "n_heads": args.n_heads, "n_kv_heads": args.n_kv_heads,
        "vocab_size": args.vocab_size, "multiple_of": multiple_of, "ffn_dim_multiplier": multiplier,
        "norm_eps": args.norm_eps, "rope_theta": None if args.rope_theta == 10000.0 else args.rope_theta,
        "head_dim": args.head_dim, "rope_scaling": args.rope_scaling and meta_rope(args.rope_scaling),
    }  # fmt: skip
    return {key: value for key, value in params.items() if value is not None}


def quantization_params(quantization: Optional[Quantization]) -> dict[str, Any]:
    """The entry of params.json for quantized matrices."""
    if quantization is None:
        return {}
    group = {} if quantization.kind == "int8" else {"group_size": quantization.group_size}
    return {"quantization": {"kind": quantization.kind, **group}}


def _write_meta_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """tokenizer.model with a piece for each id, so that Meta's code counts right; and beside it what it cannot say."""
    (folder / "tokenizer.model").write_bytes(whole_model(tokenizer))
    if tokenizer.added:
        _write_json(folder / "added_tokens.json", {token.content: i for i, token in tokenizer.added.items()})
    if len(tokenizer.stop_ids) > 1:
        _write_json(folder / "generation_config.json", {"eos_token_id": sorted(tokenizer.stop_ids)})


def _write_hf_config(
    folder: Path,
    args: ModelArgs,
    dtype: torch.dtype,
    files: dict[str, list[Entry]],
    tokenizer: Optional[Tokenizer],
    tied: bool,
) -> None:
    if len(files) > 1:
        where = {entry.name: name for name, entries in files.items() for entry in entries}
        total = sum(entry.nbytes for entries in files.values() for entry in entries)
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
    if tokenizer:
        stops = sorted(tokenizer.stop_ids)
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops if len(stops) > 1 else tokenizer.eos_id}
        bos, eos = boundaries(tokenizer)
        (folder / "tokenizer.model").write_bytes(tokenizer.sp_model.serialized_model_proto())
        _write_json(folder / "tokenizer.json", hf_tokenizer(tokenizer))
        _write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos,
            "unk_token": tokenizer.piece(tokenizer.sp_model.unk_id()),
            "clean_up_tokenization_spaces": False, "chat_template": tokenizer.chat_template or LLAMA2.template,
        })  # fmt: skip
    _write_json(folder / "generation_config.json", ids)
    scaling = args.rope_scaling
    positions = stated_positions(scaling, args.rope_theta) if scaling else metas_positions(args.rope_theta)
    _write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": args.dim,
        "intermediate_size": args.ffn_width, "num_hidden_layers": args.n_layers, "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads, "head_dim": args.head_size, "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps, "rope_theta": args.rope_theta,
        "rope_scaling": scaling and rope_settings(scaling),
        "max_position_embeddings": positions, "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "tie_word_embeddings": tied, "torch_dtype": str(dtype).removeprefix("torch."), **ids,
    })  # fmt: skip


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
