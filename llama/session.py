"""A conversation that remembers: what was said, and the ids that it is to the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Optional, Protocol, Union

from typing_extensions import Unpack

from .chat import UNSAFE_ERROR, Dialog, DialogError, Message, turn_messages
from .chat_formats import ChatFormat, ending, in_common
from .completion import Chunk
from .options import TurnOptions
from .saved import Turn as Turn
from .saved import read_conversation, saved_by, turns_of
from .system.checks import whole_number
from .system.files import replace_file
from .system.printable import json_line, shortened
from .tokenizer import REPLACEMENT, Tokenizer, is_control, user_path


class Talker(Protocol):
    """What a conversation needs of a `Llama`, which makes conversations itself."""

    tokenizer: Tokenizer
    model: Any

    @property
    def lock(self) -> AbstractContextManager[Any]: ...

    @property
    def chat_format(self) -> ChatFormat: ...

    def check_options(self, options: Mapping[str, Any]) -> None: ...

    @property
    def continue_ids(self) -> Callable[..., Iterator[Chunk]]: ...


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

    `Llama.chat` makes one, and describes the arguments; `send` may override options for one turn. A reply ends before a
    tag of the chat format too, since no message may have one.

    The texts in `turns` are what counts: they may be changed, deleted, appended. A turn's ids are made from its texts,
    and kept as long as they say the same. So a reply stays as it was generated, and each turn runs only what is new:
    the ids of the turns before are in the cache, as long as no other prompts needed their place.
    """

    def __init__(
        self,
        llama: Talker,
        system: Optional[str] = None,
        *,
        dialog: Optional[Dialog] = None,
        **options: Unpack[TurnOptions],
    ) -> None:
        llama.check_options(options)
        self.llama, self.options = llama, options
        self._turns: list[Turn] = []
        self._system: Optional[str] = None
        # (user, assistant, system message, whether first) -> ids that were found to say these texts: it takes
        # milliseconds.
        self._proven: dict[tuple[str, str, Optional[str], bool], tuple[int, ...]] = {}
        if dialog is not None:
            self.dialog = dialog
        self._check("" if system is None else system)  # also raises if there is no format for chats
        if system is not None:
            if self.system is not None:
                raise ValueError("the dialog has a system message of its own; leave one of the two out")
            self._system = system

    @property
    def system(self) -> Optional[str]:
        """The system message. It takes effect in the first turn, so it can be changed only while there is none."""
        return self._system

    @system.setter
    def system(self, text: Optional[str]) -> None:
        if self._turns:
            raise ValueError("the system message belongs to the first turn; clear() the session before changing it")
        self._check("" if text is None else text)
        self._system = text

    @property
    def turns(self) -> list[Turn]:
        """What was said, to be read and changed. `ids` follow the texts: they are brought up to date here."""
        for turn, first in self._placed():
            try:
                turn["ids"] = self._ids(turn, first)
            except ValueError:  # `send` says what is wrong with it
                if isinstance(turn, dict):
                    turn.pop("ids", None)
        return self._turns

    @turns.setter
    def turns(self, turns: Sequence[Turn]) -> None:
        copies = []
        for turn in turns:
            self._check_turn(turn)
            copies.append(Turn(user=turn["user"], assistant=turn["assistant"]))
            if isinstance(turn.get("ids"), list):
                copies[-1]["ids"] = list(turn["ids"])
        self._turns = copies

    @property
    def dialog(self) -> Dialog:
        """All that was said, as `chat_completion` takes it."""
        messages = [Message(role="system", content=self.system)] if self.system is not None else []
        for turn in self._turns:
            self._check_turn(turn)
            messages.append(Message(role="user", content=turn["user"]))
            messages.append(Message(role="assistant", content=turn["assistant"]))
        return messages

    @dialog.setter
    def dialog(self, dialog: Dialog) -> None:
        """Replace all that was said here, the system message included."""
        system, turns = turns_of(dialog)
        self._check("" if system is None else system)
        self.turns, self._system = turns, system

    @property
    def room(self) -> int:
        """Tokens that are left for the next message and its reply."""
        return self.llama.model.params.max_seq_len - sum(map(len, self._history()))

    def send(self, message: str, **options: Unpack[TurnOptions]) -> Iterator[Chunk]:
        """Say something. If you stop iterating early, the part of the reply that was read is kept.

        Args:
            message: the user's text.
            options: those of this turn; they go before the session's.

        Returns:
            The reply as it comes, in chunks.

        Raises:
            DialogError: a message with a tag of the chat format in it.
            ContextFull: there is no room for the message; `drop` says how many of the oldest turns must go.
            RuntimeError: while it is read, if another message was sent to this chat meanwhile.
        """
        self._check(message)
        chosen = self._chosen(options)
        with self.llama.lock:
            history = self._history()
            prompt = self._encode(message, not history)
            self._check_room(history, message, len(prompt))
            return self._reply(history, prompt, [], Turn(user=message, assistant=""), self._end(), chosen)

    def ask(self, message: str, **options: Unpack[TurnOptions]) -> str:
        """`send`, and the whole reply at once. Other threads' messages wait for it."""
        with self.llama.lock:
            for _ in self.send(message, **options):
                pass
            return self.turns[-1]["assistant"]

    def continue_reply(self, **options: Unpack[TurnOptions]) -> Iterator[Chunk]:
        """Let the last turn's reply go on: one that max_gen_len ended, or whose beginning you have written. The chunks
        are what is new of it, as from `chat_completion(chat.dialog, continue_final_message=True)`."""
        if not self._turns:
            raise ValueError("there is no reply that could go on; send() a message first")
        *history, last = self._history()
        turn, first = self._turns[-1], not history
        prompt = self._encode(turn["user"], first)
        reply = self._open(last)[len(prompt) :]
        # A reply may end in half a character, which shows as U+FFFD.
        if last == self._finished(turn, first) or turn["assistant"].endswith(REPLACEMENT):
            begun = self._encode(turn["user"], first, turn["assistant"])
            prompt, reply = begun[: (same := in_common(begun, prompt))], begun[same:]
        self._check_room(history, turn["user"], len(prompt) + len(reply))
        return self._reply(history, prompt, reply, turn, self._end(), self._chosen(options))

    def _end(self) -> tuple[list[Turn], Optional[Turn]]:
        """Where the next turn goes: the list, and the last one in it."""
        return self._turns, self._turns[-1] if self._turns else None

    def _reply(
        self,
        history: list[list[int]],
        prompt: list[int],
        reply: list[int],
        turn: Turn,
        end: tuple[list[Turn], Optional[Turn]],
        options: dict[str, Any],
    ) -> Iterator[Chunk]:
        """Run the reply that these ids begin to its end. What was read of it stands in `turn`; a new turn is put at the
        `end` of the list that the session had before: to clear or load a session gives it another list.

        RuntimeError if that list has changed meanwhile, by another message for example: this reply knows nothing of it.
        """
        turns, newest = end
        said, new = turn["assistant"], list(reply)
        generated = self.llama.tokenizer.decode(reply) if reply else ""
        # Spaces at the end of a generated reply are in its ids, but not in its text.
        missing = generated[len(generated.rstrip()) :] if said == said.rstrip() else ""
        close = self._format.close(self.llama.tokenizer)
        ids = [i for part in (*history, prompt, reply) for i in part]
        chunks = self.llama.continue_ids(ids, begun=reply, **options)
        while True:
            with self.llama.lock:
                if (turns[-1] if turns else None) is not newest:
                    raise RuntimeError(
                        "another message was sent to this chat, or its turns were changed, before this reply ended; "
                        "fork() the chat for a second one"
                    )
                chunk = next(chunks, None)
                if chunk is None:
                    return
                chunk["text"], missing = missing + chunk["text"], ""
                said += chunk["text"]
                new += chunk["tokens"]
                turn.update(Turn(user=turn["user"], assistant=said.strip(), ids=[*prompt, *new, *close]))
                if turn is not newest:
                    turns.append(turn)
                    newest = turn
            yield chunk

    def _chosen(self, options: Mapping[str, Any]) -> dict[str, Any]:
        chosen = {**self.options, **options}
        self.llama.check_options(chosen)
        return ending(self._format, self.llama.tokenizer, chosen, *self._format.tags(self.llama.tokenizer))

    def undo(self) -> Optional[Turn]:
        """Take the last turn back, and return it."""
        return self._turns.pop() if self.turns else None

    def drop(self, turns: int = 1) -> None:
        """Forget the oldest turns. The system message moves to the first that is left."""
        del self.turns[: whole_number("turns", turns, 0)]

    def clear(self) -> None:
        """Forget all turns; the system message stays."""
        self._turns = []

    def fork(self) -> ChatSession:
        """Another session with the same past and options, to go on from here in two ways."""
        other = type(self)(self.llama, self.system, **self.options)
        other.turns = self.turns
        return other

    def save(self, path: Union[str, Path]) -> None:
        """Write the session as JSON. What was at `path` stays as it was until all is written."""
        turns: list[Turn] = []
        # Turns that could not be loaded again are not written.
        for (turn, first), ids in zip(self._placed(), self._history()):
            turns.append(Turn(user=turn["user"], assistant=turn["assistant"]))
            if self._is_exact(ids, turn, first):
                turns[-1]["ids"] = ids
        replace_file(user_path(path), json_line({"system": self.system, "turns": turns}).encode())

    def load(self, path: Union[str, Path]) -> None:
        """Read what `save` wrote, or a list of messages, in place of what was said here. ValueError if it is something
        else.

        A turn may have no `ids`: they are made from its texts. If it has, they must say the same.
        """
        source = user_path(path)
        system, stored = read_conversation(source)
        with saved_by(source):
            loaded = ChatSession(self.llama, system)
            loaded.turns = stored
        for given, (turn, first), ids in zip(stored, loaded._placed(), loaded._history()):
            if "ids" in given and not (given["ids"] == ids and loaded._is_exact(ids, turn, first)):
                raise ValueError(
                    f"{source} has ids that do not say what their texts say: it was saved with another tokenizer, or "
                    f"changed; "
                    "take the ids out, and they are made from the texts"
                )
        self._system, self._turns = loaded.system, loaded.turns

    @property
    def _format(self) -> ChatFormat:
        return self.llama.chat_format

    def _placed(self) -> Iterator[tuple[Turn, bool]]:
        """Each turn, and whether it is the first, which has the system message."""
        return ((turn, not i) for i, turn in enumerate(self._turns))

    def _history(self) -> list[list[int]]:
        """The ids of each turn. ValueError for one that is not in order."""
        return [self._ids(turn, first) for turn, first in self._placed()]

    def _ids(self, turn: Turn, first: bool) -> list[int]:
        """The turn's own ids if they say what its texts say, with the reply as it was generated; otherwise ids of
        these."""
        self._check_turn(turn)
        ids, said = turn.get("ids"), (turn["user"], turn["assistant"], self.system if first else None, first)
        if said in self._proven and ids == list(self._proven[said]):
            return list(self._proven[said])
        if len(self._proven) > 2 * len(self._turns) + 16:
            self._proven.clear()
        found = self._made(turn, first)
        self._proven[said] = tuple(found)
        return found

    def _made(self, turn: Turn, first: bool) -> list[int]:
        ids, close = turn.get("ids"), self._format.close(self.llama.tokenizer)
        if isinstance(ids, list) and ids[len(ids) - len(close) :] == close:
            own = self._encode(turn["user"], first)
            # The turn may have become the first one, or no longer be it; the system message may be new.
            for place in ((self.system if first else None, first), (self.system, True), (None, True), (None, False)):
                asked = self._encode_as(turn["user"], *place)
                if ids[: len(asked)] == asked and self._says(self._open(ids)[len(asked) :], turn["assistant"]):
                    return [*own, *ids[len(asked) :]]
        return self._finished(turn, first)

    def _finished(self, turn: Turn, first: bool) -> list[int]:
        """The ids of a turn, from its texts."""
        system = self.system if first else None
        return self._format.encode_turn(turn["user"], turn["assistant"], self.llama.tokenizer, system, first)

    def _open(self, ids: list[int]) -> list[int]:
        """The ids of a turn, without the one that closes the reply."""
        return ids[: len(ids) - len(self._format.close(self.llama.tokenizer))]

    def _says(self, ids: list[int], text: str) -> bool:
        """Whether these ids say this text, and none is hidden; spaces at the ends, which the format strips, aside."""
        tokenizer = self.llama.tokenizer
        return (
            all(type(i) is int and 0 <= i < tokenizer.n_words and not is_control(tokenizer, i) for i in ids)
            and tokenizer.decode(ids).strip() == text.strip()
        )

    def _is_exact(self, ids: list[int], turn: Turn, first: bool) -> bool:
        """Whether a turn's ids have no other spaces at the ends of the reply than those that the format puts there."""
        said = self.llama.tokenizer.decode(self._open(ids)[len(self._encode(turn["user"], first)) :])
        return said.removesuffix(" ") == turn["assistant"].strip()

    def _encode(self, message: str, first: bool, beginning: Optional[str] = None) -> list[int]:
        """The ids of a message, up to the reply or with its beginning. first: no turn stands before it."""
        return self._encode_as(message, self.system if first else None, first, beginning)

    def _encode_as(
        self, message: str, system: Optional[str], first: bool, beginning: Optional[str] = None
    ) -> list[int]:
        messages = turn_messages(message, beginning, system)
        return self._format.encode_dialog(messages, self.llama.tokenizer, beginning is not None, first)

    def _check(self, text: str) -> None:
        if not isinstance(text, str):
            raise ValueError(f"a message is a text, not {type(text).__name__}")
        if any(tag in text for tag in self._format.tags(self.llama.tokenizer)):
            raise DialogError(UNSAFE_ERROR)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{shortened(text)} has characters that UTF-8 cannot encode") from error

    def _check_turn(self, turn: Turn) -> None:
        if not isinstance(turn, dict) or not {"user", "assistant"} <= turn.keys():
            raise ValueError(f"a turn must be {{'user': …, 'assistant': …}}, not {shortened(turn)}")
        self._check(turn["user"])
        self._check(turn["assistant"])

    def _check_room(self, history: list[list[int]], message: str, tokens: int) -> None:
        """ContextFull unless a token is left for the reply, behind the history and `tokens` of the message."""
        limit = self.llama.model.params.max_seq_len
        missing = sum(map(len, history)) + tokens + 1 - limit
        if missing <= 0:
            return
        left = missing
        for drop in range(1, len(history) + 1):
            # The system message moves to the turn that becomes the first, or to the message.
            user = self._turns[drop]["user"] if drop < len(history) else message
            moved = len(self._encode(user, True)) - len(self._encode(user, False))
            left = missing + moved - sum(map(len, history[:drop]))
            if left <= 0:
                oldest = "the oldest turn" if drop == 1 else f"the {drop} oldest turns"
                raise ContextFull(
                    f"the context of {limit} tokens is full: {missing} are missing; drop({drop}) forgets {oldest}, or "
                    f"build "
                    "with a larger max_seq_len",
                    drop,
                )
        raise ContextFull(f"the message is {left} tokens too long for max_seq_len={limit}; shorten it", len(history))
