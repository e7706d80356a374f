"""What a user names at the terminal: paths, which are checked early, and names on the Hugging Face Hub, which are asked
about before a download. And the command pull."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Optional

from ..system.files import is_there, user_path
from ..system.launch import Launch
from ..system.printable import counted, escaped, gigabytes
from ..weights import hub
from ..weights.places import check_place
from .console import note, pipe_may_close, say


def agreed_folder(given: str) -> Path:
    """The folder of a path or a name, which is fetched if the user agrees."""
    ask_before_fetching(given)
    return hub.locate(given, user_path(given))


def check_named(*given: Optional[str]) -> None:
    """ValueError for a path at which no model can be. Commands ask this before they import torch, which takes
    seconds; names on the hub are looked up later."""
    for text in [text for text in given if text is not None]:
        path = user_path(text)
        if is_there(path) or hub.parse(str(text)) is None:
            check_place(path)


def named_places(given: str, args: Namespace) -> tuple[Path, Optional[Path], Optional[Path]]:
    """The folders of a checkpoint and of its adapter, and the file of its tokenizer, as far as they were named."""
    adapter = None if args.adapter is None else agreed_folder(args.adapter)
    return agreed_folder(given), adapter, None if args.tokenizer_path is None else user_path(args.tokenizer_path)


def ask_before_fetching(*given: Optional[str]) -> None:
    """Ask a user at a terminal whether to fetch what the hub's cache lacks of these. ValueError if the answer is no."""
    if Launch.read().rank > 0 or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return
    for text in given:
        name = None if text is None else hub.absent(str(text), user_path(text))
        if name is None:
            continue
        listing = hub.look_up(name)
        print(f"{_told(listing)}\nfetch it? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise ValueError(f"{name} was not fetched; pass the path of a folder that is here")


def _told(listing: hub.Listing) -> str:
    what = f"{listing.name}: {gigabytes(listing.nbytes)} of {counted(len(listing.files), 'file')} to fetch"
    return f"{what} into {escaped(str(listing.cache))}, where {gigabytes(listing.free)} are free"


def pull(args: Namespace) -> None:
    """Fetch a model from the Hugging Face Hub, or what changed of it.

    The folder or file that it lies in goes to stdout. An interrupted pull goes on with the files that it lacks when it
    is run again.
    """
    name = hub.parse(args.id)
    if name is None:
        raise ValueError(
            f"{escaped(args.id)} is no name on the hub; one looks like org/name, org/name@revision or org/name:Q4_K_M"
        )
    if Launch.read().local_rank > 0:
        return  # one process fetches for all of a node
    listing = hub.look_up(name)
    note(_told(listing))
    folder = hub.fetch(listing)
    with pipe_may_close():
        say(f"{folder}\n")
    note(f"python -m llama chat --ckpt_dir {folder if is_there(user_path(args.id)) else name}")
