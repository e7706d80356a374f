"""A GPU made of CPU memory: what the lines for CUDA do, with numbers, where no GPU is.

Tensors on the device type "emulated" (which `runtime.device_kind` is told to call "cuda") wrap tensors of the CPU. Each
lies in an arena of its device that behaves like CUDA's caching allocator: a block is freed with its last tensor,
POISONED at once, and given out again. torch.cuda's functions work on these devices:

- A graph records operators with the addresses that they read and write, keeps no tensor alive, computes nothing while
it is
  captured, and runs over the same addresses when it is replayed. Only what the thread issues on the capturing stream of
  the capturing device is recorded. A replay that reads a block which was freed since is a violation.
- Each thread has a current device and current streams, as in CUDA. A copy to pinned memory is done when an event behind
it,
  on the same stream, was waited for; until then the host sees poison.
- `waits` counts what makes the host wait for the device, by line; `launches` counts kernels; operators whose tensors
lie on
  different devices are refused.

Use it through `emulated(...)`; `Violations` are collected in `Machine.violations`.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Optional

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from llama import runtime
from llama.layers import kernels, proven

ARENA_BYTES = 2 * 2**30  # of virtual memory
GRAIN = 512
POISON = 0xFF  # NaN in every float, -1 in every whole number

WAITS = {"item", "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero", "unique_dim"}
NO_LAUNCH = {"empty", "empty_strided", "new_empty", "empty_like", "new_empty_strided", "detach", "lift_fresh", "alias"}
RANDOM = {"exponential_", "normal_", "uniform_", "random_", "randint", "multinomial", "rand", "randn", "bernoulli_"}


def here() -> str:
    """The package's lines that are running, the innermost first."""
    frame, found = sys._getframe(1), []
    while frame is not None and len(found) < 3:
        name = frame.f_code.co_filename
        if "/llama/" in name:
            found.append(f"{name.rsplit('/', 1)[1]}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found)


class Arena:
    """A device's memory, or a graph pool's: blocks of equal size are given out again, the latest first."""

    def __init__(self, of_graphs: bool = False) -> None:
        self.of_graphs = of_graphs  # whose replays go on using what was freed
        self.graphs: weakref.WeakSet[Graph] = weakref.WeakSet()  # that were recorded into it, and not reset
        self.lock = threading.RLock()  # a tensor may be freed, by the garbage collector, while another is allocated
        self.memory = np.zeros(ARENA_BYTES, dtype=np.uint8)
        self.base = self.memory.ctypes.data
        self.reserved = 0
        self.free: dict[int, list[int]] = collections.defaultdict(list)
        self.blocks: dict[int, tuple[int, int, str]] = {}  # offset -> size, serial number, the line; of the living ones
        self.serial = itertools.count()

    def allocate(self, nbytes: int) -> torch.Tensor:
        size = -(-max(1, nbytes) // GRAIN) * GRAIN
        with self.lock:
            if self.free[size]:
                offset = self.free[size].pop()
            else:
                offset, self.reserved = self.reserved, self.reserved + size
                if self.reserved > ARENA_BYTES:
                    raise torch.OutOfMemoryError("the emulated GPU is out of memory")
            self.blocks[offset] = size, next(self.serial), here()
        piece = self.memory[offset : offset + size]
        weakref.finalize(piece, self._release, offset, size)
        return torch.from_numpy(piece)[:nbytes]

    def _release(self, offset: int, size: int) -> None:
        if not self.of_graphs:
            self.poison(offset, size)
        with self.lock:
            del self.blocks[offset]
            self.free[size].append(offset)

    def trim(self) -> None:
        """Give back what lies behind the last living block."""
        with self.lock:
            self.reserved = max((offset + size for offset, (size, _, _) in self.blocks.items()), default=0)
            for size, offsets in self.free.items():
                offsets[:] = [offset for offset in offsets if offset + size <= self.reserved]

    def poison(self, offset: int, size: int) -> None:
        self.memory[offset : offset + size] = POISON

    def block(self, address: int) -> Optional[tuple[int, int, str]]:
        """(offset, serial number, line) of the living block around an address."""
        place = address - self.base
        with self.lock:
            return next(((o, n, w) for o, (size, n, w) in self.blocks.items() if o <= place < o + size), None)

    @property
    def allocated(self) -> int:
        with self.lock:
            return sum(size for size, _, _ in self.blocks.values())


class Machine:
    """All that there is of emulated GPUs."""

    def __init__(self, devices: int, total: int) -> None:
        self.devices = [Arena() for _ in range(devices)]
        self.pools: dict[object, Arena] = {}
        self.total = total  # bytes of each device
        self.violations: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[str] = collections.Counter()
        self.launches: collections.Counter[str] = collections.Counter()
        self.streams = 0
        self.captured = self.replays = 0
        self.local = threading.local()
        self.default_streams = [Stream.__new__(Stream) for _ in self.devices]
        for index, stream in enumerate(self.default_streams):
            stream.index, stream.queue = index, []
        self.pinned: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()

    def wait(self, what: str) -> None:
        self.waits[f"{what} at {here()}"] += 1
        if self.capture is not None:
            self.violations[f"{what} while a graph is captured, at {here()}"] += 1
            self.capture.spoilt = True

    @property
    def capture(self) -> Optional[Graph]:
        return getattr(self.local, "capture", None)

    @property
    def current(self) -> int:
        return getattr(self.local, "device", 0)

    def arena_of(self, address: int) -> Optional[Arena]:
        arenas = (*self.devices, *self.pools.values())
        return next((a for a in arenas if a.base <= address < a.base + ARENA_BYTES), None)


machine: Machine  # the one that is switched on


class StandIns:
    """What stands for `triton_kernels`: the plain forms, each counted as the launches that Triton's takes."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> Any:
            before = machine.launches.copy()
            result = getattr(kernels, name)(*args, **options)
            machine.launches = before + collections.Counter({name: 2 if name == "attend" else 1})
            return result

        return launch


STAND_INS = StandIns()


class EmulatedTensor(torch.Tensor):
    inner: torch.Tensor  # of the CPU, over the memory of an arena
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: torch.Tensor, index: int) -> EmulatedTensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device("emulated", index),
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_on_device(key, self.device))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_on_device(key, self.device), value)


def _on_device(key: Any, device: torch.device) -> Any:
    """An index with its lists brought to the device, as torch does, which waits."""
    if isinstance(key, tuple):
        return tuple(_on_device(part, device) for part in key)
    return torch.tensor(key).to(device) if isinstance(key, list) else key


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do what an operator does, on the memory of its device."""
    name = func._schema.name.removeprefix("aten::")
    tensors = [x for x in _leaves((*args, *kwargs.values())) if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, EmulatedTensor)]
    wanted = kwargs.get("device")
    if name not in ("copy_", "_to_copy", "to"):
        _check_places(name, args, tensors, ours)
    elif (crossing := _crossing(name, args, kwargs, ours)) is not None:
        return crossing
    index = wanted.index or 0 if wanted is not None and wanted.type == "emulated" else ours[0].device.index
    if name in WAITS:
        machine.wait(name)
    graph = machine.capture
    if graph is not None and not graph.records(index):
        graph = None
    inner_args = _inner(args)
    inner_kwargs = {key: _inner(value) for key, value in kwargs.items() if key != "pin_memory"}
    writes = [i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    refs: Any = None
    if graph is not None:
        if name in RANDOM:
            machine.violations[f"random numbers in a graph, at {here()}"] += 1
        graph.restore += [(x, x.clone()) for i in writes for x in _leaves(inner_args[i : i + 1])]
        refs = tree_flatten((inner_args, inner_kwargs))
        refs = [Ref(x) if isinstance(x, torch.Tensor) else x for x in refs[0]], refs[1]
    out = func(*inner_args, **inner_kwargs)
    known = {id(x.inner): x for x in ours}
    storages = {x.inner.untyped_storage().data_ptr() for x in ours}
    made: list[Optional[torch.Tensor]] = []
    # A view of a tensor that was made outside inference mode is none of inference mode either.
    normal = not all(x.is_inference() for x in ours)

    def wrapped(result: Any) -> Any:
        made.append(None)
        if not isinstance(result, torch.Tensor):
            return result
        if id(result) in known:
            return known[id(result)]
        if result.untyped_storage().data_ptr() not in storages:
            result = made[-1] = _placed(result, index, None if graph is None else graph.arena)
        with torch.inference_mode(False) if normal and made[-1] is None else contextlib.nullcontext():
            return EmulatedTensor(result, index)

    # No recursion: a function that knows itself would keep tensors until the next garbage collection.
    several = isinstance(out, (list, tuple))
    results = type(out)([wrapped(part) for part in _leaves(out)]) if several else wrapped(out)
    if "c10d" in func._schema.name and several:  # (tensors, or lists of them; the work)
        results = args[0], results[-1]
    is_view = func.namespace == "aten" and not writes and not any(x is not None for x in made)
    if name not in NO_LAUNCH and not is_view:
        machine.launches[name] += 1
    if graph is not None and not is_view:
        graph.record(func, *refs, [None if x is None else Ref(x) for x in made], name)
    return results


def _leaves(parts: Any) -> Iterator[Any]:
    for part in parts:
        if isinstance(part, (list, tuple)):
            yield from _leaves(part)
        else:
            yield part


def _inner(x: Any) -> Any:
    if isinstance(x, EmulatedTensor):
        return x.inner
    if isinstance(x, (list, tuple)):
        return type(x)(_inner(part) for part in x)
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "emulated" else x


def _placed(result: torch.Tensor, index: int, pool: Optional[Arena]) -> torch.Tensor:
    """The same numbers in the memory of the device."""
    if machine.arena_of(result.data_ptr()) is not None and result.numel():
        return result
    extent = 1 + sum((n - 1) * s for n, s in zip(result.size(), result.stride())) if result.numel() else 0
    raw = (pool or machine.devices[index]).allocate(extent * result.element_size())
    placed = raw.view(result.dtype).as_strided(result.size(), result.stride())
    return placed.copy_(result)


def _check_places(name: str, args: Any, tensors: list[torch.Tensor], ours: list[EmulatedTensor]) -> None:
    indices = name in ("index", "index_put", "index_put_")
    for x in tensors:
        if not isinstance(x, EmulatedTensor) and x.dim() and not indices and "c10d" not in name:
            raise RuntimeError(
                f"{name}: tensors on {ours[0].device if ours else 'emulated'} and {x.device}, at {here()}"
            )
    if len({x.device for x in ours}) > 1:
        raise RuntimeError(f"{name}: tensors on {sorted(str(x.device) for x in ours)}, at {here()}")
    if indices:
        for x in args[1]:
            if x is not None and x.dtype in (torch.bool, torch.uint8):
                machine.wait(f"{name} by a mask")
            elif x is not None and not isinstance(x, EmulatedTensor):
                machine.wait(f"{name} by numbers of the host")


def _crossing(name: str, args: Any, kwargs: Any, ours: list[EmulatedTensor]) -> Any:
    """A copy between host and device. None: it is none."""
    if name != "copy_":  # from the CPU, `to` comes as an empty tensor and `copy_`
        wanted = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)), None)
        if wanted is None or wanted.type != "cpu" or not ours:
            return None
        machine.wait("copy to the host")
        dtype = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)), args[0].dtype)
        return args[0].inner.to(dtype, copy=True)
    into, source = args[:2]
    non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
    if isinstance(into, EmulatedTensor) == isinstance(source, EmulatedTensor):
        return None
    host, device = (source, into) if isinstance(into, EmulatedTensor) else (into, source)
    waits = not (non_blocking and is_pinned(host))
    if waits:
        machine.wait("copy between host and device")
    if host is source:
        if source.dtype != into.dtype and source.numel() > 1:
            machine.waits[f"conversion on the host at {here()}"] += 1
        if machine.capture is not None:
            machine.violations[f"copy from the host while a graph is captured, at {here()}"] += 1
        into.inner.copy_(source)
    elif waits:
        into.copy_(source.inner)
    else:
        into.view(-1).view(torch.uint8).fill_(POISON)
        snapshot = source.inner.clone()
        current_stream(device.device).queue.append(lambda: into.copy_(snapshot))
    return into


def is_pinned(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() in machine.pinned


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    machine.pinned[tensor.untyped_storage().data_ptr()] = tensor
    return tensor


class Ref:
    """A tensor as an address, which keeps nothing alive. Memory outside the arenas, that of constants, is kept."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype, self.size, self.stride = tensor.dtype, tensor.size(), tensor.stride()
        self.address = tensor.data_ptr()
        self.arena = machine.arena_of(self.address) if tensor.numel() else None
        self.kept = tensor if self.arena is None else None

    def tensor(self) -> torch.Tensor:
        if self.arena is None:
            assert self.kept is not None
            return self.kept
        low = self.address - self.arena.base
        extent = 1 + sum((n - 1) * s for n, s in zip(self.size, self.stride))
        raw = torch.from_numpy(self.arena.memory[low : low + extent * self.dtype.itemsize])
        return raw.view(self.dtype).as_strided(self.size, self.stride)


class Graph:
    """torch.cuda.CUDAGraph"""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.operators: list[Any] = []
        self.outside: dict[tuple[int, int], tuple[Arena, int, str, str]] = {}
        self.restore: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.arena: Arena
        self.spoilt = self.gone = False

    def records(self, index: int) -> bool:
        return index == self.stream.index and current_stream(torch.device("emulated", index)) is self.stream

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        self.stream = current_stream(None)
        known = pool in machine.pools
        self.arena = machine.pools.setdefault(self if pool is None else pool, Arena(of_graphs=True))
        if known and not self.arena.graphs:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED: the graphs of this pool have gone")
        self.arena.graphs.add(self)
        self.before = {number for _, number, _ in self.arena.blocks.values()}
        machine.local.capture = self

    def capture_end(self) -> None:
        machine.local.capture = None
        if self.spoilt:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        machine.captured += 1
        for inner, saved in reversed(self.restore):  # a capture computes nothing
            inner.copy_(saved)
        self.restore.clear()
        for offset, (size, number, _) in self.arena.blocks.items():
            if number not in self.before:
                self.arena.poison(offset, size)

    def record(self, func: Any, refs: list[Any], spec: Any, targets: list[Optional[Ref]], name: str) -> None:
        for ref in refs:
            if isinstance(ref, Ref) and ref.arena is not None:
                found = ref.arena.block(ref.address)
                if found is None:
                    machine.violations[f"a graph that is captured reads freed memory: {name} at {here()}"] += 1
                    continue
                offset, number, line = found
                if ref.arena is not self.arena or number in self.before:
                    self.outside.setdefault((id(ref.arena), offset), (ref.arena, number, line, f"{name} at {here()}"))
        # Tensors over addresses of the arena, which keep none of its blocks.
        args, kwargs = tree_unflatten([ref.tensor() if isinstance(ref, Ref) else ref for ref in refs], spec)
        kwargs.pop("pin_memory", None)
        self.operators.append((func, args, kwargs, [None if target is None else target.tensor() for target in targets]))

    def replay(self) -> None:
        if self.gone:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        machine.replays += 1
        for (_, offset), (arena, number, line, reader) in self.outside.items():
            if offset not in arena.blocks or arena.blocks[offset][1] != number:
                machine.violations[f"a replay reads freed memory: allocated at [{line}], read by {reader}"] += 1
        for func, args, kwargs, targets in self.operators:
            result = func(*args, **kwargs)
            for made, target in zip(tree_flatten(result)[0], targets):
                if target is not None:
                    target.copy_(made)
                elif isinstance(made, torch._C.ScriptObject):  # of a collective; the stream would wait for it
                    torch._C._distributed_c10d.Work.unbox(made).wait()

    def reset(self) -> None:
        self.gone = True
        self.arena.graphs.discard(self)
        self.operators.clear()


class Stream:
    """torch.cuda.Stream: of the thread's current device unless another is named."""

    index: int
    queue: list[Callable[[], Any]]  # copies to pinned memory that are under way

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.index = _index(device)
        self.queue = []
        machine.streams += 1

    @property
    def device(self) -> torch.device:
        return torch.device("emulated", self.index)

    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None:
        machine.wait("Stream.synchronize")
        self.drain(len(self.queue))

    def drain(self, count: int) -> None:
        for _ in range(count):
            self.queue.pop(0)()


class Event:
    """torch.cuda.Event: recorded on the current stream of the thread's current device unless another is named."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.behind: list[Callable[[], Any]] = []

    def record(self, stream: Optional[Stream] = None) -> None:
        self.stream = stream or current_stream(None)
        self.behind = list(self.stream.queue)

    def synchronize(self) -> None:
        machine.waits[f"event at {here()}"] += 1
        self.stream.drain(sum(copy in self.behind for copy in self.stream.queue))

    def query(self) -> bool:
        return True


def _index(device: Any) -> int:
    if device is None:
        return machine.current
    return device if isinstance(device, int) else (torch.device(device).index or 0)


def current_stream(device: Any) -> Stream:
    index = _index(device)
    return getattr(machine.local, f"stream{index}", machine.default_streams[index])


@contextlib.contextmanager
def use_device(device: Any) -> Iterator[None]:
    before = machine.current
    machine.local.device = _index(device)
    try:
        yield
    finally:
        machine.local.device = before


@contextlib.contextmanager
def use_stream(stream: Stream) -> Iterator[None]:
    """torch.cuda.stream, which makes the stream's device the current one too."""
    before = current_stream(stream.device)
    with use_device(stream.device):
        setattr(machine.local, f"stream{stream.index}", stream)
        try:
            yield
        finally:
            setattr(machine.local, f"stream{stream.index}", before)


class Capture:
    """torch.cuda.graph. Without a stream it takes one that all captures of the process share, of the device that was
    the current one at the first of them."""

    shared: Optional[Stream] = None

    def __init__(
        self, graph: Graph, pool: Any = None, stream: Optional[Stream] = None, capture_error_mode: str = "global"
    ) -> None:
        if stream is None:
            stream = Capture.shared = Capture.shared or Stream()
        self.graph, self.pool, self.mode, self.on = graph, pool, capture_error_mode, use_stream(stream)

    def __enter__(self) -> None:
        self.on.__enter__()
        self.graph.capture_begin(self.pool, self.mode)

    def __exit__(self, *error: Any) -> None:
        self.graph.capture_end()
        self.on.__exit__(*error)


def _register() -> None:
    """Tell torch of the device type, once for the process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("emulated")
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda op, *args, **kwargs: run(op, args, kwargs), "PrivateUse1")
    _registered.append(library)
    with torch.device("cpu"):
        torch.empty(
            0
        )  # torch remembers its constructors at their first use here, which must come before they are patched


_registered: list[Any] = []


def set_device(device: Any) -> None:
    machine.local.device = _index(device)


@contextlib.contextmanager
def emulated(
    devices: int = 1, total: int = 80 * 10**9, capability: tuple[int, int] = (9, 0), triton: Any = STAND_INS
) -> Iterator[Machine]:
    """Within the block torch.cuda is the emulation: build with device="emulated" (or "emulated:1").

    triton: what stands for `triton_kernels`, None for a machine without Triton.
    """
    global machine
    if not _registered:
        _register()
    machine = Machine(devices, total)
    Capture.shared = None
    tensor, empty, arange, generator, cuda = torch.tensor, torch.empty, torch.arange, torch.Generator, torch.cuda

    def new_tensor(data: Any, *args: Any, device: Any = None, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made = tensor(data, *args, **options)
        if device is not None and torch.device(device).type == "emulated":
            return made.to(device)
        return pinned(made) if pin_memory else made if device is None else made.to(device)

    def new_empty(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made = empty(*size, **options)
        return pinned(made) if pin_memory else made

    def new_arange(*bounds: Any, device: Any = None, **options: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != "emulated":
            return arange(*bounds, device=device, **options)
        overloads = torch.ops.aten.arange  # torch's own way goes through a tensor that is resized
        overload = (overloads.default, overloads.start, overloads.start_step)[len(bounds) - 1]
        return run(overload, bounds, {"device": torch.device(device), **options})

    class NewGenerator:
        def __new__(cls, device: Any = "cpu") -> Any:
            return generator()

    def reserved(device: Any = None) -> int:
        return machine.devices[_index(device)].reserved

    # torch's compiler notes once in a process which functions are torch's: it must not find the ones that stand in for
    # them. It is imported here, since that takes seconds, and the pool's processes import this file with the tests that
    # they run.
    from torch._dynamo import trace_rules

    trace_rules.lookup(arange)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(runtime.ALIASES, "emulated", "cuda")
        patch.setattr(proven, "triton_kernels", lambda: triton)
        for function in vars(proven).values():
            if isinstance(function, proven.Proven):
                patch.setattr(function, "_verdicts", {})
        patch.setattr(torch, "tensor", new_tensor)
        patch.setattr(torch, "empty", new_empty)
        patch.setattr(torch, "arange", new_arange)
        patch.setattr(torch, "Generator", NewGenerator)
        patch.setattr(torch.Tensor, "is_pinned", is_pinned)
        patch.setattr(torch.Tensor, "pin_memory", lambda self: pinned(self.clone()))
        for name, value in {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: devices,
            "current_device": lambda: machine.current,
            "set_device": set_device,
            "device": use_device,
            "get_device_capability": lambda *_: capability,
            "get_device_name": lambda *_: "emulated",
            "get_device_properties": lambda device=None: SimpleNamespace(
                uuid=f"GPU-{_index(device)}", multi_processor_count=132
            ),
            "mem_get_info": lambda device=None: (machine.total - reserved(device), machine.total),
            "memory_reserved": reserved,
            "memory_allocated": lambda device=None: machine.devices[_index(device)].allocated,
            "empty_cache": lambda: [arena.trim() for arena in machine.devices],
            "synchronize": lambda *_: machine.wait("synchronize"),
            "CUDAGraph": Graph,
            "graph": Capture,
            "Stream": Stream,
            "Event": Event,
            "current_stream": lambda device=None: current_stream(device),
            "stream": use_stream,
            "graph_pool_handle": object,
            "default_generators": (torch.default_generator,) * devices,
            "get_rng_state": lambda *_: torch.get_rng_state(),
            "set_rng_state": lambda state, *_: torch.set_rng_state(state),
            "manual_seed_all": lambda seed: None,
        }.items():
            patch.setattr(cuda, name, value)
        yield machine
