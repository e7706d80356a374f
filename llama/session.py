"""A conversation that remembers: what was said, and what of it the cache holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, TypedDict, Union

from .chat import SPECIAL_TAGS, UNSAFE_ERROR, Dialog, DialogError, Message, encode_dialog
from .completion import Chunk
from .files import read_file

if TYPE_CHECKING:
    from .generation import Llama


class Turn(TypedDict):
    """What the user said and the assistant answered; `ids` are the turn's own, with the reply as it was generated."""

    user: str
    assistant: str
    ids: list[int]


class ContextFull(ValueError):
    """A message does not fit behind what was said before. `drop` says how many of the oldest turns must go."""

    def __init__(self, message: str, drop: int) -> None:
        super().__init__(message)
        self.drop = drop


class ChatSession:
    """A dialog with the model, a turn at a time.

    >>> chat = llama.chat(system="Answer in one sentence.")
    >>> for chunk in chat.send("Who wrote Hamlet?"):
    ...     print(chunk["text"], end="", flush=True)

    options: temperature, top_p, max_gen_len and those of `Options`, for every turn; `send` may override them. Each turn
    runs only its own ids: those of the turns before are in the cache, unless something else ran in between. The reply's
    ids are kept as they were generated, not made again from its text.
    """

    def __init__(self, llama: Llama, system: Optional[str] = None, **options: Any) -> None:
        self.llama, self.options = llama, options
        self.system = system
        self.turns: list[Turn] = []

    @property
    def system(self) -> Optional[str]:
        return self._system

    @system.setter
    def system(self, text: Optional[str]) -> None:
        """Takes effect in the first turn, so it can be changed only while there is none."""
        if getattr(self, "turns", []):
            raise ValueError("the system message belongs to the first turn; clear() the session before changing it")
        self._check("" if text is None else text)
        self._system = text

    @property
    def dialog(self) -> Dialog:
        """All that was said, as `chat_completion` takes it."""
        messages = [Message(role="system", content=self.system)] if self.system is not None else []
        for turn in self.turns:
            messages.append(Message(role="user", content=turn["user"]))
            messages.append(Message(role="assistant", content=turn["assistant"]))
        return messages

    @property
    def room(self) -> int:
        """Tokens that are left for the next message and its reply."""
        return self.llama.model.params.max_seq_len - sum(len(turn["ids"]) for turn in self.turns)

    def send(self, message: str, **options: Any) -> Iterator[Chunk]:
        """Say something; the chunks are the reply, as it comes. A reply that is left early stays as far as it was read.

        DialogError for a message with a tag of the format in it; `ContextFull` where there is no room for it.
        """
        self._check(message)
        prompt = self._prompt(message)
        history = [i for turn in self.turns for i in turn["ids"]]
        limit = self.llama.model.params.max_seq_len
        if len(history) + len(prompt) >= limit:
            raise self._full(len(history) + len(prompt) + 1 - limit)
        return self._reply(message, prompt, history, {**self.options, **options})

    def _reply(self, message: str, prompt: list[int], history: list[int], options: dict[str, Any]) -> Iterator[Chunk]:
        text, ids = "", list(prompt)
        started = False
        try:
            for chunk in self.llama.continue_ids(history + prompt, **options):
                started = True
                text += chunk["text"]
                ids += chunk["tokens"]
                yield chunk
        finally:
            if started:
                self.turns.append(Turn(user=message, assistant=text.strip(), ids=[*ids, self.llama.tokenizer.eos_id]))

    def ask(self, message: str, **options: Any) -> str:
        """`send`, and the whole reply at once."""
        for _ in self.send(message, **options):
            pass
        return self.turns[-1]["assistant"]

    def undo(self) -> Optional[Turn]:
        """Take the last turn back, and return it."""
        return self.turns.pop() if self.turns else None

    def drop(self, turns: int = 1) -> None:
        """Forget the oldest turns. The system message moves to the first that is left."""
        del self.turns[:turns]
        if self.turns and self.system is not None and turns > 0:
            first = self.turns[0]
            old = len(self._encode(first["user"], None))
            first["ids"] = self._encode(first["user"], self.system) + first["ids"][old:]

    def clear(self) -> None:
        self.turns.clear()

    def save(self, path: Union[str, Path]) -> None:
        """Write the session as JSON."""
        state = {"system": self.system, "turns": self.turns}
        Path(path).expanduser().write_text(json.dumps(state, ensure_ascii=False, indent=1), encoding="utf-8")

    def load(self, path: Union[str, Path]) -> None:
        """Read what `save` wrote, in place of what was said here. ValueError where it is something else."""
        source = Path(path).expanduser()
        try:
            data = read_file(source)
        except ValueError as error:
            raise ValueError(f"no saved session at {source}: {error}") from error
        try:
            state = json.loads(data)
            system = state["system"]
            turns = [Turn(user=t["user"], assistant=t["assistant"], ids=[int(i) for i in t["ids"]]) for t in state["turns"]]
            said = [system or "", *(text for t in turns for text in (t["user"], t["assistant"]))]
            if not all(isinstance(text, str) for text in said):
                raise TypeError("what was said is text")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{source} is not a saved session; `save` writes one") from error
        vocab_size = self.llama.model.vocab_size
        if any(not 0 <= i < vocab_size for turn in turns for i in turn["ids"]):
            raise ValueError(f"{source} was saved with another tokenizer; load it with the model that it was made with")
        self.clear()
        self.system = system
        self.turns = turns

    def _prompt(self, message: str) -> list[int]:
        return self._encode(message, None if self.turns else self.system)

    def _encode(self, message: str, system: Optional[str]) -> list[int]:
        messages = [Message(role="system", content=system)] if system is not None else []
        return encode_dialog([*messages, Message(role="user", content=message)], self.llama.tokenizer)

    @staticmethod
    def _check(text: str) -> None:
        if not isinstance(text, str):
            raise ValueError(f"a message is a text, not {type(text).__name__}")
        if any(tag in text for tag in SPECIAL_TAGS):
            raise DialogError(UNSAFE_ERROR)

    def _full(self, missing: int) -> ContextFull:
        drop, freed = 0, 0
        while drop < len(self.turns) and freed < missing:
            freed += len(self.turns[drop]["ids"])
            drop += 1
        limit = self.llama.model.params.max_seq_len
        if freed < missing:
            return ContextFull(f"the message is {missing - freed} tokens too long for max_seq_len={limit}; shorten it", drop)
        oldest = "the oldest turn" if drop == 1 else f"the {drop} oldest turns"
        return ContextFull(
            f"the context of {limit} tokens is full: {missing} are missing; drop({drop}) forgets {oldest}, or build with a "
            "larger max_seq_len",
            drop,
        )
