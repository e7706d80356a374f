"""Whether docs/API.md, the docstrings and the types that an IDE shows are true."""

from __future__ import annotations

import importlib.util
import inspect
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import pytest
from conftest import ROOT

import llama
from llama import Llama, Options
from llama.completion import Alternative
from llama.options import DEFAULTS, METAS_OPTIONS, TurnOptions

SPEC = importlib.util.spec_from_file_location("api", ROOT / "docs/api.py")
assert SPEC is not None
assert SPEC.loader is not None
api = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(api)


def functions() -> Iterator[Any]:
    """Every public function, method and property."""
    for _, thing, members in api.PUBLIC:
        if inspect.isfunction(thing):
            yield thing
        for member in members.split():
            value = getattr(thing, member)
            yield getattr(value, "fget", value)


def entries(thing: Any, section: str) -> dict[str, str]:
    """What the section of a docstring says of each name."""
    found = re.search(rf"^{section}:\n((?: .*\n?|\n(?= ))+)", inspect.getdoc(thing) or "", flags=re.MULTILINE)
    told = {}
    for entry in re.split(r"\n(?= {4}\S)", "\n" + found[1]) if found else ():
        names, _, text = " ".join(entry.split()).partition(": ")
        told.update(dict.fromkeys(filter(None, names.split(", ")), text))
    return told


def test_the_page_is_what_the_docstrings_say() -> None:
    """If this fails: python docs/api.py"""
    page = (ROOT / "docs/API.md").read_text("utf-8")
    assert page == api.page()
    assert {f"## {name}" for name in llama.__all__} <= set(page.splitlines())


@pytest.mark.parametrize("function", [*functions()])
def test_arguments_are_described(function: Any) -> None:
    """All of them or none, by their names, with their defaults; and their types are there."""
    parameters = {name: p for name, p in inspect.signature(function).parameters.items() if name != "self"}
    hints = get_type_hints(function)
    assert {*parameters, "return"} <= set(hints)
    told = entries(function, "Args")
    assert not told or set(told) == set(parameters)
    for name, text in told.items():
        default = parameters[name].default
        if default not in (parameters[name].empty, None, ()) and "as in `" not in text and "the default" not in text:
            assert f"Default: {default}".replace("'", '"') in text.replace('"', ""), name


METHODS = [function for function in functions() if "options" in inspect.signature(function).parameters]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__qualname__)
def test_every_option_is_seen_where_it_is_used(method: Any) -> None:
    if method.__qualname__.startswith("Llama."):
        for name in Options.__annotations__:
            assert re.search(rf"\b{name}\b", entries(method, "Args")["options"])
    if method is Llama.text_completion:
        for name in Options.__annotations__:
            assert f"{name}={DEFAULTS[name]!r}" in entries(method, "Args")["options"]


def test_the_options_are_those_of_the_table() -> None:
    assert set(Options.__annotations__) | set(METAS_OPTIONS) == set(DEFAULTS)
    assert set(TurnOptions.__annotations__) == set(DEFAULTS)
    told = entries(Options, "Attributes") | entries(TurnOptions, "Attributes")
    for name, default in DEFAULTS.items():
        assert told[name].endswith(f"Default: {default!r}.")


@pytest.mark.parametrize(
    "kind", [kind for _, kind, _ in api.PUBLIC if is_typeddict(kind) or hasattr(kind, "__dataclass_fields__")]
)
def test_attributes_are_described(kind: Any) -> None:
    told = entries(kind, "Attributes")
    own = set(get_type_hints(kind)) - (set(Options.__annotations__) if kind is TurnOptions else set())
    assert not told or set(told) == own


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as far as the results' types go."""
    origin, parts = get_origin(hint), get_args(hint)
    if is_typeddict(hint):
        hints = get_type_hints(hint)
        needed = hint.__required_keys__ <= set(value) <= set(hints)
        return needed and all(fits(value[key], hints[key]) for key in value)
    if origin is Literal:
        return value in parts
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is list:
        return type(value) is list and all(fits(part, parts[0]) for part in value)
    return hint is Any or (isinstance(value, Mapping) if origin is Mapping else type(value) is hint)


def test_results_have_the_types_that_are_told() -> None:
    model = Llama.build(max_seq_len=64, dtype="float32")
    dialogs: list[llama.Dialog] = [[{"role": "user", "content": "Hi"}], [{"role": "user", "content": "[INST]"}]]
    results: list[tuple[Any, Any]] = [
        *((chunk, llama.Chunk) for chunk in model.stream_text(["A cat"], max_gen_len=3, logprobs=2)),
        *((chunk, llama.Chunk) for chunk in model.stream_chat(dialogs, max_gen_len=3, n=2)),
        (model.text_completion(["A cat", "A dog"], max_gen_len=3, logprobs=2), list[llama.CompletionPrediction]),
        (model.chat_completion(dialogs, max_gen_len=3, logprobs=True), list[llama.ChatPrediction]),
        (model.score(["A cat"]), list[llama.Score]),
    ]
    for value, hint in results:
        assert fits(value, hint), (value, hint)
    assert not fits({"id": 1, "text": "a", "logprob": 0}, Alternative)  # an int where a float is told
    assert not fits({"role": "user"}, llama.Message)
