"""Raw runs -> figures, medians with their spread, ratios, shares of the limits; all as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

from tasks import Task

Result = dict[str, Any]  # name, kind, loads, runs, notes; as the JSON file has it
DASH = "–"


class Figure(NamedTuple):
    """A column: its values in one system's runs, and whether more of it is better."""

    label: str
    values: Callable[[Result], list[float]]
    digits: int
    more_is_better: bool = True


def figures(tasks: dict[str, Task]) -> list[Figure]:
    def runs(result: Result, task: str, key: str) -> list[float]:
        return [run[key] for run in result["runs"].get(task, []) if run[key] is not None]

    def loads(key: str) -> Callable[[Result], list[float]]:
        return lambda result: [load[key] for load in result["loads"] if load[key] is not None]

    def decode(task: str, digits: int) -> Figure:
        shape = tasks[task]
        label = f"decode {shape.batch}×{shape.context}"
        return Figure(label, lambda result: [shape.batch / step for step in runs(result, task, "step")], digits)

    def prefill(task: str) -> Figure:
        length = tasks[task].prompt
        return Figure(f"prefill {length}", lambda result: [length / first for first in runs(result, task, "first")], 0)

    def kept(result: Result) -> list[float]:
        return [100 * a / b for a, b in zip(runs(result, "decode", "step"), runs(result, "long", "step"))]

    return [
        decode("decode", 1),
        decode("decode 4", 1),
        decode("decode 16", 1),
        decode("middle", 1),
        decode("long", 1),
        Figure(f"kept at {tasks['long'].context}, %", kept, 0),
        prefill("short"),
        prefill("middle"),
        prefill("long"),
        Figure("first token, s", lambda result: runs(result, "middle", "first"), 3, False),
        Figure("load, s", loads("load_s"), 2, False),
        Figure("peak, MB", loads("peak_MB"), 0, False),
        Figure("private, MB", loads("private_MB"), 0, False),
    ]


def legend(tasks: dict[str, Task]) -> str:
    return (
        "decode n×c: tokens a second of n prompts together, at about c tokens of context; kept: the speed of one "
        "prompt at "
        f"{tasks['long'].context} tokens beside {tasks['decode'].context}; prefill n: tokens a second of a prompt of "
        f"n; first token: of a prompt of {tasks['middle'].prompt}; load: with room for one prompt; peak: resident "
        f"then, "
        "with mapped files; private: without."
    )


def median(values: Sequence[float]) -> Optional[float]:
    return statistics.median(values) if values else None


def cell(values: Sequence[float], digits: int) -> str:
    """Median (least–most)."""
    if not values:
        return DASH
    middle, least, most = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return middle if least == most else f"{middle} ({least}–{most})"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def results_table(results: Sequence[Result], columns: Sequence[Figure]) -> str:
    rows = [[r["name"], *(cell(column.values(r), column.digits) for column in columns)] for r in results]
    return markdown(["system", *(column.label for column in columns)], rows)


def ratio(ours: Optional[float], theirs: Optional[float], more_is_better: bool) -> Optional[float]:
    """How many times better ours is; None where one of them is missing or nothing."""
    if not ours or not theirs:
        return None
    return ours / theirs if more_is_better else theirs / ours


def ratios_table(results: Sequence[Result], columns: Sequence[Figure]) -> str:
    """A row for each mode of ours and each peer that computes in weights of the same size ("form")."""
    rows = []
    for ours in (r for r in results if r["kind"] == "ours"):
        for peer in (r for r in results if r["kind"] == "peer" and r["form"] == ours["form"]):
            found = [
                ratio(median(column.values(ours)), median(column.values(peer)), column.more_is_better)
                for column in columns
            ]
            rows.append([f"{ours['name']} / {peer['name']}", *(DASH if r is None else f"{r:.2f}" for r in found)])
    return markdown(["times better than", *(column.label for column in columns)], rows) if rows else ""


def shares_table(
    results: Sequence[Result], tasks: dict[str, Task], limits: dict[str, float], layer_flops: float
) -> str:
    """Decode as bytes of weights a second against the read rate; prefill as products a second against the product rate.

    limits: read_rate in bytes/s and matmul_rate in FLOP/s. layer_flops: of the layers' products, for one token.
    """
    rows = []
    for result in results:
        step = median([run["step"] for run in result["runs"].get("decode", []) if run["step"] is not None])
        first = median([run["first"] for run in result["runs"].get("long", [])])
        nbytes = result["loads"][-1]["weights_bytes"] if result["loads"] else 0
        read = nbytes / step if step else None
        flops = layer_flops * tasks["long"].prompt / first if first else None
        rows.append(
            [
                result["name"],
                f"{nbytes / 1e9:.3f}" if nbytes else DASH,
                f"{limits['read_rate'] / nbytes:.1f}" if nbytes else DASH,
                f"{read / 1e9:.1f}" if read else DASH,
                f"{read / limits['read_rate']:.0%}" if read else DASH,
                f"{flops / 1e9:.0f}" if flops else DASH,
                f"{flops / limits['matmul_rate']:.0%}" if flops else DASH,
            ]
        )
    header = ["system", "weights a step, GB", ("tok/s that the read rate "
                                              "allows"), "GB/s at decode, batch 1", "of the read rate",
              f"GFLOP/s at prefill of {tasks['long'].prompt}", "of the product rate"]  # fmt: skip
    return markdown(header, rows)


def agreement(results: Sequence[Result]) -> list[str]:
    """How many of each system's greedy ids are those of the first one, up to each prompt's first difference: whether
    all compute the same model. A near tie in a prompt's first ids can cost all of that prompt."""
    texts = {r["name"]: {task: runs[0]["ids"] for task, runs in r["runs"].items()} for r in results if r["runs"]}
    if not texts:
        return []
    (first, reference), *others = texts.items()
    lines = []
    for name, rows in others:
        pairs = [(ids, reference[task]) for task, ids in rows.items() if task in reference]
        same = [next((i for i, (a, b) in enumerate(zip(*pair)) if a != b), len(pair[0])) for pair in pairs]
        total = sum(len(ids) for ids, _ in pairs)
        lines.append(
            f"{name}: {sum(same)} of {total} greedy ids are those of {first}, up to each prompt's first difference"
        )
    return lines
