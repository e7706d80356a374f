"""Weights onto a GPU, on one made of CPU memory: what waits, what is converted where, what stays allocated, what
fails."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PARAMS, random_weights, write_checkpoint
from emulated_cuda import Machine, emulated
from helpers import TWINS, write_twin
from workers import Pool

from llama import Llama, Transformer, memory
from llama.commands.convert import convert
from llama.layers import own_kernels
from llama.layers.quantized import Quantized
from llama.weights import staging

PIECE, LARGE_PIECE = 5000, 40_000  # bytes; rounding to int4 in many pieces takes the emulation long
WIDE: dict[str, Any] = {"dim": 256, "n_layers": 1, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 256, "norm_eps": 1e-5}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every matrix takes several."""
    monkeypatch.setattr(staging.PinnedSender, "nbytes", PIECE)


def slow(machine: Machine) -> dict[str, int]:
    """What loading did that a GPU would wait for, or that keeps the host busy."""
    return {line: n for line, n in machine.waits.items() if "conversion" in line or "copy" in line}


def assert_same(model: Transformer, on_cpu: Transformer) -> None:
    theirs = on_cpu.state_dict()
    ours = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


HALVES = [(a, b) for a in (torch.bfloat16, torch.float16, torch.float32) for b in ("bfloat16", "float16", "float32")]


@pytest.mark.parametrize(
    ("stored", "dtype", "kind", "shards"),
    [*((*pair, None, 1) for pair in HALVES), (torch.bfloat16, None, None, 2), (torch.bfloat16, None, None, 4),
     (torch.bfloat16, None, "int8", 1), (torch.float32, None, "int8", 4), (torch.bfloat16, None, "int4", 4)],
)  # fmt: skip
def test_loading_neither_waits_nor_converts_on_the_host(
    stored: torch.dtype, dtype: str | None, kind: str | None, shards: int, tmp_path: Path, tokenizer_path: str
) -> None:
    """Every tensor was copied from pageable memory, in one thread; int8 and int4 became float32 on the host.

    4 shards on 1 process: a shard has 16 numbers of each row of wo, half a group of int4.
    """
    folder = write_checkpoint(tmp_path, {name: w.to(stored) for name, w in random_weights().items()}, shards)
    options = {"dtype": dtype, "quantize": kind}
    on_cpu = Llama.build(str(folder), tokenizer_path, 16, 1, device="cpu", **options).model
    with emulated() as machine:
        model = Llama.build(str(folder), tokenizer_path, 16, 1, device="emulated", **options).model
        assert slow(machine) == {}
        assert not machine.violations
        assert_same(model, on_cpu)


@pytest.mark.parametrize(("kind", "name"), [("int8", "scales"), ("int4", "zeros")])
def test_scales_that_no_rounding_makes(kind: str, name: str, tiny: Path, tmp_path: Path, tokenizer_path: str) -> None:
    """Are refused as on a CPU: see test_files.py."""
    convert(tiny, tmp_path / "q", "meta", quantize=kind)
    path = tmp_path / "q" / "consolidated.00.pth"
    stored = torch.load(path)
    stored[f"layers.1.feed_forward.w2.{name}"].view(-1)[5] = float("nan")
    torch.save(stored, path)
    with (
        emulated(),
        pytest.raises(ValueError, match=rf"layers.1.feed_forward.w2.{name} goes from .*the file is damaged"),
    ):
        Llama.build(str(tmp_path / "q"), tokenizer_path, 16, 1, device="emulated")


@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("name", sorted(TWINS)[:3])
def test_hugging_face_folders(name: str, kind: str | None, tmp_path: Path, tokenizer_path: str) -> None:
    """Whose q and k have their rows in another order."""
    pytest.importorskip("transformers")
    folder = str(write_twin(tmp_path / "hf", TWINS[name]))
    on_cpu = Llama.build(folder, tokenizer_path, 16, 1, device="cpu", quantize=kind).model
    with emulated() as machine:
        model = Llama.build(folder, tokenizer_path, 16, 1, device="emulated", quantize=kind).model
        assert slow(machine) == {}
        assert_same(model, on_cpu)


def loaded_on(folder: str, tokenizer_path: str, processes: int, kind: str | None) -> dict[str, int]:
    """What was slow; this rank's weights must be those of the same rank's CPU build."""
    on_cpu = Llama.build(folder, tokenizer_path, 16, 1, processes, device="cpu", quantize=kind).model
    staging.PinnedSender.nbytes = LARGE_PIECE
    with emulated(devices=4) as machine:
        model = Llama.build(folder, tokenizer_path, 16, 1, processes, device="emulated", quantize=kind).model
        found = slow(machine)
        assert_same(model, on_cpu)
    return found


@pytest.mark.parametrize(("kind", "shards"), [(None, 1), (None, 4), ("int8", 1), ("int8", 4), ("int4", 1)])
def test_cut_for_two_processes(kind: str | None, shards: int, pool: Pool, tmp_path: Path, tokenizer_path: str) -> None:
    """wo, w2 and the embedding are cut along their rows: slices that are not contiguous, on a second GPU."""
    bf16 = {name: weight.bfloat16() for name, weight in random_weights(WIDE).items()}
    folder = write_checkpoint(tmp_path, bf16, shards, WIDE)
    assert pool.run(loaded_on, str(folder), tokenizer_path, 2, kind) == [{}] * 4


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_joined_matrices_are_filled_in_place(
    kind: str | None, tmp_path: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were copied together from the layers' weights, whose blocks torch then kept: 1.4 times the model."""
    monkeypatch.setattr(staging.PinnedSender, "nbytes", LARGE_PIECE)
    bf16 = {name: weight.bfloat16() for name, weight in random_weights(WIDE).items()}
    folder = write_checkpoint(tmp_path, bf16, 1, WIDE)
    with emulated() as machine:
        model = Llama.build(str(folder), tokenizer_path, 16, 1, device="emulated", quantize=kind).model
        quantization = None if kind is None else _quantization(model)
        need = memory.estimate(memory.Placement(model.params, torch.bfloat16, quantization=quantization))
        tensors = need.weights + need.cache
        assert tensors <= machine.devices[0].allocated <= machine.devices[0].reserved < 1.05 * tensors
        for block in model.layers:
            attention, feed_forward = block.attention, block.feed_forward
            assert (attention.fused is None) == (kind is not None)
            for module, names in ((attention, ("wq", "wk", "wv")), (feed_forward, ("w1", "w3"))):
                layers = [getattr(module, name) for name in names]
                whole = (
                    {"weight": module.fused} if kind is None else dict(module.joined.named_parameters(recurse=False))
                )
                for name, tensor in whole.items():
                    assert torch.equal(tensor.cpu(), torch.cat([layer.get_parameter(name).cpu() for layer in layers]))
                    assert tensor.data_ptr() == layers[0].get_parameter(name).data_ptr()
        names = {name for name, _ in model.named_modules()}
        assert not any("joined" in name for name in [*names, *model.state_dict()])


def _quantization(model: Transformer) -> Any:
    return next(module.quantization for module in model.modules() if isinstance(module, Quantized))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_joined_quantized_layers_are_the_layers(
    kind: str, tmp_path: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same product; joined anew after somebody put other numbers into one of them, and after `.to()`."""
    monkeypatch.setattr(staging.PinnedSender, "nbytes", LARGE_PIECE)
    folder = write_checkpoint(tmp_path / "a", random_weights(WIDE), 1, WIDE)
    other = write_checkpoint(tmp_path / "b", random_weights(WIDE, seed=1), 1, WIDE)
    with emulated(), torch.no_grad():
        model, second = (
            Llama.build(str(path), tokenizer_path, 16, 2, device="emulated", quantize=kind).model
            for path in (folder, other)
        )
        attention = model.layers[0].attention
        for rows in (1, 3, 40):
            x = torch.randn(rows, 256).to("emulated")
            y = torch.cat([layer.product(x) for layer in (attention.wq, attention.wk, attention.wv)], -1)
            torch.testing.assert_close(attention.joined.product(x).cpu(), y.cpu())
        tokens = torch.tensor([[1, 5, 9, 200]]).to("emulated")
        mine, theirs = model(tokens, 0).cpu(), second(tokens, 0).cpu()
        assert not torch.allclose(mine, theirs)
        model.load_state_dict(second.state_dict(), assign=True)
        assert torch.equal(model(tokens, 0).cpu(), theirs)
        assert attention.joined.weight.data_ptr() == attention.wq.weight.data_ptr()
        attention.wk.weight = torch.nn.Parameter(attention.wk.weight.clone(), requires_grad=False)
        assert torch.equal(model(tokens, 0).cpu(), theirs)
        for name, tensor in attention.joined.named_parameters(recurse=False):
            last = attention.wv.get_parameter(name)
            assert tensor.data_ptr() + tensor.nbytes == last.data_ptr() + last.nbytes
        before = attention.joined
        assert torch.equal(model.to("emulated")(tokens, 0).cpu(), theirs)
        assert attention.joined is not None
        assert before is not attention.joined
        attention.wk = torch.nn.Linear(256, attention.wk.output_size_per_partition).to("emulated")
        model.keep_fused()
        assert attention.joined is None


def test_an_error_in_a_thread_is_the_callers(tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is; no other thread goes on, and none stays."""

    class DiskError(OSError): ...

    calls: Counter[str] = Counter()
    send = staging.PinnedSender.send

    def failing(self: staging.PinnedSender, parts: Any) -> torch.Tensor:
        calls[threading.current_thread().name] += 1
        if calls.total() == 20:
            raise DiskError("lost")
        return send(self, parts)

    monkeypatch.setattr(staging.PinnedSender, "send", failing)
    with emulated() as machine, pytest.raises(DiskError, match="^lost$"):
        Llama.build(str(tiny), tokenizer_path, 16, 1, device="emulated")
    assert len(calls) > 1
    # Or what is still being sent would arrive in memory that has another owner by then.
    assert sum(n for line, n in machine.waits.items() if "Stream.synchronize" in line) == staging.LOADERS
    assert not any("llama-loader" in thread.name for thread in threading.enumerate())


def test_ctrl_c_ends_the_threads(tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def __init__(self, **_: Any) -> None: ...
        def __enter__(self) -> Interrupted:
            return self

        def __exit__(self, *_: object) -> None: ...
        def update(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr("llama.weights.checkpoint.bar", Interrupted)
    with emulated(), pytest.raises(KeyboardInterrupt):
        Llama.build(str(tiny), tokenizer_path, 16, 1, device="emulated")
    assert not any("llama-loader" in thread.name for thread in threading.enumerate())


def test_the_progress_counts_tensors(tiny: Path, tokenizer_path: str, bars: list[Any]) -> None:
    with emulated():
        Llama.build(str(tiny), tokenizer_path, 16, 1, device="emulated")
    (shown,) = bars
    assert shown.n == shown.total == len(random_weights(PARAMS))
    assert (shown.desc, shown.unit) == ("Loading", "tensor")


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_other_devices_are_filled_in_this_thread(
    kind: str | None, tmp_path: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a Mac: without pinned memory, streams or threads."""
    from llama import runtime
    from llama.weights.checkpoint import fill, fit_vocabulary, open_checkpoint, prepare

    folder = write_checkpoint(tmp_path, random_weights(WIDE), 2, WIDE)
    with monkeypatch.context() as patch:  # only CPUs round to int4 in C++, with sums in another order
        patch.setattr(own_kernels, "loaded", lambda: False)
        on_cpu = Llama.build(str(folder), tokenizer_path, 16, 1, device="cpu", quantize=kind).model
    with emulated() as machine:
        monkeypatch.setitem(runtime.ALIASES, "emulated", "mps")
        checkpoint = open_checkpoint(folder)
        with torch.device("meta"):
            model = Transformer(fit_vocabulary(checkpoint, 400))
        prepare(model, checkpoint, kind)
        fill(model, checkpoint, torch.device("emulated"), torch.float32)
        assert_same(model, on_cpu)
        assert machine.streams == 0
        assert not machine.pinned
