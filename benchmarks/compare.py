"""This library beside its peers and beside this machine's limits, in one go.

    python benchmarks/compare.py --tokenizer_path tokenizer.model [--shape 1.1B] [--device cpu] [--quantize none,int8]
    python benchmarks/compare.py --tokenizer_path tokenizer.model --ckpt_dir FOLDER --json out.json --plot out.png

Each system sits loaded in a process of its own and sleeps until its turn; each round asks all of them for each task in
turn, so that a busy machine is busy for all. The first round warms up and is not counted. Peers that are not installed
are left out with a note (pip install -e '.[bench]'). What is made for it, random checkpoints and other formats, is kept
under the temp folder. Prints Markdown.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json as jsonlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional, Union

import fire
import torch
from checkpoints import into_page_cache
from children import System
from peers import FORMS, PEERS, Setting, find_source, limits, ours, peers
from plot import plot as draw
from table import agreement, cell, figures, legend, median, ratios_table, results_table, shares_table
from tasks import FULL, QUICK

from llama import ModelArgs, runtime
from llama.commands import bench
from llama.system.checks import whole_number
from llama.system.program import as_a_program, fail
from llama.system.progress import bar
from llama.tokenizer import user_path
from llama.tokenizer_files import need_tokenizer
from llama.weights.checkpoint import open_checkpoint

Words = Union[str, Sequence[str]]  # fire makes a tuple of what has commas
LOADS = 3  # fresh processes of each system that are timed; imports make them slow
PACKAGES = ("torch", "transformers", "llama-cpp-python", "gguf")


def main(
    tokenizer_path: Optional[str] = None,
    shape: str = "1.1B",
    ckpt_dir: Optional[str] = None,
    device: str = "cpu",
    quantize: Words = "none",
    compile: bool = False,
    against: Words = tuple(PEERS),
    repeats: int = 5,
    quick: bool = False,
    json: Optional[str] = None,
    plot: Optional[str] = None,
) -> None:
    """shape: 1.1B, 134M or 7B, random weights; or stories, the demo model. ckpt_dir: a checkpoint in place of these.

    quantize: the modes of ours, of none, int8, int4, w8a8 and w4a8. compile: each of them compiled as well. against:
    the peers, of meta, transformers and llama.cpp. quick: tasks of a few tokens, to try it out.
    """
    modes, wanted = _words("quantize", quantize, FORMS), _words("against", against, PEERS)
    repeats = whole_number("repeats", repeats, 1)
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib; pip install -e '.[bench]'")
    place = runtime.choose_device(device, runtime.Launch.read())
    source = find_source(shape, ckpt_dir)
    checkpoint = open_checkpoint(source)
    args = replace(checkpoint.args, vocab_size=checkpoint.shape("tok_embeddings.weight", 1)[0])
    tokenizer = need_tokenizer(source, tokenizer_path)
    setting = Setting(source, args, tokenizer, place, QUICK if quick else FULL)
    notes: list[str] = []
    busy = os.getloadavg()[0]
    if busy > 1:
        notes.append(f"the machine was busy with something else: its load was {busy:.1f} when this began")
    systems = [*ours(setting, modes, compile), *peers(setting, wanted, notes)]
    machine = limits(setting, quick)
    try:
        load(systems, 1 if quick else min(LOADS, repeats))
        measure([*systems, machine], setting, repeats)
    finally:
        for system in (*systems, machine):
            system.kill()
    report = {
        "about": _about(setting, repeats),
        "tasks": {name: task._asdict() for name, task in setting.profile.tasks.items()},
        "limits": {
            "read_rate": [run["first"] for run in machine.runs["decode"]],  # bytes/s
            "matmul_rate": [run["step"] for run in machine.runs["decode"]],  # FLOP/s
        },
        "systems": [system.result() for system in systems],
        "notes": notes,
    }
    print(to_markdown(report, setting))
    if json is not None:
        user_path(json).write_text(jsonlib.dumps(report, indent=1))
    if plot is not None:
        draw(
            report["systems"], setting.profile.tasks, f"{source.name}, {report['about']['processor']}", user_path(plot)
        )


def _words(name: str, given: Words, known: dict[str, Any]) -> list[str]:
    words = given.split(",") if isinstance(given, str) else [str(word) for word in given]
    if unknown := [word for word in words if word not in known]:
        raise ValueError(f"{name}={','.join(unknown)} is not known; there are {', '.join(known)}")
    return words


def load(systems: list[System], times: int) -> None:
    """Each in a fresh process, with its files in the page cache, and a cache for one prompt: not all make room for more
    before they need it. The process that is left is for the tasks."""
    for _ in range(times):
        for system in systems:
            if system.alive:
                into_page_cache(Path(system.specs[0]["path"]))
                system.start(counted=True, max_batch_size=1)
    for system in systems:
        system.start(counted=False)


def measure(systems: list[System], setting: Setting, repeats: int) -> None:
    """One round that does not count, then `repeats` that do. Each round begins with another system."""
    progress = bar(total=(repeats + 1) * len(setting.profile.tasks), desc="Measuring", unit="task")
    for number in range(repeats + 1):
        for name, task in setting.profile.tasks.items():
            rows = bench.make_prompts(task.batch, task.prompt, setting.args.vocab_size)
            for at in range(len(systems)):
                system = systems[(at + number) % len(systems)]
                if system.kind != "limits" or name == "decode":  # once a round
                    system.run(name, rows, task.new, counted=number > 0)
            progress.update()
        progress.write(f"round {number} of {repeats} done", file=sys.stderr)
    progress.close()


def layer_flops(args: ModelArgs) -> float:
    """Of the products with the layers' weights, for one token."""
    heads = args.head_size * (2 * args.n_heads + 2 * args.kv_heads)
    return 2.0 * args.n_layers * args.dim * (heads + 3 * args.ffn_width)


def to_markdown(report: dict[str, Any], setting: Setting) -> str:
    about, tasks, results = report["about"], setting.profile.tasks, report["systems"]
    rates = {name: median(values) or 0.0 for name, values in report["limits"].items()}
    kind = "memory read" if setting.device.type == "cpu" else "memory copied"
    spread = {name: cell([value / 1e9 for value in values], 1) for name, values in report["limits"].items()}
    columns = figures(tasks)
    lines = [
        f"{about['checkpoint']} on {about['processor']}, {about['threads']} thread{'s' * (about['threads'] != 1)}; "
        f"{about['packages']}; commit {about['commit']}. Medians of {about['repeats']} rounds (least–most).",
        f"This machine: {kind} at {spread['read_rate']} GB/s, bf16 products at {spread['matmul_rate']} GFLOP/s.",
        results_table(results, columns),
        legend(tasks),
        ratios_table(results, columns),
        shares_table(results, tasks, rates, layer_flops(setting.args)),
        "\n".join(f"- {line}" for line in [*agreement(results), *_notes(report)]),
    ]
    return "\n\n".join(filter(None, lines))


def _notes(report: dict[str, Any]) -> list[str]:
    notes = [
        *report["notes"],
        *(f"{result['name']}: {note}" for result in report["systems"] for note in result["notes"]),
    ]
    largest = max((load["weights_bytes"] for result in report["systems"] for load in result["loads"]), default=0)
    if report["about"]["device"] == "cpu" and largest < 2 * bench.largest_cache():
        notes.append(
            f"the processor says that it has a cache of {bench.largest_cache() / 1e6:.0f} MB: weights that stay in it "
            f"can be "
            "read faster than memory"
        )
    return notes


def _about(setting: Setting, repeats: int) -> dict[str, Any]:
    return {
        "checkpoint": setting.source.name,
        "shape": {
            key: getattr(setting.args, key)
            for key in ("dim", "n_layers", "n_heads", "kv_heads", "ffn_width", "vocab_size")
        },
        "device": str(setting.device),
        "processor": _processor(setting.device),
        "threads": torch.get_num_threads(),
        "packages": ", ".join(f"{name} {version}" for name, version in _versions().items()),
        "python": platform.python_version(),
        "commit": _commit(),
        "repeats": repeats,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a note says that it was left out
    return found


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The checked-out commit, with a + where files have been changed since; "unknown" without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + "+" * bool(changed.stdout.strip())


if __name__ == "__main__":
    with as_a_program(main):
        try:
            fire.Fire(main)
        except ValueError as error:
            fail(str(error), "compare")
