"""The commands on a folder of weights: convert writes another, info says what it holds and what that needs to run, pull fetches
one, verify checks one, bench measures one. What works is imported when it is asked for."""

from __future__ import annotations

from argparse import Namespace

from .arguments import MODEL, REQUIRED, Command, Option, a_name, a_number, some_of_model, truth
from .fetching import pull


def info(args: Namespace) -> None:
    """Say what model a checkpoint folder holds, on how many processes it runs, and what memory it needs. Loads nothing."""
    from .info import info

    info(args)


def convert(args: Namespace) -> None:
    """Write the checkpoint SRC as a new folder or file DST, in another format, or with other shards, or in another dtype."""
    from .convert import command

    command(args)


def verify(args: Namespace) -> None:
    """Check that a folder is whole and right, and that this code and this machine give its model's numbers.

    A row for each check: pass, fail or not applicable; then what each failure usually means. Status 1 if any failed.
    """
    from .verify import verify

    verify(args)


def bench(args: Namespace) -> None:
    """Measure load, prefill, first token and decode of a checkpoint on this machine.

    The prompts are made up, and continued whatever comes. Figures are medians of 3 runs after one that is not counted. Under
    torchrun, bytes and rates are one process's.
    """
    from .bench import bench

    bench(args)


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
    "verify": Command(verify, ["ckpt_dir"], {
        "what is checked": {
            "ckpt_dir": Option(str, REQUIRED, "the folder, a GGUF file, or its name on the hub"),
            "quick": Option(truth, False, "read the files and the weights only: run nothing"),
            "rounded": Option(truth, None, "compare int8 and int4 too; if not given, not on a CPU for over 1e9 parameters"),
            "text": Option(str, None, "a file of texts like those that the model was trained on, with empty lines between"),
            "wikitext": Option(str, None, "wiki.test.raw of WikiText-2, whose perplexity is compared with the published one"),
            "processes": Option(a_number, 4, "the most processes that are started to share the model"),
            "seconds": Option(a_number, 600, "how long exchanged layers and other faults of meaning are looked for"),
        },
        "what is told": {
            "json": Option(truth, False, "print one JSON object in place of the table"),
            "record": Option(truth, False, "if all is right, write checklist.chk, by which later damage is found"),
        },
        "the model": some_of_model("tokenizer_path", "device", "dtype", "compile"),
    }),
    "bench": Command(bench, ["ckpt_dir", "tokenizer_path"], {
        "what is run": {
            "prompt_tokens": Option(a_number, None, "tokens of a prompt; if not given 480, or what the demo has room for"),
            "new_tokens": Option(a_number, 64, "tokens that each prompt is continued by"),
            "batch_size": Option(a_number, 1, "prompts that run side by side"),
            "json": Option(truth, False, "print one JSON object in place of the text"),
        },
        "the model": some_of_model("ckpt_dir", "tokenizer_path", "device", "dtype", "quantize", "compile"),
    }),
}  # fmt: skip
