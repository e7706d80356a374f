"""Sets up this process: torchrun's variables, or none -> device, dtype, process group, threads, quiet ranks, a clean
end.

Only this file and `launch` read the environment. A process that torchrun did not start needs no process group and gets
none, so it opens no port and leaves nothing to clean up. `shutdown` undoes what `start` did; it also runs at exit.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import platform
import re
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import MethodType, TracebackType
from typing import Any, Optional, TextIO, Union

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mpu
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from .system import cores, peers, pipes
from .system.checks import whole
from .system.interrupts import held_back
from .system.launch import ALONE
from .system.launch import Launch as Launch
from .system.printable import counted, reason, shortened
from .system.progress import say

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALSO_CALLED = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "auto": None}


# Device types that count as another kind: the tests' emulated GPU counts as "cuda".
ALIASES: dict[str, str] = {}


def device_kind(place: Union[torch.Tensor, torch.device]) -> str:
    """The kind of a device, or of the one that a tensor lies on: "cpu", "cuda", "mps" or "meta". No other place
    asks."""
    device = place.device if isinstance(place, torch.Tensor) else place
    return ALIASES.get(device.type, device.type)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """A block in which a GPU is the thread's current one: streams, events and Triton's kernels belong to that."""
    return torch.cuda.device(device) if device_kind(device) == "cuda" else nullcontext()


def to_device(values: Any, device: torch.device, out: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Copy a tensor of the host, or a list of whole numbers (as int64), to a device (into `out`, if given).

    On the way to a GPU they pass through pinned memory, so that the host does not wait.
    """
    host = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=torch.long, device="cpu")
    on_gpu = device_kind(device) == "cuda"
    host = host.pin_memory() if on_gpu else host
    return host.to(device, non_blocking=on_gpu) if out is None else out.copy_(host, non_blocking=on_gpu)


# fairscale's variables for its groups. Setting them to None does not end the groups: they are torch's.
FAIRSCALE_GROUPS = tuple(f"_{kind}" for kind in (
    "MODEL_PARALLEL_GROUP", "DATA_PARALLEL_GROUP", "PIPELINE_PARALLEL_GROUP", "PIPELINE_PARALLEL_RANKS"
))  # fmt: skip
# A collective waits this long for a process that is late: it may read 138 GB of weights from a network disk that
# another process has in its page cache (torch's limits are 30 minutes, and 10 with NCCL). A process that died is
# noticed sooner: gloo loses its connection, and torchrun ends the others.
TIME_LIMIT = timedelta(hours=6)


@dataclass
class _Started:
    """The changes that `start` made in this process, for `shutdown` to undo."""

    store: Optional[Store] = None  # belongs to the process group that was joined
    world: Optional[dist.ProcessGroup] = None  # the process group at that time, the caller's own or this one
    watch: Optional[peers.Watch] = None
    model_parallel: bool = False
    groups: dict[int, dict[str, Any]] = field(default_factory=dict)  # model-parallel size -> fairscale's variables
    launch: Optional[Launch] = None  # if it was given by `placed`
    lost: bool = False  # whether a process that this one has started is gone
    at_exit: bool = False
    threads: Optional[int] = None
    cores: frozenset[int] = frozenset()  # the ones that this process could use before it was bound
    stdout: Optional[TextIO] = None
    silence: Optional[TextIO] = None  # stands in stdout's place while this process is quiet
    excepthook: Optional[Any] = None
    gpus: list[torch.device] = field(default_factory=list)  # the ones that this process has computed on


_started = _Started()
_placed: ContextVar[Optional[Launch]] = ContextVar("_placed", default=None)


@contextlib.contextmanager
def placed(launch: Launch) -> Iterator[None]:
    """A block in which this process stands where `launch` says, whatever the environment says."""
    token = _placed.set(launch)
    try:
        yield
    finally:
        _placed.reset(token)


def acts_alone() -> bool:
    """Whether what runs here has no part in the process group, which is that of an earlier `Llama` with processes of
    its own."""
    return _started.launch is not None and _placed.get() is None


def this_launch() -> Launch:
    """This process's place among those that act alike."""
    return _placed.get() or (ALONE if acts_alone() else Launch.read())


def start(
    device: Union[str, torch.device, None] = None, model_parallel_size: Optional[int] = None, bind: bool = False
) -> torch.device:
    """Join the other processes of the launcher, if there are any, and return the device that this one computes on.

    bind: whether each process of a machine is bound to cores of its own, until `shutdown`.

    A process group, or fairscale's groups, that the caller made before are used unchanged. ValueError if the device is
    missing, or is another process's, or `model_parallel_size` does not fit the number of processes, or there are no
    cores to bind to.
    """
    launch = this_launch()
    if launch.by_launcher:
        with held_back() if launch.store is not None else nullcontext():
            _join(launch)
    place, problem = _Place(), None
    try:
        size = _model_parallel_size(model_parallel_size, launch.world_size)
        chosen = choose_device(device, launch)
        _check_bind(bind, chosen, launch)
        if device_kind(chosen) == "cuda":
            torch.cuda.set_device(chosen)  # before NCCL starts, which binds to the current device
            if chosen not in _started.gpus:
                _started.gpus.append(chosen)
        place = _Place.of(chosen, size, bind)
    except ValueError as error:
        place, problem = _Place(problem=str(error)), error
    if launch.world_size > 1:
        _compare_places(place, problem)
    if problem is not None:
        raise problem
    if launch.by_launcher:
        _make_groups(size)
    if launch.world_size > 1:
        if bind:
            _bind(launch, place)
        _share_cores(chosen, launch)
        if launch.store is None:
            _quieten(launch.rank)
    return chosen


def chosen_device() -> torch.device:
    """The device of the last `start`."""
    return _started.gpus[-1] if _started.gpus and torch.cuda.is_initialized() else torch.device("cpu")


def _model_parallel_size(wanted: Optional[int], world_size: int) -> int:
    if wanted is None:
        callers_own = mpu.model_parallel_is_initialized() and not _started.model_parallel
        return mpu.get_model_parallel_world_size() if callers_own else world_size
    if (number := whole(wanted)) is None:
        raise ValueError(f"model_parallel_size={shortened(wanted)} must be a whole number of processes")
    wanted = number
    if wanted < 1 or world_size % wanted:
        raise ValueError(
            f"model_parallel_size={wanted} does not fit {world_size} process{'es' if world_size > 1 else ''}; "
            f"start torchrun with --nproc_per_node {max(wanted, 1)} (or a multiple), or leave model_parallel_size out"
        )
    return wanted


def choose_device(device: Union[str, torch.device, None], launch: Launch) -> torch.device:
    """`device`, or else the best one for this process. ValueError if it is not there."""
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
    if device_kind(chosen) == "cuda":
        count = torch.cuda.device_count()
        # A single visible GPU is this process's own, as SLURM gives them out; `start` refuses two processes that see
        # the same.
        index = chosen.index if chosen.index is not None else 0 if count == 1 else launch.local_rank
        if not count:
            raise ValueError(
                f"device={str(device)!r}, but torch sees no GPU; pass device='cpu', or install a CUDA build of PyTorch"
            )
        if index >= count:
            raise ValueError(
                f"process {launch.local_rank} of this machine wants GPU {index}, but {count} can be seen; "
                f"start at most {counted(count, 'process')} here, or pass device='cpu'"
            )
        return torch.device(chosen.type, index)
    if device_kind(chosen) == "mps" and (launch.world_size > 1 or not torch.backends.mps.is_available()):
        raise ValueError("device='mps' needs a Mac with Metal and a single process; use device='cpu'")
    if device_kind(chosen) not in ("cpu", "mps"):
        raise ValueError(f"device={str(device)!r} is not supported; use 'cpu', 'cuda' or 'mps'")
    return chosen


def machine() -> str:
    """This machine's name, and on Linux the id of its boot: on some clusters every machine is called "localhost"."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return platform.node() + (" " + boot.read_text().strip() if boot.exists() else "")


@dataclass(frozen=True)
class _Place:
    """The device of a process and its model-parallel size; or the problem that keeps it from computing."""

    machine: str = ""
    kind: str = ""
    uuid: str = ""  # empty for a CPU
    size: int = 0  # model_parallel_size
    cores: str = ""  # the ones that the process may use, if it is to be bound to some of them
    problem: str = ""

    @staticmethod
    def of(device: torch.device, size: int, bind: bool) -> _Place:
        """This process's place."""
        kind = device_kind(device)
        uuid = str(torch.cuda.get_device_properties(device.index).uuid) if kind == "cuda" else ""
        return _Place(machine(), kind, uuid, size, cores.ranges(_started.cores or cores.usable()) if bind else "")


def _compare_places(mine: _Place, problem: Optional[ValueError]) -> None:
    """A collective. ValueError on all processes if one has a problem, if not all compute on the same kind of device, if
    two have the same GPU, or if sizes differ: their first collective would wait for ever, or fail inside NCCL."""
    places: list[_Place] = [mine] * dist.get_world_size()
    with peers.waiting(range(len(places)), "start"):
        peers.connected(lambda: dist.all_gather_object(places, mine))
    words = ""
    for rank, place in enumerate(places):
        first = next(
            other for other, known in enumerate(places) if (known.machine, known.uuid) == (place.machine, place.uuid)
        )
        if place.problem:
            everyones = all(other.problem == place.problem for other in places)
            words = place.problem if everyones else f"{place.problem} (on process {rank})"
        elif place.kind != places[0].kind:
            words = (
                f"process 0 computes on {places[0].kind}, but process {rank} on {place.kind}; pass the same "
                f"device= to both"
            )
        elif place.size != places[0].size:
            words = (
                f"model_parallel_size is {places[0].size} on process 0, but {place.size} on process {rank}; they "
                f"must agree"
            )
        elif bool(place.cores) != bool(places[0].cores):
            words = (
                f"bind is {bool(places[0].cores)} on process 0, but {bool(place.cores)} on process {rank}; they must "
                "agree"
            )
        elif place.cores != places[beside := _first_of(place.machine, places)].cores:
            words = (
                f"bind=True, but process {beside} may use the cores {places[beside].cores}, and process {rank} of the "
                f"same machine {place.cores}: what started them has bound them already; leave bind out"
            )
        elif place.kind == "cuda" and first != rank:
            words = (
                f"processes {first} and {rank} of {place.machine.split(' ')[0]} both compute on GPU {place.uuid}; "
                f"start no "
                "more processes than GPUs, let CUDA_VISIBLE_DEVICES show each process another one, or pass device='cpu'"
            )
        if words:
            error = ValueError(words)
            error.told_by = 0  # type: ignore[attr-defined]  # one process speaks for all: see `_report`
            raise error from problem


def _first_of(name: str, places: list[_Place]) -> int:
    """The lowest rank of a machine."""
    return next(rank for rank, place in enumerate(places) if place.machine == name)


def memory_sharers(device: torch.device) -> int:
    """How many of the launcher's processes use this device's memory: on a CPU, all those of this machine."""
    return this_launch().local_world_size if device_kind(device) == "cpu" else 1


def _join(launch: Launch) -> None:
    global _joined
    if not _started.at_exit:  # also for the caller's own group: graphs must be freed before it ends
        atexit.register(shutdown)
        _started.at_exit = True
    if _started.watch is not None and dist.is_initialized() and _started.world is dist.group.WORLD:
        return
    if _started.watch is not None:  # the caller has left the group
        _started.watch.stop()
    _joined += launch.store is None
    _started.launch = launch if launch.store is not None else None
    _started.watch = watch = peers.begin(launch)
    if dist.is_initialized():
        # A store that cannot open a second connection carries no signs of life.
        with contextlib.suppress(RuntimeError, AttributeError):
            watch.publish(PrefixStore(f"llama/{_joined}", _default_store().clone()))
        _started.world = dist.group.WORLD
        return
    address = "" if launch.store is not None else f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        # With GPUs both are joined: a later build may be for the CPU.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and peers.is_refused(address):
            # torchrun ended while this process was importing; rendezvous would wait for minutes.
            raise RuntimeError(peers.GONE)
        store: Any = launch.store
        if store is None:
            with peers.waiting((), address):
                store, _, _ = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        turn = _joined if launch.store is None else 0
        # The signs have a connection of their own: on the other one they would wait while this process waits.
        watch.publish(PrefixStore(f"llama/{turn}", store.clone()))
        # The group has keys of its own: a store that outlives a group, as torchrun's does, still has the old group's
        # addresses.
        _started.store = store = PrefixStore(f"llama/{turn}/group", store)
        hook = sys.excepthook
        join = partial(dist.init_process_group, backend, store=store, rank=launch.rank, world_size=launch.world_size)
        peers.connected(lambda: join(timeout=TIME_LIMIT))
        if launch.store is not None:
            sys.excepthook = hook  # torch has put one there that says which rank this is
    except RuntimeError as error:
        watch.stop()
        _started.watch = _started.store = None
        dist.distributed_c10d._world.group_count = 0  # torch names groups by it: the same on processes that start anew
        if launch.store is not None:
            raise
        raise ValueError(
            f"process {launch.rank} cannot meet the others at MASTER_ADDR:MASTER_PORT = {address}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    _started.world = dist.group.WORLD


def _default_store() -> Any:
    return dist.distributed_c10d._get_default_store()


_joined = 0  # how often this process has joined a launcher's group; the same on all processes


def _make_groups(model_parallel_size: int) -> None:
    if mpu.model_parallel_is_initialized() and mpu.get_model_parallel_world_size() != model_parallel_size:
        if not _started.model_parallel:
            raise ValueError(
                f"fairscale's model-parallel groups were made for {mpu.get_model_parallel_world_size()} processes, but "
                f"model_parallel_size is {model_parallel_size}; pass the same number, or destroy those groups first"
            )
        mpu.destroy_model_parallel()
        # An earlier build's groups of this size are used again: its model may live, and each group keeps a thread busy.
        vars(mpu).update(_started.groups.get(model_parallel_size, {}))
    if not mpu.model_parallel_is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):  # fairscale prints three lines
            peers.connected(lambda: mpu.initialize_model_parallel(model_parallel_size))
        for group in (mpu.get_model_parallel_group(), mpu.get_data_parallel_group()):  # a new group has torch's limits
            dist.distributed_c10d._set_pg_timeout(TIME_LIMIT, group)
        _started.model_parallel = True
        _started.groups[model_parallel_size] = {name: vars(mpu)[name] for name in FAIRSCALE_GROUPS}


def _check_bind(bind: bool, device: torch.device, launch: Launch) -> None:
    """ValueError if the processes of this machine cannot each have cores of their own."""
    if bind not in (True, False):
        raise ValueError(f"bind={shortened(bind)} must be True or False")
    if not bind:
        return
    count, there = launch.local_world_size, len(_started.cores or cores.usable())
    if launch.world_size == 1:
        raise ValueError(
            "bind=True gives each of several processes cores of its own, but there is one; leave bind out, or start "
            "more"
        )
    if device_kind(device) != "cpu":
        raise ValueError(f"bind=True is for processes that compute on CPUs, but this one has {device}; leave bind out")
    if not there:
        raise ValueError("bind=True needs Linux: this system binds no process to cores; leave bind out")
    if count > there:
        raise ValueError(f"bind=True needs a core for each of {count} processes, but they may use {there}; start fewer")


def _bind(launch: Launch, place: _Place) -> None:
    """Bind this process to its share of the cores, which stays until `shutdown`. A collective. ValueError on all
    processes if the system refuses one."""
    if _started.cores:
        return
    before, problem = cores.usable(), None
    parts = cores.shares(before, launch.local_world_size)
    try:
        cores.bind(parts[launch.local_rank])
        _started.cores = before
    except OSError as error:
        told = f"this system does not bind it to the cores {cores.ranges(parts[launch.local_rank])}"
        problem = ValueError(f"bind=True, but {told}: {reason(error)}; leave bind out")
    _compare_places(replace(place, problem=str(problem or "")), problem)
    say(f"Bound {cores.in_words(parts)}")


def _share_cores(device: torch.device, launch: Launch) -> None:
    """Divide the cores among the processes. torchrun sets OMP_NUM_THREADS=1, which would leave most cores idle on a
    CPU."""
    launchers_own = "1" if launch.store is None else None
    if (
        device_kind(device) == "cpu"
        and os.environ.get("OMP_NUM_THREADS") in (None, launchers_own)
        and _started.threads is None
    ):
        _started.threads = torch.get_num_threads()
        there, sharers = len(cores.usable()) or os.cpu_count() or 1, 1 if _started.cores else launch.local_world_size
        torch.set_num_threads(max(1, there // sharers))


def _quieten(rank: int) -> None:
    """Let one process print, and one of those that fail together say why."""
    if _started.excepthook is None:
        _started.excepthook = sys.excepthook
        sys.excepthook = _report
    if rank > 0 and _started.stdout is None:
        _started.stdout = sys.stdout
        sys.stdout = _started.silence = open(os.devnull, "w")  # noqa: SIM115, closed by shutdown


def _report(kind: type[BaseException], error: BaseException, trace: Optional[TracebackType]) -> None:
    if not peers.tell_failure(error) and _started.excepthook is not None:
        _started.excepthook(kind, error, trace)


def cache_folder() -> Path:
    """The folder of compiled steps: $LLAMA_CACHE, or llama in the user's cache folder ($XDG_CACHE_HOME, ~/.cache).

    ValueError if it is below an unknown home.
    """
    named = os.environ.get("LLAMA_CACHE")
    folder = named or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "llama"
    try:
        return Path(folder).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"{folder} is below a home that is not known; let LLAMA_CACHE name another folder") from error


@contextlib.contextmanager
def inductor_cache(make_folder: Callable[[Path], None]) -> Iterator[None]:
    """Let torch.compile keep what it makes in `cache_folder`, unless the user has named another place."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    if name in os.environ:
        yield
        return
    folder = cache_folder() / "inductor"
    make_folder(folder)
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(name, None)


def cpp_compiler() -> Optional[str]:
    """The C++ compiler to call: $CXX, or the first of the usual names that is found. None on other systems than
    Linux."""
    if sys.platform != "linux":
        return None
    return os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)


def compiler_environment(folder: Path) -> dict[str, str]:
    """The environment of a process that compiles: all its files are in `folder`, and it joins no process group."""
    begins, ends = ("MASTER_", "TORCHELASTIC_"), ("RANK", "WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if not (name.startswith(begins) or name.endswith(ends))}
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP", "TORCHINDUCTOR_CACHE_DIR"), str(folder))
    return {"TORCHINDUCTOR_COMPILE_THREADS": "1", **kept, **places}


def processor() -> str:
    """The abilities of this machine's processor, as far as compiled code depends on them."""
    abilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    listed = Path("/proc/cpuinfo")
    if not abilities and listed.exists():  # the flags of the first processor
        abilities = dict.fromkeys(
            re.findall(r"^(?:flags|Features)\s*:(.*)", listed.read_text(), flags=re.MULTILINE)[:1]
        )
    return repr((platform.machine(), torch.backends.cpu.get_cpu_capability(), sorted(abilities.items())))


_first: list[Callable[[], Optional[Callable[[], object]]]] = []  # references to the callbacks of `release_first`


def release_first(callback: Callable[[], object]) -> None:
    """Have each `shutdown` call this before it destroys the process group; the latest callback comes first.

    It is for owners of CUDA graphs and the like: NCCL waits for ever for a graph with one of its collectives (pytorch
    issue 115388). A bound method is held weakly, so that it keeps no model alive.
    """
    reference = weakref.WeakMethod(callback) if isinstance(callback, MethodType) else lambda: callback
    _first[:] = [known for known in _first if known() is not None] + [reference]


def has_failed() -> bool:
    """Whether an exception ends this process, or a process is gone that it had started. If so, it must not wait for its
    GPU: a collective there may never end."""
    return _started.lost if _started.launch is not None else getattr(sys, "last_value", None) is not None


def lose() -> None:
    """A process that this one has started is gone. End what waits for it: on a GPU nothing else would."""
    _started.lost = True
    peers.end(peers.LOST)
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # not all backends of all releases can; `shutdown` ends them
            dist.distributed_c10d._abort_process_group()


def shutdown() -> None:
    """Leave the process group that `start` joined, and restore stdout, threads and the exception hook.

    Call it on every process. Models built over several processes cannot run afterwards; a new `build` can. The first
    error of a callback of `release_first` is raised at the end.
    """
    global _started
    started, failed = _started, has_failed()
    steps = [callback for known in reversed(_first) if (callback := known()) is not None]
    if not failed and torch.cuda.is_initialized():
        # NCCL is free of a graph only when the GPU has ended its last replay.
        steps += [partial(torch.cuda.synchronize, gpu) for gpu in started.gpus]
    errors: list[Exception] = []
    for step in steps:
        try:
            step()
        except Exception as error:
            errors.append(error)
    _started = _Started()
    watch = started.watch
    if watch is not None:
        watch.end(peers.NOBODY_READS if pipes.lost_reader() else peers.ENDED)
    if started.store is not None:
        if watch is not None and watch.sign.end == peers.ENDED and dist.is_initialized():
            watch.wait_for_ends()
        if mpu.model_parallel_is_initialized():
            mpu.destroy_model_parallel()
        never_ends = failed and started.launch is None and torch.cuda.is_available()  # NCCL would wait for a collective
        if dist.is_initialized() and not never_ends:
            dist.destroy_process_group()
    if watch is not None:
        if started.store is not None and watch.sign.end not in (peers.ENDED, peers.LOST):
            watch.linger()
        watch.stop()
    if started.cores:
        cores.bind(started.cores)
    if started.threads is not None:
        torch.set_num_threads(started.threads)
    if started.silence is not None:
        if sys.stdout is started.silence:
            sys.stdout = started.stdout
        started.silence.close()
    if started.excepthook is not None and sys.excepthook is _report:
        sys.excepthook = started.excepthook
    if errors and not failed:
        raise errors[0]


def choose_dtype(wanted: Union[str, torch.dtype, None], stored: torch.dtype, device: torch.device) -> torch.dtype:
    """`wanted`, or else the checkpoint's own dtype, or the other 16-bit dtype if the device is slow or unable in that
    one.

    wanted: a dtype or its name, also as bf16, fp16, half or fp32; "auto" is as None.

    float16 replaces bfloat16 if the device cannot compute in that. bfloat16 replaces float16 on an x86 processor, which
    reads prompts up to twenty times as fast in it; Llama 2's weights, trained in bfloat16, lose nothing. ValueError for
    other dtypes.
    """
    wanted = ALSO_CALLED.get(wanted, wanted) if isinstance(wanted, str) else wanted
    if wanted is None:
        if stored == torch.float16 and device_kind(device) == "cpu" and platform.machine() in ("x86_64", "AMD64"):
            return torch.bfloat16
        return torch.float16 if stored == torch.bfloat16 and not _computes_in_bfloat16(device) else stored
    dtype = DTYPES.get(wanted) if isinstance(wanted, str) else wanted
    if dtype is None or dtype not in DTYPES.values():
        told = f"use {', '.join(map(repr, DTYPES))} (or bf16, fp16, fp32), or None for the checkpoint's"
        raise ValueError(f"dtype={wanted!r} is not supported; {told}")
    return dtype


def _computes_in_bfloat16(device: torch.device) -> bool:
    if device_kind(device) == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device_kind(device) == "mps":
        try:
            torch.ones(1, device=device, dtype=torch.bfloat16) + 1
        except (RuntimeError, TypeError):  # before macOS 14
            return False
    return True
