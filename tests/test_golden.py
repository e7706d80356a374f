"""The numbers that Meta's own code gave, on 1, 2 and 4 processes."""

from __future__ import annotations

import pytest
import torch
from conftest import golden, shared
from helpers import check_golden, run_golden
from workers import Pool

from llama import Llama


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("name", ["toy-mha", "toy-gqa", "toy-gqa-mp2", "toy-gqa-mp4"])
def test_toy_models(name: str, processes: int, pool: Pool) -> None:
    """Every count of shards on every count of processes; sampled rows of the ragged batch are not promised."""
    cases = golden(name.split("-mp")[0])
    cases["generate"] = [case for case in cases["generate"] if case["name"] != "sampled_ragged"]
    for results in pool.run(run_golden, str(shared(f"models/{name}")), cases, processes):
        check_golden(results, cases)


def test_more_processes_than_key_value_heads() -> None:
    """4 key/value heads on 8 processes, as the 70B's 8 on 16: two ranks have the same one."""
    cases = golden("toy-gqa")
    cases["generate"] = [case for case in cases["generate"] if case["name"].startswith("greedy")][:1]
    assert cases["generate"]
    pool = Pool(8)
    try:
        outcomes = pool.run(run_golden, str(shared("models/toy-gqa")), cases, 8)
    finally:
        pool.close()
    for results in outcomes:
        check_golden(results, cases)


def test_stories260k() -> None:
    cases = golden("stories260K")
    folder = shared("models/stories260K")
    llama = Llama.build(
        str(folder), str(folder / "tokenizer.model"), cases["max_seq_len"], cases["max_batch_size"], device="cpu"
    )
    for case in cases["text_completion"]:
        torch.manual_seed(case.get("seed", 1))
        for ours, theirs in zip(llama.text_completion(case["prompts"], **case["args"]), case["results"], strict=True):
            assert ours["generation"] == theirs["generation"]
            if "logprobs" in theirs:
                assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-4)
                # Meta's strings are each id decoded alone; ours, joined, are the text.
                assert len(ours["tokens"]) == len(theirs["tokens"])
                assert "".join(ours["tokens"]) == ours["generation"]
