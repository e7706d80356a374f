"""The Llama-2 dialog format: types, tags, checks, and the ids of a dialog's prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from .tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    role: Role
    content: str


Dialog = list[Message]

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
SPECIAL_TAGS = [B_INST, E_INST, "<<SYS>>", "<</SYS>>"]
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."


class DialogError(ValueError, AssertionError):
    """A dialog that the format has no words for. An AssertionError too, since that is what Meta's release raises."""


def check_dialog(dialog: Sequence[Message]) -> None:
    """Raise a DialogError unless `dialog` is [system,] user, assistant, user, … user."""
    if not isinstance(dialog, Sequence) or isinstance(dialog, str):
        raise DialogError(f"a dialog is a list of messages, not {type(dialog).__name__}")
    for i, message in enumerate(dialog):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise DialogError(f"message {i} must be {{'role': …, 'content': …}}, not {message!r}")
        if not isinstance(message["content"], str):
            raise DialogError(f"the content of message {i} is {type(message['content']).__name__}; it must be a str")
    first = 1 if dialog and dialog[0]["role"] == "system" else 0
    if len(dialog) == first:
        raise DialogError("a dialog needs a message from the user; this one has none")
    for i, message in enumerate(dialog[first:], start=first):
        expected = "assistant" if (i - first) % 2 else "user"
        if message["role"] != expected:
            raise DialogError(
                "model only supports 'system', 'user' and 'assistant' roles, starting with 'system', then 'user' and "
                f"alternating (u/a/u/a/u...); message {i} is from {message['role']!r}, not {expected!r}"
            )
    if dialog[-1]["role"] != "user":
        raise DialogError(f"Last message must be from user, got {dialog[-1]['role']}")


def is_unsafe(dialog: Sequence[Message]) -> bool:
    """Whether a message contains one of the format's own tags."""
    return any(tag in message["content"] for message in dialog for tag in SPECIAL_TAGS)


def encode_dialog(dialog: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """The prompt's ids: every turn is encoded by itself, between BOS and EOS; the last one is left open for the reply.

        <s> "[INST] <<SYS>>\\n{system}\\n<</SYS>>\\n\\n{user} [/INST] {assistant} " </s> <s> "[INST] {user} [/INST]"

    The system message becomes part of the first user message, and the two are stripped as one text. DialogError for a
    dialog that is empty, system-only, out of turn, or not made of messages.
    """
    check_dialog(dialog)
    texts = [message["content"] for message in dialog]
    if dialog[0]["role"] == "system":
        texts[:2] = [B_SYS + texts[0] + E_SYS + texts[1]]
    ids: list[int] = []
    for user, assistant in zip(texts[0::2], texts[1::2]):
        ids += tokenizer.encode(f"{B_INST} {user.strip()} {E_INST} {assistant.strip()} ", bos=True, eos=True)
    return ids + tokenizer.encode(f"{B_INST} {texts[-1].strip()} {E_INST}", bos=True, eos=False)
