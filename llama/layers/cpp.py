"""Compiles a C++ file of this folder, which holds operators, for this processor: once, and keeps it in the folder of
compiled steps."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import torch

from .. import runtime
from ..system import sealed
from ..system.printable import reason
from ..system.progress import say

# No product and sum become one operation, and none changes places, unless the source says so.
FLAGS = ["-O3", "-march=native", "-std=c++20", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
LIMIT = 300  # seconds for the compiler, which takes 3 to 7


def load(source: Path, what: str = "") -> None:
    """Bring in the operators of a file. what: the words for them, in a line if it must be compiled; empty: no line.

    Raises the errors of `sealed.read`; RuntimeError if there is no compiler, or it fails.
    """
    sealed.load(_kept(source, what), torch.ops.load_library)


def _kept(source: Path, what: str) -> Path:
    """The compiled file, made if it is not there or not to be trusted."""
    compiler = runtime.cpp_compiler()
    key = repr((runtime.processor(), torch.__version__, compiler, FLAGS)).encode()
    key += b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))))
    folder = runtime.cache_folder()
    sealed.make_folder(folder)
    path = folder / f"{hashlib.sha256(key).hexdigest()[:32]}.kernels"
    try:
        sealed.read(path, "delete it")
        return path
    except FileNotFoundError:
        pass
    except ValueError as error:
        if what:
            say(f"The {what} are compiled anew: {reason(error)}")
    if compiler is None:
        raise RuntimeError("it needs a C++ compiler, on Linux; install g++, or let CXX name one")
    if what:
        say(f"Compiling the {what}, once for this machine …")
    with sealed.workspace(folder) as work:
        made = work / "kernels.so"
        torchs = Path(torch.__file__).parent
        places = [f"-I{torchs / 'include'}", f"-L{torchs / 'lib'}"]
        command = [compiler, *FLAGS, "-fPIC", "-shared", *places, str(source), "-ltorch_cpu", "-o", str(made)]
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
