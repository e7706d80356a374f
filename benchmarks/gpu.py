"""What can be known of this library on one GPU only, in one command: kernels, ids, waits, speed, loading, tests, block
sizes.

    python benchmarks/gpu.py [--part NAME ...] [--minutes 40] [--out gpu.json] [--small]

Each part (they are the functions of `gpu_parts`) runs in a process of its own, which may crash, hang or break its GPU:
it is started again behind the case that it failed at. Progress goes to stderr, results to --out as they come, and all
of them once more, as JSON, into the last line of stdout. --small: tiny shapes on the tests' emulated GPU, to test this
script without one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Optional

HERE = Path(__file__).resolve().parent
STARTS = 6  # of one part: the first, and those behind a case that crashed or hung


class Part(NamedTuple):
    """How many seconds a part may take, and one of its cases."""

    seconds: float
    case_seconds: float


PARTS = {  # the most valuable first
    "kernels": Part(240, 60),
    "ids": Part(240, 120),
    "waits": Part(90, 60),
    "liveness": Part(120, 60),
    "decode": Part(360, 120),
    "prefill": Part(180, 90),
    "load": Part(300, 200),
    "tests": Part(180, 180),
    "tune": Part(600, 90),
    "two": Part(240, 180),
}


def child(name: str, small: bool, skip: frozenset[str], log: str, parent: Connection) -> None:
    """Run a part's cases, but for those to skip, and tell the parent of each: (what happened, the case, its value)."""
    os.setsid()  # the parent ends this process together with those that it has started
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    try:
        import gpu_parts  # not at the top: the parent needs no torch, and outlives an import that fails

        with gpu_parts.place(small) as place:
            parent.send(("about", "", gpu_parts.about(place)))
            for case, work in getattr(gpu_parts, name)(place):
                if case in skip:
                    continue
                parent.send(("begins", case, None))
                try:
                    parent.send(("value", case, work()))
                except Exception as error:
                    traceback.print_exc()
                    parent.send(("failed", case, reason(error)))
                    place.synchronize()  # raises, and so ends this process, if the GPU has been broken
    except BaseException as error:
        traceback.print_exc()
        parent.send(("broke", "", reason(error)))
    else:
        parent.send(("ended", "", None))


def reason(error: BaseException) -> str:
    """The last line of what is printed of an error, CUDA's advice left out."""
    advice = ("CUDA kernel errors", "For debugging", "Compile with", "Device-side", "Search for")
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith(advice)]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:500]


class Runner:
    """Runs parts until the deadline. report: all that is known so far."""

    def __init__(self, deadline: float, small: bool, save: Callable[[dict[str, Any]], None]) -> None:
        self.deadline, self.small, self.save = deadline, small, save
        self.report: dict[str, Any] = {"about": {}, "parts": {}, "failed": {}, "seconds": {}}
        self.context = multiprocessing.get_context("forkserver")  # imports torch once for all
        self.context.set_forkserver_preload(["gpu_parts"])
        self.process: Optional[Any] = None

    def run(self, name: str) -> None:
        began = time.monotonic()
        if began >= self.deadline:
            self.fail(name, "not started: the minutes were spent")
            return
        self.report["parts"][name] = {}
        skip: frozenset[str] = frozenset()
        for _ in range(STARTS):
            begun = self.start(name, skip, min(self.deadline, began + PARTS[name].seconds))
            if not begun:
                break
            skip |= begun
        self.report["seconds"][name] = round(time.monotonic() - began, 1)
        self.save(self.report)

    def start(self, name: str, skip: frozenset[str], until: float) -> set[str]:
        """One process. -> the cases that it began, if another one is to go on behind them"""
        receiver, sender = self.context.Pipe(duplex=False)
        with tempfile.NamedTemporaryFile("r", prefix=f"gpu-{name}-", suffix=".log", errors="replace") as log:
            self.process = process = self.context.Process(target=child, args=(name, self.small, skip, log.name, sender))
            process.start()
            sender.close()
            begun: set[str] = set()
            event, current, problem = "", "", None
            case_until = until
            while True:
                if not receiver.poll(max(0.0, min(until, case_until) - time.monotonic())):
                    event, problem = "", "its time was up"
                    break
                try:
                    event, case, value = receiver.recv()
                except EOFError:
                    event = ""
                    process.join()
                    code = process.exitcode or 0
                    problem = (
                        f"its process ended by {signal.Signals(-code).name if code < 0 else f'exit status {code}'}"
                    )
                    break
                if event == "about":
                    self.report["about"] = value
                elif event == "begins":
                    current = case
                    begun.add(case)
                    case_until = time.monotonic() + PARTS[name].case_seconds
                elif event == "value":
                    self.report["parts"][name][case] = value
                    current = ""
                    print(f"{name}: {case}: {json.dumps(value, default=str)[:300]}", file=sys.stderr, flush=True)
                elif event == "failed":
                    self.fail(name, value, case)
                    current = ""
                else:  # "broke" or "ended"
                    problem = value
                    break
                self.save(self.report)
            self.end(patience=10 if event in ("ended", "broke") else 0)
            said = log.read().strip().splitlines()
        if problem is None:
            return set()
        if problem.startswith("its ") and said and "exit status" in problem:
            problem += f": {said[-1]}"
        self.fail(name, problem, current)
        print("\n".join(said[-30:]), file=sys.stderr, flush=True)
        return begun if time.monotonic() < until else set()

    def fail(self, name: str, problem: str, case: str = "") -> None:
        self.report["failed"][f"{name}: {case}" if case else name] = problem
        print(f"{name}: {case or 'all'} FAILED: {problem}", file=sys.stderr, flush=True)
        self.save(self.report)

    def end(self, patience: float = 0) -> None:
        """End the process, if one is there, and those that it has started. patience: seconds in which it may end by
        itself."""
        process, self.process = self.process, None
        if process is None:
            return
        process.join(patience)
        if process.pid is not None:
            for kill in (os.killpg, os.kill):  # it is no group before its first line has run
                try:
                    kill(process.pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    continue
        process.join()


def written(path: Optional[Path]) -> Callable[[dict[str, Any]], None]:
    """A function that keeps the report in a file, which is whole at any time."""

    def save(report: dict[str, Any]) -> None:
        if path is not None:
            beside = path.with_name(f"{path.name}.part")
            beside.write_text(json.dumps(report, indent=1))
            os.replace(beside, path)

    return save


def stop(number: int, _: Optional[FrameType]) -> None:
    raise SystemExit(128 + number)


def main(arguments: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS, metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=40, help="after which nothing runs any more (default: 40)")
    parser.add_argument("--out", type=Path, help="a file for the results so far")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args(arguments)
    paths = [str(HERE), str(HERE.parent), *([str(HERE.parent / "tests")] if args.small else [])]
    sys.path[:0] = paths  # which the processes of the parts take over
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [*paths, os.environ.get("PYTHONPATH")])
    )  # and those they start
    signal.signal(signal.SIGTERM, stop)
    runner = Runner(time.monotonic() + 60 * args.minutes, args.small, written(args.out))
    try:
        for name in args.part:
            runner.run(name)
    finally:
        runner.end()
        print(json.dumps(runner.report), flush=True)


if __name__ == "__main__":
    main()
