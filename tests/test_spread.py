"""The measures of weights, beside torch's of whole tensors, and what counts as unusual, at its bounds."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, Optional

import pytest
import torch

from llama.verification import spread
from llama.verification.results import FAIL, PASS
from llama.verification.spread import LONE_LAYER, LONE_ROW, LONE_SPREAD, MATRICES, NORMS, Spread

INF, NAN = math.inf, math.nan


def measured(weight: torch.Tensor, dim: Optional[int] = None, parts: int = 1) -> tuple[Spread, list[list[int]]]:
    """A weight that lies in some parts, and the shapes of the pieces whose memory was given back."""
    released: list[list[int]] = []
    whole = 1 if dim is None else weight.shape[dim]
    checkpoint: Any = SimpleNamespace(
        parts=lambda *place: {("w", dim, 0, whole): weight.chunk(parts, dim or 0)}[place],
        mapped=SimpleNamespace(release=lambda piece: released.append(list(piece.shape))),
    )
    return spread._measure(checkpoint, "w", list(weight.shape), dim), released


@pytest.mark.parametrize(
    ("shape", "dim", "parts", "pieces"),
    [
        ((7, 4), 0, 1, [[2, 4], [2, 4], [2, 4], [1, 4]]),
        ((6, 4), 0, 2, [[2, 4], [1, 4]] * 2),
        ((5, 12), 1, 2, [[1, 6]] * 10),
        ((3, 20), 0, 1, [[1, 20]] * 3),  # a row may be longer than a piece
        ((2, 3, 4), 0, 1, [[1, 3, 4]] * 2),
        ((19,), None, 1, [[8], [8], [3]]),
    ],
)
def test_measures(
    shape: tuple[int, ...], dim: Optional[int], parts: int, pieces: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "PIECE_NUMBERS", 8)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    found, released = measured(weight, dim, parts)
    rows = weight.reshape(-1, shape[-1]) if len(shape) > 1 else weight[:, None]
    assert torch.equal(found.low, rows.amin(1))
    assert torch.equal(found.high, rows.amax(1))
    assert found.mean == pytest.approx(weight.mean().item())
    assert found.std == pytest.approx(weight.std(correction=0).item())
    assert found.is_matrix == (len(shape) > 1)
    assert [piece if len(shape) > 1 else piece[:1] for piece in released] == pieces


def test_rounding_makes_no_spread_of_equal_numbers() -> None:
    """Their squares may add up to a little less than the square of their mean."""
    for number in (0.1, 0.3, 0.7):
        assert measured(torch.full((3, 7), number))[0].std == pytest.approx(0, abs=1e-3)


def made(name: str = "layers.0.attention.wq.weight", rows: Any = (1.0, 1.0, 1.0), **other: Any) -> Spread:
    """Rows whose numbers go from minus to plus what is given."""
    high = torch.tensor(rows)
    matrix = "norm" not in name
    return Spread(name, -high, high, **{"mean": 1.0, "std": 1.0, "is_matrix": matrix, **other})


def unusual(*spreads: Spread) -> str:
    return "; ".join(spread._unusual(spreads))


def test_numbers_that_are_not_finite() -> None:
    """The first row that has some, and how many more there are."""
    for row in ((0.0, NAN), (NAN, 0.0)):
        low, high = (torch.tensor([0.0, 0.0, number, 0.0, 0.0]) for number in row)
        assert list(spread._not_finite(made()._replace(low=low, high=high))) == [
            "layers.0.attention.wq.weight has NaN in row 2"
        ]
    several = made(rows=(0.0, INF, 0.0, INF))
    assert list(spread._not_finite(several)) == ["layers.0.attention.wq.weight has infinity in row 1 and 1 more row"]
    assert list(spread._not_finite(several._replace(high=torch.zeros(4)))) == [
        "layers.0.attention.wq.weight has infinity in row 1 and 1 more row"
    ]


def test_a_row_far_beyond_the_others() -> None:
    for name, place in (("layers.0.attention.wq.weight", "row"), ("norm.weight", "entry")):
        assert unusual(made(name, (1.0, 0.5, LONE_ROW))) == ""
        found = unusual(made(name, (1.0, 0.5, LONE_ROW * 1.01)))
        assert found.startswith(f"{name} has 8.08 in {place} 2, and no other {place} goes beyond 1: one bit of an")
        assert unusual(made(name, (0.0, 3.0, 0.0))).endswith(f"no other {place} goes beyond 0: all others are zeros")
    assert unusual(made(rows=(1.0, 99.0))) == ""  # of two rows nothing tells which is unusual


def test_bounds_of_norms_and_matrices() -> None:
    for bound, inside in zip(NORMS, (1.01, 0.99)):
        assert unusual(made("norm.weight", mean=bound * inside)) == ""
        assert "the mean of norm.weight is" in unusual(made("norm.weight", mean=bound))
    for bound, inside in zip(MATRICES, (1.01, 0.99)):
        assert unusual(made(std=bound * inside)) == ""
        assert "the standard deviation of layers.0.attention.wq.weight is" in unusual(made(std=bound))
        assert unusual(made("layers.0.attention.wq.scales", std=bound)) == ""


def test_rows_of_one_number() -> None:
    """In the vocabulary up to half of them belong to ids that nothing uses."""
    for name, rows, told in (
        ("output.weight", (0.0, 0.0, 1.0, 1.0), ""),
        ("output.weight", (0.0, 0.0, 0.0, 1.0, 1.0), "3 of 5 rows of output.weight are the same number throughout"),
        ("layers.0.attention.wq.weight", (0.0, 1.0, 1.0), "1 of 3 rows of layers.0.attention.wq.weight are the same"),
    ):
        assert unusual(made(name, rows))[: len(told) or None] == told


def test_a_layer_unlike_the_others() -> None:
    names = [f"layers.{i}.attention.wq.weight" for i in range(3)]
    others = [made(name) for name in names[1:]]
    for size, told in ((1.0, ""), (1.01, f"{names[0]} goes to 64.6, and those of other layers to 1")):
        rows = (LONE_LAYER * size,) * 3
        assert unusual(made(names[0], rows), *others) == told
    inside, outside = 0.9 * LONE_SPREAD, LONE_SPREAD
    others = [made(name, std=0.5) for name in names[1:]]
    for std in (0.5 * inside, 0.5 / inside):
        assert unusual(made(names[0], std=std), *others) == ""
    for std in (0.5 * outside, 0.5 / outside):
        assert "has a standard deviation of" in unusual(made(names[0], std=std), *others)
        assert unusual(made(names[0], std=std), *others[1:]) == ""  # of two layers nothing tells which is unusual
    norms = [made(f"layers.{i}.ffn_norm.weight", std=0.01) for i in range(3)]
    assert unusual(norms[0]._replace(std=1.0), *norms[1:]) == ""  # what spreads in a norm is no matter


def test_in_words() -> None:
    """Scales and biases have no part in it."""
    weights = [
        made("tok_embeddings.weight", (0.0, 1.0), std=0.5), made("layers.0.attention.wq.weight", std=2.0),
        made("layers.0.attention.wq.scales", std=9.0), made("norm.weight", mean=3.0),
        made("layers.0.ffn_norm.weight", mean=2.0), made("layers.0.wq.bias", mean=9.0, is_matrix=False),
    ]  # fmt: skip
    assert spread._in_words(weights) == (
        "matrices have standard deviations from 0.5 to 2, norms have means from 2 to 3; 1 row of unused ids"
    )
    assert spread._in_words(weights[3:5]) == "norms have means from 2 to 3"


def test_the_results(bars: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """How many numbers there are; tensors of integers, and without numbers, are not read. The first four faults."""
    weight, norm = torch.tensor([[1.0, 2, 3], [4, 5, 6]]), torch.ones(3)
    tensors = {f"layers.{i}.attention.wq.weight": weight for i in range(6)} | {
        "n.zeros": torch.empty(3, 0), "n.weight": torch.ones(2, 3, dtype=torch.int8), "norm.weight": norm,
    }  # fmt: skip
    plan = {name: (list(tensor.shape), 0 if tensor.ndim > 1 else None, 1) for name, tensor in tensors.items()}
    monkeypatch.setattr(spread, "cut", lambda _: plan)
    checkpoint: Any = SimpleNamespace(
        dtypes={name: tensor.dtype for name, tensor in tensors.items()},
        parts=lambda name, *_: [tensors[name]],
        mapped=SimpleNamespace(release=lambda _: None),
    )
    model: Any = None
    finite, usual = spread.check_weights(checkpoint, model)
    assert [(bar.n, bar.total, bar.desc, bar.unit) for bar in bars] == [(8, 8, "Weights", "tensor")]
    assert (finite.verdict, finite.told) == (PASS, "39 numbers in 7 tensors; 1 tensor of integers left out")
    assert usual.verdict == PASS
    weight[1, 1] = NAN
    (finite,) = spread.check_weights(checkpoint, model)
    assert (finite.verdict, finite.told.count("has NaN in row 1"), finite.told[-11:]) == (FAIL, 4, " and 2 more")
    weight[1] = 0.0
    _, usual = spread.check_weights(checkpoint, model)
    assert (usual.verdict, usual.told.count("of 2 rows of"), usual.told[-11:]) == (FAIL, 4, " and 2 more")
