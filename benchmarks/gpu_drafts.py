"""What guesses cost on a GPU: a step of 7B, a step of a 1.1B draft model, and passes of 7B that verify 1 to 8 guesses.

    python benchmarks/gpu_drafts.py            (a GPU with 24 GB, a minute or two)
    python benchmarks/gpu_drafts.py --small    (tiny models on the tests' emulated GPU: does it run?)

Weights are random, which says nothing about how many guesses hold; so for each number of guesses the report has the
share of them that must hold for the pass to pay. The demo model then guesses for itself: ids with and without, and how
many held.

Prints one JSON object: milliseconds by rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoints import SHAPES
from gpu_kernels import TINY, Place, place
from gpu_parts import random_model

from llama import Llama
from llama.decoding.calls import Source
from llama.decoding.draft_model import DraftModel
from llama.decoding.engine import Engine
from llama.decoding.requests import Request
from llama.decoding.rows import Row
from llama.decoding.sampling import Sampling
from llama.loading import DEMO
from llama.model import Transformer

GUESSES = (1, 2, 4, 8)
CONTEXT = 300


def timed(where: Place, work: Callable[[], Any], repeats: int) -> float:
    """Milliseconds, the median; the first runs record graphs."""
    for _ in range(min(8, repeats)):
        work()
    where.synchronize()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        where.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def break_even(guesses: int, cost: float) -> float | None:
    """The share of guesses that must hold for a pass, which costs as many steps, to pay; None if none is enough."""
    shares = [i / 100 for i in range(101)]
    return next((share for share in shares if sum(share**i for i in range(guesses + 1)) >= cost), None)


@torch.inference_mode()
def costs(
    where: Place, model: Transformer, draft: Transformer, rows: int, context: int, repeats: int
) -> dict[str, Any]:
    engine, guesser = Engine(model, None), DraftModel(Engine(draft, None))
    with engine.turn():
        engine.refresh()
        guesser.refresh(engine)
        assert guesser.usable
        ids = [[1 + (7 * i + row) % 1000 for i in range(context)] for row in range(rows)]
        for _ in engine.prefill(ids, range(rows)):
            pass
        some = [Row(Request(each, 99, Sampling(0)), i, Source(rows), None, number=i) for i, each in enumerate(ids)]
        newest = torch.ones(rows, dtype=torch.long, device=where.device)
        positions = [context - 1] * rows

        def read(logits: torch.Tensor) -> Any:
            return engine.fetch([logits.argmax(-1)])

        plain = timed(where, lambda: read(engine.decode(newest, positions)), repeats)
        report: dict[str, Any] = {"step": round(plain, 3)}
        for count in GUESSES:
            guess = timed(where, partial(guesser.guess, some, [count] * rows), repeats) / count
            tokens = [[1] * (count + 1)] * rows
            verifies = partial(engine.verify, tokens, positions)
            verify = timed(where, lambda verifies=verifies: read(verifies()), repeats)  # type: ignore[misc]
            cost = (verify + count * guess) / plain
            report[f"{count} guesses"] = {
                "guess": round(guess, 3), "verify": round(verify, 3), "cost_in_steps": round(cost, 2),
                "pays_from_share": break_even(count, cost),
            }  # fmt: skip
        return report


def demo(where: Place, count: int) -> dict[str, Any]:
    """Float32: the ids must be the same."""
    report: dict[str, Any] = {}
    llamas = [Llama.build(None, None, 256, 4, device=where.device, dtype="float32", draft=d) for d in (None, str(DEMO))]
    right: list[int] = []
    model = llamas[1]._scheduler.draft_model
    assert model is not None
    judge = model.judge
    model.count = lambda rows, pace: 4  # type: ignore[method-assign]
    model.judge = lambda row, tried, held: right.append(held) or judge(row, tried, held)  # type: ignore[method-assign]
    for rows in (1, 4):
        prompts = [[1, 403, 407 + i] for i in range(rows)]
        report[f"{rows} rows"] = {
            "same_ids": llamas[0].generate(prompts, count, 0) == llamas[1].generate(prompts, count, 0)
        }
    seeds = [
        [llama.text_completion(["Once", "The"], 0.8, max_gen_len=count, seed=[3, 4]) for _ in range(2)]
        for llama in llamas
    ]
    report["same_draws_twice"] = seeds[1][0] == seeds[1][1]
    report["right_of_4"] = round(sum(right) / max(len(right), 1), 2)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    if small:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    with place(small) as where:
        context, length, repeats = (20, 64, 2) if small else (CONTEXT, 512, 20)
        report: dict[str, Any] = {}
        model = random_model(where, where.args(length, 4))
        for name, shape, form in (("1.1B", "1.1B", None), ("1.1B int8", "1.1B", "int8")):
            changes = TINY if small else SHAPES[shape]
            draft = random_model(where, where.args(length, 4, **changes), form)
            for rows in (1, 4):
                report[f"{name}, {rows} rows"] = costs(where, model, draft, rows, context, repeats)
                print(json.dumps(report[f"{name}, {rows} rows"]), file=sys.stderr, flush=True)
            del draft
        del model
        report["demo"] = demo(where, 4 if small else 64)
        print(json.dumps(report))


if __name__ == "__main__":
    main()
