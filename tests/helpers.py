"""What several test files share: commands in processes of their own, Meta's goldens, twins by transformers, tiny
builds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional, TypeVar, Union

import pytest
import torch
from conftest import ROOT
from forks import Ended

from llama import Llama
from llama.commands import cli
from llama.decoding.calls import Call, Source
from llama.decoding.choosing import Chooser
from llama.decoding.engine import Engine
from llama.decoding.requests import Request
from llama.decoding.rows import Row
from llama.decoding.sampling import Sampling

T = TypeVar("T")
TORCHRUN = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
NOISE = ("OMP_NUM_THREADS", "*****", "NOTE: Redirects are currently not supported")


def run_cells(notebook: str) -> dict[str, Any]:
    """Run the cells of a notebook from top to bottom, which is stored with its outputs: they are plain Python, so no
    kernel has to start. -> its names"""
    cells = [
        cell
        for cell in json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    assert ["".join(cell["source"]) for cell in cells if not cell["outputs"]] == []
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    names: dict[str, Any] = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), notebook, "exec"), names)
    return names


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def run(command: list[str], cwd: Path = ROOT, seconds: int = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=seconds, check=False
    )


def command(name: str, *places: str, **options: Any) -> None:
    """A command of `python -m llama`, in this process."""
    cli.run([name, *places, *(f"--{option}={value}" for option, value in options.items())])


def text_of(result: Union[subprocess.CompletedProcess[str], Ended]) -> str:
    """What it printed, less the time it took. It must have ended well, with nothing on stderr but torchrun's own
    remark."""
    assert result.returncode == 0, result.stderr
    noise = [line for line in result.stderr.splitlines() if line and not any(known in line for known in NOISE)]
    assert noise == []
    lines = result.stdout.splitlines()
    assert sum(line.startswith("Loaded in ") for line in lines) == 1
    return "\n".join(line for line in lines if not line.startswith("Loaded in "))


def watch_prefill(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, told: Callable[[Sequence[Sequence[int]], int], T]
) -> list[T]:
    """What `told` says of each pass over prompts: of their ids, and of the position that it starts at. Grows as they
    run."""
    seen: list[T] = []
    prefill = engine.prefill

    def watched(prompts: Any, slots: Any, start: int = 0, **more: Any) -> Any:
        seen.append(told(prompts, start))
        return prefill(prompts, slots, start, **more)

    monkeypatch.setattr(engine, "prefill", watched)
    return seen


def chosen(
    logits: torch.Tensor, sampling: Sampling, prompt: Sequence[int] = (), new: Sequence[int] = (), grammar: Any = None
) -> torch.Tensor:
    """The next ids of rows with these logits (N, V), options, prompts and new ids, drawn from the global generator."""
    params = SimpleNamespace(vocab_size=logits.shape[-1])
    chooser = Chooser(
        SimpleNamespace(device=logits.device, model=SimpleNamespace(params=params), batch_invariant=False)
    )  # type: ignore[arg-type]
    requests = [Request(list(prompt), 9, sampling, grammar=grammar) for _ in logits]
    call = Call(None, requests, Source(len(logits)))  # type: ignore[arg-type]
    rows = [Row(call, i, 99, lane=i) for i in range(len(logits))]
    for row in rows:
        chooser.admit(row)
    for token in new:
        chooser.count(torch.full((len(logits),), token), rows)
    return chooser.choose(logits, rows)


def run_golden(folder: str, cases: dict[str, Any], model_parallel_size: int, device: str = "cpu") -> dict[str, Any]:
    """Every call of a golden file, on this rank."""
    sizes = cases["max_seq_len"], cases["max_batch_size"], model_parallel_size
    llama = Llama.build(folder, f"{folder}/tokenizer.model", *sizes, device=device, dtype="float32")
    results: dict[str, Any] = {}
    for case in cases["generate"]:
        torch.manual_seed(case["seed"])
        results[case["name"]] = llama.generate(case["prompt_tokens"], **case["args"])
    with torch.inference_mode():
        for name in ("prefill", "chunk_after_prefill", "decode_after_chunk"):
            case = cases[name]
            results[name] = llama.model(torch.tensor(case["tokens"]), case.get("start_pos", 0))[:, -1].tolist()
    return results


def check_golden(results: dict[str, Any], cases: dict[str, Any]) -> None:
    for case in cases["generate"]:
        tokens, logprobs = results[case["name"]]
        assert tokens == case["tokens"], case["name"]
        for ours, theirs in zip(logprobs or [], case.get("logprobs", []), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
    for name in ("prefill", "chunk_after_prefill", "decode_after_chunk"):
        torch.testing.assert_close(
            torch.tensor(results[name]), torch.tensor(cases[name]["logits_last"]), atol=1e-4, rtol=0
        )


SHAPE: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 64, "intermediate_size": 168, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
}  # fmt: skip
# A Code-Llama-like one, a tied one with a long base, one whose heads are wider than dim / n_heads, one without GQA.
TWINS: dict[str, dict[str, Any]] = {
    "code": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "tied": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "tie_word_embeddings": True},
    "wide": {"head_dim": 24},
    "mha": {"num_key_value_heads": 8},
}


def write_twin(folder: Path, change: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A random model that transformers made and saved."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(7)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, **change})).to(dtype)
    model.save_pretrained(folder, **options)
    return folder


PROMPTS = [[1, 5, 6, 7, 8, 9, 10], [1, 20], [1, 8, 30, 31]]
COLUMNS = 128  # of the caches


def build(
    tiny: Path, tokenizer_path: str, compile: Optional[bool] = None, rows: int = 4, dtype: Optional[str] = None
) -> Llama:
    llama = Llama.build(str(tiny), tokenizer_path, COLUMNS, rows, device="cpu", compile=compile, dtype=dtype)
    llama.tokenizer.eos_id = -1  # random weights may choose it
    return llama


def near(found: Any, expected: Any) -> None:
    """Assert that both are the same, with numbers of float32 that were summed in another order."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, abs=2e-4, rel=1e-3)
    elif isinstance(expected, dict):
        near(list(found.items()), list(expected.items()))
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected):
            near(ours, theirs)
    else:
        assert found == expected
