"""`python -m llama …`, and the `llama` command: what can be done with a checkpoint from a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..system.program import as_a_program, fail
from . import evaluate, folders, serve, shells, terminal
from .arguments import understand
from .console import say, warnings_in_a_line
from .help import asked_help

COMMANDS = {**terminal.COMMANDS, **serve.COMMANDS, **evaluate.COMMANDS, **folders.COMMANDS}
COMMANDS |= shells.commands(COMMANDS)


def run(words: Sequence[str]) -> None:
    """Run a command line. ValueError or OSError for what it refuses."""
    if (told := asked_help(COMMANDS, words)) is not None:
        say(told)
    elif words[0] in ("--version", "-V", "version"):
        say(_version() + "\n")
    else:
        understand(COMMANDS, words)()


def main() -> None:
    """Run the command line of this process. What it refuses ends with one line and exit status 1, Ctrl-C with 130."""
    try:
        with as_a_program(), warnings_in_a_line():
            run(sys.argv[1:])
    except (ValueError, OSError) as error:
        fail(str(error), "llama")


def _version() -> str:
    from importlib.metadata import version  # tells torch's without importing it

    from .. import __version__

    return f"llama {__version__} (torch {version('torch')}, Python {sys.version.split()[0]})"
