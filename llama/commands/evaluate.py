"""How good a model is, in figures that others have too: `python -m llama perplexity` and `python -m llama eval`."""

from __future__ import annotations

import math
import re
from argparse import Namespace
from typing import Any

from ..perplexity import METHODS, Perplexity, parse_method, perplexity
from ..system.checks import real, whole_number
from ..system.files import replace_file, user_path
from ..system.launch import Launch
from ..system.printable import counted, escaped, json_line, printable, shortened
from .arguments import MODEL, REQUIRED, Command, Option, a_number, a_path, build, truth
from .console import exact_text, pipe_may_close, say
from .fetching import ask_before_fetching, check_named


def measure(args: Namespace) -> None:
    """Show the perplexity of a text by one of the methods that numbers are published for.

    Each is computed exactly as its tool does it: docs/EVALUATION.md. Without --max_seq_len the model has room for all
    positions that it was trained on.
    """
    method = parse_method(args.method)
    # Before a long load; the other processes run the first one's steps.
    text = exact_text(user_path(args.file)) if Launch.read().rank == 0 else ""
    check_named(args.ckpt_dir)
    ask_before_fetching(args.ckpt_dir)
    length = _length(args)
    method.check_fits(length)
    if args.max_seq_len is None:
        length = method.window or length
    llama = build(args, max_seq_len=length)
    told = llama.lead(lambda: perplexity(llama, text, args.method))
    if told is not None:
        with pipe_may_close():
            say(f"{json_line({'file': args.file, **told}) if args.json else _in_words(args.file, told)}\n")


def _length(args: Namespace) -> int:
    """The max_seq_len that was asked for, or that of all positions that the model was trained on."""
    from ..loading import whole_length  # imports torch

    if args.max_seq_len is not None:
        return whole_number("max_seq_len", args.max_seq_len, 1)
    return whole_length(args.ckpt_dir, args.device, args.model_parallel_size)


def _in_words(file: str, told: Perplexity) -> str:
    error = f" ± {told['standard_error']:.5f}" if "standard_error" in told else ""
    lines = [
        f"{printable(escaped(file))} by {told['method']}: {counted(told['tokens'], 'token')} scored, in "
        f"{counted(told['windows'], 'window')} of up to {told['window']}",
        f"  perplexity  {told['perplexity']:.4f}{error} of a token",
        f"  bits        {told['bits_per_token']:.4f} of a token",
    ]
    if "words" in told:
        counts = f"{counted(told['documents'], 'document')}, {told['words']} words, {told['bytes']} bytes"
        bits = told["nll"] / told["words"] / math.log(2)
        lines[1] += f", {told['word_perplexity']:.4f} of a word, {told['byte_perplexity']:.4f} of a byte ({counts})"
        lines[2] += f", {bits:.4f} of a word, {told['bits_per_byte']:.4f} of a byte"
    return "\n".join(lines)


def evaluate(args: Namespace) -> None:
    """Run tasks of lm-evaluation-harness.

    Each request gets the answer that the harness' own model "hf" gives with the same weights. Tasks come with the
    harness, or from YAML files in --include_path; their data is fetched from the Hugging Face Hub if it is not there.
    Without --max_seq_len the model has room for all positions that it was trained on.
    """
    _check_numbers(args)
    first, out = Launch.read().rank == 0, user_path(args.out) if args.out is not None else None
    if args.samples and out is None:
        raise ValueError("--samples writes each request and its answer into --out; name a file with --out too")
    if first and out is not None and out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file in it")
    if first and out is not None and not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    check_named(args.ckpt_dir, args.draft)
    try:
        from .. import lm_eval_model as harness
    except ImportError as error:
        raise ValueError(f"{error}: tasks need lm-evaluation-harness: pip install 'llama[eval]'") from error
    tasks = harness.find_tasks(args.tasks, args.include_path, args.num_fewshot) if first else None  # before a long load
    ask_before_fetching(args.ckpt_dir, args.adapter)
    llama = build(args, max_seq_len=_length(args))

    def work() -> Any:
        how = {name: getattr(args, name) for name in HOW}
        assert tasks is not None
        return harness.evaluate(llama, tasks, name=args.ckpt_dir or "demo", samples=args.samples, **how)

    results = llama.lead(work)
    if results is not None:
        if out is not None:
            replace_file(out, harness.as_json(results).encode())
        with pipe_may_close():
            say(f"{harness.table(results)}\n")


def _check_numbers(args: Namespace) -> None:
    """ValueError for a number that the harness would take wrongly, or refuse only after the model is loaded."""
    limit = real(args.limit)
    if args.limit is not None and (limit is None or not 0 < limit < math.inf):
        raise ValueError(f"limit={shortened(args.limit)} must be a number above 0")
    if args.num_fewshot is not None:
        whole_number("num_fewshot", args.num_fewshot, 0)
    whole_number("bootstrap_iters", args.bootstrap_iters, 0)
    for part in [] if args.gen_kwargs is None else args.gen_kwargs.split(","):  # the harness ignores other words
        if not re.fullmatch(r"\s*\w+\s*=.+", part):
            raise ValueError(f"gen_kwargs: {shortened(part)} must be NAME=VALUE, as in temperature=0.8,top_p=0.9")


HOW = {
    "limit": Option(a_number, None, "documents of each task, or a share below 1; else all"),
    "num_fewshot": Option(a_number, None, "examples before each question; else as the task says"),
    "apply_chat_template": Option(truth, False, "write questions as chats, in the folder's format"),
    "system_instruction": Option(str, None, "their system message, or a text before each question", rare=True),
    "fewshot_as_multiturn": Option(truth, True, "in chats, examples are turns of their own", rare=True),
    "gen_kwargs": Option(str, None, "options of texts, as temperature=0.8,top_p=0.9", rare=True),
    "bootstrap_iters": Option(a_number, 100000, "draws for standard errors without a formula; 0 for none", rare=True),
}
LENGTH = Option(a_number, None, "tokens that there is room for; all that it was trained on")

COMMANDS = {
    "eval": Command(evaluate, ["ckpt_dir", "tokenizer_path"], {
        "the tasks": {
            "tasks": Option(str, REQUIRED, "their names, as hellaswag,arc_easy; * is any letters"),
            "include_path": Option(a_path, None, "a folder with further tasks as YAML files"),
            **HOW,
        },
        "the results": {
            "out": Option(a_path, None, "a file for all results as JSON, beside the table"),
            "samples": Option(truth, False, "each request and its answer are in --out too"),
        },
        "the model": MODEL | {"max_seq_len": LENGTH,
          "max_batch_size": Option(a_number, 4, "requests that run side by side")},
    }, ["llama-2-7b/ --tasks hellaswag,arc_easy --limit 100", ("llama-2-7b/ --tasks gsm8k --num_fewshot 5 --out "
                                                              "gsm8k.json")]),
    "perplexity": Command(measure, ["ckpt_dir", "tokenizer_path"], {
        "what is measured": {
            "file": Option(a_path, REQUIRED, "the text, as wiki.test.raw of WikiText-2"),
            "method": Option(str, REQUIRED, "also joined-N, llama.cpp-N: N tokens in a window", METHODS),
            "json": Option(truth, False, "print one JSON object in place of the text"),
        },
        "the model": MODEL | {"max_seq_len": LENGTH},
    }, [
        "llama-2-7b/ --file wiki.test.raw --method joined-2048",
        "7b.Q4_K_M.gguf --file wiki.test.raw --method llama.cpp-512",
    ]),
}  # fmt: skip
