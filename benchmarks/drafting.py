"""Tokens per second at temperature 0 with and without drafts, interleaved, best of all, and the passes that they took.

    python benchmarks/drafting.py                                                     (the demo model)
    python benchmarks/drafting.py --ckpt_dir FOLDER --tokenizer_path tokenizer.model --dtype float32

Random ids; small and random models do not copy, so in two cases the answer is forced, by an offset to its logits. That costs
a few microseconds a token with and without drafts; passes, look-ups and checks are the real ones. (In float32 forced choices
are always clear; how often others are not is the model's own affair.)

    copied   the answer is a passage of the prompt, as in an edit that changes nothing
    edited   the same, with every 16th id another one
    misled   three ids of the prompt come again and again, with something else behind them each time: the worst case
    free     the model's own answer to ids that do not recur; it may run in a loop, which drafts then find

Prints one JSON object.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Optional
from unittest import mock

import fire
import torch

from llama import Llama


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
        mock.patch.object(engine, "verify", lambda tokens, position: towards(verify(tokens, position), position)),
        mock.patch.object(engine, "logits", lambda hidden: towards(logits(hidden), len(prompt) - 1)),
    ):
        yield


def run(llama: Llama, prompt: list[int], count: int, draft: bool, answer: Optional[list[int]]) -> tuple[list[Any], float]:
    """The ids, and the seconds from the first to the last."""
    ids, began = [], 0.0
    with forced(llama, prompt, answer) if answer else nullcontext():
        for step in llama.steps([prompt], 0, 1, count, draft=draft):
            ids.append(step.token)
            began = began or time.perf_counter()
    return ids, time.perf_counter() - began


def main(
    ckpt_dir: Optional[str] = None,
    tokenizer_path: Optional[str] = None,
    dtype: Optional[str] = None,
    count: int = 96,
    repeats: int = 5,
) -> None:
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
    fire.Fire(main)
