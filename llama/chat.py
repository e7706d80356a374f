"""Dialogs and their checks; the Llama-2 format: its tags, and the ids of a dialog's prompt. `chat_formats` has the
others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Optional, TypedDict

from .system.printable import shortened
from .tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One message of a dialog."""

    role: Role
    content: str


Dialog = list[Message]

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
SPECIAL_TAGS = [B_INST, E_INST, "<<SYS>>", "<</SYS>>"]
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."


class DialogError(ValueError, AssertionError):
    """A dialog that the format cannot express. It is an AssertionError too, because Meta's release raises that."""


def check_messages(dialog: Sequence[Message]) -> None:
    """Raise a DialogError unless `dialog` is a list of messages, whatever their roles."""
    if not isinstance(dialog, Sequence) or isinstance(dialog, str):
        raise DialogError(f"a dialog is a list of messages, not {type(dialog).__name__}; put its messages into a list")
    for i, message in enumerate(dialog):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise DialogError(f"message {i} must be {{'role': …, 'content': …}}, not {shortened(message)}")
        if not isinstance(message["content"], str):
            raise DialogError(f"the content of message {i} is {type(message['content']).__name__}; it must be a str")


def check_dialog(dialog: Sequence[Message], begun: bool = False) -> None:
    """Raise a DialogError unless `dialog` is [system,] user, assistant, user, … user. begun: it ends with an
    assistant's message."""
    check_messages(dialog)
    first = 1 if dialog and dialog[0]["role"] == "system" else 0
    if len(dialog) == first:
        raise DialogError("a dialog needs a message from the user; this one has none")
    for i, message in enumerate(dialog[first:], start=first):
        expected = "assistant" if (i - first) % 2 else "user"
        if message["role"] != expected:
            raise DialogError(
                "model only supports 'system', 'user' and 'assistant' roles, starting with 'system', then 'user' and "
                f"alternating (u/a/u/a/u...); message {i} is from {shortened(message['role'])}, not {expected!r}"
            )
    last = "assistant" if begun else "user"
    if dialog[-1]["role"] != last:
        raise DialogError(f"Last message must be from {last}, got {dialog[-1]['role']}")


def is_unsafe(dialog: Sequence[Message], tags: Sequence[str] = SPECIAL_TAGS) -> bool:
    """Whether a message contains one of a format's own tags."""
    return any(tag in message["content"] for message in dialog for tag in tags)


def turn_messages(user: str, assistant: Optional[str] = None, system: Optional[str] = None) -> Dialog:
    """A turn as messages. assistant: None if it is still to be said."""
    messages: Dialog = [] if system is None else [Message(role="system", content=system)]
    messages.append(Message(role="user", content=user))
    return messages if assistant is None else [*messages, Message(role="assistant", content=assistant)]


def encode_turn(user: str, assistant: str, tokenizer: Tokenizer, system: Optional[str] = None) -> list[int]:
    """The ids of a finished turn, between BOS and EOS. The two messages are stripped."""
    return tokenizer.encode(f"{_asked(user, system)} {assistant.strip()} ", bos=True, eos=True)


def encode_dialog(dialog: Sequence[Message], tokenizer: Tokenizer, begun: bool = False) -> list[int]:
    """The prompt's ids. Every turn is encoded by itself, between BOS and EOS; the last one is left open for the reply.

        <s> "[INST] <<SYS>>\\n{system}\\n<</SYS>>\\n\\n{user} [/INST] {assistant} " </s> <s> "[INST] {user} [/INST]"

    The system message becomes part of the first user message, and the two are stripped as one text. begun: the dialog
    ends with the beginning of the reply, which is stripped on its left only, so that the reply goes on behind its last
    character. DialogError for a dialog that is empty, system-only, out of turn, or not made of messages.
    """
    check_dialog(dialog, begun)
    texts = [message["content"] for message in dialog]
    system = texts.pop(0) if dialog[0]["role"] == "system" else None
    beginning = texts.pop().lstrip() if begun else ""
    ids: list[int] = []
    for user, assistant in zip(texts[0::2], texts[1::2]):
        ids += encode_turn(user, assistant, tokenizer, system)
        system = None
    return ids + tokenizer.encode(
        _asked(texts[-1], system) + (f" {beginning}" if beginning else ""), bos=True, eos=False
    )


def _asked(user: str, system: Optional[str]) -> str:
    text = user if system is None else B_SYS + system + E_SYS + user
    return f"{B_INST} {text.strip()} {E_INST}"
