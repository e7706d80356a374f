"""For `gpu_parts`: where the parts run, how they take times, and those parts that are about the kernels.

Letters in shapes are those of `llama.layers.kernels`. On the emulated GPU (`--small`) all that is timed is meaningless.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from checkpoints import SHAPES, VOCAB_SIZE

from llama import ModelArgs, runtime
from llama.commands import bench
from llama.layers import kernels as plain_forms
from llama.layers import proven
from llama.layers.rounding import GROUP_SIZE

ROOT = Path(__file__).resolve().parents[1]
Cases = Iterator[tuple[str, Callable[[], Any]]]
FORMS = (None, "int8", "int4")  # of the weights
ROWS = (1, 4, 32)
TINY = {"dim": 64, "n_layers": 2, "n_heads": 4, "multiple_of": 32, "norm_eps": 1e-5}
REFRESHED = (
    256 * 2**20
)  # bytes: the copies of a kernel's arguments fill more than the L2 cache, so that it does not help
TIMED = 0.02  # seconds that a measurement takes at least


@dataclass
class Place:
    """Where the parts run. machine: the emulation, or None on a real GPU."""

    device: torch.device
    machine: Any = None

    @property
    def small(self) -> bool:
        return self.machine is not None

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    @cached_property
    def copy_rate(self) -> float:
        """Bytes a second, read and written."""
        if self.small:
            return 1e9
        return bench.read_rate(self.device, 2**30)

    @property
    def params(self) -> dict[str, float]:
        return TINY if self.small else SHAPES["7B"]

    def args(self, max_seq_len: int, rows: int, **changes: Any) -> ModelArgs:
        given: dict[str, Any] = {**self.params, "vocab_size": 2048 if self.small else VOCAB_SIZE, **changes}
        return ModelArgs(**given, max_seq_len=max_seq_len, max_batch_size=rows)


@contextlib.contextmanager
def place(small: bool) -> Iterator[Place]:
    if not small:
        if not torch.cuda.is_available():
            raise RuntimeError("torch sees no GPU here; --small tests this script without one")
        torch.cuda.set_device(0)
        yield Place(torch.device("cuda", 0))
        return
    from emulated_cuda import emulated  # of the tests

    torch.set_num_threads(1)
    with emulated() as machine:
        yield Place(torch.device("emulated", 0), machine)


def about(place: Place) -> dict[str, Any]:
    triton = proven.triton_kernels()
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = (
        subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() if shutil.which("git") else ""
    )
    return {
        "gpu": torch.cuda.get_device_name(place.device),
        "capability": torch.cuda.get_device_capability(place.device),
        "gpus": torch.cuda.device_count(),
        "memory_GB": round(torch.cuda.mem_get_info(place.device)[1] / 1e9, 1),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "triton": None if triton is None else getattr(getattr(triton, "triton", None), "__version__", "a stand-in"),
        "python": sys.version.split()[0],
        "commit": commit,
        "small": place.small,
    }


def median_seconds(place: Place, work: Callable[[], Any]) -> float:
    """Of one call, when many are queued one behind another."""

    def mean(count: int) -> float:
        place.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            work()
        place.synchronize()
        return (time.perf_counter() - began) / count

    mean(1)
    if place.small:
        return mean(1)
    count = max(1, min(1000, int(TIMED / mean(1))))
    return statistics.median(mean(count) for _ in range(5))


def recorded_seconds(place: Place, calls: Sequence[Callable[[], Any]]) -> float:
    """Mean of the calls in one CUDA graph, where they follow each other as in a step: launches are counted, Python is
    not."""
    for call in calls[:2]:  # compiles
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median_seconds(place, graph.replay) / len(calls)


# The kernels


@dataclass
class Kernel:
    """One call of a function of `llama.layers.kernels`: how to make its arguments, and the bytes that it has to
    move."""

    name: str
    make: Callable[[], list[Any]]
    nbytes: Callable[[list[Any], Any], int]


def tensor_bytes(args: list[Any], result: Any) -> int:
    tensors = [x for x in (*args, *(result if isinstance(result, tuple) else [result])) if isinstance(x, torch.Tensor)]
    return sum({x.data_ptr(): x.nbytes for x in tensors}.values())


def product_kernel(place: Place, dtype: torch.dtype, bits: int, B: int, N: int, K: int, gated: bool) -> Kernel:
    """gated: N is that of w1 and w3 together. The numbers are random bits, of the size that keeps activations near
    one."""
    device, spread = place.device, K**-0.5

    def make() -> list[Any]:
        x = torch.randn(B, K, device=device).to(dtype)
        if bits == 16:
            return [x, (torch.randn(N, K, device=device) * spread).to(dtype), gated]
        if bits == 8:
            weight = torch.randint(-127, 128, (N, K), device=device, dtype=torch.int8)
            return [x, weight, torch.rand(N, device=device) * (spread / 73), gated]
        weight = torch.randint(0, 256, (N, K // 2), device=device, dtype=torch.uint8)
        groups = [torch.rand(N, K // GROUP_SIZE, device=device).mul(spread / 4.6).bfloat16() for _ in range(2)]
        return [x, weight, *groups, gated]

    return Kernel({16: "product", 8: "product_int8", 4: "product_int4"}[bits], make, tensor_bytes)


def cache_kernels(place: Place, dtype: torch.dtype, B: int, heads: int, kv_heads: int, D: int, T: int) -> list[Kernel]:
    """Those that read and write the cache, which lies as `Attention.allocate_cache` has it. The last row is half
    full."""
    device = place.device
    last = [T - 1] * (B - 1) + [T // 2 if B > 1 else T - 1]

    def caches() -> list[torch.Tensor]:
        return [torch.randn(B, kv_heads, T + 1, D, device=device).to(dtype)[:, :, :-1].transpose(1, 2) for _ in "kv"]

    def rotating() -> list[Any]:
        qkv = torch.randn(B, (heads + 2 * kv_heads) * D, device=device).to(dtype)
        return [qkv, torch.rand(T, D // 2, 2, device=device), runtime.to_device(last, device), *caches()]

    def attending() -> list[Any]:
        return [torch.randn(B, heads, D, device=device).to(dtype), *caches(), runtime.to_device(last, device)]

    read = 2 * (sum(last) + B) * kv_heads * D * dtype.itemsize
    return [
        Kernel("attend", attending, lambda args, result: read + 2 * args[0].nbytes),
        Kernel("rotate_and_store", rotating, lambda args, result: 2 * args[0].nbytes),
    ]


def kernel_cases(place: Place, dtype: torch.dtype) -> Iterator[tuple[str, Kernel]]:
    device, args = place.device, place.args(1, 1)
    dim, width, heads, D = args.dim, args.ffn_width, args.n_heads, args.head_size
    shapes = {"wqkv": (3 * dim, dim, False), "wo": (dim, dim, False), "w1w3": (2 * width, dim, True),
      "w2": (dim, width, False),
              "odd": (2 * 37, 352, True)}  # fmt: skip
    several = (3,) if place.small else (1, 4, 16)
    for B, bits, (shape, (N, K, gated)) in itertools.product(several, (16, 8, 4), shapes.items()):
        yield f"{bits} bits {shape} B={B}", product_kernel(place, dtype, bits, B, N, K, gated)
    yield "16 bits head B=1", product_kernel(place, dtype, 16, 1, args.vocab_size, dim, False)
    rows, lengths = ((3,), (100,)) if place.small else (ROWS, (100, 1030, 2040))
    for B, T in itertools.product(rows, lengths):
        for kernel in cache_kernels(place, dtype, B, heads, heads, D, T):
            yield f"{kernel.name} B={B} T={T}", kernel
    for kernel in cache_kernels(place, dtype, 3, 12, 4, 80, lengths[-1] - 9):
        yield f"{kernel.name} odd", kernel
    for B, n in itertools.product(rows, (dim, 1000)):

        def norms(B: int = B, n: int = n) -> list[Any]:
            x, delta, weight = (torch.randn(*shape, device=device).to(dtype) for shape in ((B, n), (B, n), (n,)))
            return [x, delta, weight, 1e-5]

        yield f"add_norm B={B} dim={n}", Kernel("add_norm", norms, tensor_bytes)
    for B, n in ((rows[0], width), (rows[-1], width), (3, 77)):
        yield (
            f"silu_mul B={B} width={n}",
            Kernel("silu_mul", lambda B=B, n=n: [torch.randn(B, 2 * n, device=device).to(dtype)], tensor_bytes),
            # type: ignore[misc]
        )
    for name, N, K in (("w2", dim, width), ("odd", 5, 768)):
        int4 = product_kernel(place, dtype, 4, 1, N, K, False)
        yield (
            f"dequantize_int4 {name}",
            Kernel("dequantize_int4", lambda int4=int4: [*int4.make()[1:4], dtype], tensor_bytes),
        )  # type: ignore[misc]


def compared(kernel: Kernel, args: list[Any], dtype: torch.dtype) -> dict[str, Any]:
    """The kernel beside its plain form in float32, as `proven` compares them: whether it is used, and why not; the
    largest difference in units of the numbers' spread, and that of the plain form in their dtype."""
    function: proven.Proven = getattr(proven, kernel.name)
    try:
        found = function.results(getattr(proven.triton_kernels(), kernel.name), args, {})
    except Exception as error:
        return {"right": False, "why": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    expected, plain = function.exact(args, {}), function.results(function.plain, args, {})
    near = all(proven.is_near(a, b, proven.KERNEL_TOLERANCE[dtype]) for a, b in zip(found, expected))

    def error(results: list[torch.Tensor]) -> float:
        errors = [
            (a.float() - b.float()).abs().max() / b.float().square().mean().sqrt() for a, b in zip(results, expected)
        ]
        return float(f"{max(map(float, errors)):.2e}")

    return {
        "right": near,
        "taken": proven.usable(args[0]),
        "error": error(found),
        "plain_error": error(plain),
        **({} if near else {"why": "numbers"}),
    }


def timed(place: Place, kernel: Kernel, form: Callable[..., Any], args: list[Any]) -> dict[str, Any]:
    nbytes = kernel.nbytes(args, form(*args))
    copies = 1 if place.small else max(1, min(48, math.ceil(REFRESHED / tensor_bytes(args, None))))
    inputs = [args, *(kernel.make() for _ in range(copies - 1))]
    repeated = [inputs[i % copies] for i in range(max(copies, 2 if place.small else 16))]
    seconds = recorded_seconds(place, [partial(form, *some) for some in repeated])
    rate = nbytes / seconds
    return {"us": round(seconds * 1e6, 2), "GB_s": round(rate / 1e9, 1), "share": round(rate / place.copy_rate, 3)}


def kernel_case(place: Place, kernel: Kernel, dtype: torch.dtype, clock: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    args = kernel.make()
    record = compared(kernel, args, dtype)
    if clock and "error" in record:
        record.update(timed(place, kernel, getattr(proven.triton_kernels(), kernel.name), args))
        record["plain_us"] = timed(place, kernel, getattr(plain_forms, kernel.name), args)["us"]
    return record


@torch.inference_mode()
def kernels(place: Place) -> Cases:
    """Each against its plain form, in both dtypes; times in bfloat16."""
    yield "copy rate, GB/s", lambda: place.copy_rate / 1e9
    for dtype in (torch.bfloat16, torch.float16):
        for name, kernel in kernel_cases(place, dtype):
            clock = dtype == torch.bfloat16 and "odd" not in name
            if dtype == torch.float16 and any(part in name for part in ("B=16", "B=32", "T=100", "T=2040")):
                continue  # what compiles anew takes a second each
            yield f"{str(dtype).removeprefix('torch.')} {name}", partial(kernel_case, place, kernel, dtype, clock)


def tune(place: Place) -> Cases:
    """Block sizes around the constants of `triton_kernels`: microseconds of the present ones, and of the best five."""
    from llama.layers import triton_kernels as constants

    args = place.args(1, 1)
    dim, width = args.dim, args.ffn_width
    shapes = {
        "w1w3": (2 * width, dim, True),
        "w2": (dim, width, False),
        "wqkv": (3 * dim, dim, False),
        "wo": (dim, dim, False),
    }

    def grid(now: Any, several: bool) -> list[Any]:
        steps = itertools.product((1, 0.5, 2), (1, 0.5, 2))
        made = [now._replace(rows=int(now.rows * r), columns=int(now.columns * c)) for r, c in steps]
        made += [now._replace(warps=max(1, int(now.warps * f))) for f in (0.5, 2)]
        made += (
            [now._replace(stages=max(1, now.stages + s)) for s in (-2, -1, 1)] if several else [now._replace(stages=2)]
        )
        return list(dict.fromkeys(tiles for tiles in made if not several or tiles.rows >= 16))

    @torch.inference_mode()
    def search(bits: int, B: int, N: int, K: int, gated: bool) -> dict[str, Any]:
        table = constants.ONE if B == 1 else constants.SEVERAL
        kernel = product_kernel(place, torch.bfloat16, bits, B, N, K, gated)
        found, refused, now = {}, {}, table[bits]
        inputs = kernel.make()
        for tiles in grid(now, B > 1)[: 2 if place.small else None]:
            with mock.patch.dict(table, {bits: tiles}):
                record = compared(kernel, inputs, torch.bfloat16)
                if record["right"]:
                    found[tiles] = timed(place, kernel, getattr(proven.triton_kernels(), kernel.name), inputs)
                else:
                    refused[str(tuple(tiles))] = record["why"]
        best = sorted(found, key=lambda tiles: found[tiles]["us"])
        return {
            "now": {"tiles": tuple(now), **found.get(now, {})},
            "best": [{"tiles": tuple(tiles), **found[tiles]} for tiles in best[:5]],
            "refused": refused,
        }

    for B, bits, (name, shape) in itertools.product((1, 4, 16), (16, 8, 4), shapes.items()):
        if not place.small or (name == "w2" and B < 16):
            yield f"{bits} bits {name} B={B}", partial(search, bits, B, *shape)
