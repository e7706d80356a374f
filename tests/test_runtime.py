from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from workers import Pool

from llama import Llama, runtime

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_one_process_needs_nothing() -> None:
    assert runtime.Launch.read() == runtime.Launch(False, 0, 1, 0, 1)
    device = runtime.start()
    assert device.type in ("cpu", "cuda", "mps")
    assert not torch.distributed.is_initialized()


def test_torchruns_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(VARIABLES, ("5", "8", "1", "4", "localhost", "29500")):
        monkeypatch.setenv(name, value)
    assert runtime.Launch.read() == runtime.Launch(True, 5, 8, 1, 4)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK and MASTER_ADDR and MASTER_PORT not set; start with torchrun"),
        ({"RANK": "zero"}, "variable RANK is 'zero'"),
        ({"RANK": "0", "WORLD_SIZE": "-1", "MASTER_ADDR": "localhost"}, "variable WORLD_SIZE is '-1'"),
    ],
)
def test_broken_variables(variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        runtime.start("cpu")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device='gpu' is not a device of torch"),
        ("meta", "device='meta' is not supported"),
        (3.5, "is not a device of torch"),
    ],
)
def test_unknown_devices(device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runtime.start(device)


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would say 'invalid device ordinal', after NCCL had started."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="process 3 of this machine wants GPU 3, but 2 can be seen; start at most 2"):
        runtime.choose_device("cuda", runtime.Launch(True, 3, 4, 3, 4))
    assert runtime.choose_device("cuda", runtime.Launch(True, 1, 4, 1, 4)) == torch.device("cuda", 1)


@pytest.mark.parametrize("size", [0, 2, -1])
def test_model_parallel_size_of_one_process(size: int) -> None:
    with pytest.raises(ValueError, match=f"model_parallel_size={size} does not fit 1 process; start torchrun with"):
        runtime.start("cpu", size)


def test_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert runtime.choose_dtype(None, torch.bfloat16, cpu) == torch.bfloat16
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert runtime.choose_dtype(None, torch.float16, cpu) == torch.bfloat16  # its float16 reads prompts 20 times as slowly
    assert runtime.choose_dtype(None, torch.float16, torch.device("cuda")) == torch.float16
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert runtime.choose_dtype(None, torch.float16, cpu) == torch.float16
    assert runtime.choose_dtype("float32", torch.bfloat16, cpu) == torch.float32
    assert runtime.choose_dtype(torch.float16, torch.bfloat16, cpu) == torch.float16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert runtime.choose_dtype(None, torch.bfloat16, torch.device("cuda")) == torch.float16
    for wrong in ("int8", "bf16", torch.int64, 3):
        with pytest.raises(ValueError, match="is not supported; use 'float32', 'bfloat16', 'float16', or None"):
            runtime.choose_dtype(wrong, torch.bfloat16, cpu)  # type: ignore[arg-type]


def what_is_set(tiny: str, tokenizer_path: str) -> tuple[int, bool, int]:
    llama = Llama.build(tiny, tokenizer_path, 16, 1, 2, device="cpu")
    size = llama.model.output.output_size_per_partition
    return torch.get_num_threads(), sys.stdout is sys.__stdout__, size


def test_several_processes_share_the_cores_and_one_prints(tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    import os

    results = pool.run(what_is_set, str(tiny), tokenizer_path)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert results == [(max(1, cores // 4), rank == 0, 200) for rank in range(4)]


def print_from_everywhere() -> tuple[bool, bool]:
    """A caller who took stdout back keeps it, and can still print after shutdown."""
    import os

    sys.stdout = mine = io.StringIO()
    runtime.shutdown()
    kept = sys.stdout is mine
    print("still here")
    sys.stdout = sys.__stdout__
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    runtime.start("cpu")
    return kept, mine.getvalue() == "still here\n"


def test_shutdown_leaves_the_callers_stdout(pool: Pool) -> None:
    assert pool.run(print_from_everywhere) == [(True, True)] * 4


def leave_and_come_back(tiny: str, tokenizer_path: str) -> tuple[bool, bool, list[list[int]]]:
    """shutdown gives everything back; the variables are still there, so the next build joins again, by another port."""
    import os

    runtime.shutdown()
    undone = sys.stdout is sys.__stdout__ and sys.excepthook is not runtime._report
    gone = not torch.distributed.is_initialized()
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    return undone, gone, Llama.build(tiny, tokenizer_path, 16, 1, 4, device="cpu").generate([[1, 5]], 4, 0)[0]


def test_shutdown_undoes_start(tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    alone = Llama.build(str(tiny), tokenizer_path, 16, 1, device="cpu").generate([[1, 5]], 4, 0)[0]
    for undone, gone, tokens in pool.run(leave_and_come_back, str(tiny), tokenizer_path):
        assert undone
        assert gone
        assert tokens == alone
