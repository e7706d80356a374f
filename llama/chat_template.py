"""A chat template in Jinja, as Hugging Face's folders have them -> what stands around the messages of a dialog.

A template is somebody's code: it runs in Jinja's sandbox, and sees marks in the place of the texts of messages. So what
a text says can neither steer it nor pass for a part of it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn, Optional, Union

from .chat import Dialog, DialogError, Message, check_dialog, turn_messages
from .system.printable import escaped
from .tokenizer import Tokenizer, encode_plain

# What expressions of a template may raise.
FAILURES = ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError
MOST_CHARACTERS = 2**17  # a longer template is refused; those of this family have some hundreds


class Part(NamedTuple):
    """A part of a prompt: the template's own text, or the message that said it."""

    text: str
    said: Optional[int] = None  # the index of the message


def check_template(template: str) -> None:
    """ValueError unless Jinja can read the template."""
    _compiled(template)


def render(
    template: str, messages: Sequence[Message], *, bos: str, eos: str, asks: bool, begun: bool = False
) -> list[Part]:
    """The prompt of a dialog, in parts. asks: the assistant's reply is to follow. begun: the last message is the
    beginning of a reply, and what the template would put behind it is left out.

    Spaces at the ends of a text stay outside its mark, so that a template may strip them. DialogError for what the
    template refuses, and for a message that it leaves out.
    """
    secret = secrets.token_hex(16)
    shown, cores = [], [message["content"].strip() for message in messages]
    for i, (message, core) in enumerate(zip(messages, cores)):
        mark = f"{secret}x{i}x"
        # An empty reply is marked too, so that its place is known.
        last = i == len(messages) - 1 and message["role"] == "assistant"
        content = message["content"].replace(core, mark, 1) if core else mark if last else message["content"]
        shown.append({"role": message["role"], "content": content})
    text = _run(template, shown, bos, eos, asks)
    parts = []
    for at, piece in enumerate(re.split(rf"{secret}x(\d+)x", text)):
        if at % 2:
            parts.append(Part(cores[int(piece)], int(piece)))
        elif piece:
            parts.append(Part(piece))
    for i, core in enumerate(cores):
        if core and not any(part.said == i for part in parts):
            raise DialogError(f"the chat template leaves out message {i}, which is from {messages[i]['role']!r}")
    if begun:
        end = max(at for at, part in enumerate(parts) if part.said == len(messages) - 1) + 1
        spaces = messages[-1]["content"][len(messages[-1]["content"].rstrip()) :] if cores[-1] else ""
        parts[end:] = [Part(spaces)] if spaces else []
    return parts


def _run(template: str, messages: list[dict[str, str]], bos: str, eos: str, asks: bool) -> str:
    compiled = _compiled(template)
    from jinja2 import TemplateError

    from . import sandbox

    try:
        return sandbox.run(
            compiled,
            messages=messages,
            bos_token=bos,
            eos_token=eos,
            add_generation_prompt=asks,
            raise_exception=_refuse,
        )
    except DialogError:
        raise
    except sandbox.TooMuch as error:
        raise DialogError(f"the chat template is stopped: {error}") from error
    except (TemplateError, *FAILURES) as error:
        raise DialogError(f"the chat template fails: {type(error).__name__}: {escaped(str(error))}") from error


def _refuse(message: Any) -> NoReturn:
    raise DialogError(f"the chat template refuses this dialog: {escaped(str(message))}")


@lru_cache(maxsize=32)
def _compiled(template: str) -> Any:
    """A template, read as transformers reads it."""
    try:
        from jinja2 import TemplateError

        from .sandbox import Limited
    except ImportError as error:
        raise ValueError("a chat template needs jinja2; pip install jinja2, or pass chat_format='llama2'") from error
    if len(template) > MOST_CHARACTERS:
        raise ValueError(f"the chat template has {len(template)} characters; at most {MOST_CHARACTERS} are read")
    try:
        return Limited().from_string(template)
    except (TemplateError, RecursionError) as error:
        raise ValueError(f"the chat template cannot be read: {escaped(str(error))}") from error


# A turn that stands before another; any one will do.
BEFORE: Dialog = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


@dataclass(frozen=True)
class TemplateFormat:
    """A format that a Jinja template tells.

    user, reply, asks: the text before a user's message, before a reply in the past, and before the one that is to come.
    end: the piece behind a reply, "" for EOS. These recognise a folder's template, which may differ in the rest.
    own_tags: texts that no message may have, unless they are control pieces of the tokenizer. own_stops: texts that end
    a reply too.
    """

    name: str
    template: str
    user: str = ""
    reply: str = ""
    asks: str = ""
    end: str = ""
    own_tags: tuple[str, ...] = ()
    own_stops: tuple[str, ...] = ()

    def tags(self, tokenizer: Tokenizer) -> Sequence[str]:
        names = self._names(tokenizer)
        return [tag for tag in self.own_tags if tag not in names]

    def stops(self, tokenizer: Tokenizer) -> tuple[Sequence[int], Sequence[str]]:
        named = self.end in self._names(tokenizer)
        return self.close(tokenizer), (*[self.end] * (bool(self.end) and not named), *self.own_stops)

    def close(self, tokenizer: Tokenizer) -> list[int]:
        parts = self._parts(BEFORE, tokenizer)
        reply = next(at for at, part in enumerate(parts) if isinstance(part, Part) and part.said == 1)
        return [part for part in parts[reply:] if isinstance(part, int)][:1]

    def encode_dialog(
        self, dialog: Sequence[Message], tokenizer: Tokenizer, begun: bool = False, first: bool = True
    ) -> list[int]:
        check_dialog(dialog, begun)
        if begun and not dialog[-1]["content"].strip():
            dialog, begun = dialog[:-1], False
        if first:
            return self._ids(self._parts(dialog, tokenizer, asks=not begun, begun=begun), tokenizer)
        parts = self._parts([*BEFORE, *dialog], tokenizer, asks=not begun, begun=begun)
        return self._ids(parts[self._end(parts, 1, tokenizer) :], tokenizer, behind=True)

    def encode_turn(
        self, user: str, assistant: str, tokenizer: Tokenizer, system: Optional[str] = None, first: bool = True
    ) -> list[int]:
        dialog = turn_messages(user, assistant, system)
        before = [] if first else BEFORE
        parts = self._parts([*before, *dialog], tokenizer)
        start = 0 if first else self._end(parts, 1, tokenizer)
        end = self._end(parts, len(before) + len(dialog) - 1, tokenizer)
        return self._ids(parts[start:end], tokenizer, behind=not first)

    def _parts(
        self, dialog: Sequence[Message], tokenizer: Tokenizer, asks: bool = False, begun: bool = False
    ) -> list[Union[Part, int]]:
        """The template's parts, in which control pieces are ids."""
        names, (bos, eos) = self._names(tokenizer), boundaries(tokenizer)
        controls = re.compile(f"({'|'.join(re.escape(name) for name in sorted(names, key=len, reverse=True))})")
        parts: list[Union[Part, int]] = []
        for part in render(self.template, dialog, bos=bos, eos=eos, asks=asks, begun=begun):
            if part.said is not None:
                parts.append(part)
                continue
            for at, text in enumerate(controls.split(part.text)):
                if text:
                    parts.append(names[text] if at % 2 else Part(text))
        return parts

    def _end(self, parts: Sequence[Union[Part, int]], reply: int, tokenizer: Tokenizer) -> int:
        """Where the turn ends whose reply is the message of this index: behind `close`, or behind the reply."""
        end = max(at for at, part in enumerate(parts) if isinstance(part, Part) and part.said == reply) + 1
        return parts.index(close[0], end) + 1 if (close := self.close(tokenizer)) else end

    def _ids(self, parts: Sequence[Union[Part, int]], tokenizer: Tokenizer, behind: bool = False) -> list[int]:
        """Texts between two control ids are encoded as one. behind: other ids stand before these."""
        ids: list[int] = []
        text, controls = "", set(self._names(tokenizer).values())
        for part in [*parts, None]:
            if isinstance(part, Part):
                text += part.text
                continue
            if text:
                ids += encode_plain(
                    tokenizer, text, controls, behind=tokenizer.is_bare(text, begun=bool(ids) or behind)
                )
                text = ""
            if part is not None:
                ids.append(part)
        return ids

    def _names(self, tokenizer: Tokenizer) -> dict[str, int]:
        """The control pieces; `end` is one of them where the vocabulary has it as a piece."""
        need_pieces(tokenizer)
        piece = tokenizer.sp_model.PieceToId(self.end) if self.end else tokenizer.sp_model.unk_id()
        return tokenizer.named if piece == tokenizer.sp_model.unk_id() else {self.end: piece, **tokenizer.named}


def boundaries(tokenizer: Tokenizer) -> tuple[str, str]:
    """The texts of BOS and EOS in templates."""
    need_pieces(tokenizer)
    bos, eos = tokenizer.boundaries
    return bos or tokenizer.piece(tokenizer.bos_id), eos or tokenizer.piece(tokenizer.eos_id)


def need_pieces(tokenizer: Tokenizer) -> None:
    """ValueError for a user's own tokenizer, of which no control pieces are known."""
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(
            f"a chat template needs a llama.Tokenizer, not {type(tokenizer).__name__}; pass chat_format='llama2'"
        )
