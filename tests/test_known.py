"""Whether a folder gives the published numbers of the model that it is, at the bounds of what rounding may change."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pytest
import torch

from llama import Llama
from llama.verification import known, repairs
from llama.verification.known import Known, check_known, check_order, check_published, check_setting, recognise
from llama.verification.results import FAIL, NOT_APPLICABLE, PASS

X: dict[str, Any] = {"name": "X", "names": ["x"], "rope_theta": 1e4, "norm_eps": 1e-5}
Y: dict[str, Any] = {**X, "name": "Y", "names": ["y"], "rope_theta": 1e6}


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama.build(max_seq_len=64, device="cpu", dtype="float32")


def test_settings_of_a_known_model() -> None:
    """A model of its shape may be a fine-tune, which may have another rope_theta, but no other norm_eps."""
    one, alike = Known([X], "its name"), Known([X, {**X, "name": "Z"}])
    for model, check, value, told in (
        (one, repairs.THETA, 1e4, (PASS, "10000, as X")),
        (one, repairs.THETA, 1e4 * 1.0009, (PASS, "10009, as X")),
        (one, repairs.THETA, 1e4 * 1.002, (FAIL, "rope_theta is 10020, and that of X is 10000")),
        (alike, repairs.EPS, 1e-5, (PASS, "1e-05, as models of its shape (X, Z)")),
        (alike, repairs.EPS, 1e-6, (FAIL, "norm_eps is 1e-06, and that of models of its shape (X, Z) is 1e-05")),
        (alike, repairs.THETA, 1e6, None),
        (Known([X, Y]), repairs.EPS, 1e-5, (PASS, "1e-05, as models of its shape (X, Y)")),
        (Known([X, Y], "the first"), repairs.THETA, 1e4, None),  # they do not agree
        (Known([]), repairs.EPS, 1e-5, None),
    ):
        found = check_setting(model, check, value)
        assert (found and (found.verdict, found.told)) == told
        assert found is None or found.verdict == PASS or found.means == repairs.MEANS[check]


def test_what_is_told_of_what_is_known() -> None:
    several = [{**X, "name": f"X{i}"} for i in range(6)]
    assert check_known(Known([X], "its name"))[1:3] == (PASS, "X, recognised by its name")
    assert check_known(Known(several))[1:3] == (
        NOT_APPLICABLE, "it has the shape of X0, X1, X2, X3, X4 and 1 more; neither a digest nor the folder's name "
        "says which of them it is",
    )  # fmt: skip
    assert check_known(Known([]))[1:3] == (NOT_APPLICABLE, "none whose numbers this package has")
    assert (Known([X]).window, Known([X, {**X, "perplexity": []}]).window) == (2048, 4096)


SHAPE = {"dim": 8, "n_layers": 2, "n_heads": 2, "kv_heads": 2, "ffn_width": 16, "vocab_size": 32}


def folder(path: Path, **norms: float) -> Any:
    """A checkpoint whose norms hold one number each."""
    return SimpleNamespace(folder=path, read=lambda name, *_: torch.full((8,), norms.get(name.replace(".", "_"), 1.0)))


def test_how_a_model_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the last norm, whatever the rest is; or by shape and the name of one of the last folders; or by shape."""
    plain = folder(tmp_path)
    numbers = torch.full((8,), 1.0, dtype=torch.bfloat16).view(torch.int16).numpy().tobytes()
    assert known.digest(plain, "norm.weight") == known.hashlib.sha256(numbers).hexdigest()[:16]
    by_digest = {**X, "name": "D", "shape": SHAPE, "digests": {"norm": known.digest(plain, "norm.weight")}}
    entries = [{**X, "shape": SHAPE}, {**Y, "shape": SHAPE}, {**X, "name": "other", "shape": {**SHAPE, "dim": 9}}]
    monkeypatch.setattr(known, "published", lambda: [*entries, by_digest])
    args: Any = SimpleNamespace(**SHAPE)
    found = recognise(plain, args)
    assert (found.names, found.how) == ("D", "the digest of its last norm")
    for path, name in (("X-hf", "X"), ("Y.gguf", "Y"), ("models--org--y/snapshots/0123", "Y"), ("y/b/c/d", "Y")):
        found = recognise(folder(tmp_path / path, norm_weight=2.0), args)
        assert (found.names, found.how) == (name, "its shape and its folder's name"), path
    for path in ("a", "y/a/b/c/d"):
        found = recognise(folder(tmp_path / path, norm_weight=2.0), args)
        assert (found.names, found.how) == ("X, Y", ""), path
    assert recognise(folder(tmp_path / "x", norm_weight=2.0), SimpleNamespace(**{**SHAPE, "dim": 7})).entries == []  # type: ignore[arg-type]


def test_the_order_of_layers(tmp_path: Path) -> None:
    norms = {f"layers_{i}_attention_norm_weight": 1.0 + i for i in range(3)}
    good = folder(tmp_path, **norms)
    stated = [known.digest(good, f"layers.{i}.attention_norm.weight") for i in range(3)]
    entry = Known([{**X, "digests": {"layers": stated}}], "its digest")
    assert check_order(entry, good) is None
    assert check_order(Known([X], "its name"), good) is None
    assert check_order(Known([]), good) is None
    moved = folder(tmp_path, **{**norms, "layers_0_attention_norm_weight": 3.0, "layers_2_attention_norm_weight": 1.0})
    found = check_order(entry, moved)
    assert found is not None
    assert (found.verdict, found.told) == (
        FAIL, "by the digests of X, layer 0 is the model's layer 2, layer 2 is the model's layer 0",
    )  # fmt: skip
    other = folder(tmp_path, **{**norms, "layers_0_attention_norm_weight": 9.0})  # a fine-tune: the order is not known
    assert check_order(entry, other) is None


@pytest.mark.parametrize(
    ("means", "first", "right"), [(0.0, 0.0, True), (0.009, 0.0, True), (0.011, 0.0, False), (0.0, 0.021, False)]
)
def test_published_logits(means: float, first: float, right: bool, llama: Llama) -> None:
    """One that is off anywhere counts. Four times as much is the rounding of bfloat16."""
    ids = [1, 5, 9]
    logits = llama.model(torch.tensor([ids]), 0)[0]
    wrong = torch.tensor([0.0, -1.0, 0.0])
    numbers = {
        "ids": ids, "means": (logits.mean(-1) + means * wrong).tolist(), "means_within": 0.01,
        "first": (logits[0, :3] + first * wrong).tolist(), "first_within": 0.02, "source": "here",
    }  # fmt: skip
    entry = {**X, "logits": numbers}
    (found,) = check_published(llama, Known([entry], "its name"))
    assert (found.name, found.verdict) == ("published logits", PASS if right else FAIL)
    assert found.told.startswith(
        f"X's: means {means:.3f} apart at most (bound 0.01), single ones {first:.3f} (bound 0.02)"
    )
    (found,) = check_published(llama, Known([entry]))  # it may be another model of that shape
    assert found.verdict == (PASS if right else NOT_APPLICABLE)
    assert right or found.told.endswith("here; it is no X, or not as published")
    rounded = Llama.build(max_seq_len=64, device="cpu", quantize="int8") if means else None
    if rounded is not None:
        (found,) = check_published(rounded, Known([entry], "its name"))
        assert found[1:3] == (NOT_APPLICABLE, "the weights are rounded to int8 or int4")
        found, _ = texts_of(rounded, {"prompt": "a", "answer": "b", "source": "here"})
        assert found[1:3] == (NOT_APPLICABLE, "the weights are rounded to int8 or int4")


def texts_of(llama: Llama, text: dict[str, str], how: str = "its name") -> Any:
    return list(check_published(llama, Known([{**X, "texts": [text, text]}], how)))


def test_published_texts(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token of the answer is the likeliest after those before it, or nearly; of a long one as much as fits."""
    prompt = "Once upon a time"
    ids = llama.tokenizer.encode(prompt, bos=True, eos=False)
    answer = llama.text_completion([prompt], max_gen_len=20, temperature=0)[0]["generation"]
    text = {"prompt": prompt, "answer": answer, "source": "here"}
    whole = llama.tokenizer.encode(prompt + answer, bos=True, eos=False)
    first, second = texts_of(llama, text)
    assert (first.name, second.name, first.verdict) == ("published text 1", "published text 2", PASS)
    assert first.told == f"each of {len(whole) - len(ids)} tokens is the likeliest ('{prompt}', here)"
    assert texts_of(llama, text, "") == []
    one_pass, at = known.one_pass, len(ids) + 2

    def lowered(by: float, *places: int) -> Any:
        """A model by which the tokens at these places are less likely."""

        def run(llama: Llama, given: Any) -> torch.Tensor:
            logprobs = one_pass(llama, given).clone()
            for place in places:
                logprobs[place - 1, whole[place]] = logprobs[place - 1].max() - by
            return logprobs

        return run

    near = known.NEAR[torch.float32]
    monkeypatch.setattr(known, "one_pass", lowered(near * 0.9, at))
    assert texts_of(llama, text)[0].verdict == PASS
    monkeypatch.setattr(known, "one_pass", lowered(3.0, at, at + 3))
    found = texts_of(llama, text)[0]
    should = llama.tokenizer.piece(whole[at])
    assert found.verdict == FAIL
    assert found.told.startswith(f"token 3 of {len(whole) - len(ids)} should be {should!r}, and is ")
    assert " nats less likely than " in found.told
    monkeypatch.setattr(known, "one_pass", lowered(3.0, len(ids), len(whole) - 1))
    assert texts_of(llama, text)[0].told.startswith("token 1 of ")
    monkeypatch.setattr(known, "one_pass", lowered(3.0, len(ids) - 1))  # of the prompt
    assert texts_of(llama, text)[0].verdict == PASS
    vocabulary = llama.model.vocab_size
    for gain, verdict in ((1.01, PASS), (0.99, FAIL)):
        level = -math.log(vocabulary) + gain
        monkeypatch.setattr(
            known, "one_pass", lambda _, given, level=level: torch.full((len(given), vocabulary), level)
        )
        assert texts_of(llama, text)[0].verdict == verdict
    monkeypatch.setattr(known, "one_pass", one_pass)
    monkeypatch.setattr(llama.model.params, "max_seq_len", len(ids) + 4)
    assert texts_of(llama, text)[0].told.startswith("each of 4 tokens is the likeliest")


@pytest.mark.parametrize(
    ("method", "value", "verdict"),
    [("joined-64", 10.0, PASS), ("joined-64", 10.2, FAIL), ("lm-eval", 50.0, PASS), ("lm-eval", 10.0, FAIL)],
)
def test_published_perplexities(
    method: str, value: float, verdict: str, llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def perplexity(_: Llama, text: str, method: str) -> Optional[dict[str, Any]]:
        asked.append((text, method))
        if text == "short":
            raise ValueError("too short")
        return {"perplexity": 10.05, "word_perplexity": 50.0, "window": 64}

    monkeypatch.setattr(known, "perplexity", perplexity)
    entry = {**X, "perplexity": [{"method": method, "value": value, "source": "there"}]}
    (found,) = known.check_perplexities(llama, Known([X, entry], "its name"), "text")
    assert (found.name, found.verdict, asked) == (f"wikitext {method}", verdict, [("text", method)])
    of = "50.0000 of a word" if method == "lm-eval" else "10.0500 of a token"
    assert found.told == f"perplexity {of}, in windows of 64; {value} is published for X (there)"
    (found,) = known.check_perplexities(llama, Known([entry]), "short")
    assert found[1:3] == (NOT_APPLICABLE, "too short")
    (found,) = known.check_perplexities(llama, Known([X]), "text")
    assert (found.name, found.verdict) == ("wikitext joined-64", NOT_APPLICABLE)
    assert found.told.endswith("no number is published here for this model")
