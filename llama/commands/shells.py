"""The command completion: what a shell needs to complete commands, options and their choices, out of the commands'
tables."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping

from .arguments import REQUIRED, Command, Option, a_name, a_path, truth
from .console import say
from .help import sentence, summary

Commands = Mapping[str, Command]


def commands(others: Commands) -> dict[str, Command]:
    """The command `completion`, which knows the other ones."""
    known = dict(others)

    def completion(args: Namespace) -> None:
        """Print a script that lets a SHELL complete commands and options."""
        if args.shell not in SHELLS:
            raise ValueError(f"completion: there is none for {args.shell!r}; the shells are {', '.join(SHELLS)}")
        say("\n".join(SHELLS[args.shell](known)) + "\n")

    shell = Option(a_name, REQUIRED, "the shell that reads it", tuple(SHELLS))
    examples = ("bash >> ~/.bashrc", "fish > ~/.config/fish/completions/llama.fish")
    known["completion"] = Command(completion, ["shell"], {"what is printed": {"shell": shell}}, examples)
    return {"completion": known["completion"]}


def _bash(known: Commands) -> Iterator[str]:
    yield """# Completion of the command llama for bash: put this into ~/.bashrc.
_llama() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} options= words=
    [[ $word == "=" ]] && word=
    [[ $before == "=" ]] && before=${COMP_WORDS[COMP_CWORD-2]}"""
    yield f"    (( COMP_CWORD == 1 )) && words='{' '.join(known)} --help --version'"
    yield "    case ${COMP_WORDS[1]} in"
    for name, command in known.items():
        yield f"        {name}) options='{' '.join(f'--{o}' for o in command.options)} --help' ;;"
    yield "    esac"
    yield '    case "${COMP_WORDS[1]} $before" in'
    for name, command in known.items():
        if first := _first(command).choices:
            yield f"        '{name} {name}') words='{' '.join(first)}' ;;"
        for option, kind in command.options.items():
            if kind.choices:
                yield f"        '{name} --{option}') words='{' '.join(kind.choices)}' ;;"
        others = [o for o, kind in command.options.items() if not kind.choices and kind.read not in (truth, a_path)]
        if others:
            yield f"        {'|'.join(_quoted(f'{name} --{option}') for option in others)}) return ;;"
    yield """    esac
    if [[ $words ]]; then
        COMPREPLY=($(compgen -W "$words" -- "$word"))
    elif [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$word"))
    else
        local IFS=$'\\n'
        compopt -o filenames 2>/dev/null
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}
complete -F _llama llama"""


def _zsh(known: Commands) -> Iterator[str]:
    yield (
        "#compdef llama\n# Completion of the command llama for zsh: put this into ~/.zshrc, behind "
        "compinit.\n_llama() {"
    )
    yield "    if (( CURRENT == 2 )); then"
    yield "        local -a known=("
    yield from (f"            {_quoted(f'{name}:{summary(command)}')}" for name, command in known.items())
    yield "        )\n        _describe command known\n        return\n    fi"
    yield "    local name=$words[2]\n    shift words\n    (( CURRENT-- ))\n    case $name in"
    for name, command in known.items():
        yield f"        {name}) _arguments \\"
        for option, kind in command.options.items():
            told = sentence(kind).replace("[", "(").replace("]", ")").replace(":", "\\:")
            value = "" if kind.read is truth else f":{option}:{_zsh_value(kind)}"
            yield f"            {_quoted(f'--{option}[{told}]{value}')} \\"
        yield f"            {_quoted(f'*:{command.places[0]}:{_zsh_value(_first(command))}')} ;;"
    yield "    esac\n}\ncompdef _llama llama"


def _zsh_value(kind: Option) -> str:
    return f"({' '.join(kind.choices)})" if kind.choices else "_files" if kind.read is a_path else " "


def _fish(known: Commands) -> Iterator[str]:
    yield "# Completion of the command llama for fish: put this into ~/.config/fish/completions/llama.fish."
    for name, command in known.items():
        yield f"complete -c llama -f -n __fish_use_subcommand -a {name} -d {_quoted(summary(command))}"
        here = f"complete -c llama -n '__fish_seen_subcommand_from {name}'"
        if first := _first(command).choices:
            yield f"{here} -f -a {_quoted(' '.join(first))}"
        for option, kind in command.options.items():
            value = "" if kind.read is truth else " -r -F" if kind.read is a_path else " -x"
            choices = f" -a {_quoted(' '.join(kind.choices))}" if kind.choices else ""
            yield f"{here} -l {option}{value}{choices} -d {_quoted(sentence(kind))}"


def _first(command: Command) -> Option:
    """The option whose name is left out most."""
    return command.options[command.places[0]]


def _quoted(text: str) -> str:
    """A word of these shells."""
    return "'" + text.replace("'", "'\\''") + "'"


SHELLS: dict[str, Callable[[Commands], Iterator[str]]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
