"""Compiles `cpu_kernels.cpp`, with what it includes, for this processor, once, and keeps it in the folder of compiled
steps.

Without a C++ compiler, or on a system other than Linux, the layers multiply in plain torch: the same bits, slowly.
"""

from __future__ import annotations

import hashlib
import subprocess
import threading
from functools import cache
from pathlib import Path

import torch

from .. import runtime
from ..system import sealed
from ..system.printable import reason
from ..system.progress import say

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
INCLUDED = [SOURCE.with_name(name) for name in ("cpu_vectors.h", "cpu_products.h", "cpu_step.h")]
# No product and sum become one operation, and none changes places, unless the source says so.
FLAGS = ["-O3", "-march=native", "-std=c++20", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
LIMIT = 300  # seconds for the compiler, which takes 3

_loading = threading.Lock()


def loaded() -> bool:
    """Whether the operators of `cpu_kernels.cpp` are at hand as `torch.ops.llama_cpu`. The first call brings them
    in; calls of other threads wait for it, since operators can be registered only once."""
    with _loading:
        return _brought_in()


@cache
def _brought_in() -> bool:
    try:
        path = _kept()
        sealed.load(path, torch.ops.load_library)
        if not hasattr(torch.ops.llama_cpu, "step"):
            raise RuntimeError("torch does not take the operators of the compiled file")
    except Exception as error:  # no compiler, a full disk, a file that is refused
        say(f"Decode steps and products with 8-bit activations run in plain torch, which is slow: {reason(error)}")
        return False
    torch.library.register_fake("llama_cpu::round_groups", _fake_groups)
    torch.library.register_fake("llama_cpu::product", _fake_product)
    return True


def _kept() -> Path:
    """The compiled file, made if it is not there or not to be trusted."""
    compiler = runtime.cpp_compiler()
    key = repr((runtime.processor(), torch.__version__, compiler, FLAGS)).encode()
    key += b"".join(path.read_bytes() for path in (SOURCE, *INCLUDED))
    folder = runtime.cache_folder()
    sealed.make_folder(folder)
    path = folder / f"{hashlib.sha256(key).hexdigest()[:32]}.kernels"
    try:
        sealed.read(path, "delete it")
        return path
    except FileNotFoundError:
        pass
    except ValueError as error:
        say(f"The kernels for this processor are compiled anew: {reason(error)}")
    if compiler is None:
        raise RuntimeError("it needs a C++ compiler, on Linux; install g++, or let CXX name one")
    say("Compiling the kernels for this processor, once for this machine …")
    with sealed.workspace(folder) as work:
        made = work / "kernels.so"
        torchs = Path(torch.__file__).parent
        places = [f"-I{torchs / 'include'}", f"-L{torchs / 'lib'}"]
        command = [compiler, *FLAGS, "-fPIC", "-shared", *places, str(SOURCE), "-ltorch_cpu", "-o", str(made)]
        environment = runtime.compiler_environment(work)
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT, encoding="utf-8",
            errors="replace", check=False,
        )  # fmt: skip
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "error" in line] or [
                f"it ended with {done.returncode}"
            ]
            raise RuntimeError(f"{compiler}: {said[0]}")
        sealed.keep(made.read_bytes(), path, work)
    return path


def _fake_groups(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = x.shape
    return x.new_empty(rows, columns, dtype=torch.int8), x.new_empty(rows, columns // group, dtype=torch.float32)


FORMS = ("plain", "w8a8", "w4a8", "int8", "int4")  # how matrices lie; a kernel gets the place in this list
TYPES = (torch.float32, torch.bfloat16, torch.float16)  # of activations; a kernel gets the place in this list


def _fake_product(
    numbers: torch.Tensor, unit: torch.Tensor, weight: torch.Tensor, outputs: int, bits: int, type: int
) -> torch.Tensor:
    return unit.new_empty(numbers.shape[0], outputs, dtype=TYPES[type])
