"""Sums and gathers over memory that the processes share: their bits, who may be late or gone, and what is left."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
import torch.distributed as dist
from forks import Forks
from workers import Pool

from llama import Llama, runtime
from llama.layers import parallel, shared_memory

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("g++"), reason="needs a C++ compiler, on Linux"
)


@contextlib.contextmanager
def shared(*groups: parallel.Group) -> Iterator[None]:
    """A block in which these groups share memory; others, and these outside of it, do not."""
    parallel._forget_groups()
    for group in groups:
        parallel.share_memory(group, CPU)
    assert parallel._rooms.keys() == {group.group_name for group in groups if group is not None}
    assert all(room is not None for room in parallel._rooms.values())
    yield
    parallel._forget_groups()


@cache
def pairs() -> parallel.Group:
    """Ranks 0 and 1, or 2 and 3."""
    return [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]


def everyones(dtype: torch.dtype, *shape: int) -> list[torch.Tensor]:
    """The numbers of each of four ranks."""
    numbers = [torch.randn(shape, generator=torch.Generator().manual_seed(rank)) * 1000 for rank in range(4)]
    return [x.to(dtype) for x in numbers]


def sums(ranks: int) -> list[Any]:
    """Whether sums are those in rank order, which `sum_in_order` gives over gloo too; whether they are near to exact
    ones; and their digests."""
    group = parallel.world() if ranks == 4 else pairs()
    mine, found, digest = dist.get_rank(group), [], []
    sizes = [(1,), (7,), (1, 1, 4096), (3, 4097), (5, 0), (2, 3, 200_001)]
    for dtype in shared_memory.SUMMED:
        for shape in sizes:
            parts = everyones(dtype, *shape)[:ranks]
            ordered = parts[0].float() if dtype.itemsize == 2 else parts[0]
            for part in parts[1:]:
                ordered = ordered + part
            with shared(group), torch.inference_mode():
                total = parallel.all_reduce(parts[mine].clone(), group)
                turned = parallel.all_reduce(
                    parts[mine].mT.clone(memory_format=torch.contiguous_format).mT if len(shape) > 1 else total * 0,
                    group,
                )
                again = parallel.sum_in_order(parts[mine].clone(), group)
            exact = sum(part.double() for part in parts)
            found += [total.dtype == dtype, torch.equal(total, ordered.to(dtype)), torch.equal(total, again)]
            found += [torch.equal(turned, total) or len(shape) == 1]
            found += [torch.equal(total, parallel.sum_in_order(parts[mine], group))]
            error = (total - exact).abs() <= 1e-3 * 4 * 1000 + exact.abs() * torch.finfo(torch.bfloat16).eps
            found += [bool(error.all()), *([torch.equal(total.double(), exact)] if dtype == torch.int64 else [])]
            digest.append(total.double().sum().item())
    return [all(found) or [i for i, well in enumerate(found) if not well], digest]


@pytest.mark.parametrize("ranks", [2, 4])
def test_sums(ranks: int, pool: Pool) -> None:
    (well, digest), *others = pool.run(sums, ranks)
    assert well is True
    assert others == [[True, digest]] * 3


def whole_numbers() -> list[bool]:
    """Those that overflow wrap around, as torch's do; infinities and NaN go their way."""
    group, big = parallel.world(), 2**62
    special = [[float("inf"), float("nan"), 3e38, -0.0], [1.0, 1.0, 3e38, -0.0]][dist.get_rank() % 2]
    with shared(group):
        wrapped = parallel.all_reduce(torch.tensor([big + 1]), group).tolist() == [4]
        outcomes = [parallel.all_reduce(torch.tensor(special, dtype=d), group) for d in (torch.bfloat16, torch.float32)]
    return [wrapped, *(x[0].item() == float("inf") for x in outcomes), *(bool(x[1].isnan()) for x in outcomes)] + [
        outcomes[1][2].item() == float("inf"), bool(torch.signbit(outcomes[1][3]))
    ]  # fmt: skip


def test_numbers_at_their_bounds(pool: Pool) -> None:
    assert pool.run(whole_numbers) == [[True] * 7] * 4


def gathers() -> list[bool]:
    group, rank, outcomes = parallel.world(), dist.get_rank(), []
    shapes = [(1,), (5,), (1, 6), (3, 2), (2, 1, 2, 3), (1, 300_000), (7, 99_999), (2, 0)]
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8):
            mine = torch.arange(torch.Size(shape).numel()).view(shape) + 7 * rank
            whole = torch.cat([mine + 7 * (other - rank) for other in range(4)], dim=-1).to(dtype)
            mine = mine.to(dtype)
            with shared(group), torch.inference_mode():
                turned = mine.mT.contiguous().mT if mine.ndim > 1 else mine
                outcomes.append(torch.equal(parallel.all_gather(turned, group), whole))
                votes = [parallel.least(rank - 2, group), parallel.all_agree(rank != 3, group)]
            outcomes.append(votes == [-2, False])
    return outcomes


def test_gathers(pool: Pool) -> None:
    assert pool.run(gathers) == [[True] * 80] * 4


def one_graph() -> list[bool]:
    group, outcomes = parallel.world(), []
    with shared(group), torch.inference_mode(), warnings.catch_warnings():
        for backend in ("aot_eager", "inductor"):
            torch._dynamo.reset()
            warnings.simplefilter("ignore" if backend == "inductor" else "error")  # torch's own, of its own old parts
            twice = torch.compile(
                lambda x: parallel.all_gather(parallel.all_reduce(parallel.all_reduce(x * 1, group) + 1, group), group),
                fullgraph=True, backend=backend,
            )  # fmt: skip
            for size in (3, 30_000):
                outcomes.append(torch.equal(twice(torch.ones(2, size)), torch.full((2, 4 * size), 20.0)))
    return outcomes


def test_in_a_graph(pool: Pool) -> None:
    assert pool.run(one_graph) == [[True] * 4] * 4


def several_groups() -> list[Any]:
    """Three groups of which two have this rank, in turns and without a barrier between."""
    four, two, rank = parallel.world(), pairs(), dist.get_rank()
    found = []
    with shared(four, two):
        for turn in range(200):
            size = (3, 20_000)[turn % 2]
            found.append(parallel.all_reduce(torch.full((size,), turn + rank), four)[-1].item() == 4 * turn + 6)
            found.append(parallel.all_gather(torch.full((size,), rank), two)[-1].item() == rank // 2 * 2 + 1)
            found.append(parallel.all_reduce(torch.full((size,), rank), two)[0].item() == (1, 5)[rank // 2])
    return [len(found), all(found)]


def test_several_groups(pool: Pool) -> None:
    assert pool.run(several_groups) == [[600, True]] * 4


def different() -> list[str]:
    """Messages of other sizes, and then more messages; a sum where others gather."""
    two, rank, told = pairs(), dist.get_rank(), []
    for odd in (lambda: parallel.all_reduce(torch.ones(9), two), lambda: parallel.all_gather(torch.ones(8), two)):
        with shared(two):
            for _ in range(2):
                try:
                    odd() if rank % 2 else parallel.all_reduce(torch.ones(8), two)
                    told.append("nothing")
                except RuntimeError as error:
                    told.append(str(error).splitlines()[0])
    return told


def test_messages_that_differ(pool: Pool) -> None:
    """They would be wrong numbers."""
    for told in pool.run(different):
        assert all("met with different messages" in line or "connection closed by peer" in line for line in told[::2])
        assert all("this group has ended" in line for line in told[1::2])


def late(seconds: float) -> list[Any]:
    """Whether the sum is right, and how often this process let its core go meanwhile."""
    group, rank = parallel.world(), dist.get_rank()
    with shared(group):
        parallel.all_reduce(torch.ones(1), group)
        if rank == 2:
            time.sleep(seconds)
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        total = parallel.all_reduce(torch.ones(1), group).item()
        return [total, resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before]


def test_a_late_rank(pool: Pool) -> None:
    """The others sleep, and look each 50 ms whether it lives."""
    outcomes = pool.run(late, 1.5)
    assert [total for total, _ in outcomes] == [4.0] * 4
    assert all(slept > 10 for rank, (_, slept) in enumerate(outcomes) if rank != 2)


def forked() -> list[Any]:
    """A child of each rank has no part in the group, and the group goes on when the child ends as a program does."""
    group = parallel.world()
    with shared(group):
        if (child := os.fork()) == 0:
            told = ""
            try:
                parallel.all_reduce(torch.ones(1), group)
            except RuntimeError as error:
                told = str(error)
            parallel._forget_groups()  # what an exit by sys.exit calls
            os._exit(0 if "a forked process has no part" in told else 1)
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), parallel.all_reduce(torch.ones(1), group).item()]


def test_forked_processes(pool: Pool) -> None:
    assert pool.run(forked) == [[0, 4.0]] * 4


def open_files() -> list[int]:
    """Maps of such memory, and open files, within a block and after it."""
    group = parallel.world()
    found = []
    for _ in range(3):
        before = len(os.listdir("/proc/self/fd"))
        with shared(group):
            found.append(Path("/proc/self/maps").read_text().count("memfd:llama"))
        found += [Path("/proc/self/maps").read_text().count("memfd:llama"), len(os.listdir("/proc/self/fd")) - before]
    return found


def test_nothing_is_left(pool: Pool) -> None:
    assert pool.run(open_files) == [[1, 0, 0] * 3] * 4


def test_a_part_that_cannot_be_had_leaves_no_file_open() -> None:
    shared_memory.load()
    with subprocess.Popen(["true"]) as child:
        gone = child.pid
    with shared_memory.made(3, 0) as memory:
        before = os.listdir("/proc/self/fd")
        for processes in ([os.getpid(), os.getppid(), gone], [os.getpid(), os.getppid(), -1]):
            with pytest.raises(RuntimeError, match="does not tell when a process ends"):
                torch.ops.llama_shared.join(torch.tensor(processes), 0, memory.descriptor, 1)
        assert os.listdir("/proc/self/fd") == before


def unable(what: str) -> list[Any]:
    """One rank lacks something; nobody waits for it, and gloo's sums are right."""
    group, odd = parallel.world(), dist.get_rank() == (0 if what == "memory" else 2)
    parallel._forget_groups()
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "say", told.append)
        if what == "compiler":
            patch.setattr(shared_memory, "load", shared_memory.load.__wrapped__)
            patch.setattr(runtime, "cpp_compiler", lambda: None)
            patch.setattr(runtime, "cache_folder", lambda: Path(os.environ["LLAMA_CACHE"], "empty"))
        elif what == "memory":
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20 if odd else limits[0], limits[1]))
        elif odd and what == "machine":
            patch.setattr(shared_memory, "machine", lambda: "another")
        elif odd and what == "system":
            patch.setattr(sys, "platform", "darwin")
        elif odd and what == "container":
            patch.setattr(shared_memory, "os", NoProc())
        elif odd and what == "proc":
            patch.setattr(shared_memory.os, "open", lambda *_: os.memfd_create("other"))
        elif odd and what == "limit":
            patch.setattr(parallel, "_patience", lambda group: group.no_such_name)
        elif odd and what == "sums":
            patch.setattr(shared_memory, "check", wrong)
        parallel.share_memory(group, CPU)
        parallel.share_memory(group, CPU)  # asks nobody again
    if what == "memory":
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    total = parallel.all_reduce(torch.full((5,), dist.get_rank()), group).tolist()
    left = Path("/proc/self/maps").read_text().count("memfd:llama")
    outcome = [parallel.room_of(group), total, left, told]
    parallel._forget_groups()
    return outcome


class NoProc:
    def stat(self, path: str) -> None:
        raise FileNotFoundError(path)


def wrong(*arguments: Any, check: Any = shared_memory.check) -> None:
    check(*arguments)
    raise RuntimeError("a sum over shared memory was wrong")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("compiler", "it needs a C++ compiler, on Linux; install g++, or let CXX name one (on rank 0)"),
        ("memory", "[Errno 27] File too large (on rank 0)"),
        ("machine", None),
        ("system", None),
        ("container", None),
        ("proc", "the first process's file is another one (on rank 2)"),
        ("limit", "'torch._C._distributed_c10d.ProcessGroup' object has no attribute 'no_such_name' (on rank 2)"),
        ("sums", "a sum over shared memory was wrong (on rank 2)"),
    ],
)
def test_all_ranks_or_none(what: str, words: Optional[str], pool: Pool) -> None:
    """On several machines gloo is the way, of which no line speaks."""
    told = [] if words is None else [f"Sums over several processes go over gloo, which is slow: {words}"]
    assert pool.run(unable, what) == [[None, [6] * 5, 0, told]] * 4


def built(folder: str, tokenizer_path: str) -> list[Any]:
    outcomes = []
    for size in (4, 2, 4):
        llama = Llama.build(folder, tokenizer_path, 64, 2, size, device="cpu", quiet=True)
        name = llama.model.output.group.group_name
        outcomes.append((parallel._rooms[name] is not None, llama.generate([[1, 5, 6], [1, 7]], 20, 0)[0]))
    return outcomes


def test_builds_share_memory(tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    expected = Llama.build(str(tiny), tokenizer_path, 64, 2, device="cpu").generate([[1, 5, 6], [1, 7]], 20, 0)[0]
    assert pool.run(built, str(tiny), tokenizer_path) == [[(True, expected)] * 3] * 4


SCRIPT = """
import os, signal, sys, time, torch
from llama import runtime
from llama.layers import parallel
runtime.start("cpu")
group = parallel.world()
parallel.share_memory(group, torch.device("cpu"))
assert parallel.room_of(group) is not None
for turn in range(5):
    assert (parallel.all_reduce(torch.ones(1_000_000), group) == int(os.environ["WORLD_SIZE"])).all()
if os.environ["RANK"] == "1":
    time.sleep(0.3)  # the other one sleeps by now
    {}
parallel.all_reduce(torch.ones(100_000), group)
"""


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "process 0 ends because process 1 was killed or crashed; it saw:"),
        ("sys.exit()", "process 0 ends because process 1 has ended: it returned, or called sys.exit"),
        ("raise ValueError('no more')", "process 0 ends because process 1 failed: ValueError: no more"),
    ],
)
def test_a_rank_that_ends(end: str, words: str, forks: Forks) -> None:
    """As over gloo: the others end at once, and say why."""
    before = set(os.listdir("/dev/shm"))
    first, _ = forks.ranks(SCRIPT.format(end), seconds=30)
    assert first.returncode == 1
    assert words in first.stderr
    assert "rank 1 of the group has ended" in first.stderr
    assert set(os.listdir("/dev/shm")) <= before


BUSY = (
    SCRIPT.replace("import os,", "import torch.distributed as dist, os,")
    .replace("if os", "pids = [0] * 3\ndist.all_gather_object(pids, os.getpid())\nif os")
    .format("""
    while os.path.exists(f"/proc/{pids[0]}"): time.sleep(0.01)
    os._exit(0)
if os.environ["RANK"] == "2":
    os._exit(0)
""")
)


def test_a_rank_that_ends_while_another_is_busy(forks: Forks) -> None:
    """The first rank waits for the second, which may itself wait elsewhere for the third."""
    first, *_ = forks.ranks(BUSY, count=3, seconds=30)
    assert first.returncode == 1
    assert "rank 2 of the group has ended" in first.stderr


def test_more_ranks_than_cores(forks: Forks) -> None:
    """None holds the core that another one needs."""
    bound = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    script = SCRIPT.format("pass").replace("runtime.start", f"{bound}\nruntime.start")
    assert [ended.returncode for ended in forks.ranks(script, count=3)] == [0, 0, 0]


AGAIN = """
import os, torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mpu
from llama import runtime
from llama.layers import parallel
names = []
for turn in range(2):
    dist.init_process_group("gloo")
    mpu.initialize_model_parallel(2)
    runtime.start("cpu")
    group = parallel.world()
    parallel.share_memory(group, torch.device("cpu"))
    assert parallel.all_reduce(torch.ones(5), group).tolist() == [2] * 5
    names.append((group.group_name, parallel.room_of(group).item()))
    mpu.destroy_model_parallel()
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
assert names[0][0] == names[1][0] and names[0][1] != names[1][1], names
"""


def test_a_caller_who_leaves_and_joins_again(forks: Forks) -> None:
    """Groups of the second world have the names of the first one's."""
    outcomes = forks.ranks(AGAIN)
    assert [ended.returncode for ended in outcomes] == [0, 0], outcomes[0].stderr
