"""Decode speed over context and over batch size, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from table import Result, median
from tasks import Task


def plot(results: Sequence[Result], tasks: dict[str, Task], title: str, path: Path) -> None:
    """Medians with the spread as bars."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, ScalarFormatter

    picture = Figure(figsize=(13, 5), layout="constrained")
    FigureCanvasAgg(picture)
    picture.suptitle(title)
    over_context, over_batch = picture.subplots(1, 2)
    stepping = {name: task for name, task in tasks.items() if task.new > 1}
    for axes, names, place, label in (
        (
            over_context,
            [n for n, t in stepping.items() if t.batch == 1],
            lambda task: task.context,
            "tokens of context",
        ),
        (over_batch, [n for n in stepping if n.startswith("decode")], lambda task: task.batch, "prompts at once"),
    ):
        axes.set_prop_cycle(color=colormaps["tab20"].colors)  # there may be a dozen of them
        for result in results:
            points = []
            for name in names:
                values = [tasks[name].batch / run["step"] for run in result["runs"].get(name, [])]
                if middle := median(values):
                    points.append((place(tasks[name]), middle, middle - min(values), max(values) - middle))
            if points:
                x, y, below, above = zip(*points)
                axes.errorbar(x, y, yerr=(below, above), marker="o", capsize=3, label=result["name"])
        axes.set(xlabel=label, ylabel="decode, tokens a second", xscale="log", yscale="log")
        axes.set_xticks([place(tasks[n]) for n in names], labels=[str(place(tasks[n])) for n in names])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.grid(alpha=0.3)
    if over_context.has_data():
        over_context.legend(fontsize="small")
    picture.savefig(path, dpi=120)
