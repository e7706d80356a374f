"""int8 and int4 layers against their numbers multiplied in float64; the same numbers on any processes, from any
folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PARAMS, ROOT, golden, random_weights, shared, write_checkpoint
from emulated_cuda import emulated
from helpers import TWINS, environment, write_twin
from torch import nn
from workers import Pool

from llama import Llama, ModelArgs, memory
from llama.commands.convert import convert
from llama.layers import int4, int8, kernels, own_kernels, products, quantization, quantized, rounding, tiles
from llama.layers.parallel import ColumnParallelLinear, RowParallelLinear
from llama.layers.quantization import quantize_layers
from llama.layers.quantized import Quantized
from llama.layers.rounding import KINDS, Quantization, to_int4

CPU = torch.device("cpu")


def layer_of(weight: torch.Tensor, kind: str, dtype: torch.dtype = torch.bfloat16, group: int = 64) -> Quantized:
    rows, columns = weight.shape
    with torch.device("meta"):
        parent = nn.ModuleList([ColumnParallelLinear(columns, rows, gather_output=False)])
    quantize_layers(parent, Quantization(kind, group))
    (layer,) = parent
    assert isinstance(layer, Quantized)
    layer.load_state_dict(layer.quantize(weight, None, CPU), assign=True)
    layer.pack(dtype)
    return layer


def numbers(layer: Quantized) -> torch.Tensor:
    """The layer's matrix in float64, by the formulas that the files are documented with."""
    state = {name: tensor.double() for name, tensor in layer.state_dict().items()}
    if layer.kind == "int8":
        return state["weight"] * state["scales"][:, None]
    if layer.kind == "w8a8":
        groups = state["scales"].shape[1]
        return (state["weight"].unflatten(1, (groups, -1)) * state["scales"][..., None]).flatten(1)
    left, right = state["weight"] // 16, state["weight"] % 16
    n = torch.stack((left, right), -1).flatten(1).unflatten(1, (state["scales"].shape[1], -1))
    return ((n - 8) * state["scales"][..., None] + state["zeros"][..., None]).flatten(1)


def weights(rows: int = 192, columns: int = 256, outliers: bool = False) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * columns**-0.5
    if outliers:
        weight[:, ::37] *= 8
    return weight


def assert_near(y: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor, tolerance: float) -> None:
    """Within `tolerance` of |x| |W|, which bounds what rounding of either can do to the sum."""
    exact = x.double() @ matrix.t()
    bound = x.double().norm(dim=-1, keepdim=True) * matrix.norm(dim=-1)
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= tolerance * bound).all()


@pytest.fixture(params=["tiles", "packed", "plain", "generic"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With our own products; with those of torch, for large and for small matrices; and as on a CPU that has none."""
    monkeypatch.setattr(int8, "onednn_is_fast", lambda: request.param == "packed")
    if request.param == "tiles":
        return "tiles" if own_kernels.loaded() else pytest.skip("they need a C++ compiler")
    monkeypatch.setattr(own_kernels, "loaded", lambda: False)
    if request.param == "packed":
        monkeypatch.setattr(int8, "PLAIN", 0)
    if request.param == "generic":
        monkeypatch.setattr(int8, "onednn_is_exact", lambda: False)
        monkeypatch.setattr(int4.Int4, "_packed_weight", lambda self: None)
        for module in (int8, int4):
            monkeypatch.setattr(module, "WIDENED", 2**12)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (4,), (300,), (2, 3), (2, 1, 5), ()])
def test_int8_products(shape: tuple[int, ...], dtype: torch.dtype, either_way: str) -> None:
    layer = layer_of(weights(), "int8", dtype)
    x = torch.randn(*shape, 256).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    # The row's largest entry decides the step of the activations: 1 / 32512 of it.
    assert_near(y, x, numbers(layer), 2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.skipif(not products.AMX, reason="says nothing of processors without tiles")
def test_int8_uses_the_tiles() -> None:
    assert int8.onednn_is_exact()


@pytest.mark.parametrize("plain", [0, 2**21])
def test_int8_extremes(plain: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All products at their largest and of one sign, where adding pairs in 16 bits would saturate; zeros; tiny;
    infinite."""
    monkeypatch.setattr(int8, "PLAIN", plain)
    layer = layer_of(torch.ones(64, 256) * torch.tensor([1.0, -1.0]).repeat(32)[:, None], "int8")
    rows = [torch.ones(256), -torch.ones(256), torch.zeros(256), torch.full((256,), 1e-29), torch.arange(256) - 255.0]
    x = torch.stack(rows)
    assert_near(layer(x), x, numbers(layer), 2e-5)
    assert not layer(torch.zeros(1, 256)).any()
    for bad in (torch.inf, torch.nan):
        x = torch.ones(2, 256)
        x[0, 3] = bad
        assert not layer(x)[0].isfinite().any()
        assert layer(x)[1].isfinite().all()


def test_int8_numbers() -> None:
    """Each row's largest weight is 127 steps; a row of zeros stays zeros; no weight moves by more than half a step."""
    weight = weights(outliers=True)
    weight[5] = 0
    layer = layer_of(weight, "int8")
    state = layer.state_dict()
    assert not numbers(layer)[5].any()
    sizes = state["weight"].short().abs().amax(1)
    assert (sizes[torch.arange(192) != 5] == 127).all()
    assert ((numbers(layer) - weight).abs() <= 0.5001 * state["scales"][:, None]).all()


@pytest.mark.parametrize("plain", [0, 2**21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_shares_what_it_makes_of_rows(plain: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits that layers share are each layer's own; more rows than it takes at a time come in parts."""
    monkeypatch.setattr(int8, "PLAIN", plain)
    monkeypatch.setattr(int8, "onednn_is_fast", lambda: plain == 0)
    monkeypatch.setattr(own_kernels, "loaded", lambda: False)  # tiles share none
    for module in (int8, quantized):
        monkeypatch.setattr(module, "PIECE", 2**12)
    layer, other = layer_of(weights(), "int8", dtype), layer_of(weights(64), "int8", dtype)
    for count in (1, 5, int8.FEW_ROWS + 1):
        x = torch.randn(count, 256).to(dtype)
        shared = layer.shared(x)
        for each in (layer, other):
            assert torch.equal(each.product(x, shared), each.product(x))
    monkeypatch.setattr(int8, "BLOCK_ROWS", 100)
    x = torch.randn(250, 256).to(dtype)
    assert layer.shared(x) is None
    assert_near(layer(x), x, numbers(layer), 2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 4, 40])
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
def test_int4_products(group: int, count: int, dtype: torch.dtype, either_way: str) -> None:
    layer = layer_of(weights(outliers=True), "int4", dtype, group)
    x = torch.randn(count, 256).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert_near(y, x, numbers(layer), 2e-6 if dtype == torch.float32 else 2**-7)
    assert torch.equal(layer(x.view(1, count, 256))[0], y)


@pytest.mark.parametrize(
    ("rows", "group", "dtype", "packed"),
    [(192, 32, torch.bfloat16, True), (200, 32, torch.bfloat16, False), (192, 16, torch.bfloat16, False),
     (192, 32, torch.float32, False)],
)  # fmt: skip
def test_what_torch_multiplies_in_int4(
    rows: int, group: int, dtype: torch.dtype, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_kernels, "loaded", lambda: False)
    layer, x = layer_of(weights(rows), "int4", dtype, group), torch.randn(3, 256).to(dtype)
    assert layer.packed == packed
    assert_near(layer(x), x, numbers(layer), 2**-7)


@pytest.mark.parametrize("way", ["bfloat16_product", "torch.mm", "exact_product"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_many_rows(kind: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights that become bfloat16, for torch in several blocks, of which the last is smaller and no whole tile;
    or in digits. Our own ways give a row the same bits beside any other rows."""
    if not own_kernels.loaded():
        pytest.skip("it needs a C++ compiler")
    product = tiles._unpacked_product if way == "torch.mm" else getattr(torch.ops.llama_cpu, way)
    monkeypatch.setattr(int8, "onednn_is_fast", lambda: False)
    monkeypatch.setattr(tiles, "for_many", lambda bits: product)
    monkeypatch.setattr(tiles, "UNPACKED", 2**16)
    layer = layer_of(weights(2100, 448), kind)
    x = torch.randn(tiles.FEW_ROWS[8 if kind == "int8" else 4] + 1, 448).bfloat16()
    y = layer(x)
    assert_near(y, x, numbers(layer), 2**-8)
    if way != "torch.mm":
        assert torch.equal(layer(torch.cat((x[5:6], x)))[0], y[5])
        assert torch.equal(layer(x.flip(0)), y.flip(0))


@pytest.mark.parametrize(
    ("seconds", "chosen"), [((1, 0.6, 0.6), 0), ((1, 0.4, 0.3), 1), ((1, 0.6, 0.4), 2), ((1, 0.4, 0.1), 2)]
)
def test_another_way_must_be_twice_as_fast(
    seconds: tuple[float, ...], chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not own_kernels.loaded():
        pytest.skip("it needs a C++ compiler")
    ways = torch.ops.llama_cpu.bfloat16_product, tiles._unpacked_product, torch.ops.llama_cpu.exact_product
    monkeypatch.setattr(tiles, "least_time", lambda run: seconds[ways.index(run.func)])
    assert tiles.for_many.__wrapped__(4) is ways[chosen]


def test_which_way_is_fast() -> None:
    """It is found out with one thread; what was set before comes back."""
    if not own_kernels.loaded():
        pytest.skip("it needs a C++ compiler")
    threads = torch.get_num_threads()
    ways = tiles._unpacked_product, torch.ops.llama_cpu.bfloat16_product, torch.ops.llama_cpu.exact_product
    assert all(tiles.for_many.__wrapped__(bits) in ways for bits in (8, 4))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 9, 10, 12, 13])
def test_blocks_of_rows_leave_none_out(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three rows, the last one shorter: one that is never written has what was in memory."""
    whole = layer_of(weights(rows), kind).state_dict()
    digits = int8.in_digits(weights(rows))
    monkeypatch.setattr(quantized, "PIECE", 3 * 256 // torch.get_num_threads())
    monkeypatch.setattr(int8, "PIECE", 3 * 128)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(77))
    assert [rows.stop - rows.start for rows, _ in quantized.blocks(weights(rows), CPU)] == [3] * -(-rows // 3)
    parts = layer_of(weights(rows), kind).state_dict()
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    for ours, theirs in zip(int8.in_digits(weights(rows)), digits):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("group", [16, 32, 64])
def test_refined_rounding_is_never_worse(group: int) -> None:
    def errors(weight: torch.Tensor, refinements: int) -> torch.Tensor:
        n, scales, zeros = to_int4(weight, group, refinements)
        parts = n.double().unflatten(1, (-1, group))
        back = (parts - 8) * scales.double()[..., None] + zeros.double()[..., None]
        return (weight.double().unflatten(1, (-1, group)) - back).square().sum(-1)

    plain, refined = (errors(weights(), r) for r in (0, rounding.REFINEMENTS))
    assert (refined <= plain * (1 + 1e-4)).all()
    assert refined.sum() < 0.93 * plain.sum()
    plain, refined = (errors(weights(outliers=True), r) for r in (0, rounding.REFINEMENTS))
    assert (refined <= plain * (1 + 1e-4)).all()
    assert refined.sum() < 0.93 * plain.sum()
    for constant in (0.0, 0.7, -3e-4):
        assert errors(torch.full((2, 64), constant), 6).sum().sqrt() <= 0.05 * abs(constant)


@pytest.mark.parametrize("group", [16, 32, 64, 256])
def test_rounding_in_one_operator(group: int) -> None:
    """Its sums have another order than torch's: the numbers are the same but where two are as good."""
    if not own_kernels.loaded():
        pytest.skip("it needs a C++ compiler")
    for weight in (weights(outliers=True), 1e-3 * weights(5), torch.zeros(2, 256), torch.full((2, 256), -3e-4)):
        for refinements in (0, rounding.REFINEMENTS):
            ours = torch.ops.llama_cpu.round_int4(weight, group, refinements)
            n, *of_groups = to_int4(weight, group, refinements)
            theirs = rounding.pairs(n), *of_groups
            assert [(t.shape, t.dtype) for t in ours] == [(t.shape, t.dtype) for t in theirs]
            errors = [
                (rounding.dequantized(*made, torch.float32) - weight).double().square().sum() for made in (ours, theirs)
            ]
            assert errors[0] <= 1.001 * errors[1]
            assert all((a == b).float().mean() > 0.98 for a, b in zip(ours, theirs))
    for bad in (torch.inf, -torch.inf, torch.nan):
        weight = weights(2)
        weight[1, 3] = bad
        back = rounding.dequantized(*torch.ops.llama_cpu.round_int4(weight, group, rounding.REFINEMENTS), torch.float32)
        assert not back[1, :group].isfinite().any()
        assert back[0].isfinite().all()
        assert back[1, group:].isfinite().all()
    for group in (0, 257, 24):
        with pytest.raises(RuntimeError, match="do not fit together"):
            torch.ops.llama_cpu.round_int4(weight, group, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_operators_round_to_8_bits_as_torch_does(dtype: torch.dtype) -> None:
    """To the bit: whole rows, rows of which only a part is here, groups, and rows that lie apart in memory."""
    if not own_kernels.loaded():
        pytest.skip("it needs a C++ compiler")
    cpu = torch.ops.llama_cpu
    weight = weights(outliers=True).to(dtype)
    weight[3], weight[4], weight[5, 0], weight[6] = 0, 1e-7, torch.inf, torch.nan
    whole, part = weight.float(), slice(64, 192)
    maxima = rounding.row_maxima(weight)
    for ours, theirs in (
        (cpu.round_int8(weight, torch.empty(1, 0)), rounding.to_int8(whole, maxima)),
        (cpu.round_int8(weight[:, part], maxima[None]), rounding.to_int8(whole[:, part], maxima)),
        (cpu.round_w8a8(weight, 32), rounding.to_groups(whole, 32)),
        (cpu.round_w8a8(weight[:, part], 16), rounding.to_groups(whole[:, part].contiguous(), 16)),
    ):
        n, scales = ours
        assert torch.equal(n[:5], theirs[0][:5])
        assert torch.equal(n[7:], theirs[0][7:])
        assert scales.dtype == theirs[1].dtype
        assert torch.allclose(scales, theirs[1], rtol=0, atol=0, equal_nan=True)
    same = zip(cpu.round_int4(weight[:3, part], 32, 6), cpu.round_int4(weight[:3, part].contiguous(), 32, 6))
    assert all(torch.equal(a, b) for a, b in same)
    for wrong in (lambda: cpu.round_int8(weight, maxima[None, 1:]), lambda: cpu.round_w8a8(weight, 48)):
        with pytest.raises(RuntimeError, match="do not fit together"):
            wrong()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_lie_column_by_column(kind: str, either_way: str) -> None:
    """A .pth file may hold a transposed view."""
    made, other = (
        layer_of(weights(), kind).quantize(weight, None, CPU) for weight in (weights(), weights().t().contiguous().t())
    )
    assert all(torch.equal(other[name], tensor) for name, tensor in made.items())


def test_ways_are_tried_whatever_the_defaults() -> None:
    if not own_kernels.loaded():
        pytest.skip("it needs a C++ compiler")
    expected = int8.onednn_is_exact.__wrapped__()
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        for bits in (8, 4):
            assert callable(tiles.for_many.__wrapped__(bits))
        assert int8.onednn_is_exact.__wrapped__() == expected
        if expected:
            int8._no_zero_points.cache_clear()
            assert int8.onednn_is_fast.__wrapped__() in (True, False)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("layer", "columns", "fits"),
    [
        (partial(ColumnParallelLinear, gather_output=False), 64, True),
        (RowParallelLinear, 128, True),
        (RowParallelLinear, 64, False),
    ],
)
def test_only_rows_that_are_cut_need_whole_groups(
    layer: Any, columns: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "group_size", lambda _: 4)
    with torch.device("meta"):
        model = nn.ModuleList([layer(columns, 8)])
    with nullcontext() if fits else pytest.raises(ValueError, match="rows of 64 numbers .* by 4 processes"):
        quantize_layers(model, Quantization("int4", 32))
    assert isinstance(model[0], Quantized) == fits


def test_tiles_by_hand() -> None:
    """33 rows make two tiles. A tile has, for each group, four columns of every row in turn, then the rows' scales and
    zeros. In 4 bits, the next four columns are the upper halves."""
    if not own_kernels.loaded():
        pytest.skip("it needs a C++ compiler")
    weight = torch.arange(33 * 16).view(33, 16) % 251 - 125
    scales = torch.arange(33 * 2).view(33, 2).bfloat16()
    made = tiles.to_tiles(weight.to(torch.int8), scales).view(2, 2, -1)  # (tile, group, bytes)
    assert made.shape[2] == 2 * 32 * 4 + 2 * 32
    assert (made[0, 1, 4 * 5 : 4 * 6].int() - 128).tolist() == weight[5, 8:12].tolist()
    assert (made[0, 1, 128 + 4 * 5 : 128 + 4 * 6].int() - 128).tolist() == weight[5, 12:16].tolist()
    assert (made[1, 0, :4].int() - 128).tolist() == weight[32, :4].tolist()
    assert (made[1, 0, 4:128] == 128).all()  # rows that fill up the last tile
    assert torch.equal(made[0, :, 256:].contiguous().view(torch.bfloat16), scales[:32].t())
    n, zeros = weight.remainder(16).to(torch.uint8), -scales
    made = tiles.to_tiles(rounding.pairs(n), scales, zeros).view(2, 2, -1)
    assert made.shape[2] == 32 * 4 + 2 * 2 * 32
    assert torch.equal(made[0, 1, 4 * 5 : 4 * 6], n[5, 8:12] | n[5, 12:16] << 4)
    assert torch.equal(
        made[1, 1, 128:].contiguous().view(torch.bfloat16)[::32], torch.stack((scales[32, 1], zeros[32, 1]))
    )
    with pytest.raises(RuntimeError, match="do not fit together"):
        tiles.to_tiles(rounding.pairs(n), scales, zeros[1:])


def test_plain_int4_rounding_is_within_half_a_step() -> None:
    weight = weights(outliers=True)
    n, scales, zeros = to_int4(weight, 64, 0)
    parts = weight.unflatten(1, (-1, 64))
    back = (n.unflatten(1, (-1, 64)).float() - 8) * scales.float()[..., None] + zeros.float()[..., None]
    # Scale and zero are stored in bfloat16, which moves the ends of the range.
    assert ((parts - back).abs() <= 0.56 * scales.float()[..., None]).all()


def test_what_is_stored_is_what_is_packed(either_way: str) -> None:
    for kind in KINDS:
        layer = layer_of(weights(), kind)
        made = layer.quantize(weights(), None, CPU)
        assert layer.state_dict().keys() == made.keys()
        assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in made.items())
        assert isinstance(layer, ColumnParallelLinear)
        assert kind in str(layer)
        x = torch.randn(3, 256).bfloat16()
        before = layer(x)
        assert torch.equal(layer.to(torch.float16).to(torch.bfloat16)(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_gpu_multiplies_what_is_stored(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows with the stored numbers, more with a plain matrix of them. Moved to a CPU, it packs them."""
    calls: list[str] = []
    for name in ("product_int8", "product_int4", "dequantize_int4"):
        real = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, real=real, name=name: (calls.append(name), real(*args))[1])
    packed = layer_of(weights(), kind, dtype)
    with emulated(), torch.no_grad():
        layer = layer_of(weights(), kind, dtype).to("emulated")
        assert not layer.packed
        assert all(torch.equal(tensor.cpu(), packed.state_dict()[name]) for name, tensor in layer.state_dict().items())
        for rows, called in ((1, f"product_{kind}"), (64, f"product_{kind}"), (65, "dequantize_int4")):
            x = torch.randn(rows, 256).to(dtype)
            calls.clear()
            assert_near(layer(x.to("emulated")).cpu(), x, numbers(packed), 2**-7)
            assert calls[0] == (called if kind == "int4" or rows < 65 else "product_int8")
        layer = layer.to("cpu")
        assert layer.packed == packed.packed
        assert torch.equal(layer(x), packed(x))


def test_int8_sums_stay_in_float16() -> None:
    """256 weights of 127 steps times 30 make 975,000; float16 ends at 65,504."""
    with emulated(), torch.no_grad():
        layer = layer_of(torch.full((8, 256), 1e-3), "int8", torch.float16).to("emulated")
        y = layer(torch.full((70, 256), 30.0, dtype=torch.float16).to("emulated")).cpu()
    torch.testing.assert_close(y, torch.full((70, 8), 256 * 30 * 1e-3, dtype=torch.float16), rtol=2e-3, atol=0)


def test_no_silent_gradients() -> None:
    for kind in KINDS:
        with pytest.raises(ValueError, match="no gradients through quantized weights"):
            layer_of(weights(), kind)(torch.randn(1, 256, requires_grad=True))


def test_group_sizes() -> None:
    assert [Quantization("int4").group(n) for n in (4096, 11008, 96, 48, 24, 172)] == [32, 32, 32, 16, None, None]
    assert Quantization("int4", 256).group(11008) == 256
    assert Quantization("int8").group(4096) is None
    assert repr(Quantization("int4", np.int64(64))) == repr(Quantization("int4", 64))  # type: ignore[arg-type]
    for bad in (8, 48, 512, 64.0, True):
        with pytest.raises(ValueError, match="must be a power of two from 16 to 256"):
            Quantization("int4", bad)  # type: ignore[arg-type]
    assert Quantization("8") == Quantization(8) == Quantization("int8")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="quantize='int3' is not supported; use 'int8', 'int4', 'w8a8', 'w4a8', or None"
    ):
        Quantization("int3")
    with pytest.raises(
        ValueError, match="11008 numbers in int4 groups of 32 .* by 16 processes; use 1 or 2 or 4 or 8, or int8"
    ):
        Quantization("int4").check_parts(11008, 16)
    with pytest.raises(ValueError, match="96 numbers in int4 groups of 32 .* by 2 shards; use 1, or int8$"):
        Quantization("int4").check_parts(96, 2, "shards")
    with pytest.raises(ValueError, match="96 numbers .* into whole groups by 4 processes; use 1 or 3, or"):
        Quantization("int4").check_parts(96, 4)
    Quantization("int4").check_parts(96, 3)
    Quantization("int8").check_parts(96, 5)
    assert Quantization("int4", 16).group(16) == Quantization("int4", 256).group(16) == 16


# Whole models. 256 wide, so that int4 has its packed form on one process.

WIDE: dict[str, Any] = {"dim": 256, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 256, "norm_eps": 1e-5}
TOKENS = [[1, 5, 9, 200, 33, 7, 300, 12, 6, 2, 8, 44, 17, 90]]


def state_and_logits(
    folder: str, tokenizer_path: str, processes: int, **options: Any
) -> tuple[dict[str, torch.Tensor], torch.Tensor, int, list[int]]:
    llama = Llama.build(folder, tokenizer_path, 16, 1, processes, device="cpu", **options)
    with torch.inference_mode():
        logits = llama.model(torch.tensor(TOKENS), 0)
    held = sum(p.numel() * p.element_size() for p in llama.model.parameters())
    state = {name: tensor.clone() for name, tensor in llama.model.state_dict().items()}
    return state, logits.clone(), held, llama.generate(TOKENS, 2, temperature=0)[0][0]


def whole(states: list[dict[str, torch.Tensor]], dims: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: states[0][name] if dims[name] is None else torch.cat([state[name] for state in states], dims[name])
        for name in states[0]
    }


def how_cut(kind: str, params: dict[str, Any]) -> dict[str, Any]:
    from llama import Transformer
    from llama.weights.checkpoint import cut

    with torch.device("meta"):
        model = Transformer(ModelArgs(**params, vocab_size=400, max_seq_len=1, max_batch_size=1))
    quantize_layers(model, Quantization(kind))
    return {name: dim for name, (_, dim, _) in cut(model).items()}


@pytest.mark.parametrize(
    ("kind", "shards"), [(k, n) for k in ("int8", "int4") for n in (1, 2, 4)] + [("w8a8", 2), ("w4a8", 4)]
)
def test_the_same_numbers_on_any_processes_from_any_shards(
    kind: str, shards: int, pool: Pool, tmp_path: Path, tokenizer_path: str
) -> None:
    source = str(write_checkpoint(tmp_path / "a", random_weights(WIDE), shards, WIDE))
    one, logits, _, _ = state_and_logits(source, tokenizer_path, 1, quantize=kind)
    dims = how_cut(kind, WIDE)
    assert one.keys() == dims.keys()
    for processes in (1, 2, 4):
        outcomes = pool.run(state_and_logits_of, source, tokenizer_path, processes, kind)
        joined = whole([state for state, *_ in outcomes[:processes]], dims)
        assert all(torch.equal(joined[name], tensor) for name, tensor in one.items())
        for _, theirs, _, _ in outcomes:
            torch.testing.assert_close(theirs, logits, atol=1e-4, rtol=0)


def state_and_logits_of(folder: str, tokenizer_path: str, processes: int, kind: str | None) -> Any:
    return state_and_logits(folder, tokenizer_path, processes, **({"quantize": kind} if kind else {}))


@pytest.mark.parametrize("kind", KINDS)
def test_stored_is_what_loading_makes(kind: str, pool: Pool, tmp_path: Path, tokenizer_path: str) -> None:
    bf16 = {name: weight.bfloat16() for name, weight in random_weights(WIDE).items()}
    source = write_checkpoint(tmp_path / "a", bf16, 2, WIDE)
    loaded, logits, held, ids = state_and_logits(str(source), tokenizer_path, 1, quantize=kind)
    for shards in (1, 4):
        convert(source, tmp_path / f"q{shards}", "meta", shards, quantize=kind)
        stored = json.loads((tmp_path / f"q{shards}" / "params.json").read_text())["quantization"]
        assert stored == ({"kind": "int8"} if kind == "int8" else {"kind": kind, "group_size": 32})
        for options in ({}, {"quantize": kind}):
            state, again, held_again, same = state_and_logits(
                str(tmp_path / f"q{shards}"), tokenizer_path, 1, **options
            )
            assert all(torch.equal(state[name], tensor) for name, tensor in loaded.items())
            assert torch.equal(again, logits)
            assert (held_again, same) == (held, ids)
    args = ModelArgs(**WIDE, vocab_size=400, max_seq_len=16, max_batch_size=1)
    filled = 0 if int8.onednn_is_fast() else 0.05  # in tiles, the last filled up; the output matrix is int8 in any case

    def need(processes: int) -> Any:
        placement = memory.Placement(args, torch.bfloat16, processes, quantization=Quantization(kind))
        return pytest.approx(memory.estimate(placement).weights, rel=filled, abs=0)

    assert held == need(1)
    for processes in (2, 4):
        outcomes = pool.run(state_and_logits_of, str(tmp_path / "q4"), tokenizer_path, processes, None)
        assert all(held == need(processes) for _, _, held, _ in outcomes)
        joined = whole([state for state, *_ in outcomes[:processes]], how_cut(kind, WIDE))
        assert all(torch.equal(joined[name], tensor) for name, tensor in loaded.items())
    # Other shards again: the numbers stay as they are.
    convert(tmp_path / "q4", tmp_path / "again", "meta", 1, torch.float32)
    convert(tmp_path / "q1", tmp_path / "copy", "meta", 1)
    state, _, _, _ = state_and_logits(str(tmp_path / "copy"), tokenizer_path, 1)
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.items())
    state, _, _, _ = state_and_logits(str(tmp_path / "again"), tokenizer_path, 1)
    assert state["norm.weight"].dtype == torch.float32
    assert all(torch.equal(state[name], tensor.to(state[name].dtype)) for name, tensor in loaded.items())


@pytest.mark.parametrize("name", ["tied", *sorted(set(TWINS) - {"tied"})][:2])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_hugging_face_folders(kind: str, name: str, pool: Pool, tmp_path: Path, tokenizer_path: str) -> None:
    """The same numbers as from Meta's form of the same weights; transformers' logits within what rounding does."""
    transformers = pytest.importorskip("transformers")
    source = write_twin(tmp_path / "hf", TWINS[name])
    convert(source, tmp_path / "meta", "meta", tokenizer_path=Path(tokenizer_path))
    one, logits, _, _ = state_and_logits(str(source), tokenizer_path, 1, quantize=kind)
    two, same, _, _ = state_and_logits(str(tmp_path / "meta"), tokenizer_path, 1, quantize=kind)
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())
    assert torch.equal(logits, same)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source)(torch.tensor(TOKENS)).logits[..., :400].detach()
    assert (logits - theirs).norm() < {"int8": 0.02, "int4": 0.25}[kind] * theirs.norm()


def test_goldens_within_a_bound() -> None:
    """Meta's logits of a random model: 8 bits move them by at most 5 % of their size, 4 bits by 40 %."""
    case = golden("toy-gqa")["prefill"]
    expected = torch.tensor(case["logits_last"])
    folder = shared("models/toy-gqa")
    for kind, bound in (("int8", 0.05), ("int4", 0.4), ("w8a8", 0.05), ("w4a8", 0.4)):
        model = Llama.build(str(folder), None, 128, 4, device="cpu", quantize=kind).model
        logits = model(torch.tensor(case["tokens"]), 0)[:, -1]
        assert 0 < (logits - expected).norm() < bound * expected.norm()


def test_the_compiler_takes_it(tmp_path: Path, tokenizer_path: str) -> None:
    """One graph, without the code generator: the packed weights are inputs of it that nobody looks into."""
    bf16 = {name: weight.bfloat16() for name, weight in random_weights(WIDE).items()}
    source = write_checkpoint(tmp_path / "a", bf16, 1, WIDE)
    for kind in KINDS:
        model = Llama.build(str(source), tokenizer_path, 16, 1, device="cpu", quantize=kind).model
        tokens = torch.tensor(TOKENS)[:, :4]
        with torch.no_grad():
            window_free = torch.compile(model.layers[0].feed_forward, fullgraph=True, backend="aot_eager")
            x = model.tok_embeddings(tokens)
            torch.testing.assert_close(window_free(x), model.layers[0].feed_forward(x))
    torch.compiler.reset()


def test_what_is_refused(tiny: Path, tmp_path: Path, tokenizer_path: str, pool: Pool) -> None:
    def refuse(message: str, folder: Path = tiny, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            Llama.build(str(folder), tokenizer_path, 16, 1, device="cpu", **options)

    refuse("quantize='int2' is not supported; use 'int8', 'int4', 'w8a8', 'w4a8', or None", quantize="int2")
    refuse("quantize=3 is not supported", quantize=3)
    convert(tiny, tmp_path / "q", "meta", quantize="int4")
    refuse("q is already int4 and cannot become int8; leave quantize out", tmp_path / "q", quantize="int8")
    with pytest.raises(ValueError, match="q is stored as int4, which is for Meta's format alone"):
        convert(tmp_path / "q", tmp_path / "hf", "hf")
    with pytest.raises(ValueError, match="quantize='int8' is no kind for to='hf': to='meta' takes 'int8', "):
        convert(tiny, tmp_path / "hf", "hf", quantize="int8")
    told = "quantize='int5' is no kind for to='meta': .*; to='hf' takes none; to='gguf' takes 'q8_0'"
    with pytest.raises(ValueError, match=told):
        convert(tiny, tmp_path / "new", "meta", quantize="int5")
    # 64 = 2 groups of 32, which 4 cannot share.
    with pytest.raises(ValueError, match="rows of 64 numbers in int4 groups of 32 .* by 4 shards; use 1 or 2, or int8"):
        convert(tiny, tmp_path / "new", "meta", 4, quantize="int4")
    for _, error in pool.try_run(state_and_logits_of, str(tiny), tokenizer_path, 4, "int4"):
        assert "rows of 64 numbers in int4 groups of 32 cannot be cut into whole groups by 4 processes" in error
    assert not list(tmp_path.glob("new"))
    params = json.loads((tmp_path / "q/params.json").read_text())
    for bad in (
        {"kind": "int3"},
        {"kind": "int4"},
        {"kind": "int4", "group_size": 48},
        "int4",
        {"kind": "int8", "x": 1},
        [],
    ):
        (tmp_path / "q/params.json").write_text(json.dumps({**params, "quantization": bad}))
        refuse("params.json: ", tmp_path / "q")
    (tmp_path / "q/params.json").write_text(json.dumps({**params, "quantization": {"kind": "int4", "group_size": 64}}))
    refuse(r"layers.0.attention.wq.scales has shape \[64, 2\] instead of \[64, 1\]", tmp_path / "q")
    (tmp_path / "q/params.json").write_text(json.dumps({**params, "quantization": {"kind": "int8"}}))
    refuse("layers.0.attention.wq.zeros is unexpected", tmp_path / "q")
    del params["quantization"]
    (tmp_path / "q/params.json").write_text(json.dumps(params))
    refuse("has weights in a form that is not computed here: .*uint8", tmp_path / "q")
    shards = torch.load(tmp_path / "q/consolidated.00.pth")
    shards["layers.0.attention.wq.scales"] = shards["layers.0.attention.wq.scales"].float()
    torch.save(shards, tmp_path / "q/consolidated.00.pth")
    (tmp_path / "q/params.json").write_text(json.dumps({**params, "quantization": {"kind": "int4", "group_size": 32}}))
    refuse("wq.scales is torch.float32 instead of torch.bfloat16", tmp_path / "q")


PEAK = """
import sys
from llama import Llama
def kb(key): return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) / 1000
Llama.build(sys.argv[4], sys.argv[2], 1, 1, device="cpu", quantize=sys.argv[3])  # what the libraries take
before = kb("VmRSS")
llama = Llama.build(sys.argv[1], sys.argv[2], 1, 1, device="cpu", quantize=sys.argv[3])
print(kb("VmHWM") - before, kb("RssAnon"))
"""


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_loading_holds_no_full_precision(kind: str, tmp_path: Path, tiny: Path, tokenizer_path: str) -> None:
    """A model of 170 MB in float32, of which 162 are matrices, takes what it has quantized and little more."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc/self/status")
    params = {"dim": 1024, "n_layers": 3, "n_heads": 8, "multiple_of": 64}
    source = write_checkpoint(tmp_path / "a", random_weights(params), params=params)
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(source), tokenizer_path, kind, str(tiny)],
        env=environment(), capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    taken = float(result.stdout.split()[-2])
    assert taken < {"int8": 85, "int4": 65}[kind]


def test_the_command(tiny: Path, tmp_path: Path, tokenizer_path: str) -> None:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-m", "llama", *args]
        return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)

    target = str(tmp_path / "q")
    more = ("--quantize", "int4", "--tokenizer_path", tokenizer_path)
    result = run("convert", str(tiny), target, "--to", "meta", *more)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{target} is written\n", "")
    result = run("info", target, "--device", "cpu")
    assert (result.returncode, result.stderr) == (0, "")
    count = sum(w.numel() for w in random_weights(PARAMS).values())
    assert f"parameters  {count:,} in int4" in result.stdout
    assert "dtype=float32, matrices in int4; on each process" in result.stdout
    result = run("info", target, "--quantize", "int8", "--device", "cpu")
    assert result.returncode == 1
    assert "is already int4" in result.stderr


@pytest.mark.skipif(not getattr(torch.cpu, "_is_vnni_supported", bool)(), reason="needs VNNI")
def test_onednn_multiplies_int8_where_it_is_exact() -> None:
    assert int8.onednn_is_exact()


@pytest.mark.skipif(not int8.onednn_is_exact(), reason="oneDNN packs no int8 here")
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_packed_matrices_generate(
    kind: str, tmp_path: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix that oneDNN has packed has no address. The first step of every model with a large one asked for it, and
    failed; so would the look at a file that was written to."""
    if not int8.onednn_is_exact():
        pytest.skip("oneDNN does not pack int8 here")
    monkeypatch.setattr(int8, "onednn_is_fast", lambda: True)
    folder, ids = write_checkpoint(tmp_path, random_weights()), []
    for plain in (2**21, 0):
        monkeypatch.setattr(int8, "PLAIN", plain)
        llama = Llama.build(str(folder), tokenizer_path, 32, 1, device="cpu", quantize=kind)
        weight = llama.model.output.weight
        assert weight.is_mkldnn == (plain == 0)
        ids.append(llama.generate([[1, 5, 6]], 8, temperature=0)[0])
    assert ids[0] == ids[1]
    os.utime(folder / "consolidated.00.pth", (0, 0))
    with pytest.raises(ValueError, match=r"consolidated.00.pth was written to after it was loaded"):
        llama.generate([[1, 5, 6]], 8, temperature=0)
