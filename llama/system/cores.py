"""Cores for each of several processes: which ones are near to each other, and how a process is bound to some."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

SYSTEM = Path("/sys/devices/system")


def usable() -> frozenset[int]:
    """The cores that this process may use; none if the system does not say."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def shares(cores: Collection[int], count: int) -> list[list[int]]:
    """The cores in as many even parts, node of memory by node of memory. Two that share a core's arithmetic stay
    together, if the parts are large enough."""
    near = {core: (_node(core), min(_listed(SYSTEM / f"cpu/cpu{core}/topology/thread_siblings_list") or [core]), core)
            for core in cores}  # fmt: skip
    in_order = sorted(cores, key=near.__getitem__)
    return [in_order[len(cores) * i // count : len(cores) * (i + 1) // count] for i in range(count)]


def _node(core: int) -> int:
    """The node of memory that a core is near to; 0 if the system does not say."""
    names = [path.name for path in (SYSTEM / f"cpu/cpu{core}").glob("node[0-9]*")]
    return int(names[0].removeprefix("node")) if names else 0


def _listed(path: Path) -> list[int]:
    """The numbers in a list as Linux writes it: "0-2,8". None at all if the file is not there."""
    try:
        text = path.read_text()
    except OSError:
        return []
    ranges = re.findall(r"(\d+)(?:-(\d+))?", text)
    return [number for first, last in ranges for number in range(int(first), int(last or first) + 1)]


def bind(cores: Collection[int]) -> None:
    """Let all threads of this process, and those that they start, run on these cores only."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), cores)


def in_words(parts: Sequence[Sequence[int]]) -> str:
    """What each process has: "process 0 to cores 0-3, process 1 to cores 4-7 (node 1)"."""
    told = []
    for rank, part in enumerate(parts):
        nodes = sorted({_node(core) for core in part})
        where = f" (node{'s' * (len(nodes) > 1)} {ranges(nodes)})" if nodes != [0] else ""
        told.append(f"process {rank} to core{'s' * (len(part) > 1)} {ranges(part)}{where}")
    return ", ".join(told)


def ranges(numbers: Collection[int]) -> str:
    """[0, 1, 2, 8] -> "0-2,8"."""
    text, rest = [], sorted(numbers)
    while rest:
        length = next((i for i in range(1, len(rest)) if rest[i] != rest[0] + i), len(rest))
        text.append(f"{rest[0]}-{rest[length - 1]}" if length > 1 else f"{rest[0]}")
        rest = rest[length:]
    return ",".join(text)
