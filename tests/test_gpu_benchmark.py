"""`benchmarks/gpu.py` on the emulated GPU, and with parts that end badly."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from helpers import run

SCRIPT = ROOT / "benchmarks/gpu.py"

# In the place of gpu_parts.
PARTS = """
import contextlib, os, time

@contextlib.contextmanager
def place(small):
    class Place:
        def synchronize(self):
            if os.path.exists("broken"):
                os.remove("broken")
                raise RuntimeError("an illegal memory access was encountered\\nCompile with TORCH_USE_CUDA_DSA")
    yield Place()

def about(place):
    return {"gpu": "none"}

def cases(bad):
    def part(place):
        yield "first", lambda: 1
        yield "bad", bad
        yield "last", lambda: {"us": 3}
    return part

def raises():
    raise ValueError("one\\ntwo")

def breaks():
    open("broken", "w").close()
    raise RuntimeError("an illegal memory access was encountered\\nCompile with TORCH_USE_CUDA_DSA")

def dies():
    print("about to die", flush=True)
    os.kill(os.getpid(), 9)

def leaves():
    print("the last line", flush=True)
    os._exit(3)

kernels, ids, waits, liveness, decode = (
    cases(bad) for bad in (raises, breaks, dies, leaves, lambda: time.sleep(100)))

def prefill(place):
    yield "first", lambda: 1
    raise KeyError("in the part itself")
"""
DRIVER = """
import sys
sys.path.insert(0, {here!r})
import gpu
gpu.HERE = gpu.Path({here!r})
gpu.PARTS = {{name: gpu.Part({seconds}, {case}) for name in gpu.PARTS}}
if __name__ == "__main__":
    gpu.main({arguments!r})
"""


def driven(folder: Path, arguments: list[str], seconds: float = 30, case: float = 2) -> dict[str, Any]:
    """The script with the parts above, and these limits."""
    (folder / "gpu_parts.py").write_text(PARTS)
    (folder / "gpu.py").write_text(SCRIPT.read_text(encoding="utf-8"))
    driver = folder / "driver.py"
    driver.write_text(DRIVER.format(here=str(folder), seconds=seconds, case=case, arguments=arguments))
    result = run([sys.executable, str(driver)], cwd=folder)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_a_part_that_ends_badly_takes_no_other_with_it(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    names = ["kernels", "ids", "waits", "liveness", "decode", "prefill", "load"]
    report = driven(tmp_path, ["--out", str(out), "--part", *names])
    whole = {"first": 1, "last": {"us": 3}}
    assert report["parts"] == {**dict.fromkeys(names[:5], whole), "prefill": {"first": 1}, "load": {}}
    assert report["about"] == {"gpu": "none"}
    assert json.loads(out.read_text()) == report
    failed = report["failed"]
    assert failed.pop("load").startswith("AttributeError: ")
    assert failed == {
        "kernels: bad": "ValueError: two",
        "ids: bad": "RuntimeError: an illegal memory access was encountered",
        "ids": "RuntimeError: an illegal memory access was encountered",
        "waits: bad": "its process ended by SIGKILL",
        "liveness: bad": "its process ended by exit status 3: the last line",
        "decode: bad": "its time was up",
        "prefill": "KeyError: 'in the part itself'",
    }


def test_the_minutes_are_kept(tmp_path: Path) -> None:
    """A part that is under way ends with them, and none is started after."""
    began = time.monotonic()
    report = driven(tmp_path, ["--minutes", "0.05", "--part", "decode", "kernels"], case=60)
    assert time.monotonic() - began < 12
    assert report["parts"] == {"decode": {"first": 1}}
    assert report["failed"] == {"decode: bad": "its time was up", "kernels": "not started: the minutes were spent"}


def test_all_parts_on_the_emulated_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    out = tmp_path / "gpu.json"
    environment = ["env", f"TMPDIR={tmp_path}", f"LLAMA_CACHE={os.environ['LLAMA_CACHE']}", "OMP_NUM_THREADS=1"]
    result = run(
        [*environment, sys.executable, str(SCRIPT), "--small", "--minutes", "5", "--out", str(out)],
        cwd=tmp_path,
        seconds=400,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert json.loads(out.read_text()) == report
    assert report["failed"] == {}, result.stderr
    assert report["about"]["small"]
    parts = report["parts"]
    assert list(parts) == ["kernels", "ids", "waits", "liveness", "decode", "prefill", "load", "tests", "tune", "two"]
    assert all(parts.values())
    assert parts["kernels"].pop("copy rate, GB/s") > 0
    assert all(
        record["right"] and record["error"] == record["plain_error"] for record in parts["kernels"].values()
    )  # stand-ins are the plain forms
    for models in parts["ids"].values():
        assert all(ran["same_state"] and ran["twice"] for ran in models.values())
    assert {record["each_step"] for record in parts["waits"].values()} == {0}
    assert all(all(record.get("same_ids", [True])) for record in parts["liveness"].values())
    assert parts["decode"]["bf16 B=1 T=8"]["tok_s"] > 0
    assert parts["load"]["bf16"]["load_s"] > 0
    assert parts["tests"]["tests/test_gpu.py"]["status"] == 0
    assert parts["two"] == {"two processes": {"unable": "1 GPU can be seen; this part needs two"}}
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith("torchinductor")}  # torch's own
    assert left == {"gpu.json"}
