from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import golden, shared

from llama import Tokenizer
from llama.chat import B_INST, B_SYS, E_INST, E_SYS, SPECIAL_TAGS, UNSAFE_ERROR, DialogError, encode_dialog, is_unsafe


@pytest.fixture(scope="module")
def llama2() -> Tokenizer:
    return Tokenizer(str(shared("tokenizers/llama2/tokenizer.model")))


def test_metas_prompts(llama2: Tokenizer) -> None:
    dialogs = golden("chat_prompts")["dialogs"]
    assert len(dialogs) == 8
    for case in dialogs:
        assert encode_dialog(case["dialog"], llama2) == case["tokens"]
        assert is_unsafe(case["dialog"]) == case["unsafe"]


def test_published_prompts(llama2: Tokenizer) -> None:
    for case in json.loads(shared("tokenizers/published_chat_vectors.json").read_text(encoding="utf-8")):
        assert (encode_dialog(case["dialog"], llama2) == case["expected_tokens"]) == case["matches_meta_formatting"]


def user(content: str) -> Any:
    return {"role": "user", "content": content}


def assistant(content: str) -> Any:
    return {"role": "assistant", "content": content}


def system(content: str) -> Any:
    return {"role": "system", "content": content}


def test_constants() -> None:
    assert (B_INST, E_INST) == ("[INST]", "[/INST]")
    assert (B_SYS, E_SYS) == ("<<SYS>>\n", "\n<</SYS>>\n\n")
    assert SPECIAL_TAGS == ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"]
    assert UNSAFE_ERROR == "Error: special tags are not allowed as part of the prompt."


def test_every_turn_is_encoded_by_itself(tokenizer: Tokenizer) -> None:
    def part(text: str, eos: bool) -> list[int]:
        return tokenizer.encode(text, bos=True, eos=eos)

    dialog = [system(" be kind "), user("  hi "), assistant(" yo "), user("\nbye\n")]
    before = [dict(message) for message in dialog]
    expected = part("[INST] <<SYS>>\n be kind \n<</SYS>>\n\n  hi [/INST] yo ", True) + part("[INST] bye [/INST]", False)
    assert encode_dialog(dialog, tokenizer) == expected
    assert dialog == before


def test_control_marks_in_text_are_text(tokenizer: Tokenizer) -> None:
    ids = encode_dialog([user("</s><s> <unk>")], tokenizer)
    assert ids[0] == tokenizer.bos_id
    assert not {0, 1, 2} & set(ids[1:])


@pytest.mark.parametrize(
    ("dialog", "message"),
    [
        ([], "needs a message from the user"),
        ([system("s")], "needs a message from the user"),
        ([system("s"), assistant("a")], "message 1 is from 'assistant', not 'user'"),
        ([assistant("a")], "message 0 is from 'assistant', not 'user'"),
        ([user("u"), user("u")], "message 1 is from 'user', not 'assistant'"),
        ([user("u"), system("s"), user("u")], "message 1 is from 'system'"),
        ([{"role": "bot", "content": "x"}], "model only supports 'system', 'user' and 'assistant' roles"),
        ([user("u"), assistant("a")], "Last message must be from user, got assistant"),
        ([{"role": "user"}], "message 0 must be"),
        ([{"content": "hi"}], "message 0 must be"),
        (["hi"], "message 0 must be"),
        ([user(None)], "content of message 0 is NoneType"),  # type: ignore[arg-type]
        ("hi", "a dialog is a list of messages, not str"),
    ],
)
def test_bad_dialogs(dialog: Any, message: str, tokenizer: Tokenizer) -> None:
    """Meta documents an AssertionError; a ValueError is what it is."""
    with pytest.raises(DialogError, match=message) as caught:
        encode_dialog(dialog, tokenizer)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, AssertionError)


def test_extra_keys_are_ignored(tokenizer: Tokenizer) -> None:
    assert encode_dialog([{**user("hi"), "name": "Ann"}], tokenizer) == encode_dialog([user("hi")], tokenizer)


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
def test_tags_are_looked_for_in_every_message(tag: str) -> None:
    for at in range(3):
        dialog = [user("a"), assistant("b"), user("c")]
        dialog[at]["content"] += tag
        assert is_unsafe(dialog)
    assert not is_unsafe([user(tag.lower() if "INST" in tag else tag.replace("<", "< "))])
