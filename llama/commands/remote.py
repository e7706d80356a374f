"""`chat --url` and `complete --url`: the terminal as a client of a server that speaks OpenAI's API, ours or another."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Optional, cast

from ..chat import Dialog, Message
from ..completion import Chunk
from ..saved import Turn, read_conversation
from ..system.launch import Launch, api_key
from ..system.printable import counted, escaped
from .arguments import MODEL, Option
from .client import Server, number_of
from .console import Read, note, pipe_may_close, say
from .conversation import Conversation

SERVER = {
    "url": Option(str, None, "a server of OpenAI's API, in place of a model here"),
    "api_key": Option(str, None, "its key; the variable LLAMA_API_KEY is safer", rare=True),
    "model": Option(str, None, "the model's name there; the first if not given", rare=True),
}


class RemoteChat:
    """A conversation with a server, with what `Conversation` needs of a `ChatSession`. The server remembers nothing:
    each message goes there with all that was said before."""

    def __init__(self, server: Server, system: Optional[str] = None, **options: Any) -> None:
        self.llama, self.system, self.options = server, system, options
        self.turns: list[Turn] = []

    @property
    def dialog(self) -> Dialog:
        """All that was said."""
        messages = [] if self.system is None else [Message(role="system", content=self.system)]
        for turn in self.turns:
            messages += [
                Message(role="user", content=turn["user"]),
                Message(role="assistant", content=turn["assistant"]),
            ]
        return messages

    def send(self, message: str) -> Iterator[Chunk]:
        """Say something; the chunks are the reply. If you stop iterating early, the part already read is kept."""
        dialog = [*self.dialog, Message(role="user", content=message)]
        return self._reply({"messages": dialog}, Turn(user=message, assistant=""))

    def continue_reply(self) -> Iterator[Chunk]:
        """Let the last turn's reply go on."""
        if not self.turns:
            raise ValueError("there is no reply that could go on; send() a message first")
        body = {"messages": self.dialog, "continue_final_message": True, "add_generation_prompt": False}
        return self._reply(body, self.turns[-1])

    def _reply(self, body: Mapping[str, Any], turn: Turn) -> Iterator[Chunk]:
        turns = self.turns
        with closing(cast(Any, self.llama.stream("/v1/chat/completions", self.options, body))) as chunks:
            for chunk in chunks:
                turn["assistant"] += chunk["text"]
                if not any(turn is known for known in turns):
                    turns.append(turn)
                yield chunk

    def undo(self) -> Optional[Turn]:
        """Take the last turn back, and return it."""
        return self.turns.pop() if self.turns else None

    def drop(self, turns: int = 1) -> None:
        """Forget the oldest turns."""
        del self.turns[:turns]

    def clear(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns = []

    def fork(self) -> RemoteChat:
        """Another conversation with the same past and options, to go on from here in two ways."""
        other = RemoteChat(self.llama, self.system, **self.options)
        other.turns = [Turn(user=turn["user"], assistant=turn["assistant"]) for turn in self.turns]
        return other

    def load(self, path: Path) -> None:
        """Read a conversation, as a `ChatSession` does."""
        self.system, turns = read_conversation(path)
        self.turns = [Turn(user=turn["user"], assistant=turn["assistant"]) for turn in turns]


class RemoteConversation(Conversation):
    """What can be typed into `chat --url`."""

    @property
    def limit(self) -> int:
        """The tokens that the server has room for; 0 if it does not tell."""
        return self.session.llama.limit or 0

    @property
    def context(self) -> str:
        """How much of the room the last reply and what was before it took, in words."""
        used, limit = self.session.llama.used if self.session.turns else 0, self.limit
        return f"{used} of {limit} tokens ({used / limit:.0%})" if limit else counted(used, "token")


def check(args: Namespace) -> None:
    """ValueError for options that do not go together: of a server, and of a model that runs here."""
    if args.url is None:
        if given := [name for name in SERVER if name in args.given]:
            raise ValueError(f"--{given[0]} is about a server; pass its --url, or leave it out")
        return
    local = [name for name in (*MODEL, "jsonl", "out") if name in args.given and name != "seed"]
    if local:
        raise ValueError(f"--{local[0]} is for a model that runs here; leave it out with --url, or leave out --url")
    if Launch.read().world_size > 1:
        raise ValueError("--url talks to a server, for which one process is enough; run it without torchrun")


def _server(args: Namespace, options: dict[str, Any]) -> Server:
    if "seed" in args.given:
        options["seed"] = args.seed
    return Server(args.url, args.api_key or api_key(), args.model)


def chat(args: Namespace, options: dict[str, Any], read: Optional[Read]) -> None:
    """Talk with the model of a server."""
    server = _server(args, options)
    note(f"{escaped(server.name)} at {escaped(server.url)}")
    with pipe_may_close():
        RemoteConversation(RemoteChat(server, args.system, **options)).run(read)


def complete(args: Namespace, options: dict[str, Any], text: str) -> None:
    """Continue a text by the model of a server."""
    server = _server(args, options)
    body: dict[str, Any] = {"prompt": text} if args.suffix is None else {"prompt": text, "suffix": args.suffix}
    if options["max_gen_len"] is None and (room := _room(server, text + (args.suffix or ""))):
        body["max_tokens"] = room  # the API would take 16
    with pipe_may_close(), closing(cast(Any, server.stream("/v1/completions", options, body))) as chunks:
        last = text if args.echo else ""
        say(last)
        for chunk in chunks:
            last = chunk["text"] or last
            say(chunk["text"])
        say("" if last.endswith("\n") else "\n")
    if chunk["finish_reason"] != "stop" and options["max_gen_len"] is None and "max_tokens" not in body:
        note("the server ended it at a length of its own; --max_gen_len N asks for another")


def _room(server: Server, text: str) -> int:
    """The tokens that a text leaves of the model's room; 0 if the server does not tell."""
    try:
        told = server.ask("POST", "/tokenize", {"model": server.name, "prompt": text})
    except ValueError:  # it is no part of OpenAI's API
        return 0
    return max(0, (number_of(told.get("max_model_len")) or server.limit or 0) - number_of(told.get("count")))
