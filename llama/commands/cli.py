"""`python -m llama …`, and the `llama` command: what can be done with a checkpoint from a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..system import peers, pipes
from ..system.launch import Launch
from . import evaluate, folders, serve, terminal
from .arguments import understand

COMMANDS = {**terminal.COMMANDS, **serve.COMMANDS, **evaluate.COMMANDS, **folders.COMMANDS}


def run(words: Sequence[str]) -> None:
    """Run a command line. ValueError or OSError for what it refuses."""
    understand(COMMANDS, words)()


def main() -> None:
    """Run the command line of this process. What it refuses ends with one line and exit status 1."""
    try:
        with pipes.as_the_shell_left_them():
            run(sys.argv[1:])
    except (ValueError, OSError) as error:
        peers.end(f"failed: {error}")
        if _is_first():  # one speaks for all
            peers.tell(f"llama: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _is_first() -> bool:
    try:
        return Launch.read().rank == 0
    except ValueError:  # torchrun's variables are what is wrong
        return True
