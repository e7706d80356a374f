"""The command line: the options of the commands, in groups that they share, and how words become values."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

from ..chat_formats import FORMATS
from ..options import ALSO_CALLED as OPTIONS_ALSO_CALLED
from ..options import DEFAULTS, TOLD, parse_options
from ..system.files import user_path
from ..system.launch import Launch
from ..system.printable import shortened
from ..system.program import nearest
from .console import file_text, number, texts
from .fetching import ask_before_fetching, check_named

if TYPE_CHECKING:
    from ..generation import Llama

REQUIRED = object()  # the default of an option that has to be given
TRUTHS = {"true": True, "false": False, "1": True, "0": False, "none": None}
# A name and a value. "-5" and "- a list" are texts.
OPTION = re.compile(r"(?:--|-(?=[A-Za-z]))([^\s=]+)(?:=(.*))?", re.DOTALL)
TYPESET = {*"“”„‘’–—"}  # what an editor makes of quotes and of --, and no shell understands
HELP = ("-h", "--help")
# What other programs call our options.
ALSO_CALLED = OPTIONS_ALSO_CALLED | {
    "n_ctx": "max_seq_len", "ctx_size": "max_seq_len", "model": "ckpt_dir", "model_path": "ckpt_dir",
    "path": "ckpt_dir",
    "tokenizer": "tokenizer_path", "lora": "adapter",
    "batch_size": "max_batch_size", "precision": "dtype", "bits": "quantize", "nproc_per_node": "processes",
    "processes": "model_parallel_size", "tensor_parallel_size": "model_parallel_size", "tp": "model_parallel_size",
    "format": "to", "outtype": "to", "outfile": "dst", "output": "out", "num_shards": "shards",
}  # fmt: skip


class Option(NamedTuple):
    """An option of a command. read: turns a word into the value, ValueError if it is wrong. told: its sentence in the
    help. choices: words that a shell offers. rare: only `--help all` tells more of it than its name."""

    read: Callable[[str], Any]
    default: Any
    told: str
    choices: Sequence[str] = ()
    rare: bool = False


class Command(NamedTuple):
    """A command. work: its docstring is its help. places: the options whose names may be left out, in this order.
    groups: all options by name, under the titles that the help gives them. examples: command lines, without `llama
    NAME`."""

    work: Callable[[Namespace], None]
    places: Sequence[str]
    groups: Mapping[str, Mapping[str, Option]]
    examples: Sequence[str] = ()

    @property
    def options(self) -> dict[str, Option]:
        """The options of all groups, by name."""
        return {name: option for group in self.groups.values() for name, option in group.items()}


def truth(word: str) -> Optional[bool]:
    """True, False, or None for what is not decided."""
    if word.lower() not in TRUTHS:
        raise ValueError(f"{shortened(word)} must be True or False")
    return TRUTHS[word.lower()]


def a_number(word: str) -> Union[int, float, None]:
    """A number; None in place of it means that it is not given."""
    try:
        return None if word == "None" else number(word)
    except ValueError as error:
        raise ValueError(f"{shortened(word)} is not a number") from error


def a_path(word: str) -> str:
    """The name of a file or folder, which a shell completes."""
    return word


def a_name(word: str) -> Optional[str]:
    """A word out of a list; None in place of it means that it is not given."""
    return None if word == "None" else word


DEVICES, DTYPES, QUANTIZED = ("cuda", "mps", "cpu"), ("bf16", "fp16", "fp32", "auto"), ("int8", "int4", "w8a8", "w4a8")
MODEL = {
    "ckpt_dir": Option(a_path, None, "a folder, GGUF file or name on the hub; else the demo"),
    "tokenizer_path": Option(a_path, None, "tokenizer.model or its folder, if not beside the model"),
    "max_seq_len": Option(a_number, None, "tokens of prompt and answer; up to 2048 if not given"),
    "max_batch_size": Option(a_number, 1, "prompts that run side by side", rare=True),
    "model_parallel_size": Option(a_number, None, "processes that share one copy of the model; else all", rare=True),
    "seed": Option(a_number, 1, "seed of the draws"),
    "device": Option(a_name, None, "the first that is there if not given", DEVICES),
    "dtype": Option(a_name, None, "which is as stored", DTYPES),
    "quantize": Option(a_name, None, "rounds the matrices", QUANTIZED),
    "adapter": Option(a_path, None, "a LoRA adapter of PEFT, a folder or a name on the hub", rare=True),
    "compile": Option(truth, None, "compile the step; --nocompile takes none made before"),
    "draft": Option(a_path, None, "a smaller model, whose guesses this one verifies", rare=True),
    "chat_format": Option(a_name, None, "as the folder says if not given", (*FORMATS, "template"), rare=True),
    "batch_invariant": Option(truth, False, "no answer depends on what else runs, to the bit; slower", rare=True),
    "bind": Option(truth, False, "bind each of torchrun's processes to cores of its own", rare=True),
}
FORM = {
    "json": Option(truth, False, "each answer is a JSON object"),
    "json_schema": Option(a_path, None, "JSON of this schema, a file or {…} itself"),
    "regex": Option(str, None, "each answer matches this as a whole", rare=True),
    "choice": Option(texts, None, "each answer is one of these texts, a JSON list", rare=True),
    "grammar": Option(a_path, None, "a file with a grammar, Lark's or llama.cpp's GBNF", rare=True),
}
COMMON = ("temperature", "top_p", "max_gen_len", "stop")
ANSWERS = {
    name: Option(texts if name == "stop" else a_number, DEFAULTS[name], told, rare=name not in COMMON)
    for name, told in TOLD.items()
}


def some_of_model(*names: str) -> dict[str, Option]:
    """Options of `MODEL`, by name."""
    return {name: MODEL[name] for name in names}


def build(args: Namespace, **changed: Any) -> Llama:
    """The model that the options ask for. What `build` prints goes to stderr."""
    given = {name: getattr(args, name) for name in MODEL if name in args} | changed
    check_named(given.get("ckpt_dir"), given.get("draft"))
    from ..generation import Llama  # imports torch, so not before the command line is understood

    ask_before_fetching(*map(given.get, ("ckpt_dir", "adapter", "draft")))
    # Only on the first process: the others' stdout is switched off meanwhile, and would come back.
    with redirect_stdout(sys.stderr) if Launch.read().rank == 0 else nullcontext():
        return Llama.build(**given)


def answers(args: Namespace) -> dict[str, Any]:
    """The options of answers, checked before any work."""
    given = {name: getattr(args, name) for name in ANSWERS}
    if (constraint := _constraint(args)) is not None:
        given["constraint"] = constraint
    parse_options(given, prompts=1, vocab_size=1, max_seq_len=1)  # any size will do: none of them names ids
    return given


def _constraint(args: Namespace) -> Optional[dict[str, Any]]:
    """The option `constraint`, as one of the options of `FORM` asks for it."""
    given = {name: value for name in FORM if (value := getattr(args, name)) not in (None, False)}
    if len(given) > 1:
        raise ValueError(f"an answer has one form; give one of {', '.join(f'--{name}' for name in given)}")
    for name, value in given.items():
        if name == "json":
            return {"json_object": True}
        if name == "grammar" or (name == "json_schema" and not value.lstrip().startswith("{")):
            value = file_text(user_path(value))
        return {name: [value] if name == "choice" and isinstance(value, str) else value}
    return None


def find_command(commands: Mapping[str, Command], name: str) -> Command:
    """The command of this name. ValueError if there is none."""
    if name[:1] == "-":
        raise ValueError(f"a command comes before {shortened(name)}: {', '.join(commands)}")
    if name not in commands:
        told = f"there is no command {shortened(name)}{nearest(name, commands)}; there are {', '.join(commands)}"
        raise ValueError(told)
    return commands[name]


def understand(commands: Mapping[str, Command], words: Sequence[str]) -> Callable[[], None]:
    """What a command line asks of one of the commands, ready to run. ValueError if it is wrong. Nothing is loaded
    here."""
    name, *rest = words
    command = find_command(commands, name)
    given = _given(name, command, rest)
    lacking = [
        f"--{o}" + (f" ({', '.join(option.choices)})" if option.choices else "")
        for o, option in command.options.items()
        if option.default is REQUIRED and o not in given
    ]
    if lacking:
        raise ValueError(f"{name} needs {' and '.join(lacking)}; see llama {name} --help")
    args = Namespace(given=frozenset(given))  # by the user, at its default or not
    for option, kind in command.options.items():
        try:
            setattr(args, option, kind.read(given[option]) if option in given else kind.default)
        except ValueError as error:
            raise ValueError(f"{name}: --{option}: {error}") from error
    return lambda: command.work(args)


def _given(name: str, command: Command, words: Sequence[str]) -> dict[str, str]:
    """The word that each option was given."""
    given, loose, left = dict[str, str](), list[str](), deque(words)
    while left:
        word = left.popleft()
        if word == "--":  # only texts follow
            loose += left
            break
        if found := OPTION.fullmatch(word):
            option, value = _named(name, command.options, found)
            given[option] = _next(name, option, command.options[option], left) if value is None else value
        elif word != "-":  # stands for stdin, which is read if there is no text
            loose.append(word)
    places = [place for place in command.places if place not in given]
    if more := loose[len(places) :]:
        told = f"{name} does not take {shortened(' '.join(more))}; put a text with spaces in quotes"
        if typeset := sorted({*" ".join(loose)} & TYPESET):
            told += f", straight ones, and write - for a dash: what was typed has {' '.join(typeset)}"
        raise ValueError(f"{told}, and see llama {name} --help for the options")
    return given | dict(zip(places, loose))


def _named(name: str, options: Mapping[str, Option], found: re.Match[str]) -> tuple[str, Optional[str]]:
    """The option that a word names, and the value in it: "--top-k=5" is top_k and "5", "--noecho" is echo and
    "False"."""
    option, value = found[1].replace("-", "_"), found[2]
    denied = {form: flag for flag in options if options[flag].read is truth for form in (f"no{flag}", f"no_{flag}")}
    if option in denied and value is None:
        return denied[option], "False"
    if option not in options:
        near = nearest(option, [*options, *denied], "--", ALSO_CALLED)
        told = f"{name} does not take {shortened(found[0])}{near}; see llama {name} --help for the options"
        raise ValueError(told if near else f"{told}, and write -- before a text that begins with a dash")
    return option, value


def _next(name: str, option: str, kind: Option, left: deque[str]) -> str:
    """The value of an option that has none in its own word: the next word, or "True" for a flag."""
    follows = bool(left) and left[0] != "--" and OPTION.fullmatch(left[0]) is None
    if kind.read is truth:
        return left.popleft() if follows and left[0].lower() in ("true", "false") else "True"
    if not follows:
        raise ValueError(f"{name}: --{option} needs a value; for one that looks like an option write --{option}=VALUE")
    return left.popleft()
