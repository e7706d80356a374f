"""`python -m llama …`, and the `llama` command: what can be done with a checkpoint from a terminal."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Optional

import fire
import torch

from .. import memory, runtime
from ..model import check_args, process_counts
from ..system import peers, pipes
from ..system.checks import whole_number
from ..system.printable import escaped, shortened
from ..tokenizer import Tokenizer, find_tokenizer, user_path
from ..weights.checkpoint import choose_quantization, fit_vocabulary, open_checkpoint
from . import terminal
from .bench import bench
from .convert import convert as convert_checkpoint


def convert(
    src: str,
    dst: str,
    to: str,
    shards: int = 1,
    dtype: Optional[str] = None,
    tokenizer_path: Optional[str] = None,
    quantize: Optional[str] = None,
) -> None:
    """Write the checkpoint folder SRC as a new folder DST in the other format, or with other shards, or in another dtype.

    to: "hf" (safetensors, for transformers) or "meta" (consolidated.NN.pth). shards: of Meta's format.
    dtype: "float32", "bfloat16" or "float16"; each weight's own if not given.
    tokenizer_path: the tokenizer.model to put beside the weights; the one in SRC or in the folder above it if not given.
    quantize: "int8" or "int4", in Meta's format: a half or a quarter of the bytes, quick to load.
    """
    source, target = user_path(src), user_path(dst)
    tokenizer = find_tokenizer(source, tokenizer_path)
    chosen = None if dtype is None else runtime.choose_dtype(dtype, torch.float32, torch.device("cpu"))
    convert_checkpoint(source, target, to, shards, chosen, tokenizer, quantize)
    if tokenizer is None and to == "hf":
        told = f"no tokenizer.model in {source} or above it: copy one into {target}, or pass --tokenizer_path"
        print(escaped(told), file=sys.stderr)
    print(escaped(f"{target} is written"))


def info(
    ckpt_dir: str,
    max_batch_size: int = 4,
    max_seq_len: int = 2048,
    processes: int = 1,
    dtype: Optional[str] = None,
    device: Optional[str] = None,
    tokenizer_path: Optional[str] = None,
    quantize: Optional[str] = None,
) -> None:
    """Say what model a checkpoint folder holds, on how many processes it runs, and what memory it needs. Loads nothing.

    max_batch_size, max_seq_len, processes, dtype, device, quantize: as `Llama.build` has them, to reckon the memory.
    """
    max_batch_size = whole_number("max_batch_size", max_batch_size, 1)
    max_seq_len = whole_number("max_seq_len", max_seq_len, 1)
    processes = whole_number("processes", processes, 1)
    folder = user_path(ckpt_dir)
    checkpoint = open_checkpoint(folder)
    stored, rows = checkpoint.dtype, checkpoint.shape("tok_embeddings.weight", 1)[0]
    path = find_tokenizer(folder, tokenizer_path)
    tokenizer = Tokenizer(str(path)) if path else None
    args = fit_vocabulary(checkpoint, tokenizer.n_words if tokenizer else rows)
    args = replace(args, max_batch_size=max_batch_size, max_seq_len=max_seq_len)
    check_args(args, processes)
    place = runtime.choose_device(device, runtime.Launch.read())
    chosen = runtime.choose_dtype(dtype, stored, place)
    quantization = choose_quantization(checkpoint, quantize)
    sharers = processes if runtime.device_kind(place) == "cpu" else 1
    placement = memory.Placement(args, chosen, processes, place, sharers, quantization)
    need, free = memory.estimate(placement), memory.free_bytes(place)
    numbers = memory.estimate(memory.Placement(args, torch.int8)).weights
    whole = memory.estimate(memory.Placement(args, stored, quantization=checkpoint.quantization)).weights
    theta = f", rotary base {args.rope_theta:g}" + (", one matrix for embedding and output" if checkpoint.tied else "")
    files = f"{len(checkpoint.paths)} file{'s' * (len(checkpoint.paths) > 1)}"
    print(f"{escaped(str(folder))}: {checkpoint.format} format, {files} of weights")
    print(f"  model       {args.n_layers} layers of width {args.dim}, {args.n_heads} heads of {args.head_size}, "
          f"{args.kv_heads} key/value heads, feed-forward {args.ffn_width}, {args.vocab_size} ids{theta}")  # fmt: skip
    kind = quantization.kind if checkpoint.quantization and quantization else str(stored).removeprefix("torch.")
    form = f", matrices in {quantization.kind}" if quantization else ""
    print(f"  parameters  {numbers:,} in {kind}, {memory.gigabytes(whole)}")
    if tokenizer:
        print(f"  tokenizer   {escaped(str(path))}: {tokenizer.n_words} pieces, BOS {tokenizer.bos_id}, EOS {tokenizer.eos_id}")
    else:
        print("  tokenizer   none here or in the folder above; pass --tokenizer_path")
    print(f"  processes   {', '.join(map(str, process_counts(args)))}")
    print(f"  memory      {processes} process{'es' * (processes > 1)}, {max_batch_size=}, {max_seq_len=}, "
          f"dtype={str(chosen).removeprefix('torch.')}{form}; on each process:")  # fmt: skip
    print(f"              {need}, and up to {memory.gigabytes(need.temporary)} while prompts are read")
    if free is None:
        print(f"  free        {place} does not tell")
    else:
        fits = need.resident * sharers <= free
        advice = "" if fits else "; " + memory.way_out(placement, free)
        print(f"  free        {memory.gigabytes(free)} on {place}: it {'fits' if fits else 'does not fit'}{advice}")


def _all_or_nothing(command: Callable[..., None]) -> Callable[..., Callable[..., None]]:
    """The command in two calls, because fire reports arguments that a call left over only after that call.

    The first takes the arguments that the command's signature names. The second gets the rest, refuses it, or does the work.
    """

    @functools.wraps(command)
    def bind(*arguments: Any, **flags: Any) -> Callable[..., None]:
        def work(*others: Any, **unknown: Any) -> None:
            if left := [*map(str, others), *(f"--{flag}" for flag in unknown)]:
                name = command.__name__
                told = f"{name} does not take {shortened(' '.join(left))}; put a text with spaces in quotes"
                raise ValueError(f"{told}, and see llama {name} --help for the flags")
            command(*arguments, **flags)

        return work

    return bind


def main() -> None:
    """Run a command. What it refuses ends with one line and exit status 1."""
    commands: dict[str, Callable[..., None]] = {
        "chat": terminal.chat,
        "complete": terminal.complete,
        "tokenize": terminal.tokenize,
        "score": terminal.score,
        "convert": convert,
        "info": info,
        "bench": bench,
    }
    try:
        with pipes.as_the_shell_left_them():
            fire.Fire({name: _all_or_nothing(command) for name, command in commands.items()}, name="llama")
    except (ValueError, OSError) as error:
        peers.end(f"failed: {error}")
        if _is_first():  # one speaks for all
            peers.tell(f"llama: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _is_first() -> bool:
    try:
        return runtime.Launch.read().rank == 0
    except ValueError:  # this is what went wrong
        return True
