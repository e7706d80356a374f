"""The model in a terminal or a pipe: a chat to type into, completions, the tokenizer's pieces, scores."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, Optional, Union

from fire.decorators import SetParseFns

from ..generation import DEMO, Llama
from ..runtime import Launch
from ..system.printable import json_line
from ..tokenizer import Tokenizer, need_tokenizer, user_path
from . import jobs
from .console import given_text, note, numbers_in, on_first, pipe_may_close, piped_lines, quoted, say, texts, typed_lines
from .conversation import COMMANDS, Conversation

Stop = Union[str, Sequence[str], None]


def chat(
    ckpt_dir: Optional[str] = None,
    tokenizer_path: Optional[str] = None,
    max_seq_len: Optional[int] = None,
    max_batch_size: int = 1,
    model_parallel_size: Optional[int] = None,
    seed: int = 1,
    device: Optional[str] = None,
    dtype: Optional[str] = None,
    quantize: Optional[str] = None,
    compile: Optional[bool] = None,
    system: Optional[str] = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_gen_len: Optional[int] = None,
    stop: Stop = None,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> None:
    """Talk with the model. /help lists the commands. Without a terminal, each line of the pipe is a message or a command.

    Ctrl-C stops a reply; where torchrun started several processes, it ends them all.
    """
    read = None
    if Launch.read().rank == 0:  # before a long load, since what it needs may be missing
        read = typed_lines(COMMANDS) if sys.stdin.isatty() else piped_lines()
    llama = _build(
        ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, model_parallel_size, seed, device, dtype, quantize, compile
    )
    session = llama.chat(
        system, temperature=temperature, top_p=top_p, max_gen_len=max_gen_len, stop=stop, top_k=top_k, min_p=min_p,
        repetition_penalty=repetition_penalty,
    )  # fmt: skip
    with pipe_may_close():
        Conversation(session).run(read)


def complete(
    prompt: Optional[str] = None,
    *,
    file: Optional[str] = None,
    jsonl: Optional[str] = None,
    out: Optional[str] = None,
    ckpt_dir: Optional[str] = None,
    tokenizer_path: Optional[str] = None,
    max_seq_len: Optional[int] = None,
    max_batch_size: Optional[int] = None,
    model_parallel_size: Optional[int] = None,
    seed: int = 1,
    device: Optional[str] = None,
    dtype: Optional[str] = None,
    quantize: Optional[str] = None,
    compile: Optional[bool] = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_gen_len: Optional[int] = None,
    stop: Stop = None,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    echo: bool = False,
) -> None:
    """Continue a PROMPT, the text of a --file or of a pipe (less its last line end); or all lines of a --jsonl file.

    Lines are {"prompt": "…"} or {"messages": […]}, with "id", "seed", "max_gen_len", "stop" and other options as wanted.
    Results go to --out, a line each, in order. If that is there already, what it has is checked and not done again.
    seed: of the draws; line n of a jsonl file draws with seed + n. max_batch_size: 4 for a jsonl file, otherwise 1.
    """
    options: dict[str, Any] = {
        "temperature": temperature, "top_p": top_p, "max_gen_len": max_gen_len, "stop": stop, "top_k": top_k, "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }  # fmt: skip
    size = (1 if jsonl is None else 4) if max_batch_size is None else max_batch_size

    def build() -> Llama:
        return _build(ckpt_dir, tokenizer_path, max_seq_len, size, model_parallel_size, seed, device, dtype, quantize, compile)

    if jsonl is not None:
        if prompt is not None or file is not None or echo:
            raise ValueError("--jsonl brings its own prompts; leave out the prompt, --file and --echo")
        _complete_lines(build, user_path(jsonl), None if out is None else user_path(out), options, seed)
        return
    if out is not None:
        raise ValueError(f"--out {out} is for --jsonl; the text of one completion goes to stdout")
    text = given_text(prompt, file, "prompt")
    llama = build()
    with pipe_may_close():
        # Every process has to have the text, which only the first could read.
        chunks = llama.stream_text([on_first(lambda: text)], echo=echo, **options)
        last = ""
        for chunk in chunks:
            last = chunk["text"] or last
            say(chunk["text"])
        say("" if last.endswith("\n") else "\n")


def tokenize(
    text: Optional[str] = None,
    *,
    file: Optional[str] = None,
    ids: Union[str, Sequence[int], None] = None,
    ckpt_dir: Optional[str] = None,
    tokenizer_path: Optional[str] = None,
    bos: bool = True,
    eos: bool = False,
    json: bool = False,
) -> None:
    """Show the ids and pieces of a TEXT, of a --file or of a pipe; or the text of --ids 1,306,4658. Loads no model."""
    folder = DEMO if ckpt_dir is None else user_path(ckpt_dir)
    tokenizer = Tokenizer(str(need_tokenizer(folder, tokenizer_path)))
    if ids is not None:
        if text is not None or file is not None:
            raise ValueError("give a text or --ids, not both")
        numbers = numbers_in(ids)
        decoded = tokenizer.decode(numbers)  # checks them
        pieces = [tokenizer.sp_model.IdToPiece(i) for i in numbers]
    else:
        text = given_text(text, file, "text")
        numbers = tokenizer.encode(text, bos, eos)
        # As they stand in the text, where IdToPiece would say <unk>.
        inner = tokenizer.sp_model.EncodeAsPieces(text)
        pieces = ["<s>"] * bos + inner + ["</s>"] * eos
        decoded = tokenizer.decode(numbers)
    with pipe_may_close():
        if json:
            say(json_line({"ids": numbers, "pieces": pieces, "text": decoded}) + "\n")
            return
        say("".join(f"{i:6}  {quoted(piece)}\n" for i, piece in zip(numbers, pieces)))
        say(f"{len(numbers)} ids: {' '.join(map(str, numbers))}\n")
        if decoded != text:
            say(f"they decode to {quoted(decoded, quotes=True)}\n")


def score(
    text: Optional[str] = None,
    *,
    file: Optional[str] = None,
    stride: Optional[int] = None,
    json: bool = False,
    ckpt_dir: Optional[str] = None,
    tokenizer_path: Optional[str] = None,
    max_seq_len: Optional[int] = None,
    max_batch_size: int = 1,
    model_parallel_size: Optional[int] = None,
    seed: int = 1,
    device: Optional[str] = None,
    dtype: Optional[str] = None,
    quantize: Optional[str] = None,
    compile: Optional[bool] = None,
) -> None:
    """Show how probable the model finds each token of a TEXT, of a --file or of a pipe, and the whole text's perplexity.

    stride: between the windows in which a text longer than max_seq_len is read. json: one object in place of the table.
    """
    given = given_text(text, file, "text")
    llama = _build(
        ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, model_parallel_size, seed, device, dtype, quantize, compile
    )
    result = llama.score([on_first(lambda: given)], stride=stride)[0]
    nothing = math.isnan(result["perplexity"])
    with pipe_may_close():
        if json:
            say(json_line({**result, "perplexity": None if nothing else result["perplexity"]}) + "\n")
            return
        say("    ln p        p  token\n")
        for token, logprob in list(zip(result["tokens"], result["logprobs"]))[1:]:
            say(f"{logprob:8.3f} {math.exp(logprob):7.2%}  {quoted(token, quotes=True)}\n")
        count = len(result["tokens"]) - 1
        say("no tokens\n" if nothing else f"perplexity {result['perplexity']:.4g} over {count} token{'s' * (count != 1)}\n")


def _complete_lines(build: Callable[[], Llama], source: Path, out: Optional[Path], options: dict[str, Any], seed: int) -> None:
    todo: list[jobs.Job] = []
    done, file = 0, None
    with pipe_may_close(), ExitStack() as opened:
        if Launch.read().rank == 0:  # before a long load; the others are told after it
            if out is not None and out.exists() and out.samefile(source):
                raise ValueError(f"--out {out} is the input itself; name another file")
            todo = jobs.read_jobs(source, options, seed)
            if out is None:
                file = sys.stdout.buffer
            else:
                done, size = jobs.finished(out, todo)
                file = opened.enter_context(jobs.open_output(out, size))
        llama = build()
        todo, done = on_first(lambda: (todo, done))
        jobs.check_jobs(llama, todo, source)
        try:
            jobs.write(jobs.run(llama, todo[done:]), len(todo), done, file)
        except KeyboardInterrupt:
            note("stopped" if out is None else f"stopped; the same command goes on behind what {out} has")
            raise SystemExit(130) from None


def _build(
    ckpt_dir: Optional[str],
    tokenizer_path: Optional[str],
    max_seq_len: Optional[int],
    max_batch_size: int,
    model_parallel_size: Optional[int],
    seed: int,
    device: Optional[str],
    dtype: Optional[str],
    quantize: Optional[str],
    compile: Optional[bool],
) -> Llama:
    # Only on the first process: the others' stdout is switched off meanwhile, and would come back.
    with redirect_stdout(sys.stderr) if Launch.read().rank == 0 else nullcontext():
        return Llama.build(
            ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, model_parallel_size, seed,
            device=device, dtype=dtype, quantize=quantize, compile=compile,
        )  # fmt: skip


# What is text stays text, where fire would make a number of 42 and a tuple of 1,2.
SetParseFns(system=str, stop=texts)(chat)
SetParseFns(prompt=str, file=str, jsonl=str, out=str, stop=texts)(complete)
SetParseFns(text=str, file=str, ids=str)(tokenize)
SetParseFns(text=str, file=str)(score)
