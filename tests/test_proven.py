"""The proof of a kernel at its first use for a shape, on the emulated GPU: what is wrong is found, wherever it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Optional

import pytest
import torch
from emulated_cuda import Machine, StandIns, emulated

from llama.layers import kernels, proven
from llama.layers.proven import is_near, vectors_are_near
from llama.layers.rounding import pairs, to_int4

DTYPES = (torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan


class Triton(StandIns):
    """Kernels of which each test replaces some."""


@pytest.fixture
def triton() -> Triton:
    return Triton()


@pytest.fixture
def machine(triton: Triton) -> Iterator[Machine]:
    with emulated(triton=triton) as machine:
        yield machine


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def there(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers on the emulated GPU."""
    return numbers(*shape, dtype=torch.bfloat16, seed=seed).to("emulated")


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, device="emulated")


@pytest.mark.parametrize(
    ("capability", "dtype", "usable"),
    [((8, 0), torch.bfloat16, True), ((9, 0), torch.float16, True), ((7, 5), torch.float16, False),
     ((9, 0), torch.float32, False)],
)  # fmt: skip
def test_where_kernels_are_used(capability: tuple[int, int], dtype: torch.dtype, usable: bool) -> None:
    """On NVIDIA GPUs from capability 8.0 on, in 16 bits."""
    with emulated(capability=capability), pytest.MonkeyPatch.context() as patch:
        x = torch.ones(2, dtype=dtype).to("emulated")
        assert proven.usable(x) == proven.usable(x.float(), dtype) == usable
        assert not proven.usable(torch.ones(2, dtype=dtype))
        patch.setattr(torch.version, "hip", "6.0")
        assert not proven.usable(x)
    with emulated(triton=None):
        assert not proven.usable(torch.ones(2, dtype=dtype).to("emulated"))


def test_each_shape_is_proven_once(
    machine: Machine, triton: Triton, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers of rows up to the next power of two share a proof. A kernel that fails for one shape runs for others."""
    proofs: list[Any] = []
    compare = proven.Proven._compare
    monkeypatch.setattr(
        proven.Proven,
        "_compare",
        lambda self, fast, args, *more: proofs.append(args) or compare(self, fast, args, *more),
    )

    def proofs_of(function: Callable[..., Any], *args: Any, **options: Any) -> int:
        proofs.clear()
        for _ in range(2):
            function(*args, **options)
        return len(proofs)

    assert [proofs_of(proven.silu_mul, there(rows, 16)) for rows in (1, 2, 3, 4, 5, 8, 7)] == [1, 1, 1, 0, 1, 0, 0]
    assert proofs_of(proven.silu_mul, there(4, 8)) == 1
    weight = there(6, 16)
    assert proofs_of(proven.product, there(2, 16), weight) == 1
    assert proofs_of(proven.product, there(2, 16), there(4, 16)) == 1
    assert proofs_of(proven.product, there(2, 16), there(16, 6).T) == 1
    assert proofs_of(proven.product, there(2, 16), weight, gated=True) == 1
    int4, *groups = (tensor.to("emulated") for tensor in to_int4(numbers(4, 32), 16))
    for dtype in DTYPES:
        assert proofs_of(proven.dequantize_int4, pairs(int4), *groups, dtype) == 1

    def wrong_if_gated(x: torch.Tensor, weight: torch.Tensor, gated: bool = False) -> torch.Tensor:
        return kernels.product(x, weight, gated) * (2 if gated else 1)

    triton.product = wrong_if_gated  # type: ignore[attr-defined]
    assert not proven.product.refused
    x, weight = there(2, 32), there(8, 32)
    for gated in (True, False):
        assert torch.equal(proven.product(x, weight, gated=gated).cpu(), kernels.product(x, weight, gated).cpu())
        assert proven.product.refused
    assert capsys.readouterr().out.count("it gives other numbers") == 1


def is_refused(name: str, *args: Any) -> bool:
    """Whether a kernel is refused at its first use, in which the plain form's numbers come then."""
    function: proven.Proven = getattr(proven, name)
    function._verdicts.clear()
    found = function.results(function, args, {})
    for ours, plain in zip(found, function.results(function.plain, args, {})):
        assert torch.equal(ours.cpu(), plain.cpu())
    return function.refused


def test_what_is_told_of_a_wrong_kernel(
    machine: Machine, triton: Triton, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, which shows no control characters; of another process than the first on stderr, as its stdout is
    silent."""

    def broken(gate_up: torch.Tensor) -> Any:
        raise RuntimeError("PassManager\x1b::run failed\nand a long story\nand more")

    triton.silu_mul = broken  # type: ignore[attr-defined]
    told = (
        "The kernel silu_mul is not used here, torch's own run in its place: RuntimeError: PassManager\\x1b::run "
        "failed\n"
    )
    assert is_refused("silu_mul", there(3, 8))
    assert tuple(capsys.readouterr()) == (told, "")
    monkeypatch.setattr(proven, "is_first_process", lambda: False)
    assert is_refused("silu_mul", there(3, 8))
    assert tuple(capsys.readouterr()) == ("", told)


@pytest.mark.parametrize("slots", [(), (3, 1)])
@pytest.mark.parametrize("wrong", [None, "q", "k", "v"])
def test_each_result_of_a_kernel_is_compared(
    wrong: Optional[str], slots: tuple[int, ...], machine: Machine, triton: Triton
) -> None:
    """What it returns, and for rotate_and_store the keys and values that it writes, into the slots that are named."""

    def turn(*args: Any) -> torch.Tensor:
        q = kernels.rotate_and_store(*args)
        positions, k, v = args[2:5]
        rows = args[5] if len(args) > 5 else ids(0, 1)
        for cache in {"k": [k], "v": [v]}.get(wrong or "", []):
            cache[rows, positions] = cache[rows, positions] * 1.1
        return q * 1.1 if wrong == "q" else q

    triton.rotate_and_store = turn  # type: ignore[attr-defined]
    table, caches = numbers(9, 4, 2).to("emulated"), (there(4, 9, 1, 8), there(4, 9, 1, 8))
    args = there(2, 32), table, ids(8, 3), *caches, *([ids(*slots)] if slots else [])
    assert is_refused("rotate_and_store", *args) == (wrong is not None)


@pytest.mark.parametrize("place", [0, 63, 64, 99, 149, 199])
def test_attention_is_proven_all_over_the_cache(place: int, machine: Machine, triton: Triton) -> None:
    """Wherever the first queries stand: at both ends of the cache, about the end of a block of keys, and between."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return kernels.attend(q, k, v, positions) * (positions != place)[:, None]

    triton.attend = attend  # type: ignore[attr-defined]
    assert is_refused("attend", there(1, 2, 16), there(4, 200, 1, 16), there(4, 200, 1, 16), ids(5))


@pytest.mark.parametrize(("rows", "slots"), [(1, ()), (1, (0,)), (4, ()), (4, (3, 1, 0))])
def test_attention_is_proven_on_random_numbers(
    rows: int, slots: tuple[int, ...], machine: Machine, triton: Triton
) -> None:
    """Two rows of a cache that lies as the given one does, with slots if some are given. The generator that others draw
    from stays as it was."""
    seen: list[Any] = []

    def attend(*args: Any) -> torch.Tensor:
        seen.append(args)
        return kernels.attend(*args)

    def without_slots(*args: Any) -> torch.Tensor:
        return kernels.attend(*args[:4])

    state, queries = torch.get_rng_state(), len(slots) or 1
    caches = [there(rows, 1, 10, 16, seed=seed).transpose(1, 2) for seed in (1, 2)]
    args = there(queries, 2, 16), *caches, ids(*[5] * queries), *([132, ids(*slots)] if slots else [])
    triton.attend = attend  # type: ignore[attr-defined]
    assert not is_refused("attend", *args)
    assert len(seen) > 2
    for q, k, v, positions, *more in seen[:-1]:
        assert len(k) == len(v) == len(q) == len(positions) == min(rows, 2)
        assert (k.dtype, k.stride()) == (v.dtype, v.stride()) == (q.dtype, caches[0].stride())
        assert [len(chosen) for chosen in more[1:]] == [len(q)] * bool(slots)
    triton.attend = without_slots  # type: ignore[attr-defined]
    assert is_refused("attend", *args) == (rows > 1 and bool(slots))
    assert torch.equal(torch.get_rng_state(), state)


def test_few_rows_of_a_large_matrix_are_multiplied(
    machine: Machine, triton: Triton, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those at the beginning of each half, which are w1 and w3 where a product is gated."""
    monkeypatch.setattr(proven, "SAMPLED", 4)
    seen: list[torch.Tensor] = []

    def product(x: torch.Tensor, weight: torch.Tensor, gated: bool = False) -> torch.Tensor:
        seen.append(weight.cpu())
        return kernels.product(x, weight, gated)

    triton.product = product  # type: ignore[attr-defined]
    large = there(20, 16)
    assert not is_refused("product", there(2, 16), large)
    assert torch.equal(seen[0], torch.cat((large.cpu()[:4], large.cpu()[10:14])))
    seen.clear()
    assert not is_refused("product", there(2, 16), there(7, 16))
    assert [len(weight) for weight in seen] == [7, 7]


@pytest.mark.parametrize("gated", [False, True])
def test_a_cpu_runs_the_plain_forms(gated: bool) -> None:
    x, weight = numbers(3, 16, dtype=torch.bfloat16), numbers(8, 16, dtype=torch.bfloat16, seed=1)
    assert torch.equal(proven.product(x, weight, gated=gated), kernels.product(x, weight, gated=gated))
    assert not proven.product.refused


def test_what_is_near() -> None:
    """A kernel's numbers one by one; a step's by vectors, of whose millions of numbers some lie far away."""
    exact = numbers(512, 4096)
    noise = numbers(512, 4096, seed=1) * 0.08
    assert not is_near(exact + noise, exact, 0.1)
    assert vectors_are_near(exact + noise, exact, 0.1)
    for wrong in (exact.roll(1, 0), exact.clone().index_fill_(0, torch.tensor([5]), 0.0), exact * 1.3):
        assert not vectors_are_near(wrong, exact, 0.1)
    exact[3, 7] = NAN
    assert vectors_are_near(exact, exact, 0.1)
    assert not vectors_are_near(exact.nan_to_num(), exact, 0.1)
    assert not vectors_are_near(exact.clone().index_fill_(0, torch.tensor([5]), INF), exact, 0.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_may_be_four_steps_of_itself_and_four_of_the_spread_away(dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).eps
    ones, bound = torch.ones(4096), proven.KERNEL_TOLERANCE[dtype]
    assert is_near(ones + 8 * step, ones, bound)
    assert not is_near(ones + 9 * step, ones, bound)


def test_a_vector_may_be_a_share_of_its_length_away() -> None:
    exact = torch.ones(4, 64)
    assert vectors_are_near(exact * 1.1, exact, 0.101)
    assert not vectors_are_near(exact * 1.1, exact, 0.099)


@pytest.mark.parametrize("compare", [is_near, vectors_are_near])
def test_what_is_infinite_or_large_is_near_to_its_like_alone(compare: Any) -> None:
    """A bound of infinity once made every number near: from an infinite number, or from the square of a large one."""
    for found, expected, near in (
        (INF, INF, True), (-INF, INF, False), (5.0, INF, False), (INF, 5.0, False), (NAN, INF, False),
        (INF, NAN, False),
        (0.0, 0.0, True), (3e38, 3e38, True), (-3e38, 3e38, False), (5.0, 3e38, False), (3e38, 5.0, False),
    ):  # fmt: skip
        others = numbers(1, 8) if expected else torch.zeros(1, 8)  # a vector of nothing but zeros is near to itself
        pair = (torch.cat((others, torch.tensor([[x]])), 1) for x in (found, expected))
        assert compare(*pair, 0.1) == near, (found, expected)


def test_kernels_are_compared_with_what_is_not_rounded() -> None:
    """Attention in bfloat16 loses more by its plain form than by the kernel, which was refused for that on a GPU."""
    q = numbers(2, 8, 64, dtype=torch.bfloat16)
    k, v = (numbers(2, 600, 8, 64, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    places = torch.tensor([599, 300])
    (exact,) = proven.attend.exact((q, k, v, places), {})
    assert exact.dtype == torch.float32
    torch.testing.assert_close(exact, kernels.attend(q.double(), k.double(), v.double(), places).float())
