"""What `gpu` measures. Each part is a function: it yields names of cases, each with the function that does it."""

from __future__ import annotations

import collections
import contextlib
import gc
import inspect
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Optional
from unittest import mock

import torch
import torch._dynamo  # takes seconds, which the parts need not spend each
from checkpoints import into_page_cache, write_random
from children import System
from gpu_kernels import FORMS, ROOT, ROWS, Cases, Place, about, kernels, place, tune

from llama import Llama, ModelArgs, Tokenizer, Transformer, memory, runtime
from llama.commands import bench
from llama.decoding import compiled, gpu_step
from llama.decoding.calls import Call, Source
from llama.decoding.compiled import Recorded
from llama.decoding.engine import Engine
from llama.decoding.requests import Request
from llama.decoding.sampling import Sampling
from llama.layers.quantization import quantize_layers
from llama.layers.quantized import Quantized
from llama.layers.rounding import Quantization
from llama.loading import DEMO, DEMO_POSITIONS

__all__ = ["about", "decode", "ids", "kernels", "liveness", "load", "place", "prefill", "tests", "tune", "two", "waits"]

# What others reach, batch 1: tokens a second, and the share of the bandwidth that this is.
PUBLISHED = {
    "gpt-fast, 7B bf16, A100": (104.9, "82 % of the copy rate, 68 % of the datasheet", "pytorch-labs/gpt-fast, README"),
    "gpt-fast, 7B int8, A100": (155.6, "", "pytorch-labs/gpt-fast, README"),
    "gpt-fast, 7B int4 g32, A100": (196.8, "", "pytorch-labs/gpt-fast, README"),
    "gpt-fast, 7B bf16, H100": (143.6, "57 % of the datasheet", "pytorch-labs/gpt-fast, PR 196"),
    "SGLang with torch.compile, 8B bf16, H100": (155.7, "70 % of the datasheet", "sgl-project/sglang, issue 1008"),
    "torchao, 8B int8, H100": (199.0, "", "pytorch/ao, README"),
    "torchao, 8B int4, H100": (241.0, "", "pytorch/ao, README"),
}


# Models


def random_model(
    place: Place, args: ModelArgs, quantize: Optional[str] = None, dtype: torch.dtype = torch.bfloat16
) -> Transformer:
    """Made on the device, without a file. The stored numbers of quantized weights are drawn, not rounded."""
    with torch.device("meta"):
        model = Transformer(args)
    if quantize is not None:
        quantize_layers(model, Quantization(quantize))
    generator = torch.Generator(place.device).manual_seed(1)
    for module in model.modules():
        for name, meta in module.named_parameters(recurse=False):
            spread = getattr(module, "in_features", meta.shape[-1]) ** -0.5
            stored = meta.dtype if isinstance(module, Quantized) else dtype
            weight = torch.empty(meta.shape, dtype=stored, device=place.device)
            if not stored.is_floating_point:
                weight.random_(0, 256, generator=generator) if stored == torch.uint8 else weight.random_(
                    -127, 128, generator=generator
                )
            elif meta.ndim == 1 and not isinstance(module, Quantized):
                weight.fill_(1)
            elif isinstance(module, Quantized):  # scales, and zeros
                weight.fill_(spread / 73 if module.kind == "int8" else spread / 4.6 * (0.5 if name == "zeros" else 1))
            else:
                weight.normal_(0, spread, generator=generator)
            setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
        if isinstance(module, Quantized):
            module.pack(dtype)
    model.fuse()
    model.allocate(place.device, dtype)
    return model.eval()


def tokenizer() -> Tokenizer:
    return Tokenizer(str(DEMO / "tokenizer.model"))


@contextlib.contextmanager
def checkpoint(place: Place, layers: int) -> Iterator[Path]:
    """A folder with a random model of 7B's widths and the demo model's vocabulary, so that it has a tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        device = "cpu" if place.small else "cuda"
        path = write_random(
            {**place.params, "n_layers": layers},
            tokenizer().n_words,
            Path(folder) / "random",
            torch.bfloat16,
            1,
            device,
        )
        shutil.copy(DEMO / "tokenizer.model", path)
        torch.cuda.empty_cache()
        yield path


def built(place: Place, folder: Optional[Path], rows: int, **options: Any) -> Llama:
    """folder: None for the demo model, whose trained weights have few ids that are close."""
    if place.small and folder is None:
        return Llama(random_model(place, place.args(64, rows)), tokenizer(), compile=options.get("compile"))
    sizes = (min(256, DEMO_POSITIONS), rows)
    return Llama.build(
        None if folder is None else str(folder), None, *sizes, device=place.device, dtype="bfloat16", **options
    )


def ways(llama: Llama, recorded_plain: bool) -> dict[str, Llama]:
    """The same model under each way to run its steps."""
    made = {"kernels": Llama(llama.model, llama.tokenizer, compile=None)}
    if recorded_plain:
        with mock.patch.object(gpu_step, "suits", return_value=False):
            made["recorded"] = Llama(llama.model, llama.tokenizer, compile=None)
    made["plain"] = llama
    return made


def kind(llama: Llama) -> str:
    graph = llama._engine.graph
    return graph._ways[0].kind if isinstance(graph, Recorded) else "not recorded"


def followed(
    llama: Llama, prompts: list[list[int]], new: int, temperature: float = 0.0, **options: Any
) -> list[list[int]]:
    """The new ids of each prompt, past any EOS."""
    ids: list[list[int]] = [[] for _ in prompts]
    llama.forget()
    sampling = Sampling(temperature=temperature)
    requests = [Request(list(prompt), new, sampling, draft=False, **options) for prompt in prompts]
    for step in Call(llama._scheduler, requests, Source(len(requests))):
        if step.token is not None:
            ids[step.index].append(step.token)
    return ids


@torch.inference_mode()
def forced_logits(llama: Llama, prompts: list[list[int]], ids: list[list[int]], steps: int) -> torch.Tensor:
    """Of steps whose tokens are given: float32 (steps, rows, V)"""
    engine = llama._engine
    engine.take(None)
    for _ in engine.prefill(prompts, range(len(prompts))):
        pass
    made = []
    for i in range(steps):
        tokens = runtime.to_device([row[i] for row in ids], engine.device)
        made.append(engine.decode(tokens, [len(prompt) + i for prompt in prompts]).clone())
    return torch.stack(made)


def agreeing(found: list[list[int]], expected: list[list[int]]) -> str:
    same = sum(
        len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))) for a, b in zip(found, expected)
    )
    return f"{same} of {sum(map(len, expected))}"


# The parts


def ids(place: Place) -> Cases:
    """Each way to run a step against compile=False: ids up to each row's first difference, the generator's state after
    sampling, logits of given tokens."""

    def compare(models: dict[str, Llama], rows: int) -> dict[str, Any]:
        new, steps = (4, 2) if place.small else (64, 8)
        prompts = bench.make_prompts(rows, 20, models["plain"].model.vocab_size)
        prompts = [prompt[: 20 - i % 7] for i, prompt in enumerate(prompts)]
        expected, record = followed(models["plain"], prompts, new), {}
        logits = forced_logits(models["plain"], prompts, expected, steps)
        torch.manual_seed(5)
        drawn, state = followed(models["plain"], prompts, new, 0.8), torch.cuda.get_rng_state()
        for name in list(models)[:-1]:
            found = followed(models[name], prompts, new)
            difference = (forced_logits(models[name], prompts, expected, steps) - logits).abs().max() / logits.std()
            torch.manual_seed(5)
            sampled = followed(models[name], prompts, new, 0.8)
            record[name] = {
                "ran": kind(models[name]),
                "greedy": agreeing(found, expected),
                "sampled": agreeing(sampled, drawn),
                "same_state": bool(torch.equal(torch.cuda.get_rng_state(), state)),
                "logits_error": round(float(difference), 4),
                "twice": found == followed(models[name], prompts, new),
            }
        return record

    with checkpoint(place, 2) as folder:
        for form, (name, path) in itertools.product(FORMS, (("demo", None), ("7B, 2 layers", folder))):
            if place.small and (path is None or form == "int8"):
                continue
            models = ways(built(place, path, 4 if place.small else 32, quantize=form, compile=False), True)
            for rows in ROWS[: 2 if place.small else 3]:
                yield f"{name} {form or 'bf16'} B={rows}", partial(compare, models, rows)


class Waits:
    """Counts what makes the host wait for the device, by line, but for the wait for a step's ids."""

    def __init__(self, place: Place) -> None:
        self.machine = place.machine

    def __enter__(self) -> Waits:
        self.catching = warnings.catch_warnings(record=True)
        self.caught = self.catching.__enter__()
        warnings.simplefilter("always")
        if self.machine is None:
            torch.cuda.set_sync_debug_mode("warn")
        self.take()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.machine is None:
            torch.cuda.set_sync_debug_mode("default")
        self.catching.__exit__(*error)

    def take(self) -> collections.Counter[str]:
        """Those since the last call."""
        if self.machine is None:
            synchronizing = [w for w in self.caught or [] if "synchroniz" in str(w.message)]
            lines = collections.Counter(f"{Path(w.filename).name}:{w.lineno}" for w in synchronizing)
            del (self.caught or [])[:]
            return lines
        lines = collections.Counter(
            {w: n for w, n in self.machine.waits.items() if not w.startswith("event at engine.py")}
        )
        self.machine.waits.clear()
        return lines


def waits(place: Place) -> Cases:
    def count(llama: Llama, sampling: Sampling, options: dict[str, Any], seeded: bool) -> dict[str, Any]:
        rows, new = 4, 6 if place.small else 32
        prompts = bench.make_prompts(rows, 12, llama.model.vocab_size)
        for _ in range(2):  # the first records, and compares its first replays
            steps, first = collections.Counter[str](), collections.Counter[str]()
            llama.forget()
            requests = [
                Request(list(p), new, sampling, i if seeded else None, **options) for i, p in enumerate(prompts)
            ]
            with Waits(place) as counter:
                for i, _ in enumerate(Call(llama._scheduler, requests, Source(len(requests)))):
                    if i == 0:
                        first = counter.take()
                steps = counter.take()
        return {
            "of_the_prompts": sum(first.values()),
            "each_step": sum(steps.values()) / (new - 1),
            "at": dict(first + steps),
        }

    llama = built(place, None, 4)
    greedy, sampled = Sampling(temperature=0), Sampling(temperature=0.8)
    sets: dict[str, tuple[Sampling, dict[str, Any], bool]] = {
        "greedy": (greedy, {}, False),
        "sampled": (sampled, {}, False),
        "logprobs": (greedy, {"logprobs": True}, False),
        "alternatives": (greedy, {"logprobs": True, "alternatives": 3}, False),
        "penalty": (
            Sampling(temperature=0.8, repetition_penalty=1.2, top_k=20, min_p=0.02, logit_bias={5: -2.0}),
            {},
            False,
        ),
        "seeds": (sampled, {}, True),
    }
    for name, options in sets.items():
        yield name, partial(count, llama, *options)


def liveness(place: Place) -> Cases:
    """A graph keeps alive nothing that it reads: ids before and after all freed memory was overwritten."""

    def overwrite() -> int:
        """NaN in blocks of many sizes, which are let go again. -> bytes"""
        kept, total = [], 0
        free = torch.cuda.mem_get_info(place.device)[0]
        limit = 2**17 if place.small else min(8 * 2**30, free // 2)
        for size in itertools.cycle(2**i for i in range(9, 14 if place.small else 29)):
            if total >= limit:
                return total
            kept.append(torch.full((size // 4,), math.nan, device=place.device))
            total += size
        return total

    def again(llama: Llama, prompts: list[list[int]], new: int) -> dict[str, Any]:
        before, same = followed(llama, prompts, new), []
        for empties in (
            False,
            True,
            True,
        ):  # into the blocks that torch keeps, then into all memory that was given back
            gc.collect()
            if empties:
                torch.cuda.empty_cache()
            overwrite()
            place.synchronize()
            same.append(followed(llama, prompts, new) == before)
        return {"ran": kind(llama), "same_ids": same}

    def checked(llama: Llama, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """With torch's own check, which raises if an input of a graph was freed. It sees no kernel of Triton's."""
        if "check_input_liveness" not in inspect.signature(torch.cuda.graph.__init__).parameters:
            return {"unable": f"torch {torch.__version__} has no check_input_liveness"}
        with mock.patch.object(torch.cuda, "graph", partial(torch.cuda.graph, check_input_liveness=True)):
            ids = followed(llama, prompts, new)
        gc.collect()
        torch.cuda.empty_cache()
        return {"ran": kind(llama), "same_ids": [followed(llama, prompts, new) == ids]}

    new = 6 if place.small else 32
    for form in FORMS[: 1 if place.small else 3]:
        for name, make in (("", again), ("checked by torch ", checked)):
            models = ways(built(place, None, 4, quantize=form, compile=False), True)
            for way in ("kernels", "recorded"):
                prompts = bench.make_prompts(3, 12, models[way].model.vocab_size)
                yield f"{name}{form or 'bf16'} {way}", partial(make, models[way], prompts, new)


@contextlib.contextmanager
def without_prefill(llama: Llama) -> Iterator[None]:
    """Prompts cost nothing: the cache holds random numbers, and so does the last hidden state."""
    weight = llama.model.norm.weight
    for attention in llama.model.attentions():
        for cache in (attention.cache_k, attention.cache_v):
            cache.normal_()

    def prefill(self: Engine, prompts: Any, slots: Any, start: int = 0, **_: Any) -> Any:
        for row, prompt in enumerate(prompts):
            yield (
                [row],
                torch.randn(1, 1, llama.model.params.dim, device=weight.device).to(weight.dtype),
                len(prompt) - 1,
            )

    with mock.patch.object(Engine, "prefill", prefill):
        yield


def decode(place: Place) -> Cases:
    new = 6 if place.small else 64
    contexts = (8,) if place.small else (100, 1030, 2040)
    yield (
        "published",
        lambda: {name: dict(zip(("tok_s", "share", "source"), numbers)) for name, numbers in PUBLISHED.items()},
    )

    def speed(llama: Llama, rows: int, context: int) -> dict[str, Any]:
        model = llama.model
        args, cache = model.params, next(iter(model.attentions())).cache_k
        prompts = bench.make_prompts(rows, context, model.vocab_size)
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved(place.device)
        with without_prefill(llama):
            first, step, _ = bench.timed_run(llama, prompts, 2)
            captured = torch.cuda.memory_reserved(place.device) - reserved
            runs = [bench.timed_run(llama, prompts, new)[1] for _ in range(1 if place.small else 4)][-3:]
        seconds = statistics.median(run for run in runs if run is not None)
        tokens = rows * (context + new // 2)
        nbytes = (
            bench.weight_bytes(model)
            + tokens * 2 * args.n_layers * cache.shape[2] * cache.shape[3] * cache.element_size()
        )
        return {
            "tok_s": round(rows / seconds, 1),
            "ms": round(seconds * 1e3, 3),
            "GB": round(nbytes / 1e9, 3),
            "share": round(nbytes / seconds / place.copy_rate, 3),
            "first_step_s": round(first + (step or 0), 3),
            "captures_MB": round(captured / 1e6, 1),
            "ran": kind(llama),
        }

    for form in FORMS:
        free = memory.free_bytes(place.device) or 0
        most = 4 if place.small else 32 if free > 60e9 else 8 if free > 30e9 else 1  # 32 rows of 2112 tokens are 35 GB
        llama = Llama(
            random_model(place, place.args(64 if place.small else 2112, most), form), tokenizer(), compile=None
        )
        for rows in (rows for rows in (1, 8, 32) if rows <= most):
            for context in contexts:
                yield f"{form or 'bf16'} B={rows} T={context}", partial(speed, llama, rows, context)
            if form is None and rows == 1:
                yield "profile of a step, bf16 B=1", partial(profile, place, llama, contexts[len(contexts) // 2])
        del llama
        gc.collect()
        torch.cuda.empty_cache()


def profile(place: Place, llama: Llama, context: int) -> dict[str, Any]:
    """What one replay spends its time on: the 15 largest kernels, (microseconds, times)."""
    engine, activity = llama._engine, torch.profiler.ProfilerActivity
    tokens = torch.zeros(1, dtype=torch.long, device=place.device)
    with torch.inference_mode():
        for _ in range(compiled.PROOFS + 1):
            engine.decode(tokens, [context])
        place.synchronize()
        with torch.profiler.profile(
            activities=[activity.CPU] if place.small else [activity.CUDA, activity.CPU]
        ) as profiler:
            engine.decode(tokens, [context])
            place.synchronize()

    def microseconds(event: Any) -> float:
        names = ("self_cpu_time_total",) if place.small else ("self_device_time_total", "self_cuda_time_total")
        return next((getattr(event, name) for name in names if hasattr(event, name)), 0.0)

    events = [event for event in profiler.key_averages() if microseconds(event) > 0]
    events.sort(key=microseconds, reverse=True)
    top = {event.key[:80]: (round(microseconds(event), 1), event.count) for event in events[:15]}
    return {
        "us": round(sum(map(microseconds, events)), 1),
        "launches": sum(event.count for event in events),
        "kernels": top,
    }


def prefill(place: Place) -> Cases:
    """Milliseconds of the first call with a length, and of the second; each attention backend, by name."""
    from torch.nn import attention
    from torch.nn.attention import bias  # noqa: F401  # here, because what it imports looks into `sdpa_kernel`

    names = {"as chosen": None, "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION",
      "cudnn": "CUDNN_ATTENTION",
             "math": "MATH"}  # fmt: skip
    backends = {name: value for name, value in names.items() if not (place.small and name in ("efficient", "cudnn"))}
    original = attention.sdpa_kernel

    @torch.inference_mode()
    def read(llama: Llama, length: int, backend: Optional[str]) -> dict[str, Any]:
        engine, taken = llama._engine, []
        prompts = bench.make_prompts(1, length, llama.model.vocab_size)
        chosen = None if backend is None else [getattr(attention.SDPBackend, backend)]
        with mock.patch.object(attention, "sdpa_kernel", lambda usual: original(chosen or usual)):
            for _ in range(4):
                engine.take(None)
                place.synchronize()
                began = time.perf_counter()
                for _, hidden, _ in engine.prefill(prompts, [0]):
                    last = hidden[:, -1]
                engine.logits(last).argmax(-1).tolist()
                taken.append(round((time.perf_counter() - began) * 1e3, 2))
        return {
            "first_ms": taken[0],
            "second_ms": taken[1],
            "later_ms": min(taken[2:]),
            "tok_s": round(length / min(taken[2:]) * 1e3),
        }

    lengths = (12,) if place.small else (1000, 1001, 1002, 1003, 2048)
    heads = place.args(1, 1).n_heads
    shapes: dict[str, dict[str, Any]] = {
        "7B": {},
        "8 layers, a quarter of the key heads": {"n_kv_heads": heads // 4, "n_layers": 2 if place.small else 8},
    }
    for shape, changes in shapes.items():
        llama = Llama(random_model(place, place.args(2112, 1, **changes)), tokenizer(), compile=False)
        for name, backend in backends.items():
            for length in lengths if not changes else lengths[-1:]:
                yield f"{shape}, {name}, {length}", partial(read, llama, length, backend)
        del llama
        gc.collect()
        torch.cuda.empty_cache()


def load(place: Place) -> Cases:
    """In processes of their own, which `systems` runs."""
    layers = int(place.params["n_layers"])
    needed = 14e9 * 1.2
    scaled = not place.small and shutil.disk_usage(tempfile.gettempdir()).free < needed
    layers = 2 if scaled else layers

    def loaded(folder: Path, form: Optional[str]) -> dict[str, Any]:
        into_page_cache(folder)
        spec = {"system": "ours", "path": str(folder), "tokenizer_path": str(folder / "tokenizer.model"),
          "quantize": form,
                "max_seq_len": 64, "max_batch_size": 1, "device": "cpu" if place.small else "cuda"}  # fmt: skip
        system = System("ours", "ours", form or "bf16", [spec])
        try:
            for _ in range(1 if place.small else 2):
                system.start(counted=True)
        finally:
            system.kill()
        if not system.loads:
            raise RuntimeError(system.notes[-1])
        return min(system.loads, key=lambda load: load["load_s"])

    began = time.perf_counter()
    with checkpoint(place, layers) as folder:
        size = sum(file.stat().st_size for file in folder.iterdir())
        wrote = {"GB": round(size / 1e9, 2), "layers": layers, "seconds": round(time.perf_counter() - began, 1)}
        yield "written", lambda: {**wrote, "note": "scaled down: the disk is too small for 7B" if scaled else "whole"}
        for form in FORMS[: 1 if place.small else 3]:
            yield form or "bf16", partial(loaded, folder, form)


def tests(place: Place) -> Cases:
    def run() -> dict[str, Any]:
        alone = ["-o", "addopts=", "-p", "no:cacheprovider"]  # in one process: there is one GPU, and perhaps no xdist
        command = [sys.executable, "-m", "pytest", "-q", *alone, str(ROOT / "tests/test_gpu.py")]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        lines = (result.stdout.strip() or result.stderr.strip()).splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
        return {"status": result.returncode, "said": lines[-1:], "failed": failed[:20]}

    yield "tests/test_gpu.py", run


def two(place: Place) -> Cases:
    """Two processes of torchrun on two GPUs: ids against one process's, seconds to exit, microseconds of a sum in a
    graph."""

    def run(folder: Path) -> dict[str, Any]:
        began = time.perf_counter()
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", __file__, str(folder)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            out, errors = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:  # such processes have hung at their exit
            process.terminate()  # which torchrun passes on to the two
            out, errors = process.communicate()
        ended = time.time()
        record: dict[str, Any] = {"status": process.returncode, "seconds": round(time.perf_counter() - began, 1)}
        said = [line for line in out.splitlines() if line.startswith("{")]
        if not said:
            return {**record, "errors": [line for line in errors.splitlines() if "Error" in line][:4]}
        answer = json.loads(said[-1])
        alone = followed(built(place, folder, 4), *pair_task())
        record["seconds_to_exit"] = round(ended - answer.pop("at"), 2)
        return {**record, "ids": agreeing(answer.pop("ids"), alone), **answer}

    if torch.cuda.device_count() < 2:
        yield "two processes", lambda: {"unable": f"{torch.cuda.device_count()} GPU can be seen; this part needs two"}
        return
    with checkpoint(place, 2) as folder:
        yield "two processes", partial(run, folder)


def pair_task() -> tuple[list[list[int]], int]:
    return bench.make_prompts(4, 20, tokenizer().n_words), 48


def pair(folder: str) -> None:
    """One of the two processes: builds, generates, times sums. The first one prints."""
    from llama.layers import parallel

    llama = Llama.build(folder, None, 256, 4, device="cuda", dtype="bfloat16")
    device, group = llama.model.norm.weight.device, llama.model.output.group
    where = Place(device)
    record: dict[str, Any] = {"ids": followed(llama, *pair_task()), "ran": kind(llama)}
    for rows in (1, 4):
        x = torch.zeros(rows, llama.model.params.dim, dtype=torch.bfloat16, device=device)
        small = group is not None and group.group_name in parallel._small
        with torch.inference_mode():
            if small:
                record[f"symmetric_us B={rows}"] = where_us(where, partial(parallel.all_reduce, x, group))
            record[f"nccl_us B={rows}"] = where_us(where, partial(torch.distributed.all_reduce, x, group=group))
    if torch.distributed.get_rank() == 0:
        print(json.dumps({**record, "at": time.time()}), flush=True)


def where_us(place: Place, call: Callable[[], Any]) -> float:
    """Microseconds of a collective in a graph. A fixed number of replays, the same on all ranks."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(64):
            call()
    for count in (5, 50):
        place.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            graph.replay()
        place.synchronize()
    seconds = time.perf_counter() - began
    graph.reset()  # before NCCL's communicator goes
    return round(seconds / count / 64 * 1e6, 2)


if __name__ == "__main__":
    try:
        pair(sys.argv[1])
    except Exception:
        traceback.print_exc()
        os._exit(1)
