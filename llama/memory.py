"""Estimates the memory that a model needs on each process, finds what is free, and says what would make it fit."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Optional

import torch

from .layers.rounding import EXACT, Quantization
from .model import ModelArgs, process_counts
from .runtime import device_kind
from .system.printable import gigabytes as gigabytes

# A GPU needs memory beside tensors. cuBLAS has a workspace (torch's: 32 MiB on Hopper, less before) for each stream
# that multiplies. There are two: one reads prompts, graphs are recorded on the other.
WORKSPACE_BYTES = 32 * 2**20
STREAMS = 2
KERNEL_BYTES = 192 * 2**20  # CUDA brings the code of torch's and cuBLAS's kernels to the GPU when they are first called
# Each process has a few MiB for each channel, peer and protocol: for the model's group, and again for all processes.
NCCL_BYTES = 768 * 2**20
# A recorded step keeps its logits in the model's dtype and in float32. There are graphs for one row, and for 2, 4, 8 …
# rows; together they take twice the largest.
GRAPH_LOGITS = 2 * 2
# A process on a CPU needs memory beside tensors and imports. Code of torch and oneDNN is read from disk when first
# called (16 to 33 MB), gloo has buffers, and the allocator keeps some of what was freed.
CODE_BYTES = 32 * 2**20
INT8_ROWS = 512  # tokens that int8 and int4 layers multiply at a time, with two results in float32
HOST = torch.device("cpu")


@dataclass(frozen=True)
class Placement:
    """A model and where it will lie, with a cache of max_batch_size rows of max_seq_len tokens, and weights in
    `dtype`."""

    args: ModelArgs
    dtype: torch.dtype
    processes: int = 1  # how many share one copy of the model
    device: torch.device = HOST
    sharers: int = 1  # how many processes use this device's memory (on a CPU, all of a machine)
    quantization: Optional[Quantization] = None
    draft: Optional[Placement] = None  # a draft model beside it, with as large a cache, on the same processes

    def beside(self) -> Optional[Placement]:
        """Where the draft model lies, after changes to this placement."""
        if self.draft is None:
            return None
        args = replace(self.draft.args, max_batch_size=self.args.max_batch_size, max_seq_len=self.args.max_seq_len)
        return replace(self.draft, args=args, processes=self.processes, device=self.device, sharers=self.sharers)

    def keeps_groups_whole(self) -> bool:
        """Whether no group of quantized numbers would be cut by the processes."""
        # wo and w2 are cut along their columns; they have this many.
        cut = (self.args.n_heads * self.args.head_size, self.args.ffn_width)
        return self.quantization is None or all(self.quantization.shares(columns, self.processes) for columns in cut)


class Need(NamedTuple):
    """Bytes that one process comes to hold beside what its imports took (`own_bytes`). Weights that stay in mapped
    files count: the system may drop their pages, but every step would then read them from disk again."""

    weights: int
    cache: int
    temporary: int  # peak of a prefill of the whole cache
    overhead: int  # code, workspaces, buffers of the collectives, and recorded steps on a GPU
    place: str = "cpu"

    @property
    def resident(self) -> int:
        """The bytes that stay as long as the model."""
        return self.weights + self.cache + self.overhead

    def __str__(self) -> str:
        beside = {"cpu": "libraries and their buffers", "cuda": "CUDA's libraries and recorded steps"}.get(self.place)
        parts = [f"{gigabytes(self.weights)} of weights", f"{gigabytes(self.cache)} of cache"]
        if beside is not None:
            parts.append(f"{gigabytes(self.overhead)} for {beside}")
        return f"{', '.join(parts[:-1])} and {parts[-1]}"


def estimate(placement: Placement) -> Need:
    """The memory that each process needs, for a draft model too."""
    args, processes, quantization = placement.args, placement.processes, placement.quantization
    size = placement.dtype.itemsize

    def matrix(rows: int, columns: int, parts: int = 1, is_output: bool = False) -> int:
        """Bytes of this rank's rows x columns; the full matrix is `parts` such blocks wide."""
        return quantization.nbytes(rows, columns, columns * parts, is_output) if quantization else size * rows * columns

    queries = args.n_heads * args.head_size // processes
    keys = args.kv_heads // min(processes, args.kv_heads) * args.head_size
    width = args.ffn_width // processes
    columns_cut = matrix(args.dim, queries, processes) + matrix(args.dim, width, processes)  # wo and w2
    layer = matrix(queries + 2 * keys + 2 * width, args.dim) + columns_cut + size * 2 * args.dim
    ids = -(-args.vocab_size // processes)
    columns = args.dim // processes  # columns of the embedding on one process
    output = matrix(ids, args.dim, is_output=True)
    weights = args.n_layers * layer + output + size * (args.vocab_size * columns + args.dim)
    tokens = args.max_batch_size * args.max_seq_len
    attention = 3 * args.dim + 2 * queries + 2 * keys  # the stream, its norm and sum; q, k, v and the result
    rotating = 4 * 3 * queries  # q in float32, its halves turned
    feed_forward = 4 * args.dim + 3 * width
    place = device_kind(placement.device)
    int8_results = 2 * 4 * min(tokens, INT8_ROWS) * 2 * width if quantization and place == "cpu" else 0
    need = Need(
        weights=weights,
        cache=size * 2 * args.n_layers * tokens * keys,
        temporary=tokens * max(size * attention + rotating, size * feed_forward) + int8_results,
        overhead=_overhead(placement, 0 if quantization else size * args.dim * 2 * width),
        place=place,
    )
    if (draft := placement.beside()) is None:
        return need
    other = estimate(draft)  # the two models read prompts one after the other
    temporary = max(need.temporary, other.temporary)
    overheads = need.overhead, other.overhead
    overhead = sum(overheads) if place == "cuda" else max(overheads)
    return Need(need.weights + other.weights, need.cache + other.cache, temporary, overhead, place)


def _overhead(placement: Placement, largest: int) -> int:
    """largest: bytes of the largest matrix that oneDNN rearranges, as a copy, before it multiplies many rows with
    it."""
    args, place = placement.args, device_kind(placement.device)
    if place == "cuda":
        graphs = 4 * GRAPH_LOGITS * args.max_batch_size * args.vocab_size
        return STREAMS * WORKSPACE_BYTES + KERNEL_BYTES + (NCCL_BYTES if placement.processes > 1 else 0) + graphs
    return CODE_BYTES + largest if place == "cpu" else 0


def own_bytes() -> int:
    """Bytes that are resident in this process now: Python, torch and its other imports. 0 if the system does not
    tell."""
    counts = Path("/proc/self/statm")
    return int(counts.read_text().split()[1]) * mmap.PAGESIZE if counts.exists() else 0


def free_bytes(device: torch.device) -> Optional[int]:
    """Bytes that this process can still allocate on the device; None if the system does not tell."""
    if device_kind(device) == "cuda":
        # torch keeps the memory of freed tensors for new ones.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device_kind(device) == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return _free_host_bytes(Path("/"))


def _free_host_bytes(root: Path) -> Optional[int]:
    """The least of MemAvailable and what each control group (of either version) leaves."""
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():
        return None
    found = [
        1024 * int(line.split()[1]) for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")
    ]
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
            inner = base / path.strip("/")
            folders = [f for f in (inner, *inner.parents) if f == base or base in f.parents]
            found += [free for f in folders if (free := _free_in_group(f)) is not None]
    return max(0, min(found)) if found else None


def _free_in_group(folder: Path) -> Optional[int]:
    """A group's limit minus the memory in use; files in its page cache do not count. None without a limit."""
    try:
        if (folder / "memory.max").exists():
            limit, used = (folder / "memory.max").read_text().strip(), (folder / "memory.current").read_text()
        else:
            limit, used = (folder / "memory.limit_in_bytes").read_text(), (folder / "memory.usage_in_bytes").read_text()
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    prefix = "total_" if "total_inactive_file" in stat else ""
    cache = sum(int(stat.get(prefix + kind, 0)) for kind in ("inactive_file", "active_file"))
    return int(limit) - int(used) + cache


def return_freed() -> None:
    """Have glibc give freed memory back to the system. Up to a third of a quantized model is such memory, because
    loading frees many pieces. Does nothing without glibc."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def check_fits(placement: Placement) -> None:
    """ValueError, before any weight is loaded, if weights and cache do not fit what is free."""
    need, free, sharers = estimate(placement), free_bytes(placement.device), placement.sharers
    if free is None or need.resident * sharers <= free:
        return
    each = f" for each of {sharers} processes" if sharers > 1 else ""
    place = "this machine" if device_kind(placement.device) == "cpu" else str(placement.device)
    missing = gigabytes(need.resident * sharers - free)
    what = "the model takes" if placement.draft is None else "the model and its draft model take"
    raise ValueError(
        f"not enough memory: {what} {need}{each}, but {place} has {gigabytes(free)} free, {missing} too little; "
        f"{way_out(placement, free)}"
    )


def way_out(placement: Placement, free: int, working: bool = False) -> str:
    """The single changes that make weights and cache (and with `working` the temporary) fit `free` bytes, for a
    message."""

    def fits(changed: Placement) -> bool:
        need = estimate(changed)
        return (need.resident + need.temporary * working) * changed.sharers <= free

    ways = [way for name in ("max_batch_size", "max_seq_len") for way in _largest_that_fits(name, placement, fits)]
    for choices in _other_forms(placement):
        good = [words for words, changed in choices.items() if changed.keeps_groups_whole() and fits(changed)]
        ways += good[:1]
    return f"{' or '.join(ways)} would fit" if ways else "no single change would make it fit here"


def _largest_that_fits(name: str, placement: Placement, fits: Callable[[Placement], bool]) -> list[str]:
    """The largest value of this limit of the cache that fits, as a list of one setting, or none."""
    low, high = 0, getattr(placement.args, name) - 1
    while low < high:
        middle = (low + high + 1) // 2
        good = fits(replace(placement, args=replace(placement.args, **{name: middle})))
        low, high = (middle, high) if good else (low, middle - 1)
    return [f"{name}={low}"] if low else []


def _other_forms(placement: Placement) -> Iterator[dict[str, Placement]]:
    """For each kind of change, its choices with the mildest first: the words for a message -> the placement."""
    if placement.dtype == torch.float32:
        yield {"dtype='bfloat16'": replace(placement, dtype=torch.bfloat16)}
    if (kind := device_kind(placement.device)) != "mps":
        each = f"processes, {placement.sharers} on each {'machine' if kind == 'cpu' else 'GPU'}"
        shared = process_counts(placement.args)
        if placement.draft is not None:
            shared = [n for n in shared if n in process_counts(placement.draft.args)]
        more = [n for n in shared if n > placement.processes]
        yield {f"{n} {each}": replace(placement, processes=n) for n in more}
    if placement.draft is not None:
        yield {"no draft=": replace(placement, draft=None)}
    if placement.quantization is None:  # this quantizes the model only; a draft model keeps its stored form
        yield {f"quantize={kind!r}": replace(placement, quantization=Quantization(kind)) for kind in EXACT}


@contextmanager
def explained(placement: Placement) -> Iterator[None]:
    """A block that works on the model: if memory runs out, the error says what is needed and what would make it fit."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        need, device = estimate(placement), placement.device
        what = "the model has" if placement.draft is None else "the model and its draft model have"
        room = (free_bytes(device) or 0) + need.resident * placement.sharers
        raise type(error)(
            f"{device} is out of memory: {what} {need}, and takes up to {gigabytes(need.temporary)} while it reads "
            f"prompts of {placement.args.max_seq_len} tokens; shorter or fewer prompts at once, or a build with less: "
            f"{way_out(placement, room, working=True)} ({str(error).splitlines()[0]})"
        ) from error
