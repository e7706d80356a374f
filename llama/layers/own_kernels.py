"""Brings in the operators of `cpu_kernels.cpp`.

Without a C++ compiler, or on a system other than Linux, the layers multiply in plain torch: the same bits, slowly.
"""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path

import torch
from torch.autograd import forward_ad

from ..runtime import device_kind
from ..system.printable import reason
from ..system.progress import say
from . import cpp
from .products import AMX

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")

VECTORS = torch.backends.cpu.get_cpu_capability().startswith("AVX")
MANY_QUERIES = 16  # for fewer, `attend` would put all keys in pairs for little

_loading = threading.Lock()


def loaded() -> bool:
    """Whether the operators of `cpu_kernels.cpp` are at hand as `torch.ops.llama_cpu`. The first call brings them
    in; calls of other threads wait for it, since operators can be registered only once."""
    with _loading:
        return _brought_in()


def attends(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether `torch.ops.llama_cpu.attend` is the faster form of attention for q (B, S, H, D), k (B, K, T, D): for many
    queries in bfloat16 on a CPU with AVX2 or AVX-512 and without AMX, where it is up to 3 times as fast as torch's."""
    return (
        q.shape[1] >= MANY_QUERIES
        and q.dtype == k.dtype == torch.bfloat16
        and q.shape[3] % 16 == 0
        and device_kind(q) == "cpu"
        and VECTORS
        and not AMX
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and q.requires_grad)
        and forward_ad._current_level < 0  # no forward gradients either, which would be lost in silence
        and loaded()
    )


@cache
def _brought_in() -> bool:
    try:
        cpp.load(SOURCE, "kernels for this processor")
        if not hasattr(torch.ops.llama_cpu, "step"):
            raise RuntimeError("torch does not take the operators of the compiled file")
    except Exception as error:  # no compiler, a full disk, a file that is refused
        told = "Decode steps, and products with 8-bit activations, run in plain torch, which is slower"
        say(f"{told}: {reason(error)}; CXX may name another C++ compiler")
        return False
    torch.library.register_fake("llama_cpu::round_groups", _fake_groups)
    torch.library.register_fake("llama_cpu::product", _fake_product)
    torch.library.register_fake("llama_cpu::exact_product", _fake_exact)
    torch.library.register_fake("llama_cpu::attend", lambda q, k, v: q.new_empty(q.shape))
    return True


def _fake_groups(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = x.shape
    return x.new_empty(rows, columns, dtype=torch.int8), x.new_empty(rows, columns // group, dtype=torch.float32)


FORMS = ("plain", "w8a8", "w4a8", "int8", "int4")  # how matrices lie; a kernel gets the place in this list
TYPES = (torch.float32, torch.bfloat16, torch.float16)  # of activations; a kernel gets the place in this list


def in_known_type(x: torch.Tensor) -> torch.Tensor:
    """x in one of TYPES."""
    return x if x.dtype in TYPES else x.float()


def _fake_product(
    numbers: torch.Tensor, unit: torch.Tensor, weight: torch.Tensor, outputs: int, bits: int, type: int
) -> torch.Tensor:
    return unit.new_empty(numbers.shape[0], outputs, dtype=TYPES[type])


def _fake_exact(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, outputs: int, bits: int, group: int
) -> torch.Tensor:
    return x.new_empty(x.shape[0], outputs)
