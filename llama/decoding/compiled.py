"""The decode step as one graph: computes `Transformer.step` without the time that Python and torch add to it.

There are two forms. `Packaged`, for CPUs, is compiled ahead of time (AOTInductor), kept in a folder, and loaded from
there in milliseconds; several processes need shared memory for it. `Recorded`, for GPUs and for processes without that,
has static buffers, and on a GPU a CUDA graph over them. Its kernels are those of `gpu_step`, or torch's own, or
Inductor's.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

import torch

from .. import runtime
from ..layers import proven
from ..layers.parallel import (
    ColumnParallelLinear,
    all_agree,
    forget_small_all_reduces,
    group_rank,
    group_size,
    prepare_small_all_reduces,
    room_of,
)
from ..layers.proven import STEP_TOLERANCE, vectors_are_near
from ..layers.quantized import Quantized
from ..layers.tiles import InTiles
from ..model import RMSNorm, Transformer
from ..system.printable import reason
from ..system.progress import bar, say
from . import compiler, gpu_step, packages

LEAST_COLUMNS = 256  # smallest span of the cache that a recorded graph reads; larger ones are powers of two
MOST_COMPILED = 64  # numbers of rows that torch.compile may see: more than there are powers of two
# How many replays of a CUDA graph are compared with the plain step. The first may read memory that is freed later.
PROOFS = 3
# A package depends on the code of these files.
SOURCES = (
    *("model.py", "layers/parallel.py", "layers/products.py", "layers/one_digit.py", "layers/own_kernels.py"),
    *("layers/shared_memory.py", "decoding/compiler.py", "decoding/compiled.py"),
)


def make_graph(model: Transformer, wanted: Optional[bool]) -> Optional[Union[Packaged, Recorded]]:
    """The form for the model's device, or None: then the step runs op by op.

    wanted: True compiles; None compiles nothing, but uses an earlier run's packages (and records on a GPU, which takes
    hardly any time); False does neither.
    """
    device = model.norm.weight.device
    kind = runtime.device_kind(device)
    if wanted is False or kind not in ("cpu", "cuda") or model.params.max_seq_len < 4:
        if wanted:
            say(
                f"The decode step is not compiled: there is no form for {device} and "
                f"max_seq_len={model.params.max_seq_len}"
            )
        return None
    group = model.output.group
    if kind == "cuda" or (group is not None and room_of(group) is None):
        compiles = (wanted or (wanted is None and is_marked(model))) and not gpu_step.suits(model)
        recorded = Recorded(model, "inductor" if compiles else None)
        return recorded if wanted or kind == "cuda" else None
    if not takes_a_package(model):
        if wanted:
            kind = getattr(getattr(model.output, "quantization", None), "kind", "quantized")
            say(f"The decode step is not compiled: on a CPU {kind} weights have a form that a package cannot take")
        return None
    if any(part.eps != model.params.norm_eps for part in model.modules() if isinstance(part, RMSNorm)):
        return None  # a package contains norm_eps
    if (
        wanted
        and group is not None
        and not all_agree(group_rank(group) > 0 or _packaged(model, True) is not None, group)
    ):
        return None  # the first rank has said why
    return _packaged(model, bool(wanted))


def _packaged(model: Transformer, wanted: bool) -> Optional[Packaged]:
    """The step from its packages. wanted: make those that are missing."""
    try:
        packaged = Packaged(model)
        return packaged if packaged.prepare(wanted) else None
    except Exception as error:  # no compiler, a full disk, an unknown operator, a file that is refused
        say(f"The decode step is not compiled, and runs as it is: {reason(error)}")
        return None


def takes_a_package(model: Transformer) -> bool:
    """Whether the matrices are plain, or in the tiles of `cpu_kernels.cpp`, whose operators a package can call."""
    ours = all(
        isinstance(layer, InTiles) and layer.in_tiles for layer in model.modules() if isinstance(layer, Quantized)
    )
    return ours and (type(model.output) is ColumnParallelLinear or isinstance(model.output, Quantized))


def code_key(model: Transformer) -> str:
    """A digest of all that compiled code depends on."""
    device = model.norm.weight.device
    on_gpu = runtime.device_kind(device) == "cuda"
    place = torch.cuda.get_device_name(device) if on_gpu else (runtime.processor(), torch.get_num_threads())
    what = repr((torch.__version__, torch.version.git_version, place, asdict(model.params), described(model)))
    sources = [(Path(__file__).parents[1] / name).read_bytes() for name in SOURCES]
    return hashlib.sha256(what.encode() + b"".join(sources)).hexdigest()[:32]


def described(model: Transformer) -> dict[str, Any]:
    """The names and shapes of a compiled step's tensors, for `compiler.make`."""
    named = named_tensors(model).items()
    tensors = [(name, tuple(t.shape), str(t.dtype).removeprefix("torch."), t.stride()) for name, t in named]
    quantization = getattr(model.output, "quantization", None)
    stated = None if quantization is None else asdict(quantization)
    ranks = group_size(model.output.group)
    return {"tensors": tensors, "rotations": tuple(rotations(model).shape), "quantization": stated, "ranks": ranks}


def marker(model: Transformer) -> Path:
    """The file that says that Inductor has compiled this model's step before, and kept it in the same folder."""
    return runtime.cache_folder() / f"{code_key(model)}.inductor"


def is_marked(model: Transformer) -> bool:
    """Whether the model's `marker` is there."""
    try:
        return marker(model).exists()
    except (OSError, ValueError):  # an unknown home, or one that this user cannot read
        return False


def rotations(model: Transformer) -> torch.Tensor:
    """`freqs_cis` as real numbers: float32 (max_seq_len, D/2, 2), a view."""
    return torch.view_as_real(model.freqs_cis)


class Packaged:
    """`Transformer.step` compiled for this processor: one package for one row, one for any larger number of rows.

    The weights and caches are its arguments, so a package is small, holds for every model of one shape, and never goes
    stale.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self._runners: dict[bool, Any] = {}  # key: whether there are several rows
        self._columns = torch.arange(model.params.max_seq_len)
        self._room = [] if (room := room_of(model.output.group)) is None else [room]
        self._tensors: list[torch.Tensor] = []
        folder, stem = runtime.cache_folder(), code_key(model)
        self._paths = {False: folder / f"{stem}-one.pt2"}
        if model.params.max_batch_size > 1:
            self._paths[True] = folder / f"{stem}-several.pt2"

    def prepare(self, wanted: bool) -> bool:
        """Load the packages. wanted: make those that are missing or refused. -> whether all are loaded now"""
        absent: dict[bool, Path] = {}
        if wanted:
            packages.make_folder(runtime.cache_folder())
        for several, path in self._paths.items():
            if os.path.lexists(path):
                try:
                    self._runners[several] = packages.load(path)
                    continue
                except Exception as error:
                    if not wanted:
                        raise
                    say(f"A compiled step is made anew: {reason(error)}")
            absent[several] = path
        if absent and wanted:
            self._compile(absent)
        return self._runners.keys() == self._paths.keys()

    def _compile(self, absent: dict[bool, Path]) -> None:
        """Make packages, side by side, and load them."""
        began = time.perf_counter()
        say("Compiling the decode step, once for this model's shape and this machine; it takes a minute or more …")
        with (
            packages.workspace(runtime.cache_folder()) as work,
            bar(desc="Compiling", bar_format="{desc}: {elapsed}") as shown,
            ExitStack() as stack,
        ):
            running: dict[bool, Any] = {}
            for several, path in absent.items():
                place = work / path.stem
                # The step is given the rotations: it is the same with scaled ones.
                args = asdict(replace(self.model.params, rope_scaling=None))
                request = {"args": args, **described(self.model), "several": several}
                request["threads"] = torch.get_num_threads()
                running[several] = stack.enter_context(
                    compiler.started(request, place, runtime.compiler_environment(place))
                )
            for several, process in running.items():
                path = absent[several]
                compiler.wait(process, shown)
                packages.keep(work / path.stem / compiler.MADE, path, work)
                self._runners[several] = packages.load(path)
                shown.clear()
                say(f"Compiled in {time.perf_counter() - began:.0f} seconds, and kept as {path}")

    def refresh(self) -> None:
        """Look up the weights and caches, which may have been replaced since the last call."""
        for attention in self.model.attentions():
            attention.fit_cache(self.model.norm.weight)  # autocast may have left it in another dtype
        self._tensors = list(named_tensors(self.model).values())

    def __call__(self, tokens: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        """`Transformer.step`: tokens int64 (B,), their positions -> logits float32 (B, V)."""
        at = torch.tensor(positions, device="cpu")
        columns = self._columns[: max(2, max(positions) + 1)]
        runner = self._runners[len(positions) > 1]
        (logits,) = runner.run([*self._tensors, tokens, at, columns, rotations(self.model), *self._room])
        return logits


def named_tensors(model: Transformer) -> dict[str, torch.Tensor]:
    """The tensors that a step reads and writes: the weights and the caches."""
    return {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}


# The signature of `Transformer.step`.
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Way:
    """One way to run the step. If it fails, the next one runs."""

    kind: str  # the words for it in the line that says that it failed
    step: Step
    captured: bool  # whether it is captured in a CUDA graph
    whole_cache: bool = False  # the kernels find out how much of the cache to read, so that one recording is enough


@dataclass
class _Recording:
    """A step over buffers of its own. A graph keeps no tensor alive, so all that it reads beside the model is here."""

    tokens: torch.Tensor  # (bucket,)
    positions: torch.Tensor  # (bucket,)
    columns: torch.Tensor  # 0 … T - 1
    rotations: torch.Tensor  # (max_seq_len, D/2, 2)
    logits: torch.Tensor = field(init=False)  # (bucket, V)
    graph: Optional[torch.cuda.CUDAGraph] = None
    # bits of the span -> how many replays were compared with the plain step
    proven: dict[int, int] = field(default_factory=dict)

    def is_due(self, span: int) -> bool:
        """Whether to compare this replay: the first ones, and the first one with each length of the span in bits."""
        done = self.proven.get(span.bit_length(), 0)
        self.proven[span.bit_length()] = done + 1
        return sum(self.proven.values()) <= PROOFS or not done

    def run(self, way: _Way) -> None:
        """Run the step, or record it within a capture."""
        self.logits = way.step(self.tokens, self.positions, self.columns, self.rotations)


class Recorded:
    """The step over static buffers: one recording for each bucket of rows and columns.

    A bucket's rows beyond those that run are padding: they write behind what is kept in slots where nothing runs. On a
    GPU a recording is a CUDA graph; elsewhere it is run again, so the shapes are the same everywhere. Sampling is not
    part of it: its options change from call to call, and each would need a graph of its own.

    The first replays of every CUDA graph are compared with the plain step. If they differ, a line says so, and the next
    way runs: a faulty GPU must not answer wrongly in silence.
    """

    def __init__(self, model: Transformer, backend: Optional[str] = None, step: Optional[Step] = None) -> None:
        """backend: torch.compile's for the step; None: do not compile it. step: run this one, which reads the whole
        cache, in place of the model's."""
        self.model = model
        self.device = model.norm.weight.device
        captures = runtime.device_kind(self.device) == "cuda"
        plain, whole = step or model.step, step is not None
        self._ways = [_Way("plain", plain, False, whole)]
        if captures:
            self._ways.insert(0, _Way("recorded", plain, True, whole))
        if backend is not None:
            options: Any = None
            if backend == "inductor" and captures:
                # It also turns products of one row into sums, which read faster.
                options = {"coordinate_descent_tuning": True}
            # One graph for all spans: `columns` is marked dynamic. Another number of rows is another graph.
            step = torch.compile(model.step, fullgraph=True, dynamic=False, backend=backend, options=options)
            self._ways.insert(0, _Way("compiled", step, captures))
        elif step is None and gpu_step.suits(model):
            self._ways.insert(
                0, _Way("made of Triton's kernels", partial(gpu_step.step, model), captures, whole_cache=True)
            )
        self.backend = backend
        self._recordings: dict[tuple[int, int], _Recording] = {}
        self._places: Optional[tuple[int, ...]] = None
        self._pool: Any = None
        self._stream: Any = None
        self._captures = captures
        self._kept: tuple[torch.Tensor, ...] = ()
        if captures:
            with runtime.current(self.device):
                self._pool = torch.cuda.graph_pool_handle()
                # All captures share a stream: cuBLAS keeps 32 MiB for each one that it has multiplied on.
                self._stream = torch.cuda.Stream(self.device)
            if model.output.group is not None:
                runtime.release_first(self.clear)

    def buckets(self, rows: int, span: int) -> tuple[int, int]:
        """The rows, and the columns of the cache, of the recording to use: the next powers of two, within the cache."""
        args = self.model.params
        columns = args.max_seq_len if self._ways[0].whole_cache else max(LEAST_COLUMNS, 1 << (span - 1).bit_length())
        return min(1 << (rows - 1).bit_length(), args.max_batch_size), min(columns, args.max_seq_len)

    def clear(self) -> None:
        """Free all recordings. Those with collectives must be freed before their process group ends."""
        for recording in self._recordings.values():
            if recording.graph is not None:
                recording.graph.reset()
                recording.graph, recording.proven = None, {}
        self._recordings.clear()
        if self._captures:  # torch refuses to record into a pool without graphs that had some
            with runtime.current(self.device):
                self._pool = torch.cuda.graph_pool_handle()

    def refresh(self) -> None:
        """Free the recordings if weights, caches or rotations have been replaced since."""
        tensors = (*named_tensors(self.model).values(), self.model.freqs_cis)
        places = tuple(t.data_ptr() for t in tensors)
        if places != self._places:
            self.clear()
        self._places, self._kept = places, tensors  # keeps a tensor that is replaced while a graph runs

    def __call__(self, tokens: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        """`Transformer.step`: tokens int64 (B,), their positions -> logits float32 (B, V), valid until the next
        call."""
        rows = len(positions)
        key = self.buckets(rows, max(positions) + 1)
        with runtime.current(self.device):
            recording = self._recordings.get(key)
            if new := recording is None:
                recording = self._recordings[key] = self._new(*key)
            recording.tokens[:rows].copy_(tokens)
            last, held = self.model.params.max_seq_len - 1, [*self.model.cache_use.columns, *[0] * key[0]]
            idle = [min(columns, last) for columns in held[rows : key[0]]]
            runtime.to_device([*positions, *idle], self.device, out=recording.positions)
            if new:
                self._prepare(recording)
            way = self._ways[0]
            if recording.graph is None:
                recording.run(way)
            else:
                # The replay comes last, and its keys and values stay in the cache: so equal calls give equal ids.
                expected = self._plain(recording, rows) if recording.is_due(max(positions) + 1) else None
                recording.graph.replay()
                if expected is not None and not self._are_near(recording, rows, expected):
                    self._fail("it gives other numbers than the plain step")
                    return self(tokens, positions)
            return recording.logits[:rows]

    def _new(self, bucket: int, span: int) -> _Recording:
        group, weight = self.model.output.group, self.model.norm.weight
        prepare_small_all_reduces(group, self.device, weight.dtype, bucket * self.model.params.dim)
        tokens, positions = (torch.zeros(bucket, dtype=torch.long, device=self.device) for _ in range(2))
        columns = torch.arange(span, device=self.device)
        if self.backend is not None:
            torch._dynamo.maybe_mark_dynamic(columns, 0)
        return _Recording(tokens, positions, columns, rotations(self.model))

    def _prepare(self, recording: _Recording) -> None:
        """Compile and capture in the first way; if that fails on any process, in the next one."""
        while (way := self._ways[0]).captured or way.kind == "compiled":
            problem: Optional[Exception] = None
            try:
                with _compiling() if way.kind == "compiled" else nullcontext():
                    self._record(recording, way)
                if way.whole_cache and proven.attend.refused:  # plain attention would read the whole cache in each step
                    raise RuntimeError("the kernel of attention is not used here")
            except Exception as error:  # whatever a compiler, a capture or a lack of memory may raise
                problem = error
            if all_agree(problem is None, self.model.output.group):
                break
            self._fail("another process failed" if problem is None else reason(problem), keep=recording)
        if self._ways[0].kind == "compiled" and self.backend == "inductor":
            with suppress(OSError, ValueError):  # without a marker, the next run compiles only on request
                packages.make_folder(runtime.cache_folder())
                marker(self.model).touch()

    def _record(self, recording: _Recording, way: _Way) -> None:
        """Capture the step. Its inputs are in place: the runs before the capture write the right keys and values."""
        if not way.captured:
            recording.run(way)
            return
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # compilers run, and libraries allocate their memory, before the capture
                recording.run(way)
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # "thread_local" allows NCCL's watchdog to look at its events meanwhile.
        with (
            torch.cuda.stream(current),  # makes it current again, even if torch.cuda.graph fails half way
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            recording.run(way)
        recording.graph = graph

    def _fail(self, why: str, keep: Optional[_Recording] = None) -> None:
        """Go on with the next way, and free the recordings of this one."""
        assert len(self._ways) > 1  # the plain step has nothing to fall back to
        say(f"The decode step is not {self._ways.pop(0).kind}, and runs as it is: {why}")
        self.clear()
        forget_small_all_reduces(self.model.output.group)
        if keep is not None:
            self._recordings[len(keep.tokens), len(keep.columns)] = keep

    def _plain(self, recording: _Recording, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of the plain step, and the keys and values that it writes."""
        logits = self._ways[-1].step(recording.tokens, recording.positions, recording.columns, recording.rotations)
        return logits[:rows], self._written(recording, rows)

    def _are_near(self, recording: _Recording, rows: int, expected: tuple[torch.Tensor, torch.Tensor]) -> bool:
        """Whether the last replay's logits, keys and values are near to these."""
        found = recording.logits[:rows], self._written(recording, rows)
        tolerance = STEP_TOLERANCE[self.model.norm.weight.dtype]
        near = all(vectors_are_near(a, b, tolerance) for a, b in zip(found, expected))
        return all_agree(near, self.model.output.group)

    def _written(self, recording: _Recording, rows: int) -> torch.Tensor:
        """The keys and values of the step's tokens: (2 x layers, rows, K, D)."""
        slots, positions = torch.arange(rows, device=self.device), recording.positions[:rows]
        caches = (cache for attention in self.model.attentions() for cache in (attention.cache_k, attention.cache_v))
        return torch.stack([cache[slots, positions] for cache in caches])


@contextmanager
def _compiling() -> Iterator[None]:
    """A block in which torch compiles the step: once for each number of rows, which is more often than torch
    expects."""
    with runtime.inductor_cache(packages.make_folder), torch._dynamo.config.patch(recompile_limit=MOST_COMPILED):
        yield
