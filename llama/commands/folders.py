"""The commands on a folder of weights: info says what it holds and what that needs to run, convert writes another, pull
fetches one."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Optional

import torch

from .. import memory, runtime
from ..chat_formats import spoken
from ..model import check_args, process_counts
from ..system.checks import whole_number
from ..system.printable import counted, escaped
from ..tokenizer import Tokenizer, user_path
from ..tokenizer_files import find_tokenizer, open_tokenizer
from ..weights.adapter import AdaptedCheckpoint, add_adapter, tokenizer_folder
from ..weights.checkpoint import Checkpoint, choose_quantization, fit_vocabulary, known_ids, open_checkpoint
from .arguments import MODEL, REQUIRED, Command, Option, a_name, a_number, some_of_model
from .convert import convert as convert_checkpoint
from .fetching import agreed_folder, pull


def info(args: Namespace) -> None:
    """Say what model a checkpoint folder holds, on how many processes it runs, and what memory it needs. Loads nothing."""
    for name in ("max_batch_size", "max_seq_len", "processes"):
        whole_number(name, getattr(args, name), 1)
    folder, adapter, given = _places(args.ckpt_dir, args)
    checkpoint = add_adapter(open_checkpoint(folder), adapter)
    stored, rows = checkpoint.dtype, checkpoint.shape("tok_embeddings.weight", 1)[0]
    home = tokenizer_folder(folder, adapter, given)
    path = find_tokenizer(home, given)
    tokenizer = open_tokenizer(home, path, known_ids(checkpoint)) if path else None
    model = fit_vocabulary(checkpoint, tokenizer.n_words if tokenizer else rows)
    model = replace(model, max_batch_size=args.max_batch_size, max_seq_len=args.max_seq_len)
    check_args(model, args.processes)
    device = runtime.choose_device(args.device, runtime.Launch.read())
    dtype = runtime.choose_dtype(args.dtype, stored, device)
    sharers = args.processes if runtime.device_kind(device) == "cpu" else 1
    quantization = choose_quantization(checkpoint, args.quantize)
    placement = memory.Placement(model, dtype, args.processes, device, sharers, quantization)
    files = counted(len(checkpoint.paths), "file")
    print(f"{escaped(str(checkpoint.folder))}: {checkpoint.format} format, {files} of weights")
    for label, line in {**_holds(checkpoint, placement, path, tokenizer), **_needs(placement)}.items():
        print(f"  {label:12}{line}")


def _places(given: str, args: Namespace) -> tuple[Path, Optional[Path], Optional[Path]]:
    """The folders of a checkpoint and of its adapter, and the file of its tokenizer, as far as they were named."""
    adapter = None if args.adapter is None else agreed_folder(args.adapter)
    return agreed_folder(given), adapter, None if args.tokenizer_path is None else user_path(args.tokenizer_path)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _holds(
    checkpoint: Checkpoint, placement: memory.Placement, path: Optional[Path], tokenizer: Optional[Tokenizer]
) -> dict[str, str]:
    """What is in the folder: a line for each label."""
    args, stored = placement.args, checkpoint.quantization
    model = (
        f"{args.n_layers} layers of width {args.dim}, {args.n_heads} heads of {args.head_size}, {args.kv_heads} key/value "
        f"heads, feed-forward {args.ffn_width}, {args.vocab_size} ids, rotary base {args.rope_theta:g}"
    )
    if (scaling := args.rope_scaling) is not None:
        model += (
            f", positions scaled ({scaling.kind}, factor {scaling.factor:g}) from "
            f"{scaling.original_max_position_embeddings} to {scaling.positions}"
        )
    parameters = memory.estimate(memory.Placement(args, torch.int8)).weights
    nbytes = memory.estimate(memory.Placement(args, checkpoint.dtype, quantization=stored)).weights
    pieces = "none here or in the folder above; pass --tokenizer_path"
    if tokenizer:
        stops = ", ".join(map(str, sorted(tokenizer.stop_ids)))
        pieces = (
            f"{escaped(str(path))}: {tokenizer.n_words - len(tokenizer.nameless)} pieces, BOS {tokenizer.bos_id}, EOS {stops}"
        )
    adapter = {}
    if isinstance(checkpoint, AdaptedCheckpoint):
        whole = sum(change.whole is not None for change in checkpoint.changes.values())
        sums = sum(change.a is not None for change in checkpoint.changes.values())
        told = f"LoRA for {counted(sums, 'weight')}, {whole} replaced whole"
        adapter = {"adapter": f"{escaped(str(checkpoint.adapter))}: {told}"}
    return adapter | {
        "model": model + ", one matrix for embedding and output" * checkpoint.tied,
        "parameters": f"{parameters:,} in {stored.kind if stored else _name(checkpoint.dtype)}, {memory.gigabytes(nbytes)}",
        "tokenizer": pieces,
        **({"chat format": escaped(spoken(tokenizer))} if tokenizer else {}),
        "processes": ", ".join(map(str, process_counts(args))),
    }


def _needs(placement: memory.Placement) -> dict[str, str]:
    """The memory that it takes, and what is free."""
    args, processes, device = placement.args, placement.processes, placement.device
    need, free = memory.estimate(placement), memory.free_bytes(device)
    form = f", matrices in {placement.quantization.kind}" if placement.quantization else ""
    told = f"{need}, and up to {memory.gigabytes(need.temporary)} while prompts are read"
    if runtime.device_kind(device) == "cpu":  # this process has imported what each of the others will; its own ends
        own = memory.own_bytes()
        told += (
            f"; with {own / 1e6:,.0f} MB for Python and torch, {(own + need.resident + need.temporary) / 1e6:,.0f} MB in all"
        )
        free = None if free is None else max(0, free - own * (placement.sharers - 1))
    if free is None:
        room = f"{device} does not tell"
    elif need.resident * placement.sharers <= free:
        room = f"{memory.gigabytes(free)} on {device}: it fits"
    else:
        room = f"{memory.gigabytes(free)} on {device}: it does not fit; {memory.way_out(placement, free)}"
    return {
        "memory": f"{counted(processes, 'process')}, max_batch_size={args.max_batch_size}, "
        f"max_seq_len={args.max_seq_len}, dtype={_name(placement.dtype)}{form}; on each process:",
        "": told,
        "free": room,
    }


def convert(args: Namespace) -> None:
    """Write the checkpoint SRC as a new folder or file DST, in another format, or with other shards, or in another dtype."""
    (source, adapter, given), target = _places(args.src, args), user_path(args.dst)
    tokenizer = find_tokenizer(tokenizer_folder(source, adapter, given), given)
    dtype = None if args.dtype is None else runtime.choose_dtype(args.dtype, torch.float32, torch.device("cpu"))
    convert_checkpoint(source, target, args.to, args.shards, dtype, tokenizer, args.quantize, adapter)
    if tokenizer is None and args.to == "hf":
        told = f"no tokenizer.model in {source} or above it: copy one into {target}, or pass --tokenizer_path"
        print(escaped(told), file=sys.stderr)
    print(escaped(f"{target} is written"))


COMMANDS = {
    "convert": Command(convert, ["src", "dst", "to", "shards", "dtype", "tokenizer_path", "quantize"], {
        "what is written": {
            "src": Option(str, REQUIRED, "the folder or GGUF file that is read, or a name on the hub"),
            "dst": Option(str, REQUIRED, "the folder that is made; a file NAME.gguf for gguf"),
            "to": Option(str, REQUIRED, "hf (safetensors, for transformers), meta (consolidated.NN.pth), gguf (for llama.cpp)"),
            "shards": Option(a_number, 1, "files of Meta's format"),
            "dtype": Option(a_name, None, "float32, bfloat16 or float16; each weight's own if not given, float16 for gguf"),
            "tokenizer_path": Option(str, None, "the tokenizer.model to copy; the one in SRC or above it if not given"),
            "quantize": Option(a_name, None, "int8 or int4, in Meta's format: a half or a quarter of the bytes; q8_0 for gguf"),
            **some_of_model("adapter"),
        },
    }),
    "info": Command(info, ["ckpt_dir"], {
        "the checkpoint": {
            "ckpt_dir": Option(str, REQUIRED, "its folder, a GGUF file, or its name on the hub"),
            **some_of_model("tokenizer_path", "adapter"),
        },
        "how it is to run": {
            "max_batch_size": MODEL["max_batch_size"]._replace(default=4),
            "max_seq_len": Option(a_number, 2048, "tokens of a prompt and its answer that there is room for"),
            "processes": Option(a_number, 1, "processes that share it"),
            **some_of_model("device", "dtype", "quantize"),
        },
    }),
    "pull": Command(pull, ["id"], {
        "what is fetched": {"id": Option(str, REQUIRED, "org/name, org/name@revision or org/name:Q4_K_M on the hub")},
    }),
}  # fmt: skip
