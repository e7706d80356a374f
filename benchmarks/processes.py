"""Several processes on one machine: sums over shared memory beside gloo's, and a model's speed beside one process's.

    python benchmarks/processes.py sums [--ranks 2]
    python benchmarks/processes.py model --tokenizer_path tokenizer.model [--shape 134M] [--ranks 2] [--repeats 4]

Each way has a turn, forth and back (A B B A), with one thread for each process; one process alone has as many threads.
What is printed are medians, and for the model how many times as fast as one process it is.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import fire
import torch
import torch.distributed as dist
from checkpoints import into_page_cache, random_checkpoint

from llama import Llama, generation, runtime
from llama.commands import bench
from llama.layers import parallel

SIZES = [8, 1024, 8 * 1024, 64 * 1024, 2**20, 2**22, 2**24, 2**26]  # bytes
PROMPT, NEW = 480, 48


def start(ranks: int, *arguments: Any) -> dict[str, Any]:
    """What the first of these processes of this file tells."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, __file__, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(re.findall(r"^{.*}$", ran.stdout, flags=re.MULTILINE)[-1])


def sums(ranks: int = 2) -> None:
    """Microseconds of a sum of so many bytes in bfloat16."""
    found = start(ranks, "time-sums")
    print("| bytes | shared memory | gloo |\n|--:|--:|--:|")
    for size, (ours, gloo) in found.items():
        print(f"| {size} | {ours:.0f} | {gloo:.0f} |")


def time_sums() -> None:
    """What one of the processes does."""
    runtime.start("cpu")
    torch.set_num_threads(1)
    group = parallel.model_parallel_group()
    parallel.share_memory(group, torch.device("cpu"))
    ways: list[Callable[[torch.Tensor], Any]] = [
        lambda x: parallel.all_reduce(x, group), lambda x: dist.all_reduce(x, group=group)
    ]  # fmt: skip
    found = {}
    for size in SIZES:
        x, times = torch.zeros(size // 2, dtype=torch.bfloat16), [[], []]
        for which in (0, 1, 1, 0) * 3:
            ways[which](x)
            began, count = time.perf_counter(), max(2, min(300, 2**23 // size))
            for _ in range(count):
                ways[which](x)
            times[which].append((time.perf_counter() - began) / count * 1e6)
        found[size] = [median(seen) for seen in times]
    print(json.dumps(found))


def model(tokenizer_path: str, shape: str = "134M", ranks: int = 2, repeats: int = 4) -> None:
    """The first token of a prompt, and a step of one row."""
    folder = random_checkpoint(shape, Path(tempfile.gettempdir()) / f"llama-{shape}")
    into_page_cache(folder)
    ways = {
        "one process": (1, "plain"), "shared memory": (ranks, "plain"), "bound": (ranks, "bound"),
        "bound, operator by operator": (ranks, "by operator"), "gloo": (ranks, "gloo"),
    }  # fmt: skip
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for turn in range(repeats):
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            processes, how = ways[name]
            os.environ["OMP_NUM_THREADS"] = str(ranks // processes)
            runs[name].append(start(processes, "time-model", folder, tokenizer_path, how))
    middle = {name: {key: median(run[key] for run in told) for key in told[0]} for name, told in runs.items()}
    print(f"| {shape} | prompt of {PROMPT}, ms | step, ms | as fast as one process |\n|---|--:|--:|--:|")
    for name, times in middle.items():
        share = " / ".join(f"{middle['one process'][key] / times[key]:.2f}" for key in times)
        print(f"| {name} | {times['first'] * 1e3:.0f} | {times['step'] * 1e3:.1f} | {share} |")


def time_model(folder: str, tokenizer_path: str, how: str) -> None:
    """What one of the processes does."""
    if how == "gloo":
        generation.share_memory = lambda group, device: None  # type: ignore[assignment]
    options = {"compile": False if how == "by operator" else None, "bind": how in ("bound", "by operator")}
    llama = Llama.build(folder, tokenizer_path, 1024, 1, device="cpu", quiet=True, **options)  # type: ignore[arg-type]
    prompt = [[1, *(i * 7919 % 31000 + 3 for i in range(PROMPT - 1))]]
    bench.timed_run(llama, prompt, 4)
    runs = [bench.timed_run(llama, prompt, NEW)[:2] for _ in range(3)]
    print(json.dumps({"first": median(run[0] for run in runs), "step": median(run[1] or 0 for run in runs)}))


if __name__ == "__main__":
    fire.Fire({"sums": sums, "model": model, "time-sums": time_sums, "time-model": time_model})
