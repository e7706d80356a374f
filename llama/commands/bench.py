"""How fast a checkpoint runs on this machine, beside what the machine could do: `python -m llama bench`."""

from __future__ import annotations

import json as jsonlib
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import torch

from .. import memory
from ..decoding.calls import Call, Source
from ..decoding.requests import Request
from ..generation import Llama
from ..layers.parallel import from_first_process
from ..loading import DEMO, DEMO_POSITIONS
from ..model import Transformer
from ..runtime import Launch, device_kind
from ..system.checks import whole_number
from ..system.files import user_path
from ..system.printable import counted, printable
from ..system.progress import bar
from .arguments import build

READ_BYTES = 2**28  # too many for a core's share of the caches, yet read in a fraction of a second
TRIES = 5
REPEATS = 3


def bench(args: Namespace) -> None:
    """The command bench."""
    # The first token comes with the prompt; the others time the decoding.
    new_tokens = whole_number("new_tokens", args.new_tokens, 2)
    batch_size = whole_number("batch_size", args.batch_size, 1)
    prompt_tokens = args.prompt_tokens
    if prompt_tokens is None:
        prompt_tokens = 480 if args.ckpt_dir is not None else max(1, min(480, DEMO_POSITIONS - new_tokens))
    prompt_tokens = whole_number("prompt_tokens", prompt_tokens, 1)
    began = time.perf_counter()
    llama = build(args, max_seq_len=prompt_tokens + new_tokens, max_batch_size=batch_size)
    report = {
        "checkpoint": str(DEMO if args.ckpt_dir is None else user_path(args.ckpt_dir)),
        "quantize": args.quantize,
        "compile": args.compile,
        "load_s": time.perf_counter() - began,
        **measure(llama, prompt_tokens, new_tokens, batch_size),
    }
    print(jsonlib.dumps(report) if args.json else printable(_in_words(report)), flush=True)


def measure(llama: Llama, prompt_tokens: int, new_tokens: int, batch_size: int) -> dict[str, Any]:
    """Medians over REPEATS runs, and the machine's read rate. All processes call it together."""
    weight, rows = llama.model.norm.weight, make_prompts(batch_size, prompt_tokens, llama.model.vocab_size)
    from_first_process(None)  # all start together: processes that share a memory read it at the same time, as in a step
    limit = read_rate(weight.device)
    turns = bar(iterable=range(1 + REPEATS), desc="Measuring", unit="run")
    runs = [timed_run(llama, rows, new_tokens) for _ in turns][1:]
    first = statistics.median(run[0] for run in runs)
    step = statistics.median(run[1] for run in runs if run[1] is not None)
    nbytes = weight_bytes(llama.model)
    return {
        "device": str(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "processes": Launch.read().world_size,
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "prefill_tok_s": batch_size * prompt_tokens / first,
        "first_token_s": first,
        "decode_tok_s": batch_size / step,
        "step_s": step,
        "weights_bytes": nbytes,
        "weights_GB_s": nbytes / step / 1e9,
        "memory_GB_s": limit / 1e9,
        "share_of_memory_rate": nbytes / step / limit,
        "fits_cache": nbytes < largest_cache() and device_kind(weight) == "cpu",
    }


def _in_words(report: Mapping[str, Any]) -> str:
    r, rows, step = report, report["batch_size"], f"{report['step_s'] * 1e3:.2f} ms a step"
    each = " on each process" if r["processes"] > 1 else ""
    together, apart = (f" of {rows} prompts together", f" in each of {rows} prompts") if rows > 1 else ("", "")
    kind = "plain reads" if r["device"] == "cpu" else "copies"
    lines = [
        f"{r['checkpoint']}: {_form(r)} on {_place(r)}",
        f"  load      {r['load_s']:.2f} s",
        f"  prefill   {r['prefill_tok_s']:.1f} tok/s ({r['prompt_tokens']} tokens{apart})",
        f"  first     {r['first_token_s']:.4f} s to the first token",
        f"  decode    {r['decode_tok_s']:.2f} tok/s{together} ({step}, {r['new_tokens']} new tokens)",
        f"  weights   {memory.gigabytes(r['weights_bytes'])} a step{each}, {r['weights_GB_s']:.1f} GB/s",
        (
            f"  memory    {r['memory_GB_s']:.1f} GB/s in {kind}{each}: decode takes {r['share_of_memory_rate']:.0%} of "
            f"that"
        ),
    ]
    if r["fits_cache"]:
        lines.append("            (the weights fit this processor's largest cache, so more than 100% is possible)")
    return "\n".join(lines)


def _form(report: Mapping[str, Any]) -> str:
    """How it computes: "bfloat16, int8, compiled"."""
    compiled = "compiled" if report["compile"] is True else None
    return ", ".join(word for word in (report["dtype"], report["quantize"], compiled) if word is not None)


def _place(report: Mapping[str, Any]) -> str:
    """Where it computes: "cpu, 2 processes, 4 threads each"."""
    processes, threads = report["processes"], report["threads"]
    place = f"{report['device']}, {counted(processes, 'process')}"
    if report["device"] == "cpu":
        place += f", {counted(threads, 'thread')}" + (" each" if processes > 1 else "")
    return place


def make_prompts(batch_size: int, length: int, vocab_size: int) -> list[list[int]]:
    """Prompts of BOS and then ids that vary, none of them special."""
    special = min(3, vocab_size - 1)
    return [
        [min(1, vocab_size - 1), *(special + (7 * i + 31 * row) % (vocab_size - special) for i in range(length - 1))]
        for row in range(batch_size)
    ]


def timed_run(
    llama: Llama, prompts: Sequence[Sequence[int]], new_tokens: int
) -> tuple[float, Optional[float], list[int]]:
    """Greedy, past any EOS: seconds to the first token, mean seconds of each later step (None for one new token), and
    the first row's new ids. The prompts have one length, and there are at most max_batch_size of them."""
    llama.forget()
    requests = [Request(list(prompt), new_tokens, draft=False) for prompt in prompts]
    ids: list[int] = []
    moments = []
    began = time.perf_counter()
    for count, step in enumerate(Call(llama._scheduler, requests, Source(len(requests))), start=1):
        if step.index == 0 and step.token is not None:
            ids.append(step.token)
        if count % len(prompts) == 0:  # the ids have reached the host, so the device has finished
            moments.append(time.perf_counter())
    steps = len(moments) - 1
    return moments[0] - began, (moments[-1] - moments[0]) / steps if steps else None, ids


def weight_bytes(model: Transformer) -> int:
    """Bytes of weights that each decode step reads on this process: all but the embedding, whose rows are few."""
    return sum(
        tensor.nbytes
        for module in model.modules()
        if module is not model.tok_embeddings
        for tensors in (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, tensor in tensors
        if not name.startswith("cache_") and name != "fused"  # its parts are the layers' weights, which are counted
    )


def read_rate(device: torch.device, nbytes: int = READ_BYTES) -> float:
    """Bytes a second that this process reads from memory with all its threads; on other devices than the CPU, bytes a
    second that a copy reads and writes. The best of a few operators; for each, the median of TRIES."""
    free = memory.free_bytes(device)
    nbytes = nbytes if free is None else max(2**20, min(nbytes, free // 4))
    # An even count. Writing ones touches every page.
    numbers = torch.ones(nbytes // 8 * 2, dtype=torch.float32, device=device)
    if device_kind(device) != "cpu":
        target = torch.empty_like(numbers)
        return 2 * numbers.nbytes / _seconds(lambda: target.copy_(numbers), device)
    halves, integers = numbers.chunk(2), numbers.view(torch.int32)
    reads: list[Callable[[], Any]] = [numbers.sum, integers.amax, lambda: torch.dot(*halves)]
    return numbers.nbytes / min(_seconds(read, device) for read in reads)


def matmul_rate(device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]]) -> float:
    """Floating-point operations a second in products (rows, inner) x (inner, columns), the best of these shapes."""
    rates = []
    for rows, inner, columns in shapes:
        x = torch.ones(rows, inner, dtype=dtype, device=device)
        weight = torch.ones(columns, inner, dtype=dtype, device=device)
        taken = _seconds(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight), device)  # type: ignore[misc]
        rates.append(2 * rows * inner * columns / taken)
    return max(rates)


@torch.inference_mode()
def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The median of TRIES runs, after one that is not counted."""

    def once() -> float:
        began = time.perf_counter()
        work()
        if device_kind(device) != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - began

    once()
    return statistics.median(once() for _ in range(TRIES))


def largest_cache() -> int:
    """Bytes of the first processor's largest cache; 0 if the system does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = path.read_text().strip()[:-1], path.read_text().strip()[-1:]
        if number.isdecimal() and unit in "KMG":
            sizes.append(int(number) * 1024 ** ("KMG".index(unit) + 1))
    return max(sizes, default=0)
