"""Writes API.md from the docstrings: `python docs/api.py`. tests/test_docs.py says if that is to be done."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path
from typing import Any, get_args, is_typeddict

sys.path.insert(0, str(Path(__file__).parents[1]))

import llama
from llama import completion, generation, options, runtime, scoring, session
from llama.decoding import requests

HEAD = """\
# API

Every public name, from the docstrings; `python docs/api.py` writes this page. [PYTHON.md](PYTHON.md) shows how they go
together. Names without a module are imported from `llama`.
"""
# Each name, and of a class what is public in it.
PUBLIC: list[tuple[str, Any, str]] = [
    (
        "Llama",
        llama.Llama,
        "build text_completion stream_text chat_completion stream_chat chat generate steps infill stream_infill "
        "continue_ids "
        "score score_ids embed lead close forget chat_format lock",
    ),
    ("Options", llama.Options, ""),
    ("options.TurnOptions", options.TurnOptions, ""),
    ("CompletionPrediction", llama.CompletionPrediction, ""),
    ("ChatPrediction", llama.ChatPrediction, ""),
    ("Chunk", llama.Chunk, ""),
    ("Score", llama.Score, ""),
    ("scoring.ContinuationScore", scoring.ContinuationScore, ""),
    ("completion.Alternative", completion.Alternative, ""),
    ("decoding.requests.Step", requests.Step, ""),
    ("Message", llama.Message, ""),
    ("Dialog", llama.Dialog, ""),
    ("DialogError", llama.DialogError, ""),
    (
        "ChatSession",
        llama.ChatSession,
        "send ask continue_reply turns system dialog room undo drop clear fork save load",
    ),
    ("session.Turn", session.Turn, ""),
    ("ContextFull", llama.ContextFull, ""),
    ("Tokenizer", llama.Tokenizer, "encode decode split piece stop_ids"),
    ("Transformer", llama.Transformer, "forward"),
    ("ModelArgs", llama.ModelArgs, ""),
    ("generation.sample_top_p", generation.sample_top_p, ""),
    ("runtime.shutdown", runtime.shutdown, ""),
]


def signature(name: str, function: Any) -> str:
    """A function's parameters with types and defaults, as its source has them."""
    parameters, starred = [], False
    told = inspect.signature(function)
    for parameter in told.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parameters.append("*")
        starred = starred or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        parameters.append(f"{stars}{parameter.name}: {parameter.annotation}{default}")
    end = "" if told.return_annotation in (told.empty, "None") else f" -> {told.return_annotation}"
    line = f"{name}({', '.join(parameters)}){end}"
    return line if len(line) <= 100 else "\n".join([f"{name}(", *(f"    {p}," for p in parameters), f"){end}"])


def fields(name: str, kind: Any) -> str:
    """The keys of a TypedDict, or the fields of a dataclass, with their types."""
    lines = []
    for key, hint in inspect.get_annotations(kind).items():
        told = hint if isinstance(hint, str) else getattr(hint, "__forward_arg__", str(hint))
        given = getattr(kind, "__dataclass_fields__", {}).get(key)
        default = "" if given is None or given.default in (MISSING,) else f" = {given.default!r}"
        lines.append(f"    {key}: {told}{default}")
    return "\n".join([f"class {name}:", *lines])


def wrapped(text: str) -> str:
    """The text on lines of at most 118 characters."""
    indent = "  " * text.startswith("- ")
    return textwrap.fill(text, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def markdown(doc: str) -> Iterator[str]:
    """The paragraphs of a docstring, its sections as lists."""
    for paragraph in doc.split("\n\n"):
        title, _, rest = paragraph.partition("\n")
        if title in ("Args:", "Attributes:", "Raises:"):
            entries = [" ".join(entry.split()) for entry in re.split(r"\n(?= {4}\S)", f"\n{rest}") if entry.strip()]
            yield f"**{title}**\n\n" + "\n".join(
                wrapped(re.sub(r"^([^:]+): ", r"- **\1**: ", entry)) for entry in entries
            )
        elif title == "Returns:":
            yield wrapped(f"**Returns:** {' '.join(rest.split())}")
        elif title.startswith((">>>", "    ")):
            yield f"```py\n{inspect.cleandoc(paragraph)}\n```"
        else:
            yield wrapped(" ".join(paragraph.split()))


def entry(depth: int, name: str, thing: Any) -> Iterator[str]:
    """The paragraphs of one name."""
    yield f"{'#' * depth} {name}"
    short = name.rpartition(".")[2]
    if isinstance(thing, property):
        yield f"```py\n{short}: {thing.fget.__annotations__['return']}\n```"
    elif is_typeddict(thing) or hasattr(thing, "__dataclass_fields__"):
        yield f"```py\n{fields(short, thing)}\n```"
    elif inspect.isclass(thing) and issubclass(thing, Exception):
        yield f"```py\nclass {short}({', '.join(base.__name__ for base in thing.__bases__)})\n```"
    elif inspect.isclass(thing) and not get_args(thing):
        yield f"```py\n{signature(f'class {short}', thing.__init__)}\n```"
    elif inspect.isfunction(thing):
        yield f"```py\n{signature(short, thing)}\n```"
    else:
        yield f"`{short} = {thing}`"
        return
    yield from markdown(inspect.getdoc(thing) or "")


def page() -> str:
    """API.md"""
    links = (f"[{name}](#{name.lower().replace('.', '')})" for name, _, _ in PUBLIC)
    parts = [HEAD.rstrip(), wrapped(" · ".join(links))]
    for name, thing, members in PUBLIC:
        parts += entry(2, name, thing)
        for member in members.split():
            parts += entry(3, f"{name}.{member}", getattr(thing, member))
    return "\n\n".join(filter(None, parts)) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "API.md").write_text(page(), encoding="utf-8")
