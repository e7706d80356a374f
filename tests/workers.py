"""A pool of processes joined over gloo, started once a test run. It runs module-level functions that tests send it."""

from __future__ import annotations

import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Pool:
    def __init__(self, size: int) -> None:
        context = get_context("forkserver")  # one process imports torch, for all
        context.set_forkserver_preload(["llama.commands.cli", "llama.commands.convert", "llama.generation"])
        port = free_port()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, size, port, dict(os.environ)), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = 120) -> list[Any]:
        """What `function(*args)` returned on each rank. An exception there is raised here."""
        outcomes = self.try_run(function, *args, seconds=seconds)
        for rank, (value, error) in enumerate(outcomes):
            if error is not None:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            outcomes[rank] = value
        return outcomes

    def try_run(self, function: Callable[..., Any], *args: Any, seconds: float = 120) -> list[Any]:
        """(value, None) or (None, traceback) of each rank."""
        for pipe in self.pipes:
            pipe.send((function, args))
        outcomes = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(seconds):
                raise AssertionError(f"rank {rank} did not answer within {seconds} s")
            outcomes.append(pipe.recv())
        return outcomes

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(60)
            assert process.exitcode == 0, f"a worker ended with {process.exitcode}"
        for pipe in self.pipes:
            pipe.close()


def _serve(pipe: Connection, rank: int, size: int, port: int, environment: dict[str, str]) -> None:
    warnings.simplefilter("error")
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    from llama import runtime

    runtime.start("cpu")
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            outcome = (function(*args), None)
        except Exception:
            outcome = (None, traceback.format_exc())
        pipe.send(outcome)
    runtime.shutdown()
    sys.exit(0)
