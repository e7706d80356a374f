"""What a request's body asks for: every field once, read into the options of a completion. ValueErrors become answers
of 400.

The names are those of OpenAI's API (https://platform.openai.com/docs/api-reference, as of 2026), and of vLLM's for what
that API lacks.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

from ..chat import Dialog, Message
from ..chat_formats import ending
from ..generation import Llama
from ..infilling import infilling_ids, infilling_prompts
from ..options import Asked, Prompts, with_stops
from ..system.checks import whole
from ..system.files import listed
from ..system.printable import shortened
from ..system.program import nearest

MOST_ANSWERS = 128  # answers to one prompt
MOST_PROMPTS = 2048  # prompts of one request
MOST_STOPS = 16
MOST_ALTERNATIVES = 20  # alternatives at each place
# The text needs this many of the prompt's last ids: for the space between two words, and for a character's last bytes.
TAIL = 8
MAX_TOKENS = 16  # ids of a completion that asks for no number, as in OpenAI's API
# Our own defaults are Meta's, 0.6 and 0.9; clients of the API rely on the API's.
DEFAULTS = {"temperature": 1.0, "top_p": 1.0}


class Wrong(ValueError):
    """A field that is wrong. status: of the answer."""

    def __init__(
        self, message: str, field: Optional[str] = None, code: Optional[str] = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.field, self.code, self.status = field, code, status


class Request(NamedTuple):
    """What was asked. usage: whether a stream tells the counts of tokens in a last event. chat: answer with
    messages."""

    asked: Asked
    chat: bool
    n: int
    stream: bool
    usage: bool
    scored: bool
    alternatives: int
    ids: bool  # tell the ids as well


SAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "n",
)
SHARED = (
    *SAME, "model", "seed", "stop_token_ids", "logit_bias", "logprobs", "max_tokens", "stream", "stream_options",
    "return_token_ids", "response_format", "json_schema", "regex", "choice", "grammar",
)  # fmt: skip
# Fields that change no answer of ours.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
CHAT = (*SHARED, "messages", "max_completion_tokens", "top_logprobs", "add_generation_prompt", "continue_final_message")
COMPLETION = (*SHARED, "prompt", "suffix", "echo", "best_of")
TOOLS = (
    "Llama 2 has no format for tools: describe them in a message, and hold the answer to a form with response_format"
)
REFUSED = {
    "tools": TOOLS, "functions": TOOLS, "tool_choice": TOOLS, "function_call": TOOLS,
    "modalities": "the model reads and writes text only", "audio": "the model reads and writes text only",
    "prediction": ("prompts that begin alike are read once, without being "
                  "asked"), "reasoning_effort": "the model has no efforts",
    "verbosity": "say in a message how long the answer should be", "web_search_options": "the model has no search",
}  # fmt: skip
HARMLESS: Mapping[str, list[Any]] = {
    "tool_choice": ["none"],
    "function_call": ["none"],
    "modalities": [["text"]],
    "tools": [[]],
    "functions": [[]],
}


def read_chat(llama: Llama, body: Any) -> Request:
    """A body of /v1/chat/completions."""
    given = fields(body, CHAT)
    if given.get("max_tokens", limit := given.get("max_completion_tokens")) != (limit or given.get("max_tokens")):
        raise Wrong("max_tokens and max_completion_tokens are two names of one number; give one of them", "max_tokens")
    scored, alternatives = _flag(given, "logprobs"), given.get("top_logprobs", 0)
    if alternatives and not scored:
        raise Wrong("top_logprobs needs logprobs=true", "top_logprobs")
    dialog = _dialog(given.get("messages"))
    begun = _continues(given, dialog)
    options = _options(given, given.get("max_tokens", limit), scored, alternatives, "top_logprobs", 1)
    options = ending(llama.chat_format, llama.tokenizer, options)
    asked = Asked(lambda: llama.encode_dialogs([dialog], "raise", begun), options)
    return _request(given, asked, True, scored, alternatives)


def read_completion(llama: Llama, body: Any) -> Request:
    """A body of /v1/completions."""
    given = fields(body, COMPLETION)
    alternatives = given.get("logprobs")
    scored, echo = alternatives is not None, _flag(given, "echo")
    prompts = several(given.get("prompt", ""), "prompt")
    if given.get("best_of", given.get("n", 1)) != given.get("n", 1):
        raise Wrong("best_of is not known here; take n answers with logprobs, and choose", "best_of")
    options = _options(given, given.get("max_tokens", MAX_TOKENS), scored, alternatives or 0, "logprobs", len(prompts))
    if (suffix := given.get("suffix")) is None:

        def read() -> Prompts:
            ids = ids_of(llama, prompts)
            return Prompts(ids, () if echo else [row[-TAIL:] for row in ids])

        return _request(given, Asked(read, options, echo), False, scored, alternatives or 0)
    if not isinstance(suffix, str) or not all(isinstance(prompt, str) for prompt in prompts) or echo:
        raise Wrong("suffix must be a text that follows prompts of text, without echo", "suffix")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    options = with_stops(options, [infilling_ids(llama.tokenizer).eot])
    asked = Asked(lambda: infilling_prompts(texts, [suffix] * len(texts), llama.tokenizer, False), options)
    return _request(given, asked, False, scored, alternatives or 0)


def ids_of(llama: Llama, prompts: Sequence[Any]) -> list[list[int]]:
    """Texts as ids behind BOS; ids as they are."""
    return [llama.tokenizer.encode(p, bos=True, eos=False) if isinstance(p, str) else p for p in prompts]


def fields(body: Any, known: Sequence[str]) -> dict[str, Any]:
    """The fields that are given. What is null is not given."""
    if not isinstance(body, dict):
        raise Wrong(f"the body must be a JSON object, not {shortened(body)}")
    given = {name: value for name, value in body.items() if value is not None}
    for name, why in REFUSED.items():
        if name in given and given[name] not in HARMLESS.get(name, []):
            raise Wrong(f"{name} cannot be done here: {why}", name, "unsupported")
    unknown = sorted(set(given) - {*known, *IGNORED, *REFUSED})
    if unknown:
        near = nearest(unknown[0], known)
        raise Wrong(f"unknown {listed(unknown)}{near}; there are {', '.join(known)}", unknown[0], "unknown_field")
    return given


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise Wrong(f"{name}={shortened(value)} must be true or false", name)
    return value


def _request(given: Mapping[str, Any], asked: Asked, chat: bool, scored: bool, alternatives: int) -> Request:
    stream, more = _flag(given, "stream"), given.get("stream_options", {})
    if not isinstance(more, dict) or not set(more) <= {"include_usage", "include_obfuscation"} or (more and not stream):
        raise Wrong('stream_options={"include_usage": true} is what there is, and needs stream=true', "stream_options")
    usage = _flag(more, "include_usage")
    return Request(
        asked, chat, given.get("n", 1), stream, usage, scored, alternatives, _flag(given, "return_token_ids")
    )


def _options(
    given: Mapping[str, Any], length: Any, scored: bool, alternatives: Any, counted: str, prompts: int
) -> dict[str, Any]:
    """The options of the answers. counted: the field that says how many alternatives."""
    options = {**DEFAULTS, **{name: given[name] for name in SAME if name in given}}
    if length is not None:
        options["max_gen_len"] = length
    if options.get("top_k") == -1:  # all, as vLLM says it
        del options["top_k"]
    _limit(counted, alternatives, 0, MOST_ALTERNATIVES)
    options["logprobs"] = alternatives or scored
    n = _limit("n", given.get("n", 1), 1, MOST_ANSWERS)
    stops = given.get("stop", ())
    if isinstance(stops, list) and len(stops) > MOST_STOPS:
        raise Wrong(f"{len(stops)} stop texts are more than {MOST_STOPS}", "stop")
    if (ids := given.get("stop_token_ids")) is not None:
        options["stop_ids"] = ids
    if (bias := given.get("logit_bias")) is not None:
        options["logit_bias"] = _bias(bias)
    seed = given.get("seed")
    seed = secrets.randbits(62) if seed is None else seed
    if (first := whole(seed)) is None:
        raise Wrong(f"seed={shortened(seed)} must be a whole number", "seed")
    first %= 2**62  # the API's seeds may be negative
    options["seed"] = [(first + n * i) % 2**62 for i in range(prompts)]
    if (form := _form(given)) is not None:
        options["constraint"] = form
    return options


def _limit(name: str, value: Any, least: int, most: int) -> int:
    number = whole(value)
    if number is None or not least <= number <= most:
        raise Wrong(f"{name}={shortened(value)} must be a whole number from {least} to {most}", name)
    return number


def _bias(bias: Any) -> dict[int, float]:
    try:
        return {int(token): value for token, value in bias.items()}
    except (AttributeError, ValueError) as error:
        raise Wrong(
            f"logit_bias={shortened(bias)} must have ids as keys, as texts, and numbers", "logit_bias"
        ) from error


def _form(given: Mapping[str, Any]) -> Optional[dict[str, Any]]:
    """The form that an answer is held to."""
    forms = {name: given[name] for name in ("json_schema", "regex", "choice", "grammar") if name in given}
    form = given.get("response_format", {"type": "text"})
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "json_object":
        forms["json_object"] = True
    elif kind == "json_schema":
        schema = form.get("json_schema")
        if not isinstance(schema, dict) or "schema" not in schema:
            raise Wrong('response_format needs {"json_schema": {"name": …, "schema": {…}}}', "response_format")
        forms["json_schema"] = schema["schema"]
    elif kind != "text":
        raise Wrong(
            f"response_format={shortened(form)} must be of the type text, json_object or json_schema", "response_format"
        )
    if len(forms) > 1:
        raise Wrong(f"an answer has one form, not {listed(sorted(forms))}", "response_format")
    return forms or None


def several(given: Any, name: str) -> list[Any]:
    """A prompt, or several, each a text or ids, as a list of prompts."""
    told = f"{name}={shortened(given)} must be a text, a list of texts, ids, or a list of lists of ids"
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise Wrong(told, name)
    prompts = [given] if all(whole(part) is not None for part in given) else given
    if len(prompts) > MOST_PROMPTS:
        raise Wrong(f"{len(prompts)} prompts are more than {MOST_PROMPTS}; send several requests", name)
    if not all(isinstance(prompt, (str, list)) for prompt in prompts):
        raise Wrong(told, name)
    return prompts


def check_ids(llama: Llama, given: Any) -> list[int]:
    """Ids of the vocabulary."""
    size = llama.model.vocab_size
    if not isinstance(given, list) or not all((i := whole(part)) is not None and 0 <= i < size for part in given):
        raise Wrong(f"tokens={shortened(given)} must be a list of ids from 0 to {size - 1}", "tokens")
    return given


def read_tokens(llama: Llama, given: Mapping[str, Any]) -> list[int]:
    """The ids of a prompt, or of messages."""
    prompt, special = given.get("prompt"), given.get("add_special_tokens", True)
    if ("messages" in given) == (prompt is not None):
        raise Wrong("give prompt, or messages", "prompt")
    if not isinstance(special, bool):
        raise Wrong(f"add_special_tokens={shortened(special)} must be true or false", "add_special_tokens")
    if prompt is None:
        dialog = _dialog(given["messages"])
        return list(llama.encode_dialogs([dialog], "raise", _continues(given, dialog)).ids[0])
    if not isinstance(prompt, str):
        raise Wrong(f"prompt={shortened(prompt)} must be a text", "prompt")
    return llama.tokenizer.encode(prompt, bos=special, eos=False)


ROLES: Mapping[Any, str] = {"developer": "system"}  # the newer name


def _dialog(messages: Any) -> Dialog:
    """Messages with texts as contents. What they say is checked with the model's format."""
    if not isinstance(messages, list) or not messages:
        raise Wrong(f"messages={shortened(messages)} must be a list of messages", "messages")
    dialog: Dialog = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Wrong(f'message {i} must be {{"role": …, "content": …}}, not {shortened(message)}', "messages")
        if more := sorted(name for name in set(message) - {"role", "content"} if message[name]):
            raise Wrong(f"message {i} has {listed(more)}, for which Llama 2 has no format", "messages")
        role: Any = ROLES.get(message["role"], message["role"])
        dialog.append(Message(role=role, content=_text(i, message.get("content"))))
    return dialog


def _text(i: int, content: Any) -> str:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise Wrong(f"the content of message {i} must be a text or parts of text, not {shortened(content)}", "messages")
    for part in parts:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Wrong(
                f"message {i} has a part of the type {shortened(part.get('type'))}; the model reads text", "messages"
            )
    return "".join(part["text"] for part in parts)


def _continues(given: Mapping[str, Any], dialog: Dialog) -> bool:
    """Whether the last message is the beginning of the answer: it is if it is the assistant's."""
    begun = dialog[-1]["role"] == "assistant"
    wanted = {"continue_final_message": begun, "add_generation_prompt": not begun}
    for name, truth in wanted.items():
        if name in given and _flag(given, name) != truth:
            last = (
                "the assistant, which is continued" if begun else f"{shortened(dialog[-1]['role'])}, which is answered"
            )
            raise Wrong(f"{name}={str(not truth).lower()} does not fit: the last message is from {last}", name)
    return begun
