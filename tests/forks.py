"""Processes without the seconds that it takes to import torch: forks of one that has imported it. They start and end as
`python SCRIPT` does: hooks, atexit, exit status and all.

As a program it reads one line of JSON for each job on stdin, and answers with one line on stdout.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, Optional

ROOT = Path(__file__).resolve().parents[1]


class Ended(NamedTuple):
    """How one process ended: its exit status, negative for a signal; None if it ran out of time."""

    returncode: Optional[int]
    stdout: str
    stderr: str


def python(*arguments: str) -> str:
    """The script that does what `python` with these arguments does: a file, or -m and a module, and what that is
    given."""
    if arguments[0] == "-m":
        arguments, run = arguments[1:], "run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    else:
        run = "run_path(sys.argv[0], run_name='__main__')"
    return f"import runpy, sys\nsys.argv = {list(arguments)}\nrunpy.{run}"


class Forks:
    def __init__(self, folder: Path) -> None:
        """folder: where the output of the processes goes."""
        self.folder = folder
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip

    def run(self, script: str, *args: str, env: Optional[dict[str, str]] = None, **options: Any) -> Ended:
        """One process, without a launcher. script: its text. options: see `ranks`."""
        return self._ask(script, args, [env or {}], **options)[0]

    def ranks(
        self, script: str, *args: str, count: int = 2, env: Optional[dict[str, str]] = None, **options: Any
    ) -> list[Ended]:
        """`count` processes of one group that no launcher watches.

        options: seconds until they are killed, 60 if not given; closed: the standard streams (0, 1, 2) that they do not
        have; reader: whether somebody reads stdout, True if not given; cwd: a folder.
        """
        from workers import free_port

        common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **(env or {})}
        return self._ask(
            script, args, [{"RANK": str(rank), "LOCAL_RANK": str(rank), **common} for rank in range(count)], **options
        )

    def _ask(self, script: str, args: tuple[str, ...], envs: list[dict[str, str]], **options: Any) -> list[Ended]:
        job = {"script": script, "args": args, "envs": envs, "folder": str(self.folder), **options}
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return [Ended(*outcome) for outcome in json.loads(self.server.stdout.readline())]

    def close(self) -> None:
        self.server.communicate()
        assert self.server.returncode == 0


def _become(job: dict[str, Any], number: int) -> str:
    """Make the process that this is in the image of the job's; returns the script that it is to run."""
    os.environ.update(job["envs"][number])
    os.chdir(job.get("cwd", ROOT))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for descriptor in (1, 2):
        path = Path(f"{job['folder']}/{number}.{descriptor}")
        path.unlink(missing_ok=True)
        if descriptor == 1 and not job.get("reader", True):
            reading, file = os.pipe()
            os.close(reading)
        else:
            file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    os.close(null)
    for descriptor in job.get("closed", ()):
        os.close(descriptor)
        setattr(sys, ("stdin", "stdout", "stderr")[descriptor], None)
    sys.argv = ["script.py", *job["args"]]
    return job["script"]


def _serve() -> Optional[str]:
    """Fork what is asked for, until nobody asks any more. In a fork: the script that it is to run."""
    for line in sys.stdin:
        job = json.loads(line)
        pids = []
        for number in range(len(job["envs"])):
            pid = os.fork()
            if pid == 0:
                return _become(job, number)
            pids.append(pid)
        print(json.dumps(_outcomes(job, pids)), flush=True)
    return None


def _outcomes(job: dict[str, Any], pids: list[int]) -> list[tuple[Optional[int], str, str]]:
    statuses: dict[int, Optional[int]] = {}
    deadline = time.monotonic() + job.get("seconds", 60)
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses and (found := os.waitpid(pid, os.WNOHANG))[0]:
                statuses[pid] = os.waitstatus_to_exitcode(found[1])
            elif pid not in statuses and time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                statuses[pid] = None
        time.sleep(0.005)
    texts = [[Path(job["folder"], f"{number}.{which}") for which in (1, 2)] for number in range(len(pids))]
    return [
        (statuses[pid], *(path.read_text(errors="replace") if path.exists() else "" for path in paths))
        for pid, paths in zip(pids, texts)
    ]


if __name__ == "__main__":
    import llama.commands.cli
    import llama.commands.convert
    import llama.commands.info
    import llama.generation  # noqa: F401, what a command would import when it runs

    if (script := _serve()) is not None:
        __file__ = sys.argv[0]
        exec(compile(script, "script.py", "exec"))  # at the top, so that what it raises goes the way of any program
