"""Cores for each of several processes: which ones, that all threads are bound, and that shutdown undoes it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from forks import Forks

from llama import Llama, runtime
from llama.system import cores

linux = pytest.mark.skipif(sys.platform != "linux", reason="binds threads, as Linux does")
two_cores = pytest.mark.skipif(len(cores.usable()) < 2, reason="needs two cores")


def machine(folder: Path, nodes: list[list[int]], siblings: dict[int, str]) -> None:
    """What Linux tells of such a machine."""
    for node, members in enumerate(nodes):
        for core in members:
            place = folder / f"cpu/cpu{core}"
            (place / f"node{node}").mkdir(parents=True)
            if core in siblings:
                (place / "topology").mkdir()
                (place / "topology/thread_siblings_list").write_text(siblings[core] + "\n")


@pytest.mark.parametrize(
    ("nodes", "siblings", "usable", "count", "expected", "told"),
    [
        ([[0, 2, 4, 6], [1, 3, 5, 7]], {}, range(8), 2, [[0, 2, 4, 6], [1, 3, 5, 7]],
         "process 0 to cores 0,2,4,6, process 1 to cores 1,3,5,7 (node 1)"),
        ([[*range(4)], [*range(4, 8)]], {}, range(1, 8), 4, [[1], [2, 3], [4, 5], [6, 7]],
         "process 0 to core 1, process 1 to cores 2-3, process 2 to cores 4-5 (node 1), "
         "process 3 to cores 6-7 (node 1)"),
        ([[*range(8)]], {i: f"{i % 4},{i % 4 + 4}" for i in range(8)}, range(8), 2, [[0, 4, 1, 5], [2, 6, 3, 7]],
         "process 0 to cores 0-1,4-5, process 1 to cores 2-3,6-7"),
        ([[0, 1], [2, 3]], {}, range(4), 1, [[0, 1, 2, 3]], "process 0 to cores 0-3 (nodes 0-1)"),
        ([], {}, (5, 3, 9), 3, [[3], [5], [9]], "process 0 to core 3, process 1 to core 5, process 2 to core 9"),
    ],
)  # fmt: skip
def test_shares(
    nodes: list[list[int]], siblings: dict[int, str], usable: range, count: int, expected: list[list[int]], told: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    machine(tmp_path, nodes, siblings)
    monkeypatch.setattr(cores, "SYSTEM", tmp_path)
    parts = cores.shares(usable, count)
    assert parts == expected
    assert cores.in_words(parts) == told


SCRIPT = """
import os, sys, torch
import torch.distributed as dist
from llama import runtime
from llama.system import cores
{before}
torch.ones(1000, 1000) @ torch.ones(1000, 1000)  # starts OpenMP's threads
before = cores.usable()
runtime.start("cpu", bind=True)
mine = cores.shares(before, 2)[dist.get_rank()]
threads = lambda: [os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")]
assert all(found == set(mine) for found in threads()), (threads(), mine)
assert torch.get_num_threads() == int(os.environ.get("OMP_NUM_THREADS", 0)) or len(mine), torch.get_num_threads()
runtime.start("cpu", bind=True)
assert cores.usable() == set(mine)
runtime.shutdown()
assert all(found == before for found in threads()), threads()
"""


@linux
@two_cores
def test_all_threads_are_bound_until_shutdown(forks: Forks) -> None:
    first, second = forks.ranks(SCRIPT.format(before=""))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout == f"Bound {cores.in_words(cores.shares(cores.usable(), 2))}\n"
    assert second.stdout == ""


@linux
@two_cores
@pytest.mark.parametrize(
    ("before", "words"),
    [
        ("os.sched_setaffinity(0, {min(cores.usable())})", "a core for each of 2 processes, but they may use 1; start"),
        ("cores.usable = frozenset", "bind=True needs Linux: this system binds no process to cores; leave bind out"),
        ("cores.usable = lambda: frozenset(range(2 + int(os.environ['RANK'])))",
         "process 0 may use the cores 0-1, and process 1 of the same machine 0-2: what started them has bound them"),
        ("start = runtime.start\nruntime.start = lambda device, bind: start(device, bind=os.environ['RANK'] == '0')",
         "bind is True on process 0, but False on process 1; they must agree"),
        ("bind = cores.bind\ncores.bind = lambda some: bind({10**4} if os.environ['RANK'] == '1' else some)",
         "[Errno 22] Invalid argument; leave bind out (on process 1)"),
    ],
)  # fmt: skip
def test_what_cannot_be_bound(before: str, words: str, forks: Forks) -> None:
    """All processes end, with the same words."""
    first, second = forks.ranks(SCRIPT.format(before=before))
    assert (first.returncode, second.returncode) == (1, 1)
    assert words in first.stderr
    assert words in second.stderr


@pytest.mark.parametrize(
    ("bind", "words"), [(True, "there is one; leave bind out, or start more"), ("yes", "bind='yes' must be True or")]
)
def test_one_process(bind: object, words: str, tiny: Path, tokenizer_path: str) -> None:
    before = cores.usable()
    with pytest.raises(ValueError, match=words):
        Llama.build(str(tiny), tokenizer_path, device="cpu", bind=bind)  # type: ignore[arg-type]
    assert cores.usable() == before


@linux
@two_cores
def test_with_processes_that_it_starts(tiny: Path, tokenizer_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = cores.usable()
    llama = Llama.build(str(tiny), tokenizer_path, 32, 1, device="cpu", processes=2, bind=True)
    assert cores.usable() == set(cores.shares(before, 2)[0])
    assert "Bound process 0 to core" in capsys.readouterr().out
    assert llama.generate([[1, 5, 6]], 3, 0)[0]
    llama.close()
    assert cores.usable() == before
    assert runtime._started.cores == frozenset()
    assert os.sched_getaffinity(0) == before
