"""w8a8 and w4a8: the compiled products give the bits of the plain form, whose numbers are worked out by hand."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from emulated_cuda import emulated
from test_quantization import layer_of, numbers, weights

from llama import Llama, runtime
from llama.decoding import compiled, compiler
from llama.layers import int8, own_kernels, tiles
from llama.layers.one_digit import Digits, OneDigit, in_digits, multiplied
from llama.layers.rounding import to_groups
from llama.layers.tiles import InTiles

compiles = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux")


def layers(kind: str, weight: torch.Tensor, group: int, monkeypatch: pytest.MonkeyPatch) -> tuple[OneDigit, OneDigit]:
    """The layer with compiled products, and with plain ones."""
    packed = layer_of(weight, kind, group=group)
    with monkeypatch.context() as patch:
        patch.setattr(own_kernels, "loaded", lambda: False)
        stored = layer_of(weight, kind, group=group)
    assert isinstance(packed, OneDigit)
    assert isinstance(stored, OneDigit)
    assert (packed.packed, stored.packed) == (True, False)
    return packed, stored


def test_numbers_by_hand() -> None:
    """Two groups of two columns. 127 steps of 2 and of 0.5 make the largest activations, 254 and 63.5; a half goes to
    the even number."""
    digits = in_digits(torch.tensor([[254.0, 3.0, -63.5, 0.75], [0.0, 0.0, 127.0, 1.0]]), 2)
    assert digits.numbers.tolist() == [[127, 2, -127, 2], [0, 0, 127, 1]]
    assert digits.unit[0].tolist() == pytest.approx([2, 0.5])
    digits = Digits(digits.numbers, torch.tensor([[2, 0.5], [1, 1]]))
    w, scales = torch.tensor([[1, -1, 2, 3]], dtype=torch.int8), torch.tensor([[4.0, 0.25]]).bfloat16()
    # (127 - 2) 4 2 + (-254 + 6) 0.25 0.5 = 1000 - 31, and (254 + 3) 0.25
    assert multiplied(digits, w, scales, None).tolist() == [[969.0], [64.25]]
    # 129 2 10 and -125 0.5 2 more for zeros of 10 and 2; 128 2
    assert multiplied(digits, w, scales, torch.tensor([[10.0, 2.0]]).bfloat16()).tolist() == [[3424.0], [320.25]]
    n, scales = to_groups(torch.tensor([[127.0, -1.0, 1.27, 0.004]]), 2)
    assert n.tolist() == [[127, -1, 127, 0]]
    assert scales.tolist() == [[1.0, pytest.approx(0.01, rel=2**-8)]]


@compiles
@pytest.mark.parametrize("kind", ["w8a8", "w4a8"])
@pytest.mark.parametrize(("rows", "columns", "group"), [(96, 256, 64), (33, 96, 32), (7, 48, 16)])
def test_compiled_products_give_the_bits_of_plain_ones(
    kind: str, rows: int, columns: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, stored = layers(kind, weights(rows, columns, outliers=True), group, monkeypatch)
    assert all(torch.equal(tensor, stored.state_dict()[name]) for name, tensor in packed.state_dict().items())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(13, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
        x[3], x[4, :group], x[5, 0] = 0, 1e-33, 300
        whole = stored(x)
        assert whole.dtype == dtype
        for count in (1, 2, 3, 6, 7, 13):  # a row's bits do not depend on how many there are
            assert torch.equal(packed(x[:count]), whole[:count])
            assert torch.equal(stored(x[:count]), whole[:count])
        exact = x.double() @ numbers(packed).t()
        # An activation is off by half a step of 1 / 127 of its group's largest at most; the steps of 13 rows add like
        # noise.
        assert (whole.double() - exact).norm() < 0.02 * exact.norm()
        for bad in (torch.inf, -torch.inf, torch.nan):
            y = torch.cat(
                [
                    layer(x.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(bad).to(dtype)))
                    for layer in (packed, stored)
                ]
            )
            assert not y[[1, 14]].isfinite().any()
            assert torch.equal(y[2:13], whole[2:])


@compiles
def test_extremes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All products at their largest and of one sign: pairs of them have no room in 16 bits."""
    for kind in ("w8a8", "w4a8"):
        weight = torch.ones(64, 256) * torch.tensor([1.0, -1.0]).repeat(32)[:, None]
        packed, stored = layers(kind, weight, 256, monkeypatch)
        for x in (torch.ones(2, 256), -torch.ones(2, 256), torch.zeros(2, 256), torch.zeros(0, 256)):
            assert torch.equal(packed(x), stored(x))
            torch.testing.assert_close(packed(x), x @ weight.t(), rtol=0.01, atol=0)
    with pytest.raises(RuntimeError, match="do not fit together"):
        torch.ops.llama_cpu.product(*packed.shared(x)[:2], packed.weight, 65, 4, 0)


@compiles
def test_shared_digits_and_other_dtypes() -> None:
    for kind in ("w8a8", "w4a8"):
        layer, other = layer_of(weights(), kind), layer_of(weights(64), kind)
        x = torch.randn(2, 3, 256).bfloat16()
        shared = layer.shared(x)
        assert torch.equal(other.product(x, shared), other(x))
        assert torch.equal(layer(x.double()).bfloat16(), layer(x.float()).bfloat16())
        before = layer(x)
        assert torch.equal(layer.to(torch.float16).to(torch.bfloat16)(x), before)


@compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_exact_products_in_tiles(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations in digits give the product with the numbers that are stored, whose sums nobody rounds to 8 bits; a
    row's bits do not depend on how many there are."""
    monkeypatch.setattr(int8, "onednn_is_fast", lambda: False)
    monkeypatch.setattr(tiles, "for_many", lambda bits: torch.ops.llama_cpu.exact_product)
    for rows, columns, group in ((100, 256, 64), (33, 96, 32), (7, 48, 16)):
        layer = layer_of(weights(rows, columns, outliers=True), kind, dtype, group)
        assert isinstance(layer, InTiles)
        assert layer.in_tiles
        x = torch.randn(70, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
        x[3], x[4, :2], x[5, 0] = 0, 1e-33, 300
        y = layer(x)
        exact = x.double() @ numbers(layer).t()
        bound = x.double().norm(dim=1, keepdim=True) * numbers(layer).norm(dim=1)
        few = 2**-8 if dtype == torch.bfloat16 else 2**-21  # an output is rounded to 8 bits, or digits to 23
        assert ((y - exact).abs() <= few * bound).all()
        for count in (1, 2, 3, 5, 7):
            assert torch.equal(layer(x[:count]), y[:count])
        x[1, 2] = torch.inf
        assert not layer(x)[1].isfinite().any()
        assert torch.equal(layer(x)[2:], y[2:])
        assert torch.equal(layer.to(torch.float16).to(dtype)(x[2:]), y[2:])


@compiles
@pytest.mark.parametrize(
    ("kind", "operator"), [("w4a8", "product"), ("int4", "exact_product"), ("int8", "exact_product")]
)
def test_a_package_calls_the_kernels(
    kind: str,
    operator: str,
    tiny: Path,
    tokenizer_path: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(int8, "onednn_is_fast", lambda: False)
    made: list[Any] = []
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda program, **_: made.append(program))
    model = Llama.build(str(tiny), tokenizer_path, 128, 4, device="cpu", quantize=kind, compile=False).model
    assert compiled.takes_a_package(model)
    request = {
        "args": asdict(model.params),
        **compiled.described(model),
        "several": True,
        "threads": torch.get_num_threads(),
    }
    compiler.make(request, Path("nowhere"))
    called = [node for node in made[0].graph.nodes if str(node.target).startswith(f"llama_cpu.{operator}")]
    assert len(called) == 7 * model.n_layers + 1
    monkeypatch.setattr(own_kernels, "loaded", lambda: False)
    Llama.build(str(tiny), tokenizer_path, 128, 4, device="cpu", quantize=kind, compile=True)
    assert f"on a CPU {kind} weights have a form that a package cannot take" in capsys.readouterr().out


def test_a_quiet_build_says_nothing_of_products(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line of a compilation, or of one that is not possible, came with quiet=True too."""
    monkeypatch.setattr(runtime, "cpp_compiler", lambda: None)
    monkeypatch.setattr(own_kernels, "_brought_in", own_kernels._brought_in.__wrapped__)
    llama = Llama.build(max_seq_len=32, device="cpu", quantize="w8a8", quiet=True)
    assert not llama.model.output.packed
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("what", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_goes_into_the_unit(what: float) -> None:
    """Of its group alone."""
    x = torch.ones(2, 64)
    x[0, 3] = what
    digits, unit = in_digits(x, 32)
    assert digits.view(4, 32).unique_consecutive(dim=1).flatten().tolist() == [0, 127, 127, 127]
    assert unit.isfinite().tolist() == [[False, True], [True, True]]


def test_operators_are_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that built at the same time both loaded the file, which ended the process."""
    loads, begun, goes_on = [], Event(), Event()

    @cache
    def brought_in() -> bool:
        loads.append(None)
        begun.set()
        return goes_on.wait(10)

    monkeypatch.setattr(own_kernels, "_brought_in", brought_in)
    threads = [Thread(target=own_kernels.loaded) for _ in range(2)]
    threads[0].start()
    assert begun.wait(10)
    threads[1].start()
    threads[1].join(0.05)
    goes_on.set()
    for thread in threads:
        thread.join()
    assert len(loads) == 1


@compiles
@pytest.mark.parametrize("group", [0, -16, 33])
def test_groups_that_do_not_fit_are_refused(group: int) -> None:
    """A group of 0 columns ended the process: a division by zero."""
    assert own_kernels.loaded()
    with pytest.raises(RuntimeError, match="do not fit together"):
        torch.ops.llama_cpu.round_groups(torch.zeros(2, 32), group)


BROKEN: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], object], str]] = {
    "no compiler": (
        lambda _, patch: patch.setattr(runtime, "cpp_compiler", lambda: None),
        "needs a C\\+\\+ compiler, on Linux",
    ),
    "a compiler that fails": (
        lambda _, patch: patch.setattr(runtime, "cpp_compiler", lambda: "false"),
        "false: it ended with 1",
    ),
    "a folder for all": (lambda folder, _: os.chmod(folder, 0o777), "others can write to"),
}


@compiles
@pytest.mark.parametrize("what", BROKEN)
def test_plain_products_where_none_can_be_compiled(
    what: str,
    tmp_path: Path,
    tiny: Path,
    tokenizer_path: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line says so, and the ids are the same."""
    options: dict[str, Any] = {"device": "cpu", "quantize": "w4a8"}
    expected = Llama.build(str(tiny), tokenizer_path, 32, 1, **options).generate([[1, 5, 6]], 8, temperature=0)
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("LLAMA_CACHE", str(folder))
    monkeypatch.setattr(own_kernels, "_brought_in", own_kernels._brought_in.__wrapped__)
    change, words = BROKEN[what]
    change(folder, monkeypatch)
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops, "load_library", lambda path: None)
        assert not own_kernels.loaded()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "run in plain torch" in line)
    assert re.search(words, line)
    monkeypatch.setattr(own_kernels, "loaded", lambda: False)
    llama = Llama.build(str(tiny), tokenizer_path, 32, 1, **options)
    assert not llama.model.output.packed
    assert llama.generate([[1, 5, 6]], 8, temperature=0) == expected


@pytest.mark.parametrize(("kind", "instead"), [("w8a8", "int8"), ("w4a8", "int4")])
def test_other_devices_are_refused(kind: str, instead: str, tiny: Path, tokenizer_path: str) -> None:
    with (
        emulated(),
        pytest.raises(
            ValueError, match=f"{kind} multiplies on CPUs only, not on emulated:0; use quantize='{instead}' and the ori"
        ),
    ):
        Llama.build(str(tiny), tokenizer_path, 32, 1, device="emulated", quantize=kind)
    layer = layer_of(weights(), kind)
    with emulated(), pytest.raises(ValueError, match=f"{kind} multiplies on CPUs only"):
        layer.to("emulated")
