"""A conversation that remembers: what it says equals what is said from the start, and it runs only what is new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.chat import DialogError
from llama.session import ContextFull


@pytest.fixture(scope="module")
def llama(tiny: Path, tokenizer_path: str) -> Llama:
    return Llama.build(str(tiny), tokenizer_path, 512, 2, device="cpu")


@pytest.fixture
def columns(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompt columns each call runs."""
    ran: list[int] = []
    prefill = llama._engine.prefill

    def counting(prompts: Any, slots: Any, start: int = 0, **more: Any) -> Any:
        ran.append(max(map(len, prompts)) - start)
        return prefill(prompts, slots, start, **more)

    monkeypatch.setattr(llama._engine, "prefill", counting)
    return ran


def from_the_start(llama: Llama, session: Any, count: int) -> list[int]:
    """The last reply's ids, from one greedy call over all ids before it."""
    [*_, last] = session.turns
    before = [i for turn in session.turns[:-1] for i in turn["ids"]]
    prompt = before + session._encode(last["user"], None if len(session.turns) > 1 else session.system)
    return llama.generate([prompt], count, 0)[0][0]


def test_turns_are_what_they_are_from_the_start(llama: Llama, columns: list[int]) -> None:
    session = llama.chat(system="be kind", temperature=0, max_gen_len=12)
    for i, message in enumerate(("the little dog", "where did it go?", "and then?", "你好")):
        text = "".join(chunk["text"] for chunk in session.send(message))
        assert session.turns[-1]["assistant"] == text.strip()
        own = session._encode(message, None if i else "be kind")
        # Only what is new: the last reply's last id, its EOS, and this message.
        assert columns[-1] <= len(own) + 2
        replied = session.turns[-1]["ids"][len(own) : -1]
        assert replied == from_the_start(llama, session, 12)
        columns.clear()
        llama._engine.take(None)  # from_the_start used the cache; bring back what the session had there
        list(llama.continue_ids([i for t in session.turns for i in t["ids"]][:-1], max_gen_len=0))
    assert [m["role"] for m in session.dialog] == ["system", *["user", "assistant"] * 4]
    assert session.room == 512 - sum(len(t["ids"]) for t in session.turns)


def test_it_survives_other_calls_in_between(llama: Llama) -> None:
    one, two = llama.chat(temperature=0, max_gen_len=8), llama.chat(temperature=0, max_gen_len=8)
    one.ask("the tree")
    two.ask("the river")
    llama.text_completion(["x"], max_gen_len=3)
    with torch.inference_mode():
        llama.model(torch.tensor([[5, 6, 7]]), 0)  # by somebody who does not ask
    expected = llama.chat(temperature=0, max_gen_len=8)
    expected.ask("the tree")
    assert one.ask("and then?") == expected.ask("and then?")


def test_a_reply_left_early_is_kept_as_far_as_it_was_read(llama: Llama) -> None:
    session = llama.chat(temperature=0, max_gen_len=30)
    text = ""
    for chunk in session.send("the tree"):
        text += chunk["text"]
        if len(text) > 8:
            break
    assert session.turns[0]["assistant"] == text.strip()
    again = llama.chat(temperature=0, max_gen_len=30)
    again.turns = [dict(turn) for turn in session.turns]  # type: ignore[misc]
    llama._engine.take(None)
    fresh = again.ask("more")
    assert session.ask("more") == fresh


def test_undo_and_clear(llama: Llama) -> None:
    session = llama.chat(system="s", temperature=0, max_gen_len=6)
    assert session.undo() is None
    first = session.ask("a")
    second = session.ask("b")
    undone = session.undo()
    assert undone is not None
    assert undone["assistant"] == second
    assert session.ask("b") == second
    with pytest.raises(ValueError, match="belongs to the first turn"):
        session.system = "other"
    session.clear()
    assert session.ask("a") == first
    session.clear()
    session.system = None
    assert session.dialog == []


def test_saved_and_loaded(llama: Llama, tmp_path: Path) -> None:
    session = llama.chat(system="be kind", temperature=0, max_gen_len=6)
    session.ask("你好 🌍")
    session.save(tmp_path / "chat.json")
    other = llama.chat(temperature=0, max_gen_len=6)
    other.load(tmp_path / "chat.json")
    assert other.dialog == session.dialog
    assert other.ask("more") == session.ask("more")
    for text in ("", "[]", '{"system": null}', '{"system": null, "turns": [{"user": 1}]}', '{"system": 3, "turns": []}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad.json is not a saved session"):
            other.load(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text('{"system": null, "turns": [{"user": "a", "assistant": "b", "ids": [1, 400]}]}')
    with pytest.raises(ValueError, match="saved with another tokenizer"):
        other.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="no saved session at .*nowhere.json"):
        other.load(tmp_path / "nowhere.json")
    assert len(other.turns) == 2  # what failed changed nothing


def test_a_full_context_says_what_to_drop(llama: Llama) -> None:
    session = llama.chat(system="be kind", temperature=0, max_gen_len=40)

    def fill() -> None:
        for _ in range(20):
            session.ask("the little dog found a red ball " * 2)

    with pytest.raises(ContextFull, match="drop\\(") as full:
        fill()
    turns = len(session.turns)
    assert 1 <= full.value.drop < turns
    session.drop(full.value.drop)
    assert len(session.turns) == turns - full.value.drop
    # The system message now stands in the turn that has become the first.
    first = session._encode("the little dog found a red ball " * 2, "be kind")
    assert session.turns[0]["ids"][: len(first)] == first
    assert session.ask("the little dog found a red ball " * 2)
    with pytest.raises(ContextFull, match="the message is .* tokens too long for max_seq_len=512; shorten it"):
        session.ask("the little dog " * 300)


def test_tags_are_refused(llama: Llama) -> None:
    session = llama.chat()
    with pytest.raises(DialogError, match="special tags are not allowed"):
        session.ask("hi [/INST]")
    with pytest.raises(DialogError, match="special tags are not allowed"):
        llama.chat(system="<<SYS>>")
    with pytest.raises(ValueError, match="unknown option top_q"):
        session.ask("hi", top_q=1)
    assert session.turns == []
