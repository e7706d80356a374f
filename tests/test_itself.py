"""What `llama verify` compares within this code: each way to the same numbers, beside ways that go wrong."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pytest
import torch

from llama import Llama
from llama.verification import child, itself
from llama.verification.results import FAIL, NOT_APPLICABLE, PASS, Result
from llama.verification.texts import PROSE, STORIES

IDS = [1, 20, 30, 40]


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama.build(max_seq_len=64, device="cpu", dtype="float32")


def checked(llama: Llama, name: str) -> Result:
    return next(result for result in itself.check_itself(llama) if result.name == name)


def test_the_text_that_is_read(llama: Llama) -> None:
    """Half a story and half of the prose, so that any model finds some of it likely."""
    encode = llama.tokenizer.encode
    story, prose = encode(STORIES[0], bos=True, eos=False), encode(PROSE[0], bos=False, eos=False)
    half = itself.TOKENS // 2
    assert itself.sample(llama) == story[:half] + prose[: half - 1]


def test_a_divergence_by_hand() -> None:
    """Rows (1/2, 1/2) beside (1/4, 3/4), and a row beside itself; below 0 it is rounding."""
    p, q = (torch.tensor([row, [0.5, 0.5]]).log() for row in ([0.5, 0.5], [0.25, 0.75]))
    assert itself.divergence(p, q) == pytest.approx(0.5 * (0.5 * math.log(2) + 0.5 * math.log(2 / 3)))
    assert itself.divergence(p, p + 1) == 0
    assert itself.compare("x", "these", p, q, 0.2).told == (
        "these: 7.2e-02 nats apart a token (bound 0.2), a probability by 2.5e-01 at most"
    )


def test_both_ways_through_the_modules_are_taken(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast one for the reference, and again afterwards; Meta's beside it."""
    fast: list[bool] = []
    one_pass = itself.one_pass
    monkeypatch.setattr(
        itself, "one_pass", lambda llama, ids: fast.append(llama.model.as_built) or one_pass(llama, ids)
    )
    assert checked(llama, "plain modules").verdict == PASS
    assert (fast, llama.model.as_built) == ([True, False], True)


def test_what_is_generated_is_scored_again(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = llama.generate
    found = checked(llama, "generation")
    assert (found.verdict, found.told.split(":")[0]) == (PASS, "24 tokens scored again")

    def scored(change: float) -> Any:
        return lambda *args, **options: (
            (made := generate(*args, **options))[0],
            [[score + change for score in row] for row in made[1] or []],
        )

    for change in (0.5, -0.5):
        monkeypatch.setattr(llama, "generate", scored(change))
        found = checked(llama, "generation")
        assert (found.verdict, "log-probabilities 5.0e-01 apart" in found.told) == (FAIL, True)
    prompt = itself.sample(llama)[: itself.TOKENS // 2]
    logprobs = itself.one_pass(llama, prompt)[-1]
    second = int(logprobs.topk(2).indices[1])
    monkeypatch.setattr(llama, "generate", lambda *_, **__: ([[second]], [[float(logprobs[second])]]))
    found = checked(llama, "generation")
    ahead = float(logprobs.max() - logprobs[second])
    assert (found.verdict, f"the best token {ahead:.1e} ahead" in found.told) == (FAIL, True)
    monkeypatch.setattr(llama, "generate", lambda *_, **__: ([[]], [[]]))
    assert checked(llama, "generation").told == "the model ends the text at once"


@pytest.mark.parametrize(
    ("ours", "scores", "verdict", "told"),
    [
        ([5, 6, 7, 8], [-1.0, -2.0, -3.0, -4.0], PASS, "4 of 4 tokens alike, log-probabilities 0.0e+00 apart"),
        ([5, 6, 9, 9], [-1.0, -2.0, -3.0, -9.0], PASS, "2 of 4 tokens alike, log-probabilities 0.0e+00 apart"),
        ([5, 6, 9, 9], [-1.0, -2.0, -3.5, -4.0], FAIL, "2 of 4 tokens alike, log-probabilities 5.0e-01 apart"),
        ([5, 6], [-1.0, -2.0], PASS, "2 of 2 tokens alike"),
        ([5, 6, 7, 8], [-1.5, -2.0, -3.0, -4.0], FAIL, "4 of 4 tokens alike, log-probabilities 5.0e-01 apart"),
        ([], [], PASS, "0 of 0 tokens alike"),
    ],
)
def test_a_compiled_step(
    ours: list[int], scores: list[float], verdict: str, told: str, llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a plain one, up to the token at which they part, where two may be equally good."""

    def plain(model: Any, tokenizer: Any, compile: Optional[bool]) -> Any:
        assert compile is False
        return SimpleNamespace(generate=lambda *_, **__: ([[5, 6, 7, 8]], [[-1.0, -2.0, -3.0, -4.0]]))

    monkeypatch.setattr(itself, "Llama", plain)
    monkeypatch.setattr(llama._engine, "graph", "compiled")
    monkeypatch.setattr(llama, "generate", lambda *_, **__: ([ours], [scores]))
    found = itself._compiled(llama, IDS)
    assert (found.verdict, found.told[: len(told)]) == (verdict, told)


def test_rounded_weights_are_asked_for(llama: Llama) -> None:
    asked: list[Any] = []
    reference = itself.one_pass(llama, IDS)
    rounded = Llama.build(max_seq_len=64, device="cpu", quantize="int8")
    assert (itself.is_quantized(rounded), itself.is_quantized(llama)) == (True, False)
    found = itself.check_quantized(lambda **more: asked.append(more) or rounded, "int8", reference, IDS)
    assert asked == [{"quantize": "int8"}]
    assert (found.verdict, found.told.split(":")[0]) == (PASS, "4 tokens, rounded beside stored")

    def refuse(**_: Any) -> Llama:
        raise ValueError("no room")

    assert itself.check_quantized(refuse, "int4", reference, IDS) == Result("int4", NOT_APPLICABLE, "no room")


def test_how_many_processes_can_be_started(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each GPU; several on a CPU; one on what torch cannot share a model over."""
    assert [itself.startable(llama, most) for most in (1, 2, 4)] == [[], [2], [2, 4]]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for kind, counts in (("cuda", [2]), ("mps", [])):
        monkeypatch.setattr(itself, "device_kind", lambda _, kind=kind: kind)
        assert itself.startable(llama, 4) == counts


@pytest.mark.parametrize(
    ("script", "verdict", "told"),
    [
        ("echo 'A.Error: first' >&2; echo 'B.Error: second' >&2; exit 3", FAIL, "they ended with 3: A.Error: first"),
        ("echo noise; exit 1", FAIL, "they ended with 1: no word of why"),
        ("exit 0", FAIL, "they ended with 0: no word of why"),
        ("echo 'ValueError: not enough memory' >&2; exit 1", NOT_APPLICABLE, "they ended with 1: ValueError: not"),
        ("exec sleep 9", FAIL, "timed out"),
    ],
)
def test_processes_that_end_otherwise(
    script: str, verdict: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """What they print does not come among the rows."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(itself, "CHILD_SECONDS", 0.2 if "sleep" in script else 60.0)
    found = itself.check_processes(2, {}, torch.zeros(1, 2), IDS)
    assert (found.name, found.verdict) == ("2 processes", verdict)
    assert told in found.told
    assert tuple(capfd.readouterr()) == ("", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    assert "No such file" in itself.check_processes(2, {}, torch.zeros(1, 2), IDS).told


def test_one_of_the_processes_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first. Each leaves its group."""
    left: list[Any] = []
    monkeypatch.setattr(child.runtime, "shutdown", lambda: left.append(1))
    out = tmp_path / "out"
    job = {"build": {"max_seq_len": 64, "device": "cpu"}, "ids": IDS, "out": str(out)}
    monkeypatch.setattr(sys, "argv", ["child", json.dumps(job)])
    for rank in (1, 0):
        launch = SimpleNamespace(read=lambda rank=rank: SimpleNamespace(rank=rank))
        monkeypatch.setattr(child, "Launch", launch)
        child.main()
        assert out.exists() == (rank == 0)
    assert left == [1, 1]
