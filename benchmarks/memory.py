"""Memory that `info` tells beside what fresh processes take: they build a model, fill the cache with a prompt, and go
on.

    python benchmarks/memory.py [--ckpt_dir llama-2-7b/] [--tokenizer_path tokenizer.model] [--processes 1,2]

Told: what a process's imports take, and what `llama.memory` estimates on top. Measured: the most that was resident
(VmHWM), of which `file` is pages of mapped files and of code, which lie in the system's page cache and are shared.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Optional

from fire import Fire

FORMS = ({"dtype": "float32"}, {"dtype": "bfloat16"}, {"quantize": "int8"}, {"quantize": "int4"})
NEW_TOKENS = 16
COLUMNS = {
    "own": 6,
    "weights": 9,
    "cache": 7,
    "overhead": 10,
    "temporary": 11,
    "told": 7,
    "measured": 10,
    "file": 7,
}  # MB


def measure(spec: dict[str, Any]) -> None:
    """In a process of its own: build, generate, and print what it took, in MB."""
    from process_memory import megabytes

    from llama import Llama, memory
    from llama.commands.bench import make_prompts
    from llama.layers.parallel import group_size, model_parallel_group
    from llama.layers.rounding import Quantization

    own = memory.own_bytes()
    llama = Llama.build(**spec, device="cpu")
    params = llama.model.params
    prompts = make_prompts(params.max_batch_size, params.max_seq_len - NEW_TOKENS, llama.model.vocab_size)
    llama.generate(prompts, NEW_TOKENS, temperature=0)
    kind = spec.get("quantize")
    need = memory.estimate(
        memory.Placement(
            params, llama.model.norm.weight.dtype, group_size(model_parallel_group()),
            quantization=None if kind is None else Quantization(kind),
        )
    )  # fmt: skip
    told = (own + need.resident + need.temporary) / 1e6
    print(json.dumps({
        "own": own / 1e6, "weights": need.weights / 1e6, "cache": need.cache / 1e6, "overhead": need.overhead / 1e6,
        "temporary": need.temporary / 1e6, "told": told, "measured": megabytes("VmHWM"), "file": megabytes("RssFile"),
    }), file=sys.stderr)  # fmt: skip


def start(spec: dict[str, Any], processes: int) -> list[dict[str, Any]]:
    """What each process of a fresh group took."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    root = str(Path(__file__).resolve().parents[1])
    common = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    ranks = []
    for rank in range(processes):
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": processes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        env = common | ({name: str(value) for name, value in place.items()} if processes > 1 else {})
        command = [sys.executable, __file__, "measure", json.dumps(spec)]
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    said = [process.communicate()[1].strip().splitlines() for process in ranks]
    if any(process.returncode for process in ranks):
        raise SystemExit("\n".join(said[0][-5:]))
    return [json.loads(lines[-1]) for lines in said]


def main(
    ckpt_dir: Optional[str] = None, tokenizer_path: Optional[str] = None, max_seq_len: int = 512,
    max_batch_size: int = 1,
    processes: Any = (1, 2),
) -> None:  # fmt: skip
    """A line for each form and number of processes: the process that took the most."""
    common = {
        "ckpt_dir": ckpt_dir,
        "tokenizer_path": tokenizer_path,
        "max_seq_len": max_seq_len,
        "max_batch_size": max_batch_size,
    }
    report = []
    print("form      processes" + "".join(f"{name:>{width}}" for name, width in COLUMNS.items()) + "   ratio")
    for form in FORMS:
        for count in (processes,) if isinstance(processes, int) else processes:
            took = max(start({**common, **form}, count), key=lambda one: one["measured"])
            report.append({**form, "processes": count, **took})
            numbers = "".join(f"{took[name]:{width}.0f}" for name, width in COLUMNS.items())
            print(f"{next(iter(form.values())):10}{count:9}{numbers}{took['told'] / took['measured']:8.2f}", flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(json.loads(sys.argv[2]))
    else:
        Fire(main)
