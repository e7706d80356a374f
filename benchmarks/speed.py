"""Seconds to a ready model, peak memory, and tokens per second of one checkpoint on this machine.

    python benchmarks/speed.py --shape 1.1B --tokenizer_path tokenizer.model    (a random checkpoint, written once)
    python benchmarks/speed.py --ckpt_dir llama-2-7b/ --tokenizer_path tokenizer.model

Beside each figure, the same by Meta's way of computing (`metas_way`), interleaved, on one process.
Under torchrun each process reports its own memory. Prints one JSON object.
"""

from __future__ import annotations

import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import fire
import metas_way
import torch
from checkpoints import random_checkpoint

from llama import Llama


def seconds(work: Callable[[list[int], int], None], prompt: list[int], count: int) -> float:
    began = time.perf_counter()
    work(prompt, count)
    return time.perf_counter() - began


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main(
    tokenizer_path: str,
    ckpt_dir: Optional[str] = None,
    shape: str = "1.1B",
    prefill: int = 480,
    decode: int = 48,
    repeats: int = 5,
) -> None:
    folder = Path(ckpt_dir) if ckpt_dir else random_checkpoint(shape, Path(tempfile.gettempdir()) / f"llama-{shape}")
    imported = peak_megabytes()
    began = time.perf_counter()
    llama = Llama.build(str(folder), tokenizer_path, max_seq_len=prefill + decode + 1, max_batch_size=1)
    loaded, peak = time.perf_counter() - began, peak_megabytes()
    prompt = [1] + [(7 * i) % llama.model.vocab_size for i in range(prefill - 1)]
    llama.tokenizer.eos_id = -1  # random weights may draw it

    def ours(prompt: list[int], count: int) -> None:
        llama.generate([prompt], count, temperature=0)

    def metas(prompt: list[int], count: int) -> None:
        metas_way.generate(llama.model, prompt, count)

    ways = [ours] if torch.distributed.is_initialized() else [ours, metas]
    taken: dict[str, list[list[float]]] = {way.__name__: [] for way in ways}
    for way in ways:
        way(prompt, 1)  # touches every weight once
    for _ in range(repeats):
        for way in ways:
            tasks = ((prompt, 1), (prompt[:8], 1), (prompt[:8], decode + 1))
            taken[way.__name__].append([seconds(way, *task) for task in tasks])
    speeds = {}
    for name, runs in taken.items():
        prefilled, one, whole = (statistics.median(times) for times in zip(*runs))
        step = (whole - one) / decode
        speeds[name] = {
            "prefill_tok_s": round(prefill / prefilled, 1),
            "decode_tok_s": round(1 / step, 2),
            "decode_GB_s": round(sum(p.nbytes for p in llama.model.parameters()) / step / 1e9, 1),
        }
    report = {
        "checkpoint": str(folder),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_s": round(loaded, 3),
        "peak_MB_before": round(imported),
        "peak_MB_loaded": round(peak),
        "peak_MB_after": round(peak_megabytes()),
        **speeds,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    fire.Fire(main)
