"""The decode step as one graph: what `Transformer.step` computes, without what Python and torch add to it.

Two forms. `Packaged`, for one process on a CPU: compiled ahead of time (AOTInductor), kept in a folder, loaded from there in
milliseconds. `Recorded`, for GPUs and for several processes: static buffers, on a GPU a CUDA graph over them with the choice
of the next ids in it; its kernels are torch's own, or Inductor's where that was asked for.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import nn

from . import runtime
from .model import Transformer
from .parallel import ColumnParallelLinear, is_first_process
from .sampling import Sampling, next_token

LEAST_COLUMNS = 256  # of the cache that a recorded graph looks at; more comes in powers of two
MOST_GRAPHS = 64  # recorded at a time
SOURCES = ("model.py", "parallel.py")  # a package is of the code that it was made from


def make_graph(model: Transformer, wanted: Optional[bool]) -> Optional[Union[Packaged, Recorded]]:
    """The form that suits where the model is, or None: then the step runs op by op.

    wanted: True compiles; None compiles nothing, but uses what an earlier run has compiled (and records on a GPU, which
    takes no time to speak of); False does neither.
    """
    device = model.norm.weight.device
    kind = runtime.device_kind(device)
    if wanted is False or kind not in ("cpu", "cuda") or model.params.max_seq_len < 4:
        if wanted:
            say(f"The decode step is not compiled: there is no form for {device} and max_seq_len={model.params.max_seq_len}")
        return None
    if kind == "cuda" or model.output.group is not None:
        recorded = Recorded(model, "inductor" if wanted or (wanted is None and marker(model).exists()) else None)
        return recorded if wanted or kind == "cuda" else None
    if type(model.output) is not ColumnParallelLinear:
        if wanted:
            say("The decode step is not compiled: on a CPU quantised weights have a form that a package cannot take")
        return None
    try:
        packaged = Packaged(model)
        if not (wanted or packaged.remembered()):
            return None
        packaged.prepare()
    except Exception as error:  # no compiler, a full disk, an operator that it does not know
        say(f"The decode step is not compiled, and runs as it is: {reason(error)}")
        return None
    return packaged


def reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def say(line: str) -> None:
    if is_first_process():
        print(line)


def fingerprint(model: Transformer) -> str:
    """Stands for all that compiled code depends on."""
    weights = [(name, tuple(t.shape), t.dtype, t.stride()) for name, t in named_tensors(model).items()]
    device = model.norm.weight.device
    on_gpu = runtime.device_kind(device) == "cuda"
    place = torch.cuda.get_device_name(device) if on_gpu else runtime.processor()
    what = repr((torch.__version__, place, astuple(model.params), weights))
    sources = [Path(__file__).with_name(name).read_bytes() for name in SOURCES]
    return hashlib.sha256(what.encode() + b"".join(sources)).hexdigest()[:32]


def marker(model: Transformer) -> Path:
    """A file that says that Inductor has compiled this model's step here before, and kept it beside."""
    return runtime.cache_folder() / f"{fingerprint(model)}.inductor"


def rotations(model: Transformer) -> torch.Tensor:
    """`freqs_cis` as real numbers: float32 (max_seq_len, D/2, 2), a view."""
    return torch.view_as_real(model.freqs_cis)


class Packaged:
    """`Transformer.step` compiled for this processor: one package for one row, one for any larger number of rows.

    The weights and caches are its arguments, so a package is small, holds for every model of one shape, and never goes stale.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self._runners: dict[bool, Any] = {}  # by whether there are several rows
        self._columns = torch.arange(model.params.max_seq_len)
        self._tensors: list[torch.Tensor] = []
        folder, stem = runtime.cache_folder(), fingerprint(model)
        self._paths = {False: folder / f"{stem}-one.pt2"}
        if model.params.max_batch_size > 1:
            self._paths[True] = folder / f"{stem}-several.pt2"

    def remembered(self) -> bool:
        """Whether all packages are there from an earlier run."""
        return all(path.exists() for path in self._paths.values())

    def prepare(self) -> None:
        """Load the packages, and make those that are not there yet."""
        for several, path in self._paths.items():
            if not path.exists():
                began = time.perf_counter()
                say("Compiling the decode step, once for this model's shape and this machine …")
                self._compile(path, several)
                say(f"Compiled in {time.perf_counter() - began:.0f} seconds, and kept as {path}")
            self._runners[several] = torch._inductor.aoti_load_package(str(path))

    def _compile(self, path: Path, several: bool) -> None:
        args, weights = self.model.params, named_tensors(self.model)
        T = torch.export.Dim("T", min=2, max=args.max_seq_len)
        # Neither example has a size that something else has too: the export would take the two for the same.
        count, columns = (min(3, args.max_batch_size) if several else 1), args.max_seq_len - 1
        rows = {0: torch.export.Dim("B", min=2, max=args.max_batch_size)} if count == 3 else None
        tokens, positions = (torch.zeros(count, dtype=torch.long) for _ in range(2))
        inputs = (weights, tokens, positions, self._columns[:columns], rotations(self.model))
        shapes = (dict.fromkeys(weights), rows, rows, {0: T}, None)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with torch.no_grad(), warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=path.parent) as folder:
            warnings.simplefilter("ignore")  # torch's own, of its own insides
            program = torch.export.export(_Step(self.model), inputs, dynamic_shapes=shapes, strict=False)
            made = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / "step.pt2"))
            os.replace(made, path)  # whole, or not there

    def refresh(self) -> None:
        """Look up the weights and caches again: they may have been replaced since the last call."""
        self._tensors = list(named_tensors(self.model).values())

    def __call__(self, tokens: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        """As `Transformer.step`."""
        at = torch.tensor(positions)
        columns = self._columns[: max(2, max(positions) + 1)]
        # Not the runner's own call, which takes its arguments apart one by one: half of a small model's step.
        loader = self._runners[len(positions) > 1].loader
        (logits,) = loader.boxed_run([*self._tensors, tokens, at, columns, rotations(self.model)])
        return logits


def named_tensors(model: Transformer) -> dict[str, torch.Tensor]:
    """All that a step reads and writes: the weights and the caches."""
    return {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}


class _Step(nn.Module):
    """`Transformer.step` with the model's tensors as an argument."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.__dict__["bound"] = _Bound(model)  # not as a submodule: its tensors are no constants of the graph

    def forward(
        self,
        tensors: dict[str, torch.Tensor],
        tokens: torch.Tensor,
        positions: torch.Tensor,
        columns: torch.Tensor,
        rotations: torch.Tensor,
    ) -> Any:
        named = {f"model.{name}": tensor for name, tensor in tensors.items()}
        return torch.func.functional_call(self.__dict__["bound"], named, (tokens, positions, columns, rotations))


class _Bound(nn.Module):
    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        return self.model.step(*arguments)


@dataclass
class _Recording:
    """A recorded step: the buffers that it reads, those that it wrote, and what runs it once more."""

    tokens: torch.Tensor  # (bucket,)
    positions: torch.Tensor  # (bucket,)
    noise: Optional[torch.Tensor]  # (bucket, V)
    seen: Optional[torch.Tensor]  # (bucket, V)
    bias: Optional[torch.Tensor]  # (V,)
    logits: torch.Tensor = field(init=False)  # (bucket, V)
    chosen: torch.Tensor = field(init=False)  # (bucket,)
    replay: Optional[Callable[[], None]] = None


class Recorded:
    """The step, and the choice of the next ids, over static buffers: recorded once for each bucket of rows and columns.

    Rows above those that run are filled up: they write to column 0 of slots that nobody owns. Elsewhere than on a GPU
    "recorded" means run again; so its shapes are the same everywhere.
    """

    def __init__(self, model: Transformer, backend: Optional[str] = None) -> None:
        """backend: of torch.compile for the step, None to leave it to torch's own kernels."""
        self.model, self.backend = model, backend
        self.device = model.norm.weight.device
        self._step: Callable[..., torch.Tensor] = model.step
        if backend is not None:
            options: Any = None
            if backend == "inductor" and runtime.device_kind(self.device) == "cuda":
                options = {"coordinate_descent_tuning": True}  # and products of one row become sums, which read faster
            # One graph for all spans: `columns` is marked dynamic. Another number of rows is another graph.
            self._step = torch.compile(model.step, fullgraph=True, dynamic=False, backend=backend, options=options)
        self._recordings: dict[Any, _Recording] = {}
        self._captures = runtime.device_kind(self.device) == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None

    def buckets(self, rows: int, span: int) -> tuple[int, int]:
        """The next powers of two, within the cache."""
        args = self.model.params
        columns = max(LEAST_COLUMNS, 1 << (span - 1).bit_length())
        return min(1 << (rows - 1).bit_length(), args.max_batch_size), min(columns, args.max_seq_len)

    def refresh(self) -> None:
        """Forget recordings of weights or caches that have been replaced since."""
        places = tuple(t.data_ptr() for t in named_tensors(self.model).values())
        if places != getattr(self, "_places", places):
            self._recordings.clear()
        self._places = places

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: Sequence[int],
        sampling: Sampling,
        noise: Optional[torch.Tensor],
        seen: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, V), valid until the next call, and the next ids (B,). For the arguments see `next_token`."""
        rows = len(positions)
        bucket, columns = self.buckets(rows, max(positions) + 1)
        key = (bucket, columns, replace(sampling, logit_bias=None), noise is None, seen is None, bias is None)
        recording = self._recordings.get(key)
        if recording is None:
            if len(self._recordings) >= MOST_GRAPHS:
                self._recordings.pop(next(iter(self._recordings)))
            recording = self._recordings[key] = _Recording(
                tokens=tokens.new_zeros(bucket),
                positions=tokens.new_zeros(bucket),
                noise=None if noise is None else noise.new_ones(bucket, noise.shape[1]),
                seen=None if seen is None else seen.new_zeros(bucket, seen.shape[1]),
                bias=None if bias is None else torch.empty_like(bias),
            )
        recording.tokens[:rows].copy_(tokens)
        recording.positions[:rows].copy_(torch.tensor(positions), non_blocking=True)
        recording.positions[rows:].zero_()
        for buffer, value in ((recording.noise, noise), (recording.seen, seen)):
            if buffer is not None and value is not None:
                buffer[:rows].copy_(value)
        if recording.bias is not None and bias is not None:
            recording.bias.copy_(bias)
        if recording.replay is None:
            self._prepare(recording, columns, sampling)
        assert recording.replay is not None
        recording.replay()
        return recording.logits[:rows], recording.chosen[:rows].clone()

    def _prepare(self, recording: _Recording, columns: int, sampling: Sampling) -> None:
        """As it was asked for; where that fails, with torch's own kernels, and then without a recording, which a line says."""
        try:
            with runtime.inductor_cache():
                self._record(recording, columns, sampling)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self.backend is not None:
                say(f"The decode step is not compiled, and runs as it is: {reason(error)}")
                self.backend, self._step = None, self.model.step
            elif self._captures:
                say(f"The decode step is not recorded, and runs as it is: {reason(error)}")
                self._captures = False
            else:
                raise
            self._prepare(recording, columns, sampling)
        else:
            if self.backend == "inductor":
                marker(self.model).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                marker(self.model).touch()

    def _record(self, recording: _Recording, columns: int, sampling: Sampling) -> None:
        """Its inputs are in place already: what is run here writes what the step is to write."""
        looked_at = torch.arange(columns, device=self.device)
        torch._dynamo.maybe_mark_dynamic(looked_at, 0)
        table = rotations(self.model)

        def step() -> tuple[torch.Tensor, torch.Tensor]:
            logits = self._step(recording.tokens, recording.positions, looked_at, table)
            return logits, next_token(logits, sampling, recording.noise, recording.seen, recording.bias)

        if not self._captures:

            def run_again() -> None:
                recording.logits, recording.chosen = step()

            run_again()
            recording.replay = run_again
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and lets libraries allocate what they need, before anything is recorded
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Of this thread only: NCCL's watchdog looks at its own events meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            recording.logits, recording.chosen = step()
        recording.replay = graph.replay
