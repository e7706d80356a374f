"""Compiles the decode step ahead of time (AOTInductor), in a process of its own: a crash there ends no caller. This
file has both ends, the caller's (`started`, `wait`) and the process's own.

The process gets names and shapes, never numbers: a model of any size is compiled in the memory of a small one.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Optional

# Modules are looked for on the caller's path, and not in the current folder.
BOOT = "import sys; sys.path[:] = sys.argv[3:]; import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"
REQUEST, MADE = "request.json", "step.pt2"  # file names in the folder of a compilation
LATE = 0.2  # seconds after which the process notices that its caller has ended


@contextmanager
def started(request: dict[str, Any], folder: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A block with a compilation in the background. At the block's end its process is killed, with all that it started.

    request: see `make`. folder: a new one, in a folder of the caller's. RuntimeError if there is no Python to start.
    """
    if "python" not in Path(sys.executable or "").name.lower():
        raise RuntimeError(
            f"sys.executable is {sys.executable!r}, and not a Python that can compile in a process of its own"
        )
    folder.mkdir(mode=0o700)
    (folder / REQUEST).write_text(json.dumps({**request, "caller": os.getpid()}), encoding="utf-8")
    paths = [path for path in sys.path if isinstance(path, str)]
    command = [sys.executable, "-W", "ignore", "-c", BOOT, __file__, str(folder), *paths]
    theirs, ours = os.pipe()  # the system closes it when this process ends
    process = None
    try:
        # A new session: Ctrl-C reaches only this process, which then kills the whole group.
        process = subprocess.Popen(
            command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
            encoding="utf-8", errors="replace",
        )  # fmt: skip
        yield process
    finally:
        os.close(theirs)
        os.close(ours)
        if process is not None:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def wait(process: subprocess.Popen[str], bar: Any) -> None:
    """Wait for the end of a compilation, and redraw the bar each second. RuntimeError says why it failed."""
    while True:
        try:
            output, _ = process.communicate(timeout=1)
            break
        except subprocess.TimeoutExpired:
            bar.refresh()
    code = process.returncode
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; perhaps there was too little memory" if name == "SIGKILL" else ""
        raise RuntimeError(f"the process that compiled it was ended by {name}{hint}")
    if code > 0:
        lines = [line for line in output.splitlines() if line.strip()]
        raise RuntimeError(lines[-1] if lines else f"the process that compiled it ended with status {code}")


def make(request: dict[str, Any], folder: Path) -> None:
    """Compile `Transformer.step` into folder / MADE.

    request: "args", the fields of `ModelArgs`; "tensors", the name, shape, dtype and strides of each weight and cache;
    "rotations", the shape of their table; "quantization", the fields of `Quantization`, or None; "several", whether it
    is for several rows or for one; "threads"; "ranks", how many processes share the model.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from ..model import ModelArgs, Transformer

    torch.set_num_threads(request["threads"])
    args = ModelArgs(**request["args"])
    if request["ranks"] > 1:
        _pretend(request["ranks"])
    with torch.device("meta"):
        model = Transformer(args).requires_grad_(False)
    if request["quantization"] is not None:
        _quantize(model, request)
    with FakeTensorMode(shape_env=ShapeEnv()):
        tensors = {
            name: torch.empty_strided(shape, strides, dtype=getattr(torch, dtype))
            for name, shape, dtype, strides in request["tensors"]
        }
        T = torch.export.Dim("T", min=2, max=args.max_seq_len)
        # No other size equals an example's size: the export would take the two for the same.
        count, columns = (min(3, args.max_batch_size) if request["several"] else 1), args.max_seq_len - 1
        rows = {0: torch.export.Dim("B", min=2, max=args.max_batch_size)} if count == 3 else None
        tokens, positions = (torch.zeros(count, dtype=torch.long) for _ in range(2))
        inputs: tuple[Any, ...] = tensors, tokens, positions, torch.arange(columns), torch.empty(request["rotations"])
        inputs += (torch.zeros((), dtype=torch.long),) * (request["ranks"] > 1)  # the room
    for name in tensors:
        if name.endswith(".fused"):  # a new model has none
            model.get_submodule(name.removesuffix(".fused")).fused = torch.empty(0, device="meta")
    shapes = (dict.fromkeys(tensors), rows, rows, {0: T}, None, None)[: len(inputs)]
    settings = torch._inductor.config.aot_inductor
    if hasattr(settings, "precompile_headers"):
        settings.precompile_headers = False  # precompiling them takes as long as it saves for two packages
    with torch.no_grad():
        program = torch.export.export(_step_of(model), inputs, dynamic_shapes=shapes, strict=False)
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / MADE))


def _pretend(ranks: int) -> None:
    """Let this process build what each of so many ranks has, though it has joined none."""
    import torch.distributed as dist
    from fairscale.nn.model_parallel import initialize as mpu
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from ..layers import shared_memory

    shared_memory.load()
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mpu.initialize_model_parallel(ranks)


def _quantize(model: Any, request: dict[str, Any]) -> None:
    """Put packed layers, without numbers, in the place of the model's."""
    import torch

    from ..layers import own_kernels
    from ..layers.quantization import quantize_layers
    from ..layers.rounding import Quantization
    from ..layers.tiles import InTiles

    if not own_kernels.loaded():
        raise RuntimeError("the products with tiles could not be loaded")
    quantize_layers(model, Quantization(**request["quantization"]))
    shapes = {name: shape for name, shape, _, _ in request["tensors"]}
    for name, layer in model.named_modules():
        if isinstance(layer, InTiles):
            layer.hold_tiles(torch.empty(shapes[f"{name}.weight"], dtype=torch.uint8, device="meta"))


def _step_of(model: Any) -> Any:
    """`Transformer.step` as a module, with the model's tensors as an argument."""
    import torch

    from ..layers.parallel import sharing

    class Bound(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
            return model.step(*arguments)

    bound = Bound()

    class Step(torch.nn.Module):  # has no submodule: the model's tensors must not become constants of the graph
        def forward(
            self,
            tensors: dict[str, torch.Tensor],
            tokens: torch.Tensor,
            positions: torch.Tensor,
            columns: torch.Tensor,
            rotations: torch.Tensor,
            room: Optional[torch.Tensor] = None,
        ) -> Any:
            named = {f"model.{name}": tensor for name, tensor in tensors.items()}
            with nullcontext() if room is None else sharing(model.output.group, room):
                return torch.func.functional_call(bound, named, (tokens, positions, columns, rotations))

    return Step()


def _watch(caller: int, folder: Path) -> None:
    """Once the caller has ended, however it did, end this process and the C++ compiler that it started, and remove the
    folder that the caller would have removed."""
    if hasattr(os, "killpg"):
        while not select.select([sys.stdin], [], [], LATE)[0] and os.getppid() == caller:
            pass
        # The folder holds the caller's other compilations too; they end like this one.
        shutil.rmtree(folder.parent, ignore_errors=True)
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _reason(error: Exception) -> str:
    """The most helpful line of a message: a C++ compiler's first error, or else the first line."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "error: " in line), lines[0])


def _main() -> None:
    folder = Path(sys.argv[2])
    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    threading.Thread(target=_watch, args=(request.pop("caller"), folder), daemon=True).start()
    os.umask(0o077)
    with suppress(OSError):  # if memory runs out, the system should end this process before the one that holds a model
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        from llama.decoding.compiler import make

        make(request, folder)
    except Exception as error:
        print(_reason(error))
        sys.exit(1)


if __name__ == "__main__":
    _main()
