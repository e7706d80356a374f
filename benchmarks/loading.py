"""Seconds to a ready model, and each process's peak memory: every format, on 1 and 2 processes, beside transformers.

    python benchmarks/loading.py --tokenizer_path tokenizer.model    (random 1.1B checkpoints, written once)

The page cache is warm: every file is read before it is loaded. Peak memory is VmHWM, which counts the pages of mapped
files too; "private" is what the process holds for itself when the model is ready (RssAnon). Times and peaks are medians
of `repeats` fresh processes each; "imported" is the same process before it loads. Linux only.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Optional

import fire
from checkpoints import into_page_cache, random_checkpoint
from process_memory import megabytes

from llama.commands.convert import convert

SCRIPT = Path(__file__)


def load(who: str, folder: str, tokenizer_path: str) -> None:
    """In a process of its own: load one checkpoint, and print what that took."""
    import torch

    if who == "ours":
        from llama import Llama
    else:
        import transformers

        transformers.logging.disable_progress_bar()
    imported = megabytes("VmHWM")
    began = time.perf_counter()
    if who == "ours":
        model = Llama.build(folder, tokenizer_path, max_seq_len=512, max_batch_size=1, device="cpu").model
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    seconds = time.perf_counter() - began
    weights = sum(p.nbytes for p in {p.data_ptr(): p for p in model.parameters()}.values()) / 1e6
    figures = {
        "seconds": seconds,
        "imported": imported,
        "peak": megabytes("VmHWM"),
        "private": megabytes("RssAnon"),
        "share": weights,
    }
    print(json.dumps(figures), file=sys.stderr, flush=True)


def measure(who: str, folder: Path, tokenizer_path: str, processes: int) -> dict[str, float]:
    """The figures of the process that took most."""
    start = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, *start, str(SCRIPT), "load", who, str(folder), tokenizer_path]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = [json.loads(text) for text in re.findall(r'{"seconds".*?}', result.stderr)]  # two may share a line
    assert len(figures) == processes, result.stderr
    return {key: max(f[key] for f in figures) for key in figures[0]}


def prepare(folder: Path, shape: str, tokenizer_path: str) -> dict[str, Path]:
    """The same random weights in each format, under `folder`."""
    folders = {"Meta, 1 shard": random_checkpoint(shape, folder / "meta-1")}
    for name, to, shards in (("Meta, 2 shards", "meta", 2), ("Meta, 4 shards", "meta", 4), ("safetensors", "hf", 1)):
        folders[name] = folder / f"{to}-{shards}"
        if not folders[name].exists():
            convert(folders["Meta, 1 shard"], folders[name], to, shards, tokenizer_path=Path(tokenizer_path))
    return folders


def main(tokenizer_path: str, shape: str = "1.1B", repeats: int = 5, folder: Optional[str] = None) -> None:
    root = Path(folder) if folder else Path(tempfile.gettempdir()) / f"llama-loading-{shape}"
    folders = prepare(root, shape, tokenizer_path)
    cases = [(name, "ours", n) for name in folders for n in (1, 2)] + [("safetensors", "transformers", 1)]
    runs: dict[tuple[str, str, int], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(repeats):  # interleaved, so that a busy machine is busy for all
        for name, who, processes in cases:
            into_page_cache(folders[name])
            runs[name, who, processes].append(measure(who, folders[name], tokenizer_path, processes))
    print(
        "| checkpoint | by | processes | seconds (least) | share of weights | peak RSS | of it imports | private, "
        "ready |"
    )
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for (name, who, processes), figures in runs.items():
        middle = {key: statistics.median(f[key] for f in figures) for key in figures[0]}
        least = min(f["seconds"] for f in figures)
        sizes = " | ".join(f"{middle[key]:.0f} MB" for key in ("share", "peak", "imported", "private"))
        print(f"| {name} | {who} | {processes} | {middle['seconds']:.2f} ({least:.2f}) | {sizes} |")


if __name__ == "__main__":
    fire.Fire({"load": load, "main": main} if sys.argv[1:2] == ["load"] else main)
