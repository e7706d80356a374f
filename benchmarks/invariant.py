"""What `batch_invariant=True` keeps and costs on a GPU, in less than a minute.

    python benchmarks/invariant.py

Random mixtures of the demo model's stories in each form, each compared to the bit with the same request alone; then a
decode step and a prompt of 2,048 tokens at the shape of Llama 2 7B with 8 layers and random weights, normal and
invariant in turn (A B B A).
"""

from __future__ import annotations

import gc
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch
from gpu_kernels import Place
from gpu_parts import random_model

from llama import Llama, ModelArgs
from llama.decoding.calls import Call, Source
from llama.decoding.engine import Engine
from llama.decoding.invariant import InvariantEngine
from llama.decoding.requests import Request
from llama.decoding.sampling import Sampling

FORMS: list[tuple[str, Optional[str]]] = [
    ("bfloat16", None),
    ("float16", None),
    ("bfloat16", "int8"),
    ("bfloat16", "int4"),
]
BEGINNING = (
    "Once upon a time there was a little girl named Lily. She liked to play in the park with her dog, and one day"
)
ENDS = [" she", " the dog ran", " her mom said that it was time to go home", " it", " a bird came", ""]
SECONDS = 5.0  # for the mixtures of each form


def drawn(llama: Llama, rng: random.Random) -> Request:
    text = rng.choice([BEGINNING + rng.choice(ENDS), rng.choice(ENDS), BEGINNING[: rng.randrange(1, 100)]])
    sampling = rng.choice(
        [Sampling(0), Sampling(0.8, 0.9), Sampling(1.0, 1.0, top_k=20), Sampling(0, repetition_penalty=1.2)]
    )
    prompt = llama.tokenizer.encode(text, bos=True, eos=False)
    seed = rng.randrange(3) if sampling.temperature else None
    return Request(
        prompt, rng.choice([3, 20, 40]), sampling, seed, logprobs=True, alternatives=2, draft=rng.random() < 0.5
    )


def told(call: Call) -> list[list[Any]]:
    found: list[list[Any]] = [[] for _ in call.requests]
    for step in call:
        found[step.index].append((step.token, step.logprob, step.alternatives))
    return found


def mixtures(dtype: str, quantize: Optional[str]) -> dict[str, Any]:
    llama = Llama.build(None, None, 256, 8, device="cuda", dtype=dtype, quantize=quantize, batch_invariant=True)
    rng, known, different, compared, steps = random.Random(1), dict[str, Any](), 0, 0, 0
    began = time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        requests = [drawn(llama, rng) for _ in range(rng.choice([2, 3, 5, 8, 11]))]
        for request, got in zip(requests, told(Call(llama._scheduler, requests, Source(min(8, len(requests)))))):
            key = repr(replace(request, draft=None))
            if key not in known:
                llama.forget()
                known[key] = told(Call(llama._scheduler, [replace(request, draft=False)], Source(1)))[0]
            different, compared, steps = different + (got != known[key]), compared + 1, steps + len(got)
    graph = getattr(llama._engine.graph, "_ways", [None])[0]
    return {
        "form": quantize or dtype, "texts": compared, "steps": steps, "different": different,
        "step": None if graph is None else graph.kind, "sizes": sizes(llama._engine),
    }  # fmt: skip


def sizes(engine: Engine) -> list[Any]:
    """Which sizes of blocks give the bits of the one that counts: (shape of a matrix, size, whether)."""
    found = engine._products._same  # type: ignore[attr-defined]
    return sorted({(tuple(key[1]), size, same) for (key, size), same in found.items()})


def seconds(run: Callable[[], Any], times: int) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


@torch.inference_mode()
def costs(quantize: Optional[str], rows: int = 8) -> dict[str, Any]:
    args = ModelArgs(n_layers=8, vocab_size=32000, max_batch_size=rows, max_seq_len=2176)
    model = random_model(Place(torch.device("cuda", 0)), args, quantize)
    engines = {"normal": Engine(model, None), "invariant": InvariantEngine(model, None)}
    for engine in engines.values():
        engine.refresh()
    prompt = [(7 * i) % 31999 + 1 for i in range(2048)]

    def decode(engine: Engine, count: int) -> None:
        engine.decode(torch.ones(count, dtype=torch.long, device=engine.device), [1000] * count)

    works: dict[str, tuple[Callable[[Engine], Any], int]] = {
        **{f"step of {count}": (lambda engine, count=count: decode(engine, count), 30) for count in (1, 4, 8)},
        # type: ignore[misc]
        "prompt of 2048": (lambda engine: list(engine.prefill([prompt], [0])), 2),
    }
    report: dict[str, Any] = {"form": quantize or "bfloat16"}
    for name, (work, times) in works.items():
        for engine in engines.values():
            for _ in range(5 if times > 2 else 1):  # graphs are recorded, kernels compiled and compared
                work(engine)
        found = [(which, seconds(lambda which=which, work=work: work(engines[which]),
              times)) for which in  # type: ignore[misc]
                 ("normal", "invariant", "invariant", "normal")]  # fmt: skip
        by = {which: 500 * sum(s for other, s in found if other == which) for which in engines}
        report[name] = {
            **{f"{which}_ms": round(ms, 3) for which, ms in by.items()},
            "ratio": round(by["invariant"] / by["normal"], 3),
        }
    report["sizes"] = sizes(engines["invariant"])
    return report


def main() -> None:
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "mixtures": [], "costs": []}
    parts = [("mixtures", mixtures, form) for form in FORMS] + [("costs", costs, (q,)) for q in (None, "int8", "int4")]
    for name, part, arguments in parts:
        began = time.perf_counter()
        try:
            found: dict[str, Any] = part(*arguments)  # type: ignore[operator]
        except Exception as error:
            found = {"form": arguments, "error": f"{type(error).__name__}: {error}"}
        found["seconds"] = round(time.perf_counter() - began, 1)
        print(name, json.dumps(found), flush=True)
        report[name].append(found)
        gc.collect()
        torch.cuda.empty_cache()
    print(json.dumps(report))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
