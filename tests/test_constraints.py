"""Answers of a given form: what comes is of it, on every path, and what cannot be asked for is refused before any work."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from llama import Llama

pytest.importorskip("llguidance")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 3, "maximum": 12}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMS: list[tuple[dict[str, Any], str]] = [  # and what the text must match
    ({"choice": ["yes", "no", "perhaps so"]}, "yes|no|perhaps so"),
    ({"choice": [" yes", " no"]}, " yes| no"),
    ({"choice": ["🦙 é", "\n\nx|."]}, "🦙 é|\n\nx\\|\\."),
    ({"regex": r"[A-Z][a-z]{2,5} [0-9]{3}"}, "[A-Z][a-z]{2,5} [0-9]{3}"),
    ({"regex": "(?:  a| b|c)d"}, "(?:  a| b|c)d"),
    ({"grammar": 'start: "The " X "."\nX: "cat" | "dog"'}, r"The (cat|dog)\."),
    ({"grammar": 'root ::= "a" | "b" x\nx ::= [0-9]'}, "a|b[0-9]"),
]


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama.build(max_seq_len=128, max_batch_size=3)


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize(("constraint", "pattern"), FORMS)
def test_the_text_matches(constraint: Any, pattern: str, echo: bool, llama: Llama) -> None:
    """To the character: behind an echoed prompt a first piece shows its space, and otherwise loses it."""
    for temperature in (0, 1.5):
        for answer in llama.text_completion(["Lily"], temperature, 1.0, 40, echo=echo, constraint=constraint, n=6, seed=1):
            text = answer["generation"]
            assert re.fullmatch(pattern, text.removeprefix("Lily") if echo else text)
            assert answer["finish_reason"] == "stop"


def test_json_of_a_schema(llama: Llama) -> None:
    given = {"max_gen_len": 90, "constraint": {"json_schema": json.dumps(PERSON)}}
    for (whole,) in (llama.text_completion(["Tim"], seed=i, **given) for i in range(4)):  # type: ignore[arg-type]
        person = json.loads(whole["generation"])
        assert person.keys() == {"name", "age"}
        assert len(person["name"]) <= 8
        assert 3 <= person["age"] <= 12
