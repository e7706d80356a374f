"""What users wait for: many ragged prompts, the tenth turn of a chat, long prompts, and memory over many calls.

    python benchmarks/serving.py --tokenizer_path tokenizer.model --ckpt_dir FOLDER --only prompts
    python benchmarks/serving.py … --only chat | prefill | memory

Prints one JSON object for each part.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import fire
import metas_way
import torch
from checkpoints import random_checkpoint
from process_memory import megabytes

from llama import Llama


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def prompts(llama: Llama, repeats: int) -> dict[str, Any]:
    """40 prompts of 5 to 400 tokens over 4 slots, greedy, 60 new tokens at most; ours and Meta's loop, in turn."""
    rng = random.Random(1)
    vocab_size, limit = llama.model.vocab_size, llama.model.params.max_batch_size
    ragged = [[1, *(rng.randrange(3, vocab_size) for _ in range(rng.randint(4, 399)))] for _ in range(40)]
    eos = llama.tokenizer.eos_id

    def ours() -> list[list[int]]:
        ids: list[list[int]] = [[] for _ in ragged]
        for step in llama.steps(ragged, 0, 1, 60):
            ids[step.index] += [] if step.token is None else [step.token]
        return ids

    def metas() -> list[list[int]]:
        groups = [ragged[i : i + limit] for i in range(0, len(ragged), limit)]
        return [row for group in groups for row in metas_way.generate_batch(llama.model, group, 60, eos)]

    taken: dict[str, list[float]] = {"ours": [], "metas": []}
    texts: dict[str, list[list[int]]] = {}
    for _ in range(repeats):
        for name, way in (("ours", ours), ("metas", metas)):
            seconds, texts[name] = timed(way)
            taken[name].append(seconds)
    medians = {f"{name}_s": round(statistics.median(times), 2) for name, times in taken.items()}
    same = sum(a == b for a, b in zip(texts["ours"], texts["metas"]))
    return {**medians, "ratio": round(medians["metas_s"] / medians["ours_s"], 2), "same_texts_of_40": same}


def chat(llama: Llama, repeats: int) -> dict[str, Any]:
    """Seconds to the first token of the tenth turn: with what is remembered, and after it was forgotten."""
    waits: dict[str, list[float]] = {"remembered_s": [], "forgotten_s": []}
    tokens = 0
    for _ in range(repeats):
        session = llama.chat(temperature=0, max_gen_len=16)
        for turn in range(9):
            session.ask(f"Tell me of the river, part {turn}.")
        tokens = sum(len(turn["ids"]) for turn in session.turns)
        for name, times in waits.items():
            if name == "forgotten_s":
                llama.generate([[1]] * llama.model.params.max_batch_size, 1, 0)  # takes every slot
            times.append(timed(lambda: next(session.send("And how does it end?", max_gen_len=1)))[0])  # noqa: B023
            session.undo()
    return {"history_tokens": tokens, **{name: round(statistics.median(times), 4) for name, times in waits.items()}}


def prefill(llama: Llama, tokens: int = 4000) -> dict[str, Any]:
    """Peak memory of one long prompt, beside a short one that has touched every weight."""
    llama.generate([[1, 5, 6]], 2, 0)
    before = megabytes("VmHWM")
    seconds, _ = timed(lambda: llama.generate([[1, *([7] * (tokens - 1))]], 1, 0))
    return {
        "tokens": tokens,
        "s": round(seconds, 2),
        "peak_MB_before": round(before),
        "peak_MB_after": round(megabytes("VmHWM")),
    }


def memory(llama: Llama, calls: int = 10_000) -> dict[str, Any]:
    """Resident memory over many calls."""

    def resident() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return round(pages * 4096 / 1e6, 1)

    seen = {}
    for call in range(calls + 1):
        if call in (100, calls // 4, calls // 2, calls):
            seen[call] = resident()
        llama.text_completion(["Once upon a time"] * (1 + call % 5), max_gen_len=4 + call % 7, stop="zebra")
    return {"resident_MB_after_calls": seen}


def main(
    tokenizer_path: str, ckpt_dir: Optional[str] = None, shape: str = "134M", only: str = "prompts", repeats: int = 3
) -> None:
    folder = ckpt_dir or str(random_checkpoint(shape, Path(tempfile.gettempdir()) / f"llama-{shape}"))
    long = only == "prefill"
    llama = Llama.build(folder, tokenizer_path, max_seq_len=4096 if long else 512, max_batch_size=1 if long else 4)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "prompts": lambda: prompts(llama, repeats),
        "chat": lambda: chat(llama, repeats),
        "prefill": lambda: prefill(llama),
        "memory": lambda: memory(llama),
    }
    if only not in parts:
        raise ValueError(f"only={only!r} must be one of {', '.join(parts)}")
    print(json.dumps({"part": only, "checkpoint": folder, "torch": torch.__version__, **parts[only]()}))


if __name__ == "__main__":
    fire.Fire(main)
