"""The command line: the options of the commands, in groups that they share, and how words become values."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Optional, Union

from ..chat_formats import FORMATS
from ..options import DEFAULTS, TOLD, parse_options
from ..system.files import user_path
from ..system.launch import Launch
from ..system.printable import shortened
from .console import file_text, number, texts
from .fetching import ask_before_fetching

if TYPE_CHECKING:
    from ..generation import Llama

REQUIRED = object()  # the default of an option that has to be given
TRUTHS = {"true": True, "false": False, "1": True, "0": False, "none": None}
# A name and a value. "-5" and "- a list" are texts.
OPTION = re.compile(r"(?:--|-(?=[A-Za-z]))([^\s=]+)(?:=(.*))?", re.DOTALL)


class Option(NamedTuple):
    """An option of a command. read: turns a word into the value; a flag, which needs no word, has `truth`. told: its line in
    the help."""

    read: Callable[[str], Any]
    default: Any
    told: str


class Command(NamedTuple):
    """A command. work: its docstring is its help. places: the options whose names may be left out, in this order. groups: all
    options by name, under the titles that the help gives them."""

    work: Callable[[Namespace], None]
    places: Sequence[str]
    groups: Mapping[str, Mapping[str, Option]]

    @property
    def options(self) -> dict[str, Option]:
        """The options of all groups, by name."""
        return {name: option for group in self.groups.values() for name, option in group.items()}


def truth(word: str) -> Optional[bool]:
    """True, False, or None for what is not decided."""
    if word.lower() not in TRUTHS:
        raise ArgumentTypeError(f"{shortened(word)} must be True or False")
    return TRUTHS[word.lower()]


def a_number(word: str) -> Union[int, float, None]:
    """A number; None in place of it means that it is not given."""
    try:
        return None if word == "None" else number(word)
    except ValueError as error:
        raise ArgumentTypeError(f"{shortened(word)} is not a number") from error


def a_name(word: str) -> Optional[str]:
    """A word out of a list; None in place of it means that it is not given."""
    return None if word == "None" else word


MODEL = {
    "ckpt_dir": Option(
        str, None, "the checkpoint's folder, a GGUF file, or org/name[@revision] on the hub; the demo model if not given"
    ),
    "tokenizer_path": Option(str, None, "its tokenizer.model; the one in that folder or in the folder above if not given"),
    "max_seq_len": Option(
        a_number,
        None,
        "tokens of a prompt and its answer that there is room for; if not given 2048, or fewer if the folder says so",
    ),
    "max_batch_size": Option(a_number, 1, "prompts that run side by side"),
    "model_parallel_size": Option(a_number, None, "processes that share one copy of the model; all if not given"),
    "seed": Option(a_number, 1, "seed of the draws"),
    "device": Option(a_name, None, "cuda, mps or cpu; the first of these that is there if not given"),
    "dtype": Option(a_name, None, "float32, bfloat16 or float16; the checkpoint's own if not given"),
    "quantize": Option(a_name, None, "int8 or int4 rounds the matrices while they are loaded; as stored if not given"),
    "adapter": Option(a_name, None, "a LoRA adapter of PEFT (a folder or a name), which is added to the checkpoint's weights"),
    "compile": Option(truth, None, "compile the decode step; if not given, one that was compiled before is used"),
    "draft": Option(
        a_name, None, "a smaller model of the same tokenizer (a folder or a name), whose guesses the model verifies"
    ),
    "chat_format": Option(
        a_name,
        None,
        f"how dialogs are written: {', '.join(FORMATS)}, template (the folder's own); as the folder says if not given",
    ),
    "batch_invariant": Option(truth, False, "let no answer depend on what else runs, to the bit; costs speed"),
}
FORM = {
    "json": Option(truth, False, "each answer is a JSON object"),
    "json_schema": Option(str, None, "each answer is JSON of this schema: a file with it, or {…} itself"),
    "regex": Option(str, None, "each answer matches this regular expression, as a whole"),
    "choice": Option(texts, None, "each answer is one of these texts, a JSON list"),
    "grammar": Option(str, None, "a file with a grammar for each answer, in Lark's notation or llama.cpp's GBNF"),
}
ANSWERS = {name: Option(texts if name == "stop" else a_number, DEFAULTS[name], told) for name, told in TOLD.items()}


def some_of_model(*names: str) -> dict[str, Option]:
    """Options of `MODEL`, by name."""
    return {name: MODEL[name] for name in names}


def build(args: Namespace, **changed: Any) -> Llama:
    """The model that the options ask for. What `build` prints goes to stderr."""
    from ..generation import Llama  # imports torch, so not before the command line is understood

    given = {name: getattr(args, name) for name in MODEL if name in args} | changed
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


class Parser(ArgumentParser):
    """An ArgumentParser that raises ValueError, and leaves it to `main` to print it."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print before it ends the process."""
        raise ValueError(f"{self.prog.split()[-1]}: {message}")


def understand(commands: Mapping[str, Command], words: Sequence[str]) -> Callable[[], None]:
    """What a command line asks for, ready to run. ValueError if it is wrong. Nothing is loaded here."""
    whole = Parser(prog="llama", allow_abbrev=False, description="What can be done with a checkpoint from a terminal.")
    several = whole.add_subparsers(metavar="COMMAND", title="commands (llama COMMAND --help shows the options of one)")
    name, *rest = words or ["--help"]
    parsers = {name: _add_parser(several, name, command) for name, command in commands.items()}
    if name in ("-h", "--help"):
        return whole.print_help
    if name not in commands:
        raise ValueError(f"there is no command {shortened(name)}{_nearest(name, commands)}; there are {', '.join(commands)}")
    given = _given(name, commands[name], rest)
    if given is None:
        return parsers[name].print_help
    # One word for an option and its value, so that a value may begin with a dash.
    args = parsers[name].parse_args([f"--{option}={value}" for option, value in given.items()])
    args.given = frozenset(given)  # by the user, at its default or not
    return lambda: commands[name].work(args)


def _add_parser(several: Any, name: str, command: Command) -> ArgumentParser:
    told = " ".join((command.work.__doc__ or "").split())
    places = " ".join(p.upper() if command.options[p].default is REQUIRED else f"[{p.upper()}]" for p in command.places)
    usage = f"llama {name} {places} [--OPTION VALUE …]"
    parser: ArgumentParser = several.add_parser(
        name, allow_abbrev=False, usage=usage, help=told.partition(". ")[0].rstrip("."), description=told
    )
    for title, options in command.groups.items():
        group = parser.add_argument_group(title)
        for option, (read, default, line) in options.items():
            form: dict[str, Any] = {"nargs": "?", "metavar": "True|False"} if read is truth else {}
            if default is REQUIRED:
                form |= {"required": True}
            elif default is not None:
                line += f" (default: {default})"
                form |= {"default": default}
            group.add_argument(f"--{option}", type=read, help=line, **form)
    return parser


def _given(name: str, command: Command, words: Sequence[str]) -> Optional[dict[str, str]]:
    """The word that each option was given, or None if help is asked for."""
    given, loose, left = dict[str, str](), list[str](), deque(words)
    while left:
        word = left.popleft()
        if word == "--":  # only texts follow
            loose += left
            break
        if word in ("-h", "--help"):
            return None
        if found := OPTION.fullmatch(word):
            option, value = _named(name, command.options, found)
            given[option] = _next(name, option, command.options[option], left) if value is None else value
        elif word != "-":  # stands for stdin, which is read if there is no text
            loose.append(word)
    places = [place for place in command.places if place not in given]
    if more := loose[len(places) :]:
        told = f"{name} does not take {shortened(' '.join(more))}; put a text with spaces in quotes"
        raise ValueError(f"{told}, and see llama {name} --help for the options")
    return given | dict(zip(places, loose))


def _named(name: str, options: Mapping[str, Option], found: re.Match[str]) -> tuple[str, Optional[str]]:
    """The option that a word names, and the value in it: "--top-k=5" is top_k and "5", "--noecho" is echo and "False"."""
    option, value = found[1].replace("-", "_"), found[2]
    denied = {form: flag for flag in options if options[flag].read is truth for form in (f"no{flag}", f"no_{flag}")}
    if option in denied and value is None:
        return denied[option], "False"
    if option not in options:
        told = (
            f"{name} does not take {shortened(found[0])}{_nearest(option, [*options, *denied], '--')}; see llama {name} --help"
        )
        raise ValueError(f"{told} for the options, and write -- before a text that begins with a dash")
    return option, value


def _next(name: str, option: str, kind: Option, left: deque[str]) -> str:
    """The value of an option that has none in its own word: the next word, or "True" for a flag."""
    follows = bool(left) and left[0] != "--" and OPTION.fullmatch(left[0]) is None
    if kind.read is truth:
        return left.popleft() if follows and left[0].lower() in ("true", "false") else "True"
    if not follows:
        raise ValueError(f"{name}: --{option} needs a value; for one that looks like an option write --{option}=VALUE")
    return left.popleft()


def _nearest(name: str, names: Collection[str], dashes: str = "") -> str:
    near = [known for known in names if known.startswith(name)] or get_close_matches(name, names)
    return f" (did you mean {dashes}{near[0]}?)" if near else ""
