"""What only a real GPU can show. Skipped where there is none; `benchmarks/gpu.py` runs it with all that is measured
there."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, Optional
from unittest import mock

import events
import pytest
import torch
from conftest import ROOT, golden, shared
from helpers import check_golden, run_golden

from llama import Llama
from llama.commands import bench
from llama.decoding import gpu_step
from llama.decoding.calls import Call, Source
from llama.decoding.compiled import Recorded
from llama.decoding.requests import Request
from llama.decoding.sampling import Sampling

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TEXTS = ["Once upon a time", "The dog", "A little girl named Lily went to the park and saw a big"]
FORMS = [None, "int8", "int4"]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test gives back what it took."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    gc.collect()
    torch.cuda.empty_cache()


def build(rows: int = 4, dtype: str = "bfloat16", **options: Any) -> Llama:
    """The demo model: trained weights, whose best ids are seldom close."""
    return Llama.build(None, None, 256, rows, device="cuda", dtype=dtype, **options)


def never(model: object) -> bool:
    return False


def ids(llama: Llama, rows: int = 3, new: int = 24) -> list[list[int]]:
    return llama.generate(bench.make_prompts(rows, 9, llama.model.vocab_size), new, temperature=0)[0]


@pytest.mark.parametrize("name", ["toy-mha", "toy-gqa"])
def test_metas_numbers(name: str) -> None:
    """In float32; what is drawn depends on the device. The model gets its tokens on the CPU."""
    cases = golden(name)
    cases["generate"] = [case for case in cases["generate"] if case["args"].get("temperature") == 0]
    assert cases["generate"]
    check_golden(run_golden(str(shared(f"models/{name}")), cases, 1, "cuda"), cases)


def test_every_kernel_computes_what_its_plain_form_does() -> None:
    import gpu_kernels

    with gpu_kernels.place(small=False) as place:
        wrong = {}
        for name, kernel in gpu_kernels.kernel_cases(place, torch.bfloat16):
            if "T=2040" in name or "B=16" in name:
                continue
            record = gpu_kernels.compared(kernel, kernel.make(), torch.bfloat16)
            if not record["right"]:
                wrong[name] = record
    assert wrong == {}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("own_kernels", [True, False])
def test_recorded_steps_against_plain_ones(
    form: Optional[str], own_kernels: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """No graph is given up for numbers that differ, and the logits of the same ids are near. Ids may differ: bfloat16
    rounds ties as it likes. The same call gives the same ones, from the first one on, whose steps are compared."""
    import gpu_parts

    plain = build(quantize=form, compile=False)
    patch = mock.patch.object(gpu_step, "suits", gpu_step.suits if own_kernels else never)
    with patch:
        recorded = Llama(plain.model, plain.tokenizer, compile=None)
    assert isinstance(recorded._engine.graph, Recorded)
    for rows in (1, 3, 4):
        found = ids(recorded, rows)
        assert ids(recorded, rows) == found
        prompts = bench.make_prompts(rows, 9, plain.model.vocab_size)
        ours, theirs = (gpu_parts.forced_logits(llama, prompts, found, 16) for llama in (recorded, plain))
        assert ((ours - theirs).norm(dim=-1) <= 0.1 * theirs.norm(dim=-1)).all()
    assert "The decode step is not" not in capsys.readouterr().out
    assert any(recording.graph is not None for recording in recorded._engine.graph._recordings.values())


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.8}, {"temperature": 0.8, "repetition_penalty": 1.2, "top_k": 20}]
)
@pytest.mark.parametrize("logprobs", [False, True])
def test_no_step_waits_for_the_device(options: dict[str, Any], logprobs: bool) -> None:
    llama = build()
    sampling = Sampling(**{"temperature": 0.0, **options})

    def steps() -> Iterator[Any]:
        prompts = bench.make_prompts(3, 9, llama.model.vocab_size)
        llama.forget()
        return iter(Call(llama._scheduler, [Request(p, 24, sampling, logprobs=logprobs) for p in prompts], Source(3)))

    for _ in steps():  # records
        pass
    running = steps()
    next(running)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*beta.*|.*prototype.*")
        torch.cuda.set_sync_debug_mode("error")
    try:
        assert sum(step.token is not None for step in running) == 3 * 24 - 1
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-3), ("bfloat16", 0.2)])
def test_requests_that_come_and_go(dtype: str, near: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Each gives what it gives alone, step by step on plain operators."""
    alone = events.Alone(build(1, dtype, compile=False), near, greedy=dtype == "bfloat16")
    result = events.run(build(4, dtype), alone, 700, 1)
    assert result["texts"] > 100
    assert result["ties"] < result["texts"] / 10
    assert "The decode step is not" not in capsys.readouterr().out


def test_a_model_that_is_let_go_leaves_its_memory() -> None:
    ids(build())  # what libraries keep
    gc.collect()
    before = torch.cuda.memory_allocated()
    llama = build()
    ids(llama)
    assert torch.cuda.memory_allocated() > before
    model = weakref.ref(llama.model)
    gc.disable()
    try:
        del llama
        assert model() is None
    finally:
        gc.enable()
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_two_models_in_turn() -> None:
    """Each has its own graphs, buffers and cache."""
    first, second = build(), build(quantize="int8")
    alone = ids(first), ids(second)
    for _ in range(3):
        assert (ids(first), ids(second)) == alone
    assert first.text_completion(TEXTS, 0, max_gen_len=12) == first.text_completion(TEXTS, 0, max_gen_len=12)


def test_freed_memory_is_read_by_no_graph() -> None:
    llama = build()
    before = ids(llama)
    for empties in (False, True):
        gc.collect()
        if empties:
            torch.cuda.empty_cache()
        kept = [torch.full((2**i,), float("nan"), device="cuda") for i in range(7, 26)]
        del kept
        assert ids(llama) == before
