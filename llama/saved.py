"""Conversations in files: as a list of messages, which other tools read, or as a session with its ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional, TypedDict

from .chat import Dialog, DialogError, check_dialog, check_messages
from .system.files import parse_json, read_file, replace_file
from .system.printable import escaped, json_line

MOST_BYTES = 2**26  # largest session file that is read


class _Said(TypedDict):
    user: str
    assistant: str


class Turn(_Said, total=False):
    """What the user said and the assistant answered, and the ids that the two are to the model, up to the reply's
    end."""

    ids: list[int]


def turns_of(dialog: Dialog) -> tuple[Optional[str], list[Turn]]:
    """The system message and the turns of what was said, up to a reply."""
    check_messages(dialog)
    texts = [message["content"] for message in dialog]
    system = texts.pop(0) if dialog and dialog[0]["role"] == "system" else None
    if texts and dialog[-1]["role"] == "user":
        raise DialogError("what was said before ends with a reply; leave the last message out, and send() it")
    if texts:
        check_dialog(dialog, begun=True)
    return system, [Turn(user=user, assistant=assistant) for user, assistant in zip(texts[0::2], texts[1::2])]


def write_messages(path: Path, dialog: Dialog) -> None:
    """Write a dialog as a JSON list of messages, one a line."""
    replace_file(path, ("[\n" + ",\n".join(map(json_line, dialog)) + "\n]\n").encode())


def read_conversation(path: Path) -> tuple[Optional[str], list[Turn]]:
    """The system message and the turns of a file: a list of messages, {"messages": such a list}, or what a session's
    `save` wrote, whose turns may have ids. ValueError if it is something else."""
    try:
        data = read_file(path, MOST_BYTES, "a session has some thousands")
    except ValueError as error:
        raise ValueError(f"no saved session at {path}: {error}") from error
    with saved_by(path):
        state = parse_json(data)
        messages = state.get("messages") if isinstance(state, dict) else state
        if messages:
            return turns_of(messages)
        system, turns = state["system"], state["turns"]
        if not isinstance(system, (str, type(None))) or not isinstance(turns, list):
            raise TypeError("system must be a text or null, and turns a list")
        if not all(isinstance(turn[who], str) for turn in turns for who in ("user", "assistant")):
            raise TypeError("what was said must be texts")
        return system, turns


@contextmanager
def saved_by(path: Path) -> Iterator[None]:
    """A block that works on what a file says: its ValueErrors name the file."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a saved session; `save` writes one ({escaped(str(error))})") from error
