"""What the Triton kernels become on NVIDIA GPUs, without one: compiles them for the shapes of Llama 2 7B, and counts.

    python benchmarks/sass.py [--arch 80 90] [--only product]

A row for each kernel: registers and spilled bytes of a thread, shared memory of a program, wide and narrow loads,
conversions of integers, special functions, multiplications (of tensors); the instructions of the main loop, for each
weight or each number of the cache; the bytes that the call moves, and the microseconds that these take at the rate a
GPU reaches.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llama.layers import triton_kernels as kernels

RATES = {80: {"A100": 1.7e12}, 90: {"H100": 2.9e12, "H200": 4.1e12}}  # bytes per second that good kernels reach
TYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "int64": "i64",
    "int32": "i32",
    "int8": "i8",
    "uint8": "u8",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
DIM, WIDTH, HEADS, SIZE, LENGTH, GROUP = 4096, 11008, 32, 128, 1024, 32


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases() -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """Name -> function, arguments."""
    B = 1
    positions = empty(B, dtype=torch.int64)
    cache = [empty(B, HEADS, LENGTH, SIZE).transpose(1, 2) for _ in "kv"]
    qkv, rotations = empty(B, 3 * DIM), empty(LENGTH, SIZE // 2, 2, dtype=torch.float32)
    made: dict[str, tuple[Callable[..., Any], list[Any]]] = {
        "add_norm": (kernels.add_norm, [empty(B, DIM), empty(B, DIM), empty(DIM), 1e-5]),
        "rotate_and_store": (kernels.rotate_and_store, [qkv, rotations, positions, *cache]),
        "attend": (kernels.attend, [empty(B, HEADS, SIZE), *cache, positions]),
        "silu_mul": (kernels.silu_mul, [empty(B, 2 * WIDTH)]),
    }
    shapes = {
        "wqkv": (3 * DIM, DIM, False),
        "wo": (DIM, DIM, False),
        "w1w3": (2 * WIDTH, DIM, True),
        "w2": (DIM, WIDTH, False),
    }
    for rows in (1, 4):
        for name, (N, K, gated) in shapes.items():
            x, int8, int4 = empty(rows, K), empty(N, K, dtype=torch.int8), empty(N, K // 2, dtype=torch.uint8)
            groups = [empty(N, K // GROUP), empty(N, K // GROUP)]
            made[f"product {name} B={rows}"] = kernels.product, [x, empty(N, K), gated]
            made[f"product_int8 {name} B={rows}"] = (
                kernels.product_int8,
                [x, int8, empty(N, dtype=torch.float32), gated],
            )
            made[f"product_int4 {name} B={rows}"] = kernels.product_int4, [x, int4, *groups, gated]
    int4, groups = empty(DIM, WIDTH // 2, dtype=torch.uint8), [empty(DIM, WIDTH // GROUP), empty(DIM, WIDTH // GROUP)]
    made["dequantize_int4 w2"] = kernels.dequantize_int4, [int4, *groups, torch.bfloat16]
    return made


def launches(function: Callable[..., Any], arguments: list[Any]) -> tuple[list[tuple[Any, dict[str, Any]]], Any]:
    """The kernels that a call launches, each with its arguments by name, and what the call returns."""
    found = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append((kernel, {**dict(zip(kernel.arg_names, args)), **options}))

    with mock.patch.object(triton.runtime.JITFunction, "run", record):
        result = function(*arguments)
    return found, result


def compiled(kernel: Any, given: dict[str, Any], arch: int) -> Any:
    """As a launch would compile it: ints that 16 divides are known to be so, and every tensor starts at such an
    address."""
    signature, constants, known = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, given[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[str(value.dtype).removeprefix("torch.")]
        elif parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (signature[name] == "i32" and value % 16 == 0):
            known[(i,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in given.items() if name not in signature and value is not None}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=known)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def counted(cubin: bytes) -> tuple[dict[str, Any], list[str], list[str]]:
    """Resources, all instructions, and those of the longest loop."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        run = [
            subprocess.run([CUOBJDUMP, what, path], capture_output=True, text=True, check=True)
            for what in ("-sass", "-res-usage")
        ]
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", run[0].stdout)]
    lines = [(at, re.sub(r"^@!?U?P\w+\s+", "", text)) for at, text in lines]
    loops = [(0, 0)]
    for at, text in lines:
        jump = re.match(r"BRA\S*.*?(0x[0-9a-f]+)", text)
        if jump and int(jump[1], 16) < at:
            loops.append((int(jump[1], 16), at))
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    usage = run[1].stdout + run[1].stderr
    resources = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    everything = [text.split()[0] for _, text in lines]
    return resources, everything, [text.split()[0] for at, text in lines if first <= at <= last] if last else []


def work(kernel: Any, given: dict[str, Any]) -> tuple[int, int]:
    """Numbers of the large operand that a thread takes in one trip of the loop, and in all."""
    threads = 32 * given["num_warps"]
    if "COLUMNS" in given:
        return given["ROWS"] * given["COLUMNS"] // threads, -(-given["K"] // given["COLUMNS"])
    if "KEYS" in given:
        return 2 * given["KEYS"] * given["SIZE"] // threads, 1
    return 0, 1


def nbytes(function: Callable[..., Any], arguments: list[Any], result: Any) -> int:
    if function is kernels.rotate_and_store:
        return 2 * 2 * arguments[0].numel()
    tensors = {
        id(t): t
        for t in (*arguments, *(result if isinstance(result, tuple) else [result]))
        if isinstance(t, torch.Tensor)
    }
    return sum(t.numel() * t.element_size() for t in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=RATES)
    parser.add_argument("--only", nargs="+", default=[""], help="cases with one of these in their name")
    args = parser.parse_args()
    rows = []
    for arch in args.arch:
        rates = RATES[arch]
        print(
            f"\nsm_{arch}\n{'':28} regs spill shared  LDG.128  LDG  I2F MUFU FFMA HMMA  loop  each      MB  "
            + "  ".join(rates)
        )
        for name, (function, arguments) in cases().items():
            if not any(part in name for part in args.only):
                continue
            with mock.patch.object(kernels, "overlaps", lambda device, arch=arch: arch >= 90):
                found, result = launches(function, arguments)
            moved = nbytes(function, arguments, result)
            for i, (kernel, given) in enumerate(found):
                made = compiled(kernel, given, arch)
                resources, everything, loop = counted(made.asm["cubin"])
                numbers, trips = work(kernel, given)
                body = loop or everything
                each = len(body) / (numbers * (1 if loop else trips)) if numbers else 0.0
                ops = collections.Counter(op.split(".")[0] for op in everything)
                wide = sum(op.startswith(("LDG", "LDGSTS")) and "128" in op for op in everything)
                row = {
                    "arch": arch, "case": name, "kernel": kernel.__name__, "registers": resources["REG"],
                    "spilled": resources["STACK"] + resources["LOCAL"] + ops["LDL"] + ops["STL"],
                    "shared": made.metadata.shared,
                    "wide_loads": wide, "loads": ops["LDG"] + ops["LDGSTS"], "I2F": ops["I2F"] + ops["I2FP"],
                    "MUFU": ops["MUFU"], "FFMA": ops["FFMA"], "HMMA": ops["HMMA"] + ops["HGMMA"],
                    "loop": len(loop), "each": round(each, 2), "bytes": moved if i == 0 else 0,
                    "microseconds": {gpu: round(1e6 * moved / rate, 2) if i == 0 else 0 for gpu, rate in rates.items()},
                }  # fmt: skip
                rows.append(row)
                shown = (
                    f"{name if i == 0 else '  ' + kernel.__name__:28} {row['registers']:4} {row['spilled']:5} "
                    f"{row['shared']:6}"
                )
                shown += (
                    f" {wide:8} {row['loads']:4} {row['I2F']:4} {row['MUFU']:4} {row['FFMA']:4} {row['HMMA']:4} "
                    f"{len(loop):5}"
                )
                shown += f" {each:5.2f} {row['bytes'] / 1e6:7.2f}  "
                print(shown + "  ".join(f"{us:4.1f}" for us in row["microseconds"].values()), flush=True)
    print(json.dumps({"triton": triton.__version__, "kernels": rows}))


if __name__ == "__main__":
    main()
