"""What users wait for: many ragged prompts, prompts that begin alike, clients that come at random, the tenth turn of a
chat, long prompts, and memory over many calls.

    python benchmarks/serving.py --tokenizer_path tokenizer.model --ckpt_dir FOLDER --only prompts
    python benchmarks/serving.py … --only chat | shared | clients | joining | overhead | prefill | memory

Prints one JSON object for each part.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import fire
import metas_way
import torch
from checkpoints import random_checkpoint
from process_memory import megabytes

from llama import Llama
from llama.decoding.calls import Call, Source
from llama.decoding.requests import Request
from llama.system.program import as_a_program


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def prompts(llama: Llama, repeats: int) -> dict[str, Any]:
    """40 prompts of 5 to 400 tokens over 4 slots, greedy, 60 new tokens at most; ours and Meta's loop, in turn."""
    rng = random.Random(1)
    vocab_size, limit = llama.model.vocab_size, llama.model.params.max_batch_size
    ragged = [[1, *(rng.randrange(3, vocab_size) for _ in range(rng.randint(4, 399)))] for _ in range(40)]
    eos = llama.tokenizer.eos_id

    def ours() -> list[list[int]]:
        ids: list[list[int]] = [[] for _ in ragged]
        for step in llama.steps(ragged, 0, 1, 60):
            ids[step.index] += [] if step.token is None else [step.token]
        return ids

    def metas() -> list[list[int]]:
        groups = [ragged[i : i + limit] for i in range(0, len(ragged), limit)]
        return [row for group in groups for row in metas_way.generate_batch(llama.model, group, 60, eos)]

    taken: dict[str, list[float]] = {"ours": [], "metas": []}
    texts: dict[str, list[list[int]]] = {}
    for _ in range(repeats):
        for name, way in (("ours", ours), ("metas", metas)):
            seconds, texts[name] = timed(way)
            taken[name].append(seconds)
    medians = {f"{name}_s": round(statistics.median(times), 2) for name, times in taken.items()}
    same = sum(a == b for a, b in zip(texts["ours"], texts["metas"]))
    return {**medians, "ratio": round(medians["metas_s"] / medians["ours_s"], 2), "same_texts_of_40": same}


def chat(llama: Llama, repeats: int) -> dict[str, Any]:
    """Seconds to the first token of the tenth turn: with what is remembered, and after it was forgotten."""
    waits: dict[str, list[float]] = {"remembered_s": [], "forgotten_s": []}
    tokens = 0
    for _ in range(repeats):
        session = llama.chat(temperature=0, max_gen_len=16)
        for turn in range(9):
            session.ask(f"Tell me of the river, part {turn}.")
        tokens = sum(len(turn["ids"]) for turn in session.turns)
        for name, times in waits.items():
            if name == "forgotten_s":
                llama.forget()
            times.append(timed(lambda: next(session.send("And how does it end?", max_gen_len=1)))[0])  # noqa: B023
            session.undo()
    return {"history_tokens": tokens, **{name: round(statistics.median(times), 4) for name, times in waits.items()}}


def shared(llama: Llama, repeats: int) -> dict[str, Any]:
    """40 prompts that begin with the same 400 tokens and end differently, and 8 answers to one prompt of 400: seconds
    with what they share read once, and with each prompt read whole (after `forget`, one by one)."""
    rng = random.Random(2)
    ids = [1, *(rng.randrange(3, llama.model.vocab_size) for _ in range(399))]
    tasks = {"40_prompts": [[*ids, 5 + i, 9] for i in range(40)], "8_answers": [ids] * 8}
    result = {}
    for name, rows in tasks.items():

        def together(rows: list[list[int]] = rows) -> None:
            llama.forget()
            for _ in llama.steps(rows, 0, 1, 4):
                pass

        def singly(rows: list[list[int]] = rows) -> None:
            for row in rows:
                llama.forget()
                for _ in llama.steps([row], 0, 1, 4, draft=False):
                    pass

        taken = {way.__name__: statistics.median(timed(way)[0] for _ in range(repeats)) for way in (together, singly)}
        result[name] = {
            **{f"{way}_s": round(s, 2) for way, s in taken.items()},
            "ratio": round(taken["singly"] / taken["together"], 1),
        }
    return result


def clients(llama: Llama, count: int = 64, rate: float = 2.0) -> dict[str, Any]:
    """Clients in threads that come at random (`rate` a second), each with a prompt of 5 to 200 tokens and 16 to 128 to
    be answered: tokens a second beside the same work as one list, seconds to the first token, and gaps between
    tokens."""
    rng = random.Random(3)
    vocab_size = llama.model.vocab_size
    prompts = [[1, *(rng.randrange(3, vocab_size) for _ in range(rng.randint(4, 199)))] for _ in range(count)]
    lengths = [rng.randint(16, 128) for _ in range(count)]
    arrivals = list(itertools.accumulate(rng.expovariate(rate) for _ in range(count)))
    firsts, gaps = [], []
    llama.tokenizer.eos_id = -1

    def client(i: int) -> None:
        time.sleep(max(0.0, began + arrivals[i] - time.perf_counter()))
        last = came = time.perf_counter()
        for number, _ in enumerate(llama.steps([prompts[i]], 0, 1, lengths[i])):
            now = time.perf_counter()
            (gaps if number else firsts).append(now - (last if number else came))
            last = now

    llama.forget()
    began = time.perf_counter()
    threads = [threading.Thread(target=client, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = time.perf_counter() - began - arrivals[0]
    llama.forget()
    requests = [Request(prompt, length) for prompt, length in zip(prompts, lengths)]
    listed, _ = timed(lambda: list(Call(llama._scheduler, requests, Source(llama.model.params.max_batch_size))))

    def at(values: list[float], share: float) -> float:
        return round(sorted(values)[min(int(share * len(values)), len(values) - 1)], 4)

    return {
        "clients_tokens_a_second": round(sum(lengths) / taken, 1),
        "as_one_list": round(sum(lengths) / listed, 1),
        **{f"first_token_{name}_s": at(firsts, share) for name, share in (("median", 0.5), ("99", 0.99))},
        **{f"gap_{name}_s": at(gaps, share) for name, share in (("median", 0.5), ("99", 0.99))},
    }


def joining(llama: Llama, tokens: int = 2000) -> dict[str, Any]:
    """A prompt of 2000 tokens joins three streams: the longest gap between two tokens of theirs, beside a step's time,
    the time of reading such a prompt alone, and the pieces that it was read in."""
    streams = [llama.steps([[1, 50 + i]], 0, 1, 400, draft=False) for i in range(3)]
    running = [iter(stream) for stream in streams]
    llama.tokenizer.eos_id = -1
    steps: list[float] = []
    for number in range(30):
        seconds, _ = timed(lambda: [next(each) for each in running])
        steps += [seconds] if number > 5 else []
    pieces: list[int] = []
    prefill = llama._engine.prefill

    def counted(prompts: Any, slots: Any, start: int = 0, **more: Any) -> Any:
        pieces.append(max(map(len, prompts)) - start)
        return prefill(prompts, slots, start, **more)

    llama._engine.prefill = counted  # type: ignore[method-assign]
    began = time.perf_counter()
    first: list[float] = []

    def join() -> None:
        for _ in llama.steps([[1, *([7, 9] * tokens)][:tokens]], 0, 1, 2):
            first.append(time.perf_counter() - began)

    thread = threading.Thread(target=join)
    thread.start()
    gaps = []
    while not first:
        gaps.append(timed(lambda: [next(each) for each in running])[0])
    for each in running:
        each.close()  # type: ignore[attr-defined]
    thread.join()
    llama.forget()
    llama._engine.prefill = prefill  # type: ignore[method-assign]
    whole, _ = timed(lambda: llama.generate([[1, *([7, 9] * tokens)][:tokens]], 1, 0))
    return {
        "step_s": round(statistics.median(steps), 4),
        "longest_gap_s": round(max(gaps), 4),
        "pieces": [min(pieces), max(pieces)],
        "first_token_s": round(first[0], 2),
        "read_alone_s": round(whole, 2),
    }


def overhead(llama: Llama, steps: int = 400) -> dict[str, Any]:
    """Microseconds of a step beside the model's: the model is replaced by ready logits."""
    rows = llama.model.params.max_batch_size
    llama.tokenizer.eos_id = -1
    engine = llama._engine
    logits = torch.randn(rows, llama.model.vocab_size, device=engine.device)
    prompts = [[1, 5 + i] for i in range(rows)]
    list(llama.steps(prompts, 0, 1, 2, draft=False))
    engine.decode = lambda tokens, positions: logits  # type: ignore[method-assign]

    def work() -> float:
        """Seconds, once the prompts were read."""
        some = iter(llama.steps(prompts, 0, 1, steps + 1, draft=False))
        for _ in prompts:
            next(some)
        return timed(lambda: list(some))[0]

    taken = min(work() for _ in range(5))

    def choose() -> None:
        for _ in range(steps):
            logits.argmax(-1).where(logits.sum(-1).isfinite(), -1).tolist()

    chosen = min(timed(choose)[0] for _ in range(5))
    return {"rows": rows, "step_us": round(taken / steps * 1e6), "of_these_choosing_us": round(chosen / steps * 1e6)}


def prefill(llama: Llama, tokens: int = 4000) -> dict[str, Any]:
    """Peak memory of one long prompt, beside a short one that has touched every weight."""
    llama.generate([[1, 5, 6]], 2, 0)
    before = megabytes("VmHWM")
    seconds, _ = timed(lambda: llama.generate([[1, *([7] * (tokens - 1))]], 1, 0))
    return {
        "tokens": tokens,
        "s": round(seconds, 2),
        "peak_MB_before": round(before),
        "peak_MB_after": round(megabytes("VmHWM")),
    }


def memory(llama: Llama, calls: int = 10_000) -> dict[str, Any]:
    """Resident memory over many calls."""

    def resident() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return round(pages * 4096 / 1e6, 1)

    seen = {}
    for call in range(calls + 1):
        if call in (100, calls // 4, calls // 2, calls):
            seen[call] = resident()
        llama.text_completion(["Once upon a time"] * (1 + call % 5), max_gen_len=4 + call % 7, stop="zebra")
    return {"resident_MB_after_calls": seen}


def main(
    tokenizer_path: str,
    ckpt_dir: Optional[str] = None,
    shape: str = "134M",
    only: str = "prompts",
    repeats: int = 3,
    rows: Optional[int] = None,
) -> None:
    folder = ckpt_dir or str(random_checkpoint(shape, Path(tempfile.gettempdir()) / f"llama-{shape}"))
    columns = {"prefill": 4096, "joining": 2048}.get(only, 512)
    slots = rows or {"prefill": 1, "clients": 8, "overhead": 8}.get(only, 4)
    llama = Llama.build(folder, tokenizer_path, max_seq_len=columns, max_batch_size=slots)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "prompts": lambda: prompts(llama, repeats),
        "chat": lambda: chat(llama, repeats),
        "shared": lambda: shared(llama, repeats),
        "clients": lambda: clients(llama),
        "joining": lambda: joining(llama),
        "overhead": lambda: overhead(llama),
        "prefill": lambda: prefill(llama),
        "memory": lambda: memory(llama),
    }
    if only not in parts:
        raise ValueError(f"only={only!r} must be one of {', '.join(parts)}")
    print(json.dumps({"part": only, "checkpoint": folder, "torch": torch.__version__, **parts[only]()}))


if __name__ == "__main__":
    with as_a_program(main):  # a misspelt flag is refused before hours of work
        fire.Fire(main)
