"""Where this process runs: torchrun's variables, or none -> device, dtype, process group, threads, quiet ranks, a clean end.

The only file that reads the environment. One process that torchrun did not start needs no process group: it gets none,
so it opens no port and leaves nothing to clean up. `shutdown` undoes what `start` did; it also runs at exit.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Optional, TextIO, Union

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mpu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Launch:
    """What the launcher said about this process."""

    by_launcher: bool  # false: a plain script, a notebook, a debugger
    rank: int
    world_size: int
    local_rank: int  # on this node
    local_world_size: int

    @staticmethod
    def read() -> Launch:
        def number(name: str, default: int) -> int:
            value = os.environ.get(name, str(default))
            if not value.isdecimal():
                raise ValueError(f"the environment variable {name} is {value!r}; torchrun sets it to a number, or unset it")
            return int(value)

        world_size = number("WORLD_SIZE", 1)
        if "RANK" not in os.environ:
            if world_size > 1:
                raise ValueError(f"WORLD_SIZE is {world_size} but RANK is not set; start with torchrun, or unset WORLD_SIZE")
            return Launch(False, 0, 1, 0, 1)
        return Launch(True, number("RANK", 0), world_size, number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", world_size))


@dataclass
class _Started:
    """What `start` changed in this process, so that `shutdown` can change it back."""

    process_group: bool = False
    model_parallel: bool = False
    threads: Optional[int] = None
    stdout: Optional[TextIO] = None
    excepthook: Optional[Any] = None


_started = _Started()


def start(device: Union[str, torch.device, None] = None, model_parallel_size: Optional[int] = None) -> torch.device:
    """Join the other processes of the launcher, if there are any, and return the device that this one computes on.

    A process group, or fairscale's groups, that the caller made before are used as they are. ValueError where the
    device is not there, or `model_parallel_size` does not fit the number of processes.
    """
    launch = Launch.read()
    if dist.is_available() and dist.is_initialized():
        launch = Launch(True, dist.get_rank(), dist.get_world_size(), launch.local_rank, launch.local_world_size)
    size = _model_parallel_size(model_parallel_size, launch.world_size)
    chosen = _choose_device(device, launch)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # before NCCL starts, which binds to the current device
    if launch.by_launcher:
        _join(chosen, size)
    if launch.world_size > 1:
        _share_cores(chosen, launch.local_world_size)
        _quieten(launch.rank)
    return chosen


def _model_parallel_size(wanted: Optional[int], world_size: int) -> int:
    if wanted is None:
        return mpu.get_model_parallel_world_size() if mpu.model_parallel_is_initialized() else world_size
    if wanted < 1 or world_size % wanted:
        raise ValueError(
            f"model_parallel_size={wanted} does not fit {world_size} process{'es' if world_size > 1 else ''}; "
            f"start torchrun with --nproc_per_node {max(wanted, 1)} (or a multiple), or leave model_parallel_size out"
        )
    return wanted


def _choose_device(device: Union[str, torch.device, None], launch: Launch) -> torch.device:
    if device is None:
        if torch.cuda.is_available():
            device = "cuda"
        elif torch.backends.mps.is_available() and launch.world_size == 1:  # gloo cannot carry MPS tensors
            device = "mps"
        else:
            device = "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is not a device of torch; use 'cpu', 'cuda' or 'mps'") from error
    if chosen.type == "cuda":
        count = torch.cuda.device_count()
        index = launch.local_rank if chosen.index is None else chosen.index
        if index >= count:
            raise ValueError(
                f"process {launch.local_rank} of this machine wants GPU {index}, but {count} can be seen; "
                f"start at most {max(count, 1)} process(es) here, or pass device='cpu'"
            )
        return torch.device("cuda", index)
    if chosen.type == "mps" and (launch.world_size > 1 or not torch.backends.mps.is_available()):
        raise ValueError("device='mps' needs a Mac with Metal and a single process; use device='cpu'")
    if chosen.type not in ("cpu", "mps"):
        raise ValueError(f"device={str(device)!r} is not supported; use 'cpu', 'cuda' or 'mps'")
    return chosen


def _join(device: torch.device, model_parallel_size: int) -> None:
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        _started.process_group = True
        atexit.register(shutdown)
    if mpu.model_parallel_is_initialized() and mpu.get_model_parallel_world_size() != model_parallel_size:
        if not _started.model_parallel:
            raise ValueError(
                f"fairscale's model-parallel groups were made for {mpu.get_model_parallel_world_size()} processes, but "
                f"model_parallel_size is {model_parallel_size}; pass the same number, or destroy those groups first"
            )
        mpu.destroy_model_parallel()
    if not mpu.model_parallel_is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):  # fairscale prints three lines
            mpu.initialize_model_parallel(model_parallel_size)
        _started.model_parallel = True


def _share_cores(device: torch.device, local_world_size: int) -> None:
    """torchrun sets OMP_NUM_THREADS=1 for several processes; on a CPU that would leave most cores idle."""
    if device.type == "cpu" and os.environ.get("OMP_NUM_THREADS", "1") == "1" and _started.threads is None:
        _started.threads = torch.get_num_threads()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_world_size))


def _quieten(rank: int) -> None:
    if _started.excepthook is None:
        _started.excepthook = sys.excepthook
        sys.excepthook = _report
    if rank > 0 and _started.stdout is None:
        _started.stdout = sys.stdout
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, closed by shutdown


def _report(kind: type[BaseException], error: BaseException, trace: Optional[TracebackType]) -> None:
    """Let the process that failed first be the one that is heard: its peers only lost their connection to it."""
    lost = ("connection closed by peer", "connection reset by peer", "broken pipe", "nccl communicator was aborted")
    if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in lost):
        print(f"process {dist.get_rank()} ends because another one failed; its message tells why", file=sys.stderr)
        time.sleep(2)  # torchrun names as the cause the process that ended first
    elif _started.excepthook is not None:
        _started.excepthook(kind, error, trace)


def shutdown() -> None:
    """Leave the process group that `start` joined, and give back stdout, threads and the exception hook.

    Call it on every process. Models built over several processes cannot run afterwards; a new `build` can.
    """
    failed = getattr(sys, "last_value", None) is not None  # then the peers may never come to the barrier
    if _started.process_group and dist.is_initialized():
        if not failed:
            with contextlib.suppress(RuntimeError):  # a peer is gone already
                dist.barrier()  # without it a slow process can find its peers gone, and abort
        if mpu.model_parallel_is_initialized():
            mpu.destroy_model_parallel()
        if not (failed and dist.get_backend() == "nccl"):  # NCCL would wait for the collective that never ends
            dist.destroy_process_group()
    if _started.threads is not None:
        torch.set_num_threads(_started.threads)
    if _started.stdout is not None:
        sys.stdout.close()
        sys.stdout = _started.stdout
    if _started.excepthook is not None:
        sys.excepthook = _started.excepthook
    _started.__init__()  # type: ignore[misc]


def choose_dtype(wanted: Union[str, torch.dtype, None], stored: torch.dtype, device: torch.device) -> torch.dtype:
    """`wanted`, or else the checkpoint's own dtype; float16 in place of bfloat16 where the device cannot compute in that."""
    if wanted is None:
        return torch.float16 if stored == torch.bfloat16 and not _computes_in_bfloat16(device) else stored
    dtype = DTYPES.get(wanted) if isinstance(wanted, str) else wanted
    if dtype is None or dtype not in DTYPES.values():
        raise ValueError(f"dtype={wanted!r} is not supported; use {', '.join(map(repr, DTYPES))}, or None for the checkpoint's")
    return dtype


def _computes_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        try:
            torch.ones(1, device=device, dtype=torch.bfloat16) + 1
        except (RuntimeError, TypeError):  # before macOS 14
            return False
    return True
