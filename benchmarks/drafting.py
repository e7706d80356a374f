"""Tokens per second at temperature 0 with and without drafts, interleaved, best of all, and the passes that they took.

    python benchmarks/drafting.py                                                     (the demo model)
    python benchmarks/drafting.py --draft int4                  (a draft model: the same one, in int4; or a folder)
    python benchmarks/drafting.py --ckpt_dir FOLDER --tokenizer_path tokenizer.model --dtype float32

Random ids; small and random models do not copy, so in two cases the answer is forced, by an offset to its logits. That
costs a few microseconds a token with and without drafts; passes, look-ups and checks are the real ones. (In float32
forced choices are always clear; how often others are not is the model's own affair.)

    copied   the answer is a passage of the prompt, as in an edit that changes nothing
    edited   the same, with every 16th id another one
    misled   three ids of the prompt come again and again, with something else behind them each time: the worst case
    free     the model's own answer to ids that do not recur; it may run in a loop, which drafts then find

With --draft: stories that the model goes on with, 1 and 4 at once, at temperature 0 and 0.8, by turns without the draft
model, with as many guesses as pay, and with 4 in each pass. right: how many guesses held in a pass, of each row; ratio:
of the time.

Prints one JSON object.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Optional
from unittest import mock

import fire
import torch

from llama import Llama
from llama.commands.convert import convert
from llama.layers.rounding import KINDS
from llama.loading import DEMO
from llama.system.program import as_a_program


@contextmanager
def forced(llama: Llama, prompt: list[int], answer: list[int]) -> Iterator[None]:
    """The model's logits choose these ids, by an offset that costs the same whichever way it runs."""
    engine = llama._engine
    decode, verify, logits = engine.decode, engine.verify, engine.logits

    def towards(scores: torch.Tensor, position: int) -> torch.Tensor:
        """position: of the token that the first row of scores comes from"""
        first = position + 1 - len(prompt)
        for row in range(min(len(scores), len(answer) - first)):
            scores[row, answer[first + row]] += 1e4
        return scores

    with (
        mock.patch.object(engine, "decode", lambda tokens, positions: towards(decode(tokens, positions), positions[0])),
        mock.patch.object(
            engine, "verify", lambda ids, positions: towards(verify(ids, positions)[0], positions[0])[None]
        ),
        mock.patch.object(engine, "logits", lambda hidden: towards(logits(hidden), len(prompt) - 1)),
    ):
        yield


def run(
    llama: Llama, prompt: list[int], count: int, draft: bool, answer: Optional[list[int]]
) -> tuple[list[Any], float]:
    """The ids, and the seconds from the first to the last."""
    ids, began = [], 0.0
    with forced(llama, prompt, answer) if answer else nullcontext():
        for step in llama.steps([prompt], 0, 1, count, draft=draft):
            ids.append(step.token)
            began = began or time.perf_counter()
    return ids, time.perf_counter() - began


BEGINNINGS = [
    "Once upon a time there was a little dog",
    "One day, Tom and his mom",
    "The cat",
    "Lily had a red ball and",
]


def with_draft_model(
    ckpt_dir: Optional[str], tokenizer_path: Optional[str], dtype: Optional[str], draft: str, count: int, repeats: int
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as root:
        folder = draft
        if draft in KINDS:
            folder = f"{root}/draft"
            convert(Path(ckpt_dir or DEMO), Path(folder), to="meta", quantize=draft)
        sizes = {"max_seq_len": 256, "max_batch_size": 4, "dtype": dtype}
        llamas = [Llama.build(ckpt_dir, tokenizer_path, draft=folder if i else None, **sizes) for i in range(3)]
    report: dict[str, Any] = {}
    for llama in llamas:
        llama.tokenizer.eos_id = -1
    prompts = [llamas[0].tokenizer.encode(text, bos=True, eos=False) for text in BEGINNINGS]
    for rows, temperature in itertools.product((1, 4), (0.0, 0.8)):
        times: list[list[float]] = [[], [], []]
        right: list[list[int]] = [[], [], []]
        ids: list[Any] = [None] * 3
        for turn in range(repeats + 1):
            for i in (0, 1, 2, 2, 1, 0):
                with noticed(llamas[i], right[i], always=4 if i == 2 else 0):
                    torch.manual_seed(turn)
                    began = time.perf_counter()
                    ids[i] = llamas[i].generate(prompts[:rows], count, temperature)[0]
                    times[i] += [time.perf_counter() - began] * (turn > 0)
        record = report[f"{rows} rows, temperature {temperature}"] = {"tok_s": round(rows * count / min(times[0]), 1)}
        for i, name in ((1, "as many as pay"), (2, "4 in each pass")):
            record[name] = {
                "right": round(sum(right[i]) / max(len(right[i]), 1), 2), "passes_of_rows": len(right[i]),
                "ratio": round(statistics.median(times[0]) / statistics.median(times[i]), 2),
                "same_ids": ids[i] == ids[0] if not temperature else ids[i] == ids[1],
            }  # fmt: skip
    return report


@contextmanager
def noticed(llama: Llama, right: list[int], always: int) -> Iterator[None]:
    """Put into `right` how many guesses held. always: guesses in each pass; 0: as many as pay."""
    model = llama._scheduler.draft_model
    if model is None:
        yield
        return
    judge, count = model.judge, model.count
    model.judge = lambda row, tried, held: right.append(held) or judge(row, tried, held)  # type: ignore[method-assign]
    if always:
        model.count = lambda rows, pace: always  # type: ignore[method-assign]
    yield
    model.judge, model.count = judge, count  # type: ignore[method-assign]


def main(
    ckpt_dir: Optional[str] = None,
    tokenizer_path: Optional[str] = None,
    dtype: Optional[str] = None,
    count: int = 96,
    repeats: int = 5,
    draft: Optional[str] = None,
) -> None:
    if draft is not None:
        told = with_draft_model(ckpt_dir, tokenizer_path, dtype, draft, count, repeats)
        print(json.dumps({"checkpoint": ckpt_dir or "demo", "dtype": dtype, "draft": draft, **told}))
        return
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len=512, max_batch_size=1, dtype=dtype)
    llama.tokenizer.eos_id = -1
    passes = [0]
    hidden_states = llama.model.hidden_states

    def counted(*args: Any, **more: Any) -> torch.Tensor:
        passes[0] += 1
        return hidden_states(*args, **more)

    llama.model.hidden_states = counted  # type: ignore[method-assign]
    rng = random.Random(1)
    drawn = [rng.randrange(3, llama.model.vocab_size) for _ in range(3 * count)]
    passage = drawn[:count]
    edited = [drawn[count + i] if i % 16 == 15 else token for i, token in enumerate(passage)]
    misled = [drawn[count + i] if i % 4 == 3 else drawn[i % 4] for i in range(count)]
    tasks: dict[str, tuple[list[int], Optional[list[int]]]] = {
        "copied": ([1, *passage, *drawn[-9:], *passage[:4]], [*passage[4:], *drawn[:4]]),
        "edited": ([1, *passage, *drawn[-9:], *passage[:4]], [*edited[4:], *drawn[:4]]),
        "misled": ([1, *passage], misled),
        "free": ([1, *drawn[:40]], None),
    }
    report: dict[str, Any] = {"checkpoint": ckpt_dir or "demo", "dtype": str(llama.model.norm.weight.dtype)}
    for name, (prompt, answer) in tasks.items():
        times: dict[bool, list[float]] = {False: [], True: []}
        ids: dict[bool, list[Any]] = {}
        took: dict[bool, int] = {}
        for _ in range(repeats):
            for draft in (False, True):
                passes[0] = 0
                ids[draft], seconds = run(llama, prompt, count, draft, answer)
                times[draft].append(seconds)
                took[draft] = passes[0]
        speed = {draft: round((count - 1) / min(taken), 1) for draft, taken in times.items()}
        report[name] = {
            "tok_s": speed[False], "drafts_tok_s": speed[True], "ratio": round(speed[True] / speed[False], 2),
            "passes": took[False], "drafts_passes": took[True], "same_ids": ids[False] == ids[True],
        }  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    with as_a_program(main):  # a misspelt flag is refused before hours of work
        fire.Fire(main)
