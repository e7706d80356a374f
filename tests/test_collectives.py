"""What the processes say to each other, over gloo: gathers, votes, random states, and small sums over shared memory."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pytest
import torch
import torch.distributed as dist
from workers import Pool

from llama import runtime
from llama.layers import parallel

CPU = torch.device("cpu")


def gathers(shapes: list[tuple[int, ...]]) -> list[bool]:
    """Whether `all_gather` gives what a list and a `cat` gave, as it is and in one graph; then whether one row is a
    view."""
    group, rank = parallel.model_parallel_group(), dist.get_rank()
    parallel._forget_groups()  # a build of another test lets them share memory
    outcomes = []
    for shape, dtype in itertools.product(shapes, (torch.float32, torch.bfloat16, torch.int64)):
        mine = torch.arange(torch.Size(shape).numel(), dtype=dtype).view(shape) + 7 * rank
        whole = torch.cat([mine + 7 * (other - rank) for other in range(4)], dim=-1)
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: parallel.all_gather(x * 1, group) + 1, fullgraph=True, backend="aot_eager")
        with torch.inference_mode():
            outcomes.append(
                torch.equal(parallel.all_gather(mine.mT.contiguous().mT if mine.ndim > 1 else mine, group), whole)
            )
            outcomes.append(torch.equal(compiled(mine), whole + 1))
    with torch.no_grad():
        outcomes.append(parallel.all_gather(torch.ones(1, 1, 6), group)._base is not None)
    return outcomes


def test_gathers(pool: Pool) -> None:
    for outcomes in pool.run(gathers, [(5,), (1, 6), (3, 2), (1, 1, 6), (2, 3, 4), (2, 1, 2, 3)]):
        assert outcomes == [True] * 37


def agreements() -> list[bool]:
    group, rank = parallel.model_parallel_group(), dist.get_rank()
    votes = [parallel.all_agree(True, group), parallel.all_agree(rank != 2, group), parallel.all_agree(False, group)]
    return [*votes, parallel.all_agree(True, None), parallel.all_agree(False, None)]


def test_agreements(pool: Pool) -> None:
    assert pool.run(agreements) == [[True, False, False, True, False]] * 4


def states() -> tuple[set[torch.device], bool]:
    """The devices whose generators were read and set, and whether that of the first rank is everywhere."""
    of: dict[torch.device, torch.Tensor] = {
        torch.device("cuda", 1): torch.full((4,), dist.get_rank(), dtype=torch.uint8)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(torch.cuda, "get_rng_state", lambda device="cuda": of[device])
        patch.setattr(torch.cuda, "set_rng_state", lambda state, device="cuda": of.update({device: state}))
        parallel.broadcast_random_state(torch.device("cuda", 1), parallel.model_parallel_group())
    return set(of), not of[torch.device("cuda", 1)].any()


def test_random_state_of_another_gpu_than_the_current_one(pool: Pool) -> None:
    """A model on cuda:1 in a thread whose current GPU is 0: that one's generator was shared out, and the model's was
    not."""
    assert pool.run(states) == [({torch.device("cuda", 1)}, True)] * 4


class Symmetric(SimpleNamespace):
    """torch's symmetric memory on CPUs: what lies in the buffer is what the group sums."""

    def __init__(self, wrong: bool = False) -> None:
        self.wrong, self.buffers, self.sums = wrong, [], 0

    def empty(self, *size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self.buffers.append(torch.full(size, float("nan"), dtype=dtype))
        return self.buffers[-1]

    def rendezvous(self, tensor: torch.Tensor, name: str) -> Any:
        dist.barrier(group=parallel.model_parallel_group())  # a rank that does not come would let the others wait
        return self

    def one_shot_all_reduce(self, message: torch.Tensor, operation: str, name: str) -> torch.Tensor:
        group = parallel.model_parallel_group()
        assert operation == "sum"
        assert group is not None
        assert name == group.group_name
        assert message.data_ptr() == self.buffers[0].data_ptr()
        self.sums += 1
        result = message.clone()
        dist.all_reduce(result, group=group)
        return result + self.wrong


@contextlib.contextmanager
def gpus(memory: Optional[Symmetric], place: str = "here") -> Iterator[None]:
    """The CPU passes for a GPU that has `memory`."""
    parallel._forget_groups()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(runtime.ALIASES, "cpu", "cuda")
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(parallel, "_symmetric_memory", lambda: memory)
        patch.setattr(parallel, "machine", lambda: place)
        yield
    parallel._forget_groups()


def add_up(dtype: torch.dtype, *shape: int, by: Callable[..., torch.Tensor] = parallel.all_reduce) -> bool:
    x = torch.arange(torch.Size(shape).numel(), dtype=dtype).view(shape) % 9
    return torch.equal(by(x + dist.get_rank(), parallel.model_parallel_group()), 4 * x + 6)


def small_sums() -> list[Any]:
    group, memory = parallel.model_parallel_group(), Symmetric()
    f32, bf16 = torch.float32, torch.bfloat16
    with gpus(memory), torch.inference_mode():
        seen = [parallel.prepare_small_all_reduces(group, CPU, dtype, n) for dtype, n in ((bf16, 4096), (f32, 32768))]
        seen += [
            parallel.prepare_small_all_reduces(group, CPU, dtype, n)
            for dtype, n in ((torch.float16, 8), (f32, 32772), (f32, 3))
        ]
        memory.sums = 0
        seen += [add_up(bf16, 1, 1, 4096), add_up(f32, 2, 4), add_up(bf16, 8, 8192), memory.sums]
        seen += [add_up(bf16, 9, 8192), add_up(torch.float16, 8), add_up(f32, 3), memory.sums, len(memory.buffers)]
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x, group: parallel.all_reduce(x * 1, group), fullgraph=True, backend="aot_eager"
        )
        seen += [add_up(f32, 2, 4, by=compiled), memory.sums]
        parallel.forget_small_all_reduces(group)
        seen += [add_up(f32, 2, 4), add_up(f32, 2, 4, by=compiled), memory.sums]
        seen += [parallel.prepare_small_all_reduces(group, CPU, f32, 8)]
    with (
        torch.no_grad(),
        gpus(memory := Symmetric()),
    ):  # prepared under inference mode, used outside of it, and the reverse
        with torch.inference_mode():
            seen += [parallel.prepare_small_all_reduces(group, CPU, f32, 8)]
        seen += [add_up(f32, 2, 4)]
    return seen


def test_small_sums(pool: Pool) -> None:
    expected = [True, True, False, False, False]
    expected += [True, True, True, 3]
    expected += [
        True,
        True,
        True,
        3,
        1,
    ]  # too large, of a dtype that the kernel lacks, not a multiple of 16 bytes: as ever
    expected += [True, 4]
    expected += [True, True, 4, False]
    expected += [True, True]
    assert pool.run(small_sums) == [expected] * 4


@pytest.mark.parametrize(
    ("dtype", "numbers", "small"),
    [
        *((torch.float32, n, n % 4 == 0) for n in (4, 5, 64, 66)),
        *((torch.bfloat16, n, n % 8 == 0) for n in (8, 12, 16)),
        (torch.float32, 0, False), (torch.float32, 2**15, True), (torch.float32, 2**15 + 4, False),
        (torch.float16, 8, False), (torch.float64, 8, False),
    ],
)  # fmt: skip
def test_which_sums_are_small(dtype: torch.dtype, numbers: int, small: bool) -> None:
    assert parallel._is_small(dtype, numbers) == small


class Fails(Symmetric):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def empty(self, *size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if self.where == "empty":
            raise torch.OutOfMemoryError("no memory")
        return super().empty(*size, dtype=dtype, device=device)

    def rendezvous(self, tensor: torch.Tensor, name: str) -> Any:
        super().rendezvous(tensor, name)
        if self.where == "rendezvous":
            raise RuntimeError("failed to send fd")
        return None if self.where == "nothing" else self


def where_one_rank_cannot() -> list[bool]:
    """Rank 2 lacks something; nobody waits for it, and the sums are NCCL's (here gloo's) and right."""
    group, odd = parallel.model_parallel_group(), dist.get_rank() == 2
    seen = []
    for memory, place in (
        (None if odd else Symmetric(), "here"),
        (Symmetric(), "there" if odd else "here"),
        (Fails("empty") if odd else Symmetric(), "here"),
        (Fails("rendezvous") if odd else Symmetric(), "here"),
        (Fails("nothing") if odd else Symmetric(), "here"),
        (Symmetric(wrong=odd), "here"),
    ):
        with gpus(memory, place):
            seen += [parallel.prepare_small_all_reduces(group, CPU, torch.float32, 8), add_up(torch.float32, 2, 4)]
    return seen


def test_all_ranks_or_none_sum_small_messages(pool: Pool) -> None:
    assert pool.run(where_one_rank_cannot) == [[False, True] * 6] * 4


def on_cpus() -> list[bool]:
    group = parallel.model_parallel_group()
    answers = [parallel.prepare_small_all_reduces(group, CPU, torch.float32, 8) for _ in range(2)]
    parallel._forget_groups()
    return [*answers, parallel.prepare_small_all_reduces(None, CPU, torch.float32, 8), add_up(torch.float32, 8)]


def test_cpus_and_single_processes_sum_as_ever(pool: Pool) -> None:
    parallel.forget_small_all_reduces(None)
    assert pool.run(on_cpus) == [[False, False, False, True]] * 4


def test_what_torch_has() -> None:
    """The names that this torch has; a release that lacks one of them means NCCL, not an error."""
    memory = parallel._symmetric_memory()
    assert memory is not None
    assert all(callable(part) for part in (memory.empty, memory.rendezvous, memory.one_shot_all_reduce))
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("torch.distributed._symmetric_memory.rendezvous")
        assert parallel._symmetric_memory() is None


def groups_of_builds() -> tuple[bool, int]:
    """Whether a group comes back when its number of processes does, and how many threads ten more builds bring."""
    found = []
    for size in (4, 2, 4, 2):
        runtime.start("cpu", size)
        found.append(parallel.model_parallel_group())
    threads = len(list(Path("/proc/self/task").iterdir())) if Path("/proc/self/task").is_dir() else 0
    for size in (4, 2) * 5:
        runtime.start("cpu", size)
    more = len(list(Path("/proc/self/task").iterdir())) - threads if threads else 0
    return found[0] is found[2] and found[1] is found[3], more


def test_groups_come_back(pool: Pool) -> None:
    """Each build with another number of processes made three groups more, each with a thread that polls for ever."""
    assert pool.run(groups_of_builds) == [(True, 0)] * 4
