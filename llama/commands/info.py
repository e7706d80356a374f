"""The work of info: what a checkpoint holds, and what memory it needs."""

from __future__ import annotations

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
from ..tokenizer import Tokenizer
from ..tokenizer_files import find_tokenizer, open_tokenizer
from ..weights.adapter import AdaptedCheckpoint, add_adapter, tokenizer_folder
from ..weights.checkpoint import Checkpoint, choose_quantization, fit_vocabulary, known_ids, open_checkpoint
from .fetching import named_places


def info(args: Namespace) -> None:
    """The command info."""
    for name in ("max_batch_size", "max_seq_len", "processes"):
        whole_number(name, getattr(args, name), 1)
    folder, adapter, given = named_places(args.ckpt_dir, args)
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
    if quantization is not None:
        quantization.check_device(device)
    placement = memory.Placement(model, dtype, args.processes, device, sharers, quantization)
    files = counted(len(checkpoint.paths), "file")
    print(f"{escaped(str(checkpoint.folder))}: {checkpoint.format} format, {files} of weights")
    for label, line in {**_holds(checkpoint, placement, path, tokenizer), **_needs(placement)}.items():
        print(f"  {label:12}{line}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _holds(
    checkpoint: Checkpoint, placement: memory.Placement, path: Optional[Path], tokenizer: Optional[Tokenizer]
) -> dict[str, str]:
    """What is in the folder: a line for each label."""
    args, stored = placement.args, checkpoint.quantization
    model = (
        f"{args.n_layers} layers of width {args.dim}, {args.n_heads} heads of {args.head_size}, {args.kv_heads} "
        f"key/value heads, feed-forward {args.ffn_width}, {args.vocab_size} ids, rotary base {args.rope_theta:g}"
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
            f"{escaped(str(path))}: {tokenizer.n_words - len(tokenizer.nameless)} pieces, BOS {tokenizer.bos_id}, "
            f"EOS {stops}"
        )
    adapter = {}
    if isinstance(checkpoint, AdaptedCheckpoint):
        whole = sum(change.whole is not None for change in checkpoint.changes.values())
        sums = sum(change.a is not None for change in checkpoint.changes.values())
        told = f"LoRA for {counted(sums, 'weight')}, {whole} replaced whole"
        adapter = {"adapter": f"{escaped(str(checkpoint.adapter))}: {told}"}
    return adapter | {
        "model": model + ", one matrix for embedding and output" * checkpoint.tied,
        "parameters": (
            f"{parameters:,} in {stored.kind if stored else _name(checkpoint.dtype)}, {memory.gigabytes(nbytes)}"
        ),
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
            f"; with {own / 1e6:,.0f} MB for Python and torch, {(own + need.resident + need.temporary) / 1e6:,.0f} "
            f"MB in all"
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
