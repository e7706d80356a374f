"""The product of activations and a matrix, in each order that it is computed in."""

from __future__ import annotations

import pytest
import torch

from llama.layers import products
from llama.model import FeedForward


@pytest.fixture(params=[True, False], ids=["tiles", "no tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """As on a processor that multiplies tiles, and as on one that does not: both compute anywhere."""
    monkeypatch.setattr(products, "AMX", request.param)
    return request.param


def assert_near(y: torch.Tensor, exact: torch.Tensor) -> None:
    """Within what rounding the result to bfloat16 does, and the sums' order."""
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= 2**-8 * exact.abs() + 2e-4 * exact.std()).all()


@pytest.mark.parametrize("any_order", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2,), (3, 1), (128,), (3, 50), (2, 400)])
def test_products(shape: tuple[int, ...], any_order: bool, tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "WIDE", 96)
    weight = torch.randn(96, 160).bfloat16()
    x = torch.randn(*shape, 160).bfloat16()
    exact = x.double() @ weight.double().t()
    y = products.product(x, weight, any_order)
    assert any_order or y.is_contiguous()
    assert_near(y, exact)
    # What has its features together is multiplied as it is.
    turned = x.reshape(-1, 160).t().contiguous().t().view(x.shape)
    assert_near(products.product(turned, weight, any_order), exact)


def test_other_numbers_are_left_to_torch(tiles: bool) -> None:
    for dtype in (torch.float32, torch.float16):
        weight, x = torch.randn(96, 160).to(dtype), torch.randn(3, 160).to(dtype)
        assert torch.equal(products.product(x, weight, any_order=True), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("summed", [159, 160])
@pytest.mark.parametrize("rows", [1, 3])
def test_products_in_a_graph(rows: int, summed: int, tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SUMMED", summed)
    weight, x = torch.randn(97, 160).bfloat16(), torch.randn(rows, 1, 160).bfloat16()  # of no even number of rows
    compiled = torch.compile(products.product, backend="aot_eager", fullgraph=True)
    assert_near(compiled(x, weight), x.double() @ weight.double().t())


@pytest.mark.parametrize("rows", [1, 5, 200, 700])
def test_feed_forward_in_either_order(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate goes on in the order that it comes in; the result is what the other order gives."""
    monkeypatch.setattr(products, "WIDE", 64)
    layer = FeedForward(64, 256, 32, None).bfloat16()
    x = torch.randn(1, rows, 64).bfloat16()
    results, orders = [], []
    layer.w2.register_forward_pre_hook(lambda _, inputs: orders.append(products.is_by_feature(inputs[0])))
    for tiles in (True, False):
        monkeypatch.setattr(products, "AMX", tiles)
        with torch.no_grad():
            results.append(layer.run(x).float())
    assert orders == [1 < rows <= products.MANY, False]
    torch.testing.assert_close(*results, atol=0.02 * float(results[1].std()), rtol=2**-6)
