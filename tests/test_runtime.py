from __future__ import annotations

import io
import os
import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from emulated_cuda import emulated
from fairscale.nn.model_parallel import initialize as mpu
from forks import Forks
from workers import Pool

from llama import Llama, runtime
from llama.system import peers

WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
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
    ("gpus", "world", "rank", "local"), [(2, 4, 3, (1, 2)), (8, 4, 3, (3, 4)), (0, 4, 3, (3, 4)), (4, 4, 2, (2, 4))]
)
def test_a_launcher_without_local_variables(
    gpus: int, world: int, rank: int, local: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """mpirun sets none: then a machine has as many processes as GPUs, and no more than there are at all."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in {**WHOLE, "WORLD_SIZE": str(world), "RANK": str(rank)}.items():
        monkeypatch.setenv(name, value)
    assert runtime.Launch.read() == runtime.Launch(True, rank, world, *local)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("RANK", 0, 1),
        ("MASTER_PORT", 0, 65535),
        ("WORLD_SIZE", 1, 2**31),
        ("LOCAL_WORLD_SIZE", 1, 2**31),
        ("LOCAL_RANK", 0, 1),
    ],
)
def test_variables_at_their_bounds(name: str, least: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in {**WHOLE, "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(variable, value)
    for value, good in ((least, True), (most, True), (least - 1, False), (most + 1, False)):
        monkeypatch.setenv(name, str(value))
        if good:
            runtime.Launch.read()
        else:
            with pytest.raises(ValueError, match=f"variable {name} is '{value}'"):
                runtime.Launch.read()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"WORLD_SIZE": "2"},
            "says that WORLD_SIZE is 2, and lacks RANK and MASTER_ADDR and MASTER_PORT; start with torchrun",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "says that RANK is 0 and WORLD_SIZE is 2, and lacks MASTER_ADDR and"),
        ({"RANK": "zero"}, "variable RANK is 'zero'"),
        ({"RANK": "0", "WORLD_SIZE": "-1", "MASTER_ADDR": "localhost"}, "variable WORLD_SIZE is '-1'"),
        ({**WHOLE, "WORLD_SIZE": "0"}, "variable WORLD_SIZE is '0'; torchrun sets it to a number from 1 to"),
        (
            {**WHOLE, "RANK": "2"},
            "variable RANK is '2'; torchrun sets it to a number from 0 to 1, since WORLD_SIZE is 2",
        ),
        ({**WHOLE, "LOCAL_RANK": "abc"}, "variable LOCAL_RANK is 'abc'; torchrun sets it to a number, or unset it"),
        ({**WHOLE, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK is '1'; .* since LOCAL_WORLD_SIZE is 1"),
        ({**WHOLE, "LOCAL_WORLD_SIZE": "0"}, "variable LOCAL_WORLD_SIZE is '0'"),
        ({**WHOLE, "MASTER_PORT": "http"}, "variable MASTER_PORT is 'http'"),
        ({**WHOLE, "MASTER_PORT": "99999"}, "MASTER_PORT is '99999'; torchrun sets it to a number from 0 to 65535"),
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
    assert runtime.choose_device("cuda:1", runtime.Launch(False, 0, 1, 0, 1)) == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("gpus", "mps", "world", "best"),
    [(0, False, 1, "cpu"), (0, True, 1, "mps"), (0, True, 2, "cpu"), (2, False, 2, "cuda:1"), (2, True, 1, "cuda:0")],
)
def test_the_best_device(gpus: int, mps: bool, world: int, best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo cannot carry tensors of MPS, so it is for one process."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    launch = runtime.Launch(world > 1, world - 1, world, world - 1, world)
    assert runtime.choose_device(None, launch) == torch.device(best)
    if best == "mps":
        assert runtime.choose_device("mps", launch) == torch.device("mps")
    elif not mps or world > 1:
        with pytest.raises(ValueError, match="device='mps' needs a Mac with Metal and a single process"):
            runtime.choose_device("mps", launch)
    if not gpus:
        with pytest.raises(ValueError, match="torch sees no GPU"):
            runtime.choose_device("cuda", launch)


def test_the_gpus_that_were_used_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each: `shutdown` waits for them."""
    monkeypatch.setattr(runtime, "_started", runtime._Started())
    with emulated():
        for _ in range(2):
            assert runtime.start("emulated") == torch.device("emulated", 0)
    assert runtime._started.gpus == [torch.device("emulated", 0)]


def test_one_visible_gpu_is_the_processes_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM sets CUDA_VISIBLE_DEVICES for each process: the fourth one's only GPU has index 0, not 3."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    fourth = runtime.Launch(True, 3, 4, 3, 4)
    assert runtime.choose_device("cuda", fourth) == torch.device("cuda", 0)
    with pytest.raises(ValueError, match="process 3 of this machine wants GPU 1, but 1 can be seen"):
        runtime.choose_device("cuda:1", fourth)


def start_on_gpus(uuids: list[str], kinds: list[str]) -> str:
    """`start` in a process that sees one GPU, which has this rank's uuid."""
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        patch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=uuids[rank]))
        try:
            return str(runtime.start(kinds[rank]))
        except ValueError as error:
            return str(error)


def test_two_processes_on_one_gpu(pool: Pool) -> None:
    """NCCL would say "Duplicate GPU detected" after the weights were loaded, or wait for ever for a process on a
    CPU."""
    assert pool.run(start_on_gpus, list("abcd"), ["cuda"] * 4) == ["cuda:0"] * 4
    (message,) = set(pool.run(start_on_gpus, list("abcb"), ["cuda"] * 4))
    assert message.startswith(
        f"processes 1 and 3 of {os.uname().nodename} both compute on GPU b; start no more processes than"
    )
    (message,) = set(pool.run(start_on_gpus, list("abcd"), ["cuda", "cuda", "cpu", "cuda"]))
    assert message == "process 0 computes on cuda, but process 2 on cpu; pass the same device= to both"


def start_of_size(*sizes: int) -> str:
    try:
        return str(runtime.start("cpu", sizes[dist.get_rank()]))
    except ValueError as error:
        return str(error)


def test_processes_of_different_parts(pool: Pool) -> None:
    (message,) = set(pool.run(start_of_size, 4, 4, 2, 4))
    assert message == "model_parallel_size is 4 on process 0, but 2 on process 2; they must agree"
    (message,) = set(pool.run(start_of_size, 4, 4, 3, 4))
    assert re.fullmatch(r"model_parallel_size=3 does not fit 4 processes; .* out \(on process 2\)", message)
    (message,) = set(pool.run(start_of_size, 3, 3, 3, 3))
    assert message.endswith("or leave model_parallel_size out")


def time_limits() -> list[float]:
    groups = (dist.group.WORLD, mpu.get_model_parallel_group(), mpu.get_data_parallel_group())
    backends: list[Any] = [group._get_backend(torch.device("cpu")) for group in groups]  # type: ignore[union-attr]
    return [backend.options._timeout.total_seconds() for backend in backends]


def test_groups_wait_for_a_slow_load(pool: Pool) -> None:
    """torch gave fairscale's groups its own 30 minutes (10 with NCCL), whatever the world's limit was."""
    assert pool.run(time_limits) == [[runtime.TIME_LIMIT.total_seconds()] * 3] * 4


KILLED = """
import os, signal, torch, torch.distributed as dist
from llama import runtime
runtime.start("cpu")
dist.all_reduce(torch.ones(1))
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
dist.all_reduce(torch.ones(1))
"""


def test_a_killed_process_is_noticed_before_the_time_limit(forks: Forks) -> None:
    first, second = forks.ranks(KILLED, seconds=40)
    assert first.stderr.startswith(
        "process 0 ends because process 1 was killed or crashed; it saw:\n    RuntimeError: "
    )
    assert (first.returncode, second.returncode) == (1, -9)


SHUTDOWN = """
import sys, torch, torch.distributed as dist
from llama import runtime

class Graphs:
    def __init__(self, name): self.name = name
    def clear(self):
        print("cleared", self.name)
        if self.name == "broken": raise RuntimeError("the graph is broken")

device = runtime.start("cpu")
runtime._started.gpus.append(torch.device("cuda", 1))
torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = lambda device: print("waited for", device)
destroy = dist.destroy_process_group
dist.destroy_process_group = lambda: (print("destroyed"), destroy())
for name in ("dead", *sys.argv[2:]):
    graphs = Graphs(name)
    globals()[name] = graphs
    runtime.release_first(graphs.clear)
del dead, graphs
if sys.argv[1] == "fail":
    raise ValueError("failed")
for _ in range(int(sys.argv[1])):
    try:
        runtime.shutdown()
    except RuntimeError as error:
        print("told:", error)
"""


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["0", "one"], ["cleared one", "waited for cuda:1", "destroyed"]),  # at exit
        (["1", "one"], ["cleared one", "waited for cuda:1", "destroyed", "cleared one"]),  # and at exit once more
        (["2", "one"], ["cleared one", "waited for cuda:1", "destroyed", "cleared one", "cleared one"]),
        (["fail", "one"], ["cleared one", "destroyed"]),  # a GPU may wait for a process that is gone
        (
            ["1", "one", "broken"],
            ["cleared broken", "cleared one", "waited for cuda:1", "destroyed", "told: the graph is broken"]
            + ["cleared broken", "cleared one"],
        ),
    ],
)
def test_graphs_go_before_the_group(arguments: list[str], lines: list[str], forks: Forks) -> None:
    """NCCL waits for ever for a CUDA graph that has one of its collectives; nothing made shutdown let go of them."""
    (ended,) = forks.ranks(SHUTDOWN, *arguments, count=1)
    assert ended.stdout.splitlines() == lines


@pytest.mark.parametrize("size", [0, 2, -1])
def test_model_parallel_size_of_one_process(size: int) -> None:
    with pytest.raises(ValueError, match=f"model_parallel_size={size} does not fit 1 process; start torchrun with"):
        runtime.start("cpu", size)


def test_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert runtime.choose_dtype(None, torch.bfloat16, cpu) == torch.bfloat16
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert (
        runtime.choose_dtype(None, torch.float16, cpu) == torch.bfloat16
    )  # its float16 reads prompts 20 times as slowly
    assert runtime.choose_dtype(None, torch.float16, torch.device("cuda")) == torch.float16
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert runtime.choose_dtype(None, torch.float16, cpu) == torch.float16
    assert runtime.choose_dtype("float32", torch.bfloat16, cpu) == torch.float32
    assert runtime.choose_dtype(torch.float16, torch.bfloat16, cpu) == torch.float16
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, told=capability: told)
        assert runtime.choose_dtype(None, torch.bfloat16, torch.device("cuda")) == dtype
    mps, ones = torch.device("mps"), torch.ones
    for able, dtype in ((False, torch.float16), (True, torch.bfloat16)):
        monkeypatch.setattr(torch, "ones", lambda n, device, able=able, **how: ones(n, device="cpu" if able else 3.5))
        assert runtime.choose_dtype(None, torch.bfloat16, mps) == dtype
    monkeypatch.undo()
    for name, dtype in (
        ("bf16", torch.bfloat16),
        ("half", torch.float16),
        ("fp32", torch.float32),
        ("auto", torch.bfloat16),
    ):
        assert runtime.choose_dtype(name, torch.bfloat16, cpu) == dtype
    for wrong in ("int8", "bf", torch.int64, 3):
        with pytest.raises(
            ValueError, match=r"is not supported; use 'float32', 'bfloat16', 'float16' \(or bf16, fp16, fp32\), or None"
        ):
            runtime.choose_dtype(wrong, torch.bfloat16, cpu)  # type: ignore[arg-type]


def test_the_compiler_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("CXX", raising=False)
    for there, found in ((("clang++", "c++"), "c++"), (("clang++",), "clang++"), ((), None)):
        monkeypatch.setattr(runtime.shutil, "which", lambda name, there=there: name if name in there else None)
        assert runtime.cpp_compiler() == found
    monkeypatch.setenv("CXX", "icpx")
    assert runtime.cpp_compiler() == "icpx"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert runtime.cpp_compiler() is None


def what_is_set(tiny: str, tokenizer_path: str) -> tuple[int, bool, int]:
    llama = Llama.build(tiny, tokenizer_path, 16, 1, 2, device="cpu")
    size = llama.model.output.output_size_per_partition
    return torch.get_num_threads(), sys.stdout is sys.__stdout__, size


def test_several_processes_share_the_cores_and_one_prints(tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    results = pool.run(what_is_set, str(tiny), tokenizer_path)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert results == [(max(1, cores // 4), rank == 0, 200) for rank in range(4)]


@pytest.mark.parametrize(
    ("there", "sharers", "stated", "store", "threads"),
    [
        (8, 4, "1", None, [2]),
        (8, 4, None, None, [2]),
        (7, 2, "1", None, [3]),
        (3, 4, "1", None, [1]),
        (8, 4, "2", None, []),  # the user's own
        (8, 4, "1", "a store", []),  # no launcher has set it
        (8, 4, None, "a store", [2]),
    ],
)
def test_threads_of_one_of_several_processes(
    there: int, sharers: int, stated: Any, store: Any, threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun sets OMP_NUM_THREADS=1. Once for each start."""
    monkeypatch.setattr(runtime, "_started", runtime._Started())
    monkeypatch.setattr(runtime.cores, "usable", lambda: set(range(there)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if stated is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", stated)
    found: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    for device in ("cuda", "cpu", "cpu"):
        runtime._share_cores(torch.device(device), runtime.Launch(True, 0, 8, 0, sharers, store=store))
    assert found == threads


@pytest.mark.parametrize("threads", [None, 5])
def test_shutdown_restores_threads(threads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started, found = runtime._Started(), list[int]()
    started.threads = threads
    monkeypatch.setattr(runtime, "_started", started)
    monkeypatch.setattr(runtime, "_first", [])
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    runtime.shutdown()
    assert found == [5] * (threads is not None)


def print_from_everywhere() -> tuple[bool, bool]:
    """A caller who took stdout back keeps it, and can still print after shutdown."""
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


def join_by_one_store(port: int) -> list[int]:
    """Sums of three groups in turn, whose addresses lie in the same store."""
    runtime.shutdown()
    mine, sums = os.environ["MASTER_PORT"], []
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    try:
        for _ in range(3):
            runtime.start("cpu")
            total = torch.ones(1)
            torch.distributed.all_reduce(total)
            sums.append(int(total))
            runtime.shutdown()
    finally:
        del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
        os.environ["MASTER_PORT"] = str(int(mine) + 1)
        runtime.start("cpu")
    return sums


def test_a_store_that_outlives_the_group(pool: Pool) -> None:
    """torchrun's agent has one: what a group has written there once was read by the next, which then called closed
    ports."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert pool.run(join_by_one_store, store.port) == [[4, 4, 4]] * 4


def test_a_launcher_that_has_gone_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun was killed while this process imported torch: nobody listens where its store was."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and does not listen
        variables = {
            "RANK": "1",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": held.getsockname()[1],
        }
        for name, value in {**variables, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "1"}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(ValueError, match="cannot meet the others .* torchrun, which started it, is gone"):
            runtime.start("cpu")


def leave_and_come_back(tiny: str, tokenizer_path: str) -> tuple[bool, bool, list[list[int]]]:
    """shutdown waits for all, and gives everything back; the variables are still there, so the next build joins again,
    by another port."""
    waits: list[str] = []
    watch = peers.watch
    assert watch is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers.Watch, "wait_for_ends", lambda watch: waits.append(watch.sign.end))
        runtime.shutdown()
    undone = sys.stdout is sys.__stdout__ and sys.excepthook is not runtime._report and waits == [peers.ENDED]
    undone = undone and watch.stopped.is_set()
    gone = not torch.distributed.is_initialized()
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    return undone, gone, Llama.build(tiny, tokenizer_path, 16, 1, 4, device="cpu").generate([[1, 5]], 4, 0)[0]


def test_shutdown_undoes_start(tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    alone = Llama.build(str(tiny), tokenizer_path, 16, 1, device="cpu").generate([[1, 5]], 4, 0)[0]
    for undone, gone, tokens in pool.run(leave_and_come_back, str(tiny), tokenizer_path):
        assert undone
        assert gone
        assert tokens == alone
