"""The model in a terminal or a pipe: a chat to type into, completions, the tokenizer's pieces, scores."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from contextlib import ExitStack, suppress
from typing import Any

from ..system.checks import whole_number
from ..system.files import user_path
from ..system.launch import Launch
from ..system.printable import counted, json_line
from ..tokenizer_files import open_tokenizer
from ..weights.places import DEMO
from . import conversation, jobs, remote
from .arguments import ANSWERS, FORM, MODEL, Command, Option, a_number, a_path, answers, build, some_of_model, truth
from .console import given_text, note, numbers_in, on_first, pipe_may_close, piped_lines, quoted, say
from .fetching import agreed_folder
from .keyboard import typed_lines


def chat(args: Namespace) -> None:
    """Talk with the model, here or at the --url of a server. /help lists the commands. Without a terminal, each line of
    the pipe is a message or a command.

    Ctrl-C stops a reply; if torchrun started several processes, it ends them all.
    """
    remote.check(args)
    options, read = answers(args), None
    if Launch.read().rank == 0:  # before a long load: prompt_toolkit may be missing
        read = typed_lines(conversation.COMMANDS) if sys.stdin.isatty() else piped_lines()
    if args.url is not None:
        remote.chat(args, options, read)
        return
    session = build(args).chat(args.system, **options)
    with pipe_may_close():
        conversation.Conversation(session).run(read)


def complete(args: Namespace) -> None:
    """Continue a PROMPT, or all lines of a --jsonl file. The prompt may also be a --file or a pipe, less its last line
    end.

    Lines are {"prompt": "…"} or {"messages": […]}, with "id", "seed", "stop" and other options as wanted. Results go to
    --out, a line each, in order. If that is there already, what it has is checked and not done again.
    """
    remote.check(args)
    options = answers(args)
    if args.jsonl is not None:
        if args.prompt is not None or args.file is not None or args.suffix is not None or args.echo:
            raise ValueError("--jsonl brings its own prompts; leave out the prompt, --file, --suffix and --echo")
        _complete_lines(args, options)
        return
    if args.out is not None:
        raise ValueError(f"--out {args.out} is for --jsonl; the text of one completion goes to stdout")
    if args.suffix is not None and args.echo:
        raise ValueError("--echo shows a prompt before its continuation; leave it out with --suffix")
    text = given_text(args.prompt, args.file, "prompt")
    if args.url is not None:
        remote.complete(args, options, text)
        return
    llama = build(args, max_batch_size=1 if args.max_batch_size is None else args.max_batch_size)
    with pipe_may_close():
        # Every process needs the text; only the first could read it.
        last, prompts = "", [on_first(lambda: text)]
        if args.suffix is None:
            chunks = llama.stream_text(prompts, echo=args.echo, **options)
        else:
            chunks = llama.stream_infill(prompts, [args.suffix], **options)
        for chunk in chunks:
            last = chunk["text"] or last
            say(chunk["text"])
        say("" if last.endswith("\n") else "\n")


def _complete_lines(args: Namespace, options: dict[str, Any]) -> None:
    source, out = user_path(args.jsonl), None if args.out is None else user_path(args.out)
    todo: list[jobs.Job] = []
    done, file = 0, None
    with pipe_may_close(), ExitStack() as opened:
        if Launch.read().rank == 0:  # before a long load; the others run its steps
            if out is not None and out.exists() and out.samefile(source):
                raise ValueError(f"--out {out} is the input itself; name another file")
            todo = jobs.read_jobs(source, options, args.seed)
            if out is None:
                file = sys.stdout.buffer
            else:
                done, size = jobs.finished(out, todo)
                file = opened.enter_context(jobs.open_output(out, size))
        llama = build(args, max_batch_size=4 if args.max_batch_size is None else args.max_batch_size)

        def work() -> None:
            jobs.check_jobs(llama, todo, source)
            assert file is not None
            try:
                jobs.write(jobs.run(llama, todo[done:]), len(todo), done, file)
            except OSError as error:
                if out is None:
                    raise
                with suppress(OSError):  # it would try to write the same again
                    file.close()
                told = f"{out} cannot be written: {error.strerror}"
                raise ValueError(f"{told}; the same command goes on behind what it has") from error

        try:
            llama.lead(work)
        except KeyboardInterrupt:
            note("stopped" if out is None else f"stopped; the same command goes on behind what {out} has")
            raise SystemExit(130) from None


def tokenize(args: Namespace) -> None:
    """Show the ids and pieces of a TEXT, or the text of --ids. The text may also be a --file or a pipe. Loads no
    model."""
    folder = DEMO if args.ckpt_dir is None else agreed_folder(args.ckpt_dir)
    tokenizer = open_tokenizer(folder, args.tokenizer_path)
    text = args.text
    if args.ids is not None:
        if text is not None or args.file is not None:
            raise ValueError("give a text or --ids, not both")
        numbers = numbers_in(args.ids)
        decoded = tokenizer.decode(numbers)  # raises for ids that are not there
        pieces = [tokenizer.piece(i) for i in numbers]
    else:
        text = given_text(text, args.file, "text")
        numbers = tokenizer.encode(text, args.bos, args.eos)
        # Pieces as the text has them; IdToPiece would give <unk> for those that the vocabulary lacks.
        inner = tokenizer.sp_model.EncodeAsPieces(text)
        pieces = ["<s>"] * args.bos + inner + ["</s>"] * args.eos
        decoded = tokenizer.decode(numbers)
    with pipe_may_close():
        if args.json:
            say(json_line({"ids": numbers, "pieces": pieces, "text": decoded}) + "\n")
            return
        say("".join(f"{i:6}  {quoted(piece)}\n" for i, piece in zip(numbers, pieces)))
        say(f"{len(numbers)} ids: {' '.join(map(str, numbers))}\n")
        if decoded != text:
            say(f"they decode to {quoted(decoded, quotes=True)}\n")


def score(args: Namespace) -> None:
    """Show how probable each token of a TEXT is, and its perplexity. The text may also be a --file or a pipe."""
    if args.stride is not None:
        whole_number("stride", args.stride, 1)
    text = given_text(args.text, args.file, "text")
    result = build(args).score([on_first(lambda: text)], stride=args.stride)[0]
    nothing = math.isnan(result["perplexity"])
    with pipe_may_close():
        if args.json:
            say(json_line({**result, "perplexity": None if nothing else result["perplexity"]}) + "\n")
            return
        say("    ln p        p  token\n")
        for token, logprob in list(zip(result["tokens"], result["logprobs"]))[1:]:
            say(f"{logprob:8.3f} {math.exp(logprob):7.2%}  {quoted(token, quotes=True)}\n")
        count = len(result["tokens"]) - 1
        say("no tokens\n" if nothing else f"perplexity {result['perplexity']:.4g} over {counted(count, 'token')}\n")


FILE = Option(a_path, None, "a file with the text; - is the pipe")
JSON = Option(truth, False, "print one JSON object in place of a table")
TEXT = Option(str, None, "the text")

COMMANDS = {
    "chat": Command(chat, ["ckpt_dir", "tokenizer_path"], {
        "the talk": {"system": Option(str, None, "the system message; none if not given")},
        "the replies": ANSWERS,
        "their form": FORM,
        "a server": remote.SERVER,
        "the model": MODEL,
    }, ["llama-2-7b-chat/ --temperature 0.8", "--url http://127.0.0.1:8000 --system 'Answer in one sentence.'"]),
    "complete": Command(complete, ["prompt"], {
        "what is continued": {
            "prompt": Option(str, None, "the text"),
            "file": FILE,
            "suffix": Option(str, None, "what follows: write what stands between (Code Llama)"),
            "jsonl": Option(a_path, None, "a file with a prompt on each line, as JSON"),
            "out": Option(a_path, None, "the file for their results; stdout if not given"),
            "echo": Option(truth, False, "show the prompt before its continuation"),
        },
        "the answers": ANSWERS,
        "their form": FORM,
        "a server": remote.SERVER,
        "the model": MODEL | {
            "max_batch_size": Option(a_number, None, "prompts side by side; else 4 with --jsonl, 1 without"),
            "seed": Option(a_number, 1, "seed of the draws; seed + n for line n"),
        },
    }, ["'Once upon a time' --max_gen_len 50", "--ckpt_dir llama-2-7b/ --jsonl prompts.jsonl --out out.jsonl"]),
    "tokenize": Command(tokenize, ["text"], {
        "what is shown": {
            "text": TEXT,
            "file": FILE,
            "ids": Option(str, None, "ids in place of a text, as 1,306,4658"),
            "bos": Option(truth, True, "put the id of the text's begin in front; --nobos leaves it out"),
            "eos": Option(truth, False, "put the id of the text's end behind"),
            "json": JSON,
        },
        "the tokenizer": some_of_model("ckpt_dir", "tokenizer_path"),
    }, ["'Once upon a time'", "--ids 1,306,4658 --ckpt_dir llama-2-7b/"]),
    "score": Command(score, ["text"], {
        "what is shown": {
            "text": TEXT,
            "file": FILE,
            "stride": Option(a_number, None, "tokens between the windows that a long text is read in"),
            "json": JSON,
        },
        "the model": MODEL,
    }, ["'Once upon a time, there was a girl.'", "--file book.txt --stride 1024 --ckpt_dir llama-2-7b/"]),
}  # fmt: skip
