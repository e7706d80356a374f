"""The Triton kernels, interpreted on the CPU, and their plain forms: against each other, and against float64."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from llama import model
from llama.layers import kernels
from llama.layers.rounding import pairs, row_maxima, to_int4, to_int8, unpair

pytest.importorskip("triton", reason="Triton is not installed")

# The interpreter computes with numpy, which warns of what a GPU does silently.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what} encountered:RuntimeWarning")
    for what in ("invalid value", "overflow", "All-NaN slice")
]
DTYPES = (torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    """A copy of the module whose kernels are interpreted, also where Triton was imported to compile."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_INTERPRET", "1")
    import numpy as np
    import triton.language as tl
    from triton.runtime import JITFunction, interpreter

    for name, function in vars(tl.standard).items():  # tl.sum and others are kernels themselves
        if isinstance(function, JITFunction):
            again = interpreter.InterpretedFunction(function.fn)
            patch.setattr(tl.standard, name, again)
            if hasattr(tl, name):
                patch.setattr(tl, name, again)

    # The interpreter cuts numbers to bfloat16 where GPUs round them, and multiplies the bits of bfloat16 matrices.
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounding(numbers: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            made = torch.from_numpy(np.array(numbers)).bfloat16().view(torch.int16).numpy().view(np.uint16)
            return made.reshape(numbers.shape)
        return convert(numbers, source, target, mode)

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    patch.setattr(interpreter, "_convert_float", rounding)
    patch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *others: dot(self, widened(a), widened(b), *others),
    )
    path = Path(kernels.__file__).with_name("triton_kernels.py")
    spec = importlib.util.spec_from_file_location("interpreted_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, spec.name, made)
    spec.loader.exec_module(made)
    yield made
    patch.undo()


@pytest.fixture(params=["plain", "triton"])
def form(request: pytest.FixtureRequest) -> Any:
    return kernels if request.param == "plain" else request.getfixturevalue("interpreted")


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(ours: torch.Tensor, exact: torch.Tensor, roundings: float = 2) -> None:
    """Within some roundings of the dtype, of the size of the largest number."""
    error = (ours.double() - exact.double()).abs().max()
    largest = exact.double().abs().max()
    limit = roundings * torch.finfo(ours.dtype).eps * largest
    assert ours.isfinite().all()
    assert error <= limit, f"{error:.2e} > {limit:.2e}"


def cache(rows: int, T: int, K: int, D: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """As `Attention.allocate_cache` lays it out."""
    return numbers(rows, K, T + 1, D, dtype=dtype, seed=seed)[:, :, :-1].transpose(1, 2)


# Norm, rotation, activation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "dim"), [(1, 64), (3, 96), (16, 1000)])
def test_add_norm(form: Any, dtype: torch.dtype, B: int, dim: int) -> None:
    x, delta, weight = (
        numbers(B, dim, dtype=dtype, seed=1),
        numbers(B, dim, dtype=dtype, seed=2),
        numbers(dim, dtype=dtype),
    )
    h, normed = form.add_norm(x, delta, weight, 1e-5)
    assert torch.equal(h, x + delta)
    wide = h.double()
    close(normed, wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double())
    norm = model.RMSNorm(dim, 1e-5)
    norm.weight.data = weight
    close(normed, norm(h), 1)
    same, normed = form.add_norm(x, None, weight, 1e-5)
    assert same is x
    close(normed, norm(x), 1)


def test_a_norm_by_hand(form: Any) -> None:
    x = torch.tensor([[3.0, 4, 0, 0]], dtype=torch.bfloat16)
    weight = torch.tensor([1.0, 2, 3, 4], dtype=torch.bfloat16)
    h, normed = form.add_norm(x, -x, weight, 0.25)
    assert h.tolist() == normed.tolist() == [[0, 0, 0, 0]]
    _, normed = form.add_norm(x, x, weight, 0.0)  # (6, 8): a root mean square of 5
    assert normed.tolist() == [[1.203125, 3.203125, 0, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "H", "K", "D"), [(1, 4, 4, 64), (3, 6, 2, 48), (2, 2, 1, 80), (2, 1, 1, 2)])
def test_rotate_and_store(form: Any, dtype: torch.dtype, B: int, H: int, K: int, D: int) -> None:
    T = 9
    rotations = torch.view_as_real(model.precompute_freqs_cis(D, T))
    positions = torch.tensor([8, 0, 3])[:B]
    qkv = numbers(B, (H + 2 * K) * D, dtype=dtype)
    caches = [cache(4, T, K, D, dtype, seed) for seed in (1, 2)]
    before = [c.clone() for c in caches]
    q = form.rotate_and_store(qkv, rotations, positions, *caches)
    heads = qkv.view(B, 1, -1, D)
    rotary = rotations[positions][:, None, None]
    close(q, model.rotate(heads[:, :, :H], rotary)[:, 0], 1)
    rows = torch.arange(B)
    before[0][rows, positions] = model.rotate(heads[:, 0, H : H + K, :][:, None], rotary)[:, 0]
    before[1][rows, positions] = heads[:, 0, H + K :]
    close(caches[0], before[0], 1)
    assert torch.equal(caches[1], before[1])  # all others untouched
    others = positions[:, None] != torch.arange(T)
    assert torch.equal(caches[0][:B][others], before[0][:B][others])


def test_a_quarter_turn(form: Any) -> None:
    qkv = torch.tensor([[1.0, 2, 3, 4, 5, 6]], dtype=torch.float16)
    k, v = torch.zeros(1, 2, 1, 2, dtype=torch.float16), torch.zeros(1, 2, 1, 2, dtype=torch.float16)
    quarter = torch.tensor([[[1.0, 0]], [[0, 1]]])
    q = form.rotate_and_store(qkv, quarter, torch.tensor([1]), k, v)
    assert q.tolist() == [[[-2, 1]]]
    assert k.flatten().tolist() == [0, 0, -4, 3]
    assert v.flatten().tolist() == [0, 0, 5, 6]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "width"), [(1, 1), (3, 77), (2, 1030)])
def test_silu_mul(form: Any, dtype: torch.dtype, B: int, width: int) -> None:
    x = numbers(B, 2 * width, dtype=dtype) * 4
    gate, up = x.double().chunk(2, -1)
    y = form.silu_mul(x)
    close(y, gate * gate.sigmoid() * up)
    close(y, kernels.silu_mul(x), 1)
    special = torch.tensor([[-100.0, 0, NAN, INF, 2, 2, 2, 2]], dtype=dtype)
    y = form.silu_mul(special)[0].tolist()
    assert abs(y[0]) < 1e-4
    assert y[1] == 0
    assert math.isnan(y[2])
    assert y[3] == INF


# Attention


def exact_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    B, H, D = q.shape
    out = torch.empty(B, H, D, dtype=torch.float64)
    for b in range(B):
        seen = slice(0, int(positions[b]) + 1)
        for h in range(H):
            head = h // (H // k.shape[2])
            keys, values = k[b, seen, head].double(), v[b, seen, head].double()
            out[b, h] = (keys @ q[b, h].double() / math.sqrt(D)).softmax(0) @ values
    return out.flatten(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("positions", "T", "H", "K", "D"),
    [
        ([0], 5, 2, 2, 64),
        ([63], 64, 2, 1, 128),
        ([64], 65, 3, 3, 48),
        ([0, 63, 64, 129], 130, 4, 2, 80),
        ([199, 1, 127], 200, 8, 1, 16),
        ([70], 300, 17, 1, 32),
        ([3], 8, 1, 1, 250),
    ],
)
def test_attend(form: Any, dtype: torch.dtype, positions: list[int], T: int, H: int, K: int, D: int) -> None:
    B = len(positions)
    q, k, v = numbers(B, H, D, dtype=dtype), cache(B + 1, T, K, D, dtype, 1), cache(B + 1, T, K, D, dtype, 2)
    places = torch.tensor(positions)
    unseen = torch.arange(T) > places[:, None]
    v[:B][unseen] = k[:B][unseen] = NAN  # nothing of it may be looked at
    exact = exact_attention(q, k, v, places)
    for processors in (1, 132):
        close(form.attend(q, k, v, places, processors), exact, 3)
    close(form.attend(q, k, v, places, B * K), kernels.attend(q, k, v, places), 3)


def test_splits_fill_a_gpu(interpreted: ModuleType) -> None:
    splits = interpreted.splits_of
    assert splits(32, 2048, 132) == 16
    assert splits(32, 100, 132) == 2  # no more than there are blocks of keys
    assert splits(512, 4096, 132) == 1
    assert splits(1, 100_000, 132) == interpreted.MOST_SPLITS


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("what", [NAN, INF])
def test_attention_swallows_nothing(form: Any, which: str, what: float) -> None:
    q, k, v = (numbers(2, 200, 2, 16, dtype=torch.float16, seed=seed) for seed in range(3))
    q = q[:, 0]
    if which == "q":
        q[0, 0, 3] = what
    else:
        q[0, 0, 3] = 1
        (k if which == "k" else v)[0, 150, 0, 3] = what
    out = form.attend(q, k, v, torch.tensor([160, 160])).view(2, 2, 16)
    seen = out[0, 0, 3] if which == "v" else out[0, 0]
    assert (seen.isnan() | seen.isinf()).all()
    assert out[0, 1].isfinite().all()
    assert out[1].isfinite().all()
    assert form.attend(q, k, v, torch.tensor([149, 149])).isfinite().all() == (which != "q")


def test_scores_of_minus_infinity_weigh_nothing(form: Any) -> None:
    q = torch.ones(1, 1, 16, dtype=torch.float16)
    k, v = torch.zeros(1, 130, 1, 16, dtype=torch.float16), torch.ones(1, 130, 1, 16, dtype=torch.float16)
    k[0, 5:100], v[0, 5:100] = -INF, 3
    assert form.attend(q, k, v, torch.tensor([129])).eq(1).all()


# Products

SHAPES = [(1, 5, 16), (1, 37, 352), (1, 8, 1376), (2, 33, 96), (5, 20, 272), (16, 3, 64), (1, 3, 2080)]


def references(x: torch.Tensor, weight: torch.Tensor, gated: bool) -> torch.Tensor:
    y = x.double() @ weight.double().T
    gate, up = y.chunk(2, -1)
    return gate * gate.sigmoid() * up if gated else y


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "N", "K"), [*SHAPES, (1, 4, 33), (3, 2, 19)])
def test_product(form: Any, dtype: torch.dtype, gated: bool, B: int, N: int, K: int) -> None:
    x, weight = numbers(B, K, dtype=dtype), numbers(2 * N if gated else N, K, dtype=dtype, seed=1) / 4
    y = form.product(x, weight, gated)
    assert y.shape == (B, N)
    close(y, references(x, weight, gated), 3 if gated else 1)
    close(y, kernels.product(x, weight, gated), 4 if gated else 2)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "N", "K"), [*SHAPES, (1, 4, 34), (2, 2, 19), (33, 5, 96)])
def test_product_int8(form: Any, dtype: torch.dtype, gated: bool, B: int, N: int, K: int) -> None:
    weight = numbers(2 * N if gated else N, K, seed=1) / 4
    n, scales = to_int8(weight, row_maxima(weight))
    x = numbers(B, K, dtype=dtype) + 2  # of one sign: the sum of x is large
    y = form.product_int8(x, n, scales, gated)
    assert y.shape == (B, N)
    close(y, references(x, n.double() * scales[:, None], gated), 3 if gated else 1)
    close(y, kernels.product_int8(x, n, scales, gated), 4 if gated else 2)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "N", "K", "group"),
    [(33, 5, 96, 32)]
    + [(*shape, 16) for shape in SHAPES]
    + [(B, 5, 1280, g) for B in (1, 3) for g in (32, 64, 128, 256)],
)
def test_product_int4(form: Any, dtype: torch.dtype, gated: bool, B: int, N: int, K: int, group: int) -> None:
    n, scales, zeros = to_int4(numbers(2 * N if gated else N, K, seed=1) / 4, group)
    weight = ((n.double() - 8).unflatten(1, (-1, group)) * scales[..., None] + zeros[..., None]).flatten(1)
    x = numbers(B, K, dtype=dtype) + 2
    y = form.product_int4(x, pairs(n), scales, zeros, gated)
    assert y.shape == (B, N)
    # The dequantized weights are rounded too.
    close(y, references(x, weight, gated), 5 if gated else 2)
    close(y, kernels.product_int4(x, pairs(n), scales, zeros, gated), 6 if gated else 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K", "group"), [(1, 16, 16), (3, 96, 32), (5, 768, 256)])
def test_dequantize_int4(form: Any, dtype: torch.dtype, N: int, K: int, group: int) -> None:
    n, scales, zeros = to_int4(numbers(N, K), group)
    made = form.dequantize_int4(pairs(n), scales, zeros, dtype)
    assert torch.equal(made, kernels.dequantize_int4(pairs(n), scales, zeros, dtype))
    close(made, ((n.double() - 8).unflatten(1, (-1, group)) * scales[..., None] + zeros[..., None]).flatten(1), 1)


@pytest.mark.parametrize("B", [1, 2])
def test_every_integer_by_hand(form: Any, B: int) -> None:
    """Each number that a weight can be, and each place of a word."""
    int8 = torch.arange(-128, 128, dtype=torch.int8).view(64, 4).repeat(1, 4)
    for place in range(4):
        x = torch.zeros(B, 16, dtype=torch.float16)
        x[:, place] = 1
        assert form.product_int8(x, int8, torch.ones(64)).tolist() == [int8[:, place].tolist()] * B
    ones = torch.ones(16, 1, dtype=torch.bfloat16)
    for place in range(8):
        int4 = torch.full((16, 16), 8, dtype=torch.uint8)
        int4[:, place] = torch.arange(16)
        x = torch.zeros(B, 16, dtype=torch.bfloat16)
        x[:, place] = 2
        assert form.product_int4(x, pairs(int4), ones * 3, ones).tolist() == [list(range(-46, 50, 6))] * B
        assert torch.equal(unpair(pairs(int4)), int4)


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("what", [NAN, INF])
def test_products_swallow_nothing(form: Any, B: int, what: float) -> None:
    x, weight = numbers(B, 64, dtype=torch.bfloat16), numbers(6, 64)
    x[0, 7] = what
    n, scales = to_int8(weight, row_maxima(weight))
    int4, *groups = to_int4(weight, 16)
    for y in (
        form.product(x, weight.bfloat16()), form.product_int8(x, n, scales), form.product_int4(x, pairs(int4), *groups),
        form.product(x, weight.bfloat16(), True), form.product_int4(x, pairs(int4), *groups, True),
    ):  # fmt: skip
        # silu(-inf) is NaN, and so is what is multiplied with it
        assert not y[0].isfinite().any()
        assert y[1:].isfinite().all()
    y = form.add_norm(x, None, torch.ones(64, dtype=torch.bfloat16), 1e-5)[1]
    assert y[0, 7].isnan()
    assert y[1:].isfinite().all()


def test_they_compile(tmp_path: Path) -> None:
    """For a GPU that need not be here: the interpreter takes more than the compiler does."""
    script = Path(__file__).parents[1] / "benchmarks/sass.py"
    names = ["rotate_and_store", "attend", "product_int8 w1w3 B=4", "product_int4 w1w3 B=1"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(script), "--arch", "80", "--only", *names]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    rows = json.loads(out.splitlines()[-1])["kernels"]
    assert len(rows) == len(names) + 1  # attend and what combines its parts
    for row in rows:
        assert row["spilled"] == 0
        assert row["I2F"] == 0
        assert row["wide_loads"] or row["kernel"] == "_rotate_and_store"


@pytest.mark.parametrize(("capability", "may"), [((8, 9), False), ((9, 0), True), ((10, 0), True)])
def test_which_gpus_overlap_kernels(
    capability: tuple[int, int], may: bool, interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Hopper on. The interpreter on a CPU has neither that nor multiprocessors, and takes those of an H200."""
    device = torch.device("cpu")
    assert (interpreted.processor_count(device), interpreted.overlaps(device)) == (132, False)
    properties = SimpleNamespace(multi_processor_count=108)
    for function in (interpreted.processor_count, interpreted.overlaps):
        monkeypatch.setattr(interpreted, function.__name__, function.__wrapped__)
    monkeypatch.setattr(interpreted, "device_kind", lambda _: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert interpreted.processor_count(device) == 108
    options = {"enable_fp_fusion": True, "num_warps": 2, "launch_pdl": may, "OVERLAP": may}
    assert interpreted.launching(device, 2) == options


def test_each_program_waits_and_lets_the_next_kernel_start(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once each. Where kernels overlap, a program that did not wait would read what the one before has not written."""
    waits, starts = [], []
    monkeypatch.setattr(interpreted, "gdc_wait", lambda: waits.append(1))
    monkeypatch.setattr(interpreted, "gdc_launch_dependents", lambda: starts.append(len(waits)))
    monkeypatch.setattr(interpreted, "launching", lambda *_: {"OVERLAP": True})
    x, long = numbers(1, 64, dtype=torch.float16), numbers(1, 1, 16, dtype=torch.float16)
    keys = cache(1, 200, 1, 16, torch.float16)
    n, *groups = to_int4(numbers(4, 64), 32)
    for programs, run in (
        (2, lambda: interpreted.add_norm(x.view(2, 32), None, x[0, :32], 1e-5)),
        (3, lambda: interpreted.rotate_and_store(x[:, :48], torch.ones(4, 8, 2), torch.tensor([0]), keys, keys)),
        (1, lambda: interpreted.attend(long, keys[:, :64], keys[:, :64], torch.tensor([9]), 1)),
        (5, lambda: interpreted.attend(long, keys, keys, torch.tensor([199]), 1)),  # four parts, and what adds them up
        (2, lambda: interpreted.silu_mul(x.view(2, 32))),
        (1, lambda: interpreted.product(x, x.view(4, 16).repeat(1, 4))),
        (9, lambda: interpreted.product(x.view(2, 32), numbers(2, 32, dtype=torch.float16))),  # eight, and so on
        (1, lambda: interpreted.dequantize_int4(pairs(n), *groups, torch.float16)),
    ):
        waits.clear(), starts.clear()
        run()
        assert len(waits) == len(starts) == programs


def all_results(made: ModuleType, dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    """Of every kernel, for shapes that fill no block."""
    q, keys, values = numbers(2, 6, 48, dtype=dtype), cache(2, 130, 2, 48, dtype, 1), cache(2, 130, 2, 48, dtype, 2)
    places, written = torch.tensor([129, 70]), [cache(2, 9, 2, 48, dtype, seed) for seed in (3, 4)]
    found = [
        *made.add_norm(x := numbers(3, 96, dtype=dtype), x, x[0], 1e-5),
        made.rotate_and_store(numbers(2, 480, dtype=dtype), numbers(9, 24, 2), torch.tensor([8, 3]), *written),
        *written, made.attend(q, keys, values, places, 1), made.attend(q, keys, values, places, 132),
        made.silu_mul(numbers(3, 154, dtype=dtype)),
    ]  # fmt: skip
    int4 = to_int4(numbers(10, 96), 32)
    int8 = to_int8(weight := numbers(10, 96), row_maxima(weight))
    found.append(made.dequantize_int4(pairs(int4[0]), *int4[1:], dtype))
    for rows, gated in ((1, True), (3, False)):
        x = numbers(rows, 96, dtype=dtype)
        found.append(made.product(x, weight.to(dtype), gated))
        found.append(made.product_int8(x, *int8, gated))
        found.append(made.product_int4(x, pairs(int4[0]), *int4[1:], gated))
    return found


def test_programs_write_no_results_of_others(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU they run in any order, here from the first to the last: also backwards it must come to the same."""
    from triton.runtime import interpreter

    builder, expected = interpreter.interpreter_builder, all_results(interpreted)
    place = builder.set_grid_idx
    backwards = lambda *at: place(*(n - 1 - i for n, i in zip(builder.grid_dim, at)))  # noqa: E731
    monkeypatch.setattr(builder, "set_grid_idx", backwards)
    for found, other in zip(all_results(interpreted), expected):
        assert torch.equal(found, other)


def test_under_inference_mode(form: Any) -> None:
    with torch.inference_mode():
        x, weight = numbers(1, 32, dtype=torch.bfloat16), numbers(4, 32, dtype=torch.bfloat16)
        close(form.product(x, weight), references(x, weight, False), 1)
        c = cache(1, 4, 1, 16, torch.bfloat16)
        q = form.rotate_and_store(
            numbers(1, 48, dtype=torch.bfloat16), torch.ones(4, 8, 2), torch.tensor([0]), c, c.clone()
        )
        assert form.attend(q, c, c, torch.tensor([0])).shape == (1, 16)
