"""The commands on a folder of weights: convert writes another, info says what it holds and what that needs to run, pull
fetches one, verify checks one, bench measures one. What works is imported when it is asked for."""

from __future__ import annotations

from argparse import Namespace

from .arguments import (
    DTYPES,
    MODEL,
    QUANTIZED,
    REQUIRED,
    Command,
    Option,
    a_name,
    a_number,
    a_path,
    some_of_model,
    truth,
)
from .fetching import check_named, pull

FORMATS = ("hf", "meta", "gguf")


def info(args: Namespace) -> None:
    """Say what a checkpoint holds, and what it needs to run. Loads no weights."""
    check_named(args.ckpt_dir)
    from .info import info

    info(args)


def convert(args: Namespace) -> None:
    """Write a checkpoint in another format, dtype or number of shards. SRC stays as it is; DST is new."""
    check_named(args.src)
    from .convert import command

    command(args)


def verify(args: Namespace) -> None:
    """Check that a checkpoint is right, and gives its numbers here.

    A row for each check: pass, fail or not applicable; then what each failure usually means. Status 1 if any failed.
    """
    from .verify import verify

    verify(args)


def bench(args: Namespace) -> None:
    """Measure how fast a checkpoint loads, reads and writes here.

    The prompts are made up, and continued whatever comes. Figures are medians of 3 runs after one that is not counted.
    Under torchrun, bytes and rates are one process's.
    """
    check_named(args.ckpt_dir)
    from .bench import bench

    bench(args)


COMMANDS = {
    "convert": Command(convert, ["src", "dst", "to", "shards", "dtype", "tokenizer_path", "quantize"], {
        "what is written": {
            "src": Option(a_path, REQUIRED, "the folder or GGUF file that is read, or a hub's name"),
            "dst": Option(a_path, REQUIRED, "the folder that is made; a file NAME.gguf for gguf"),
            "to": Option(str, REQUIRED, "for transformers, Meta, llama.cpp", FORMATS),
            "shards": Option(a_number, 1, "files of Meta's format"),
            "dtype": Option(a_name, None, "else as stored, or fp16 for gguf", DTYPES[:3]),
            "tokenizer_path": Option(a_path, None, "the tokenizer.model to copy, if not in SRC or above it"),
            "quantize": Option(
                a_name, None, "that is for gguf, the others for meta", (*QUANTIZED[:2], "q8_0")
            ),
            "adapter": MODEL["adapter"]._replace(rare=False),
        },
    }, ["llama-2-7b/ llama-2-7b-hf/ hf", "llama-2-7b/ llama-2-7b-int4/ meta --quantize int4"]),
    "info": Command(info, ["ckpt_dir"], {
        "the checkpoint": {
            "ckpt_dir": Option(a_path, REQUIRED, "its folder, a GGUF file, or its name on the hub"),
            **some_of_model("tokenizer_path", "adapter"),
        },
        "how it is to run": {
            "max_batch_size": MODEL["max_batch_size"]._replace(default=4, rare=False),
            "max_seq_len": Option(a_number, 2048, "tokens of a prompt and its answer"),
            "processes": Option(a_number, 1, "processes that share it"),
            **some_of_model("device", "dtype", "quantize"),
        },
    }, ["llama-2-7b/", "llama-2-70b/ --processes 8 --quantize int8"]),
    "pull": Command(pull, ["id"], {
        "what is fetched": {"id": Option(str, REQUIRED, "org/name, org/name@revision or org/name:Q4_K_M on the hub")},
    }, ["meta-llama/Llama-2-7b-chat-hf", "TheBloke/Llama-2-7B-Chat-GGUF:Q4_K_M"]),
    "verify": Command(verify, ["ckpt_dir"], {
        "what is checked": {
            "ckpt_dir": Option(a_path, REQUIRED, "the folder, a GGUF file, or its name on the hub"),
            "quick": Option(truth, False, "read files and weights only: run nothing"),
            "rounded": Option(truth, None, "compare int8 and int4 too; else not for 1e9 parameters"),
            "text": Option(a_path, None, "texts like those it was trained on, empty lines between"),
            "wikitext": Option(a_path, None, "wiki.test.raw, compared with the published perplexity"),
            "processes": Option(a_number, 4, "the most processes that share the model"),
            "seconds": Option(a_number, 600, "time to look for faults of meaning"),
        },
        "what is told": {
            "json": Option(truth, False, "print one JSON object in place of the table"),
            "record": Option(truth, False, "if all is right, write checklist.chk"),
        },
        "the model": some_of_model("tokenizer_path", "device", "dtype", "compile"),
    }, ["llama-2-7b/", "llama-2-7b/ --quick --record"]),
    "bench": Command(bench, ["ckpt_dir", "tokenizer_path"], {
        "what is run": {
            "prompt_tokens": Option(a_number, None, "tokens of a prompt; if not given 480, less for the demo"),
            "new_tokens": Option(a_number, 64, "tokens that each prompt is continued by"),
            "batch_size": Option(a_number, 1, "prompts that run side by side"),
            "json": Option(truth, False, "print one JSON object in place of the text"),
        },
        "the model": some_of_model("ckpt_dir", "tokenizer_path", "device", "dtype", "quantize", "compile"),
    }, ["llama-2-7b/ --quantize int8", "llama-2-7b/ --prompt_tokens 2000 --batch_size 8 --json"]),
}  # fmt: skip
