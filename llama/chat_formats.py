"""The chat formats of this family: Llama 2's, which `chat` has, and those of fine-tunes, as templates that write what
their makers' own write; and which of them a folder speaks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Optional, Protocol, Union

from . import chat
from .chat import SPECIAL_TAGS, Dialog, Message
from .chat_template import BEFORE, TemplateFormat, boundaries, check_template, render
from .options import with_stops
from .system.printable import shortened
from .tokenizer import Tokenizer


class ChatFormat(Protocol):
    """How dialogs are written for a model. Text of messages never becomes a control id."""

    @property
    def name(self) -> str: ...

    @property
    def template(self) -> str:
        """The format in Jinja, for transformers."""

    def tags(self, tokenizer: Tokenizer) -> Sequence[str]:
        """Texts that no message may have, since they would pass for parts of the format."""

    def stops(self, tokenizer: Tokenizer) -> tuple[Sequence[int], Sequence[str]]:
        """The ids and the texts that end a reply, beside the tokenizer's own."""

    def close(self, tokenizer: Tokenizer) -> list[int]:
        """The id that stands behind a reply; none in a format without one."""

    def encode_dialog(
        self, dialog: Sequence[Message], tokenizer: Tokenizer, begun: bool = False, first: bool = True
    ) -> list[int]:
        """The prompt's ids, up to the reply. begun: the dialog ends with the beginning of the reply. first=False: it
        goes on behind other turns, which `encode_turn` has made. DialogError for what the format cannot express."""

    def encode_turn(
        self, user: str, assistant: str, tokenizer: Tokenizer, system: Optional[str] = None, first: bool = True
    ) -> list[int]:
        """The ids of a finished turn, up to `close`. first: no other turn stands before it."""


@dataclass(frozen=True)
class Llama2Format:
    """Meta's."""

    name: str
    template: str

    def tags(self, tokenizer: Tokenizer) -> Sequence[str]:
        return SPECIAL_TAGS

    def stops(self, tokenizer: Tokenizer) -> tuple[Sequence[int], Sequence[str]]:
        return (), ()

    def close(self, tokenizer: Tokenizer) -> list[int]:
        return [tokenizer.eos_id]

    def encode_dialog(
        self, dialog: Sequence[Message], tokenizer: Tokenizer, begun: bool = False, first: bool = True
    ) -> list[int]:
        return chat.encode_dialog(dialog, tokenizer, begun)

    def encode_turn(
        self, user: str, assistant: str, tokenizer: Tokenizer, system: Optional[str] = None, first: bool = True
    ) -> list[int]:
        return chat.encode_turn(user, assistant, tokenizer, system)


def _template(roles: Mapping[str, str], asks: str, begin: str = "", check: str = "") -> str:
    """A template in Jinja. roles: what is written for a message of each role, an expression with its `text`. asks: what
    is written in front of a reply. begin, check: what stands at the beginning, and before each message."""
    cases = "".join(f"{{% elif message['role'] == '{role}' %}}{{{{ {text} }}}}" for role, text in roles.items())
    cases = cases.replace("elif", "if", 1)
    each = (
        "{% for message in messages %}{% set text = message['content'] %}" + check + cases + "{% endif %}{% endfor %}"
    )
    return begin + each + (f"{{% if add_generation_prompt %}}{{{{ '{asks}' }}}}{{% endif %}}" if asks else "")


def _unless_told(system: str) -> str:
    """A system message for dialogs without one, in Jinja."""
    return f"{{% if messages[0]['role'] != 'system' %}}{{{{ {system!r} }}}}{{% endif %}}"


# A user's message has an even place, and with a system message in front an odd one.
_BY_TURNS = (
    "{% set place = loop.index0 + (messages[0]['role'] == 'system') | int %}"
    "{% if (message['role'] == 'user') != (place % 2 == 0) %}"
    "{{ raise_exception('a user and the assistant speak by turns; message ' ~ loop.index0 ~ ' is out of turn') }}"
    "{% endif %}"
)
LLAMA2 = Llama2Format(
    "llama2",  # meta-llama/Llama-2-7b-chat-hf
    _template(
        {
            "user": "bos_token + '[INST] ' + (told + text) | trim + ' [/INST]'",
            "assistant": "' ' + text | trim + ' ' + eos_token",
        },
        "",
        check=_BY_TURNS + "{% set told = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' "
        "if loop.index0 == 1 and messages[0]['role'] == 'system' else '' %}",
    ),
)
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
FORMATS: dict[str, Union[Llama2Format, TemplateFormat]] = {
    format.name: format
    for format in (
        LLAMA2,
        TemplateFormat(
            "vicuna",  # lmsys/vicuna-7b-v1.5, as FastChat writes it ("vicuna_v1.1"); WizardLM-13B-V1.2 and Xwin-LM too
            _template(
                {"system": "text + ' '", "user": "'USER: ' + text + ' '", "assistant": ("'ASSISTANT: ' + text + "
                                                                                       "eos_token")},
                "ASSISTANT:", "{{ bos_token }}" + _unless_told(_VICUNA),
            ),
            "USER:", "ASSISTANT:", "ASSISTANT:", own_tags=("USER:", "ASSISTANT:"),
        ),
        TemplateFormat(
            "zephyr",  # HuggingFaceH4/zephyr-7b-beta, TinyLlama/TinyLlama-1.1B-Chat-v1.0
            _template(
                {role: f"'<|{role}|>\\n' + text + eos_token + '\\n'" for role in ("system", "user", "assistant")},
                "<|assistant|>\\n",
            ),
            "<|user|>", "<|assistant|>", "<|assistant|>", own_tags=("<|system|>", "<|user|>", "<|assistant|>"),
        ),
        TemplateFormat(
            "chatml",  # microsoft/Orca-2-7b, teknium/OpenHermes-2.5, 01-ai/Yi-6B-Chat
            _template(
                {role: f"'<|im_start|>{role}\\n' + text + '<|im_end|>\\n'" for role in ("system", "user", "assistant")},
                "<|im_start|>assistant\\n",
            ),
            "<|im_start|>user", "<|im_start|>assistant", "<|im_start|>assistant", "<|im_end|>",
            ("<|im_start|>", "<|im_end|>"),
        ),
        TemplateFormat(
            "alpaca",  # tatsu-lab/alpaca-7b, WizardLMTeam/WizardMath-7B-V1.0, WizardCoder
            _template(
                {
                    "system": "text + '\\n\\n'", "user": "'### Instruction:\\n' + text + '\\n\\n'",
                    "assistant": "'### Response:\\n' + text + eos_token + '\\n\\n'",
                },
                "### Response:", "{{ bos_token }}" + _unless_told(_ALPACA),
            ),
            "### Instruction:", "### Response:", "### Response:", own_tags=("### Instruction:", "### Response:"),
            own_stops=("### Instruction:",),
        ),
        TemplateFormat(
            "orca",  # upstage/SOLAR-10.7B-Instruct-v1.0, pankajmathur/orca_mini; Orca-2 speaks ChatML
            _template(
                {
                    "system": ("'### System:\\n' + text + '\\n\\n' if text else "
                              "''"), "user": "'### User:\\n' + text + '\\n\\n'",
                    "assistant": "'### Assistant:\\n' + text",
                },
                "### Assistant:\\n",
            ),
            "### User:", "### Assistant:", "### Assistant:", own_tags=("### System:", "### User:", "### Assistant:"),
            own_stops=("### User:",),
        ),
        TemplateFormat(
            "codellama70b",  # codellama/CodeLlama-70b-Instruct-hf
            _template(
                {role: (f"'Source: {role}\\n\\n ' + text | trim + ' "
                       f"<step> '") for role in ("system", "user", "assistant")},
                "", "{{ bos_token }}", _BY_TURNS,
            ) + "{{ 'Source: assistant\\nDestination: user\\n\\n ' }}",
            "Source: user", "Source: assistant", "Source: assistant\nDestination: user", "<step>", ("<step>",),
        ),
    )
}  # fmt: skip
FOLDERS_OWN = "template"  # the name of a format that stands for the folder's own template


def choose_format(given: Optional[str], tokenizer: Tokenizer) -> ChatFormat:
    """The format that was asked for: a name, "template", or a template in Jinja. None means that of the folder's
    template, or Llama 2's if it has no template. ValueError for an unknown format, or a folder's template that
    writes no known one."""
    own = tokenizer.chat_template if isinstance(tokenizer, Tokenizer) else None
    if given is None:
        return LLAMA2 if own is None else recognised(own, *boundaries(tokenizer), way_out=True)
    check_format(given)
    if given in FORMATS:
        return FORMATS[given]
    if given == FOLDERS_OWN and own is None:
        raise ValueError(
            f"the folder has no chat template, so chat_format={given!r} says nothing; there are {_names()}"
        )
    return recognised(own if given == FOLDERS_OWN and own else given, *boundaries(tokenizer))


def spoken(tokenizer: Tokenizer) -> str:
    """The format of a folder's chats, in words."""
    if tokenizer.chat_template is None:
        return f"{LLAMA2.name} (the folder has no chat template)"
    try:
        return f"{choose_format(None, tokenizer).name} (by the folder's chat template)"
    except ValueError:
        return (
            f"none of {', '.join(FORMATS)}: the folder's chat template is another; --chat_format {FOLDERS_OWN} runs it"
        )


def check_format(given: Any) -> None:
    """ValueError unless it is None, the name of a format, or a template that can be read."""
    if given is None or given in (*FORMATS, FOLDERS_OWN):
        return
    if not isinstance(given, str) or "{" not in given:
        raise ValueError(f"chat_format={shortened(given)} is no format; there are {_names()}, and templates in Jinja")
    check_template(given)


def _names() -> str:
    return f"{', '.join(FORMATS)}, {FOLDERS_OWN} (the folder's own)"


@lru_cache(maxsize=8)
def recognised(template: str, bos: str, eos: str, way_out: bool = False) -> ChatFormat:
    """The format that a template writes, with this template. One of an unknown format has no name, tags or stops; with
    way_out=True it raises ValueError."""
    reason = ""
    try:
        shown = _probe(template, bos, eos)
        known = next((format for format in FORMATS.values() if _writes(format, shown, bos, eos)), None)
        if known is not None:
            return known if isinstance(known, Llama2Format) else replace(known, template=template)
    except ValueError as error:
        reason = f" ({error})"
    if way_out:
        raise ValueError(
            f"the folder's chat template is of no known format{reason}: pass chat_format={FOLDERS_OWN!r} to run it "
            f"as it is, a format's name (chat_format='llama2'; there are {', '.join(FORMATS)}), or another template in "
            f"Jinja "
            "(--chat_format in the terminal)"
        )
    check_template(template)
    return TemplateFormat(FOLDERS_OWN, template)


def _probe(template: str, bos: str, eos: str) -> str:
    """What a template makes of two users' messages and a reply, which are written as \\0, \\1 and \\2 here."""
    dialog: Dialog = [*BEFORE, {"role": "user", "content": "Bye"}]
    parts = render(template, dialog, bos=bos, eos=eos, asks=True)
    return "".join(part.text if part.said is None else chr(part.said) for part in parts)


def _writes(format: Union[Llama2Format, TemplateFormat], shown: str, bos: str, eos: str) -> bool:
    """Whether a template that shows this writes the format, spaces between its parts and what stands in front aside."""
    if isinstance(format, Llama2Format):
        return shown == _probe(format.template, bos, eos)
    pieces = (bos, format.end or eos, format.user, format.reply, format.asks)
    start, end, user, reply, asks = (re.escape(_squeezed(piece)) for piece in pieces)
    between = rf" ?(?:{end})? ?(?:{start})? ?"
    exact = rf"{user} ?\x00{between}{reply} ?\x01{between}{user} ?\x02{between}{asks} ?"
    return re.search(rf"(?:^| |{start}|{end}){exact}$", _squeezed(shown)) is not None


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def ending(format: ChatFormat, tokenizer: Tokenizer, options: Mapping[str, Any], *stops: str) -> dict[str, Any]:
    """The options of a reply, with the format's stops and further texts."""
    ids, texts = format.stops(tokenizer)
    return with_stops(options, [i for i in ids if i != tokenizer.eos_id], [*texts, *stops])


def in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids the two begin with alike: a prompt, and the same with the beginning of a reply."""
    return next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
