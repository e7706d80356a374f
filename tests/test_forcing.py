"""Ids that a form forces: they come in one pass, are what they would be one by one, and change nothing that is
drawn."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama, Tokenizer, constraints, generation
from llama.constraints import Constraint
from llama.decoding import forcing
from llama.decoding.calls import Call, Source
from llama.decoding.engine import Engine
from llama.decoding.requests import Request, Step
from llama.decoding.rows import Row
from llama.decoding.sampling import Sampling
from llama.masks import Matcher, forms, vocabulary

pytest.importorskip("llguidance")
KEYS = {
    "type": "object",
    "properties": {"the name of the cat": {"enum": ["Tom", "Lily"]}, "happy": {"type": "boolean"}},
    "required": ["the name of the cat", "happy"],
    "additionalProperties": False,
}
TALE = {"regex": "The little (dog|girl) ran to the (tree|house) and (found|played) with it[.!]"}
SEEN: list[dict[str, Any]] = [
    {"json_schema": KEYS},
    TALE,
    {"choice": ["a é red ball", "a éclair", "nobody knew where"]},
]


@pytest.fixture(scope="module")
def llama(tiny: Path, tokenizer_path: str) -> Llama:
    return Llama.build(str(tiny), tokenizer_path, 128, 4, device="cpu")


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer(str(Path(constraints.__file__).parent / "demo" / "tokenizer.model"))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each step behind a prompt has run, as they come."""
    found: list[int] = []

    def counts(run: Any) -> Any:
        def counted(self: Engine, tokens: Any, *more: Any) -> Any:
            found.append(len(tokens))
            return run(self, tokens, *more)

        return counted

    for name in ("decode", "run_each"):
        monkeypatch.setattr(Engine, name, counts(getattr(Engine, name)))
    return found


def test_one_pass(llama: Llama, passes: list[int]) -> None:
    """The prompt's last state gives the first id. A pass runs it with all that is certain; the last piece is left
    open."""
    text = "the little dog ran to the house with it"
    [answer] = llama.text_completion(["Tim"], 0, constraint={"choice": [text]}, echo=True)
    assert answer["generation"] == "Tim" + text
    rest = [i for i in range(len(passes)) if passes[i] > 1]
    assert rest == [0]
    assert len(passes) <= 3


def test_the_same_object(llama: Llama, passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With forced ids and without; 40 bytes of keys are tens of steps less."""
    found, names = [], ("where the river came from", "where it went")
    schema = {"type": "object", "properties": {name: {"const": 1} for name in names}, "required": list(names),
              "additionalProperties": False}  # fmt: skip
    for _ in range(2):
        [answer] = llama.text_completion(["Lily"], 1.0, 1.0, seed=3, constraint={"json_schema": schema})
        found.append((json.loads(answer["generation"]), len(passes)))
        passes.clear()
        monkeypatch.setattr(Matcher, "forced", lambda self: [])
    assert found[0][0] == found[1][0] == dict.fromkeys(names, 1)
    assert found[0][1] < found[1][1]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (b'name"', "n ame"),  # what is behind the quotation mark may be one piece with it
        (b" the big", "▁the"), (b" the big ", "▁the ▁big"), (b"a\n", "a"),
        (b"  a  b", "▁ ▁a ▁"),
        ("日x.\"".encode(), "<0xE6> <0x97> <0xA5> x"),
        (b"ab\xc3", ""), ("é".encode()[1:], ""),  # a character that is not whole
        (b"x" * 300, " ".join(["x"] * 255)),
        ("a▁b".encode(), ""),  # the tokenizer makes a space of it
    ],
)  # fmt: skip
def test_what_is_certain(text: bytes, pieces: str, demo: Tokenizer) -> None:
    assert [demo.piece(i) for i in vocabulary(demo).certain(demo, text)] == pieces.split()


def asked(llama: Llama, form: Any, **more: Any) -> list[str]:
    found = llama.text_completion(["The dog", "Lily"], 1.0, 1.0, 60, constraint=form, **more)
    return [answer["generation"] for answer in found]


@pytest.mark.parametrize("form", SEEN[1:])
def test_scores_change_nothing(form: Any, llama: Llama) -> None:
    """And they are those of the same ids in one prompt."""
    assert asked(llama, form, seed=7) == asked(llama, form, seed=7, logprobs=3)
    prompt = llama.tokenizer.encode("Lily", bos=True, eos=False)
    steps = [step for step in llama.steps([prompt], 0, constraint=form, logprobs=True) if step.token is not None]
    whole = [*prompt, *(step.token for step in steps)]
    [again] = llama.generate([whole], 1, 0, logprobs=True, echo=True)[1] or [[]]  # type: ignore[arg-type]
    torch.testing.assert_close([step.logprob for step in steps], again[len(prompt) : len(whole)], atol=1e-4, rtol=0)


WAYS: list[dict[str, Any]] = [
    {}, {"logit_bias": {300: 2.0}, "repetition_penalty": 1.3, "top_p": 0.9, "stop": " and", "stop_ids": [301]},
]  # fmt: skip


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_seeds_text(options: dict[str, Any], llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the same alone, among others, in passes of its own, and in Meta's way."""

    def one(i: int) -> Any:
        how: dict[str, Any] = {"max_gen_len": 25, "seed": [i], "constraint": [*SEEN, None][i], **options}
        return llama.text_completion([["Lily", "The dog ran"][i % 2]], 0.9, **{"top_p": 1.0, **how})

    alone = [one(i) for i in range(4)]
    for copied in (forcing.COPIED, 1):
        monkeypatch.setattr(forcing, "COPIED", copied)
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(one, range(4))) == alone
    hook = llama.model.layers[0].register_forward_hook(lambda *_: None)
    assert [one(i) for i in range(3)] == alone[:3]
    hook.remove()


@pytest.mark.parametrize("how", ["invariant", "draft"])
def test_in_any_batch(how: str, llama: Llama, tiny: Path, tokenizer_path: str) -> None:
    """To the bit, with batch_invariant; with guesses of a draft model for those that have no form."""
    parts: Any = {"batch_invariant": True} if how == "invariant" else {"draft": str(tiny)}
    other = Llama.build(str(tiny), tokenizer_path, 128, 4, device="cpu", **parts)

    def one(i: int) -> Any:
        how_scored = {"logprobs": True} if how == "invariant" else {}
        return other.text_completion(["Lily"], 0.9, 1.0, 25, seed=[i], constraint=[*SEEN, None][i], **how_scored)

    alone = [one(i) for i in range(4)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(one, range(4))) == alone


def test_rows_that_draw_together(llama: Llama) -> None:
    """One draw is for all rows of a call: it is the same with others beside them."""
    alone = asked(llama, TALE, seed=4)
    beside = iter(llama.stream_text(["Tim"], 0.5, max_gen_len=60, seed=1, constraint=SEEN[0]))
    next(beside)
    assert asked(llama, TALE, seed=4) == alone


def test_weights_that_change(tiny: Path, tokenizer_path: str) -> None:
    """What a pass has decided with the old ones is decided anew, and counted once."""
    llama = Llama.build(str(tiny), tokenizer_path, 128, 2, device="cpu")
    options: dict[str, Any] = {"repetition_penalty": 1.2, "constraint": TALE}
    prompt = [llama.tokenizer.encode("Tim", bos=True, eos=False)]
    steps = iter(llama.steps(prompt, 0, **options))
    told = [next(steps)]
    llama.model.output.weight.data.mul_(-1)
    llama.text_completion(["Lily"], 0, max_gen_len=1)  # which looks at the weights
    row = llama._scheduler.rows[0]
    told += steps
    ids = [step.token for step in told if step.token is not None]
    assert row.ids[row.prompt_length :] == ids
    assert row.counts is not None
    assert row.counts.tolist() == torch.bincount(torch.tensor(ids), minlength=len(row.counts)).tolist()


def test_what_was_read_with_other_weights_is_read_anew(tiny: Path, tokenizer_path: str) -> None:
    """Found out in a pass over forced ids; or known before, since the cache was used past the stream."""

    def scores(use: Any) -> list[Any]:
        llama = Llama.build(str(tiny), tokenizer_path, 128, 2, device="cpu")
        prompt = [llama.tokenizer.encode("Tim", bos=True, eos=False)]
        steps = iter(llama.steps(prompt, 0, constraint=TALE, logprobs=True))
        told = [next(steps)]
        for block in llama.model.layers:
            block.attention.wv.weight.data.mul_(-1)
        use(llama)
        told += steps
        return [(step.token, step.logprob) for step in told]

    found = scores(lambda llama: llama.text_completion(["Lily"], 0, max_gen_len=1))
    expected = scores(lambda llama: llama.model(torch.tensor([[1, 5]]), 0))
    assert [token for token, _ in found] == [token for token, _ in expected]
    assert [p for _, p in found if p] == pytest.approx([p for _, p in expected if p], abs=1e-4)


def test_what_is_not_forced(llama: Llama) -> None:
    """An id that has a bias, that ends the row, or behind which nothing could be chosen; and none before there is an
    id."""
    chooser, tokenizer = llama._scheduler.chooser, llama.tokenizer
    text = "the little dog ran to the house with it"
    first, *rest = tokenizer.encode_behind(text)
    [form] = forms(Constraint.of({"choice": [text]}), tokenizer, [[1, 5]], {2})

    def forced(max_new: int, *ids: int, **more: Any) -> list[int]:
        request = Request([1, 5], max_new, grammar=replace(form, bare=False), **more)
        row = Row(Call(llama._scheduler, [request], Source(1)), 0, 128)
        chooser.admit(row)
        for token in ids:
            row.accept(Step(0, token))
        return chooser.forced(row)

    certain = forced(99, first)
    assert certain == rest[: len(certain)]
    assert len(certain) > 5
    assert forced(99) == []
    assert [len(forced(n, first)) for n in (1, 2, 3, 4)] == [0, 0, 1, 2]
    assert forced(99, first, ends=frozenset({2, rest[2]})) == rest[:2]
    assert forced(99, first, sampling=Sampling(logit_bias={rest[1]: -100.0})) == rest[:1]


@pytest.mark.parametrize("failing", ["forced", "behind"])
def test_a_form_that_fails_fails_alone(failing: str, llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    other, wrong = iter(llama.steps([[1, 5]], 0, max_gen_len=30)), iter(llama.steps([[1, 6]], 0, constraint=TALE))
    next(other)
    next(wrong)

    def fails(self: Matcher, *_: Any) -> Any:
        raise ValueError("no more")

    monkeypatch.setattr(Matcher, failing, fails)
    assert len(list(other)) == 29
    with pytest.raises(ValueError, match="no more"):
        list(wrong)


def test_somebodys_own_draw(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """It draws one id for each row, and none of those that are forced."""
    asked_for: list[int] = []

    def draw(probs: torch.Tensor, top_p: float) -> torch.Tensor:
        asked_for.append(len(probs))
        return torch.multinomial(probs, 1)

    monkeypatch.setattr(generation, "sample_top_p", draw)
    assert len(asked(llama, TALE)) == 2
    assert set(asked_for) <= {1, 2}
