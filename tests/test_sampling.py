from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import chosen

from llama.decoding.sampling import Sampling, exponential_noise, multinomial_no_sync, sample_top_p

CPU = torch.device("cpu")


def next_token(logits: torch.Tensor, temperature: float, top_p: float, **options: Any) -> torch.Tensor:
    return chosen(logits, Sampling(temperature, top_p, **options))


PROBS = torch.tensor([[0.15, 0.5, 0.05, 0.3]])


def drawn(p: float, times: int = 400) -> set[int]:
    torch.manual_seed(0)
    return set(sample_top_p(PROBS.expand(times, 4), p).flatten().tolist())


@pytest.mark.parametrize(
    ("p", "kept"),
    [
        (0.0, {1}),  # the best one always stays
        (0.4, {1}),
        (0.7, {1, 3}),  # the one that crosses p stays
        (0.81, {1, 3, 0}),  # the mass before the third is .8, which is not more than p
        (0.9, {1, 3, 0}),
        (1.0, {0, 1, 2, 3}),
        (2.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_by_hand(p: float, kept: set[int]) -> None:
    assert drawn(p) == kept


def test_kept_tokens_keep_their_proportions() -> None:
    torch.manual_seed(0)
    ids = sample_top_p(PROBS.expand(40_000, 4), 0.7).flatten()
    # .5 : .3 -> 5/8; four standard deviations of 40,000 draws are .0097
    assert (ids == 1).float().mean().item() == pytest.approx(5 / 8, abs=0.0097)


@pytest.mark.parametrize("seed", range(20))
def test_draws_are_torch_multinomials(seed: int) -> None:
    probs = torch.softmax(torch.randn(3, 500, generator=torch.Generator().manual_seed(seed)), dim=-1)
    torch.manual_seed(seed)
    expected = torch.multinomial(probs, 1)
    after = torch.get_rng_state()
    torch.manual_seed(seed)
    assert torch.equal(multinomial_no_sync(probs, exponential_noise(3, 500, CPU)), expected)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("p", [-1.0, float("nan")])
def test_a_mass_that_is_none(p: float) -> None:
    with pytest.raises(ValueError, match="must be a number of 0 or more"):
        sample_top_p(PROBS, p)


def test_the_input_stays() -> None:
    probs = PROBS.clone()
    sample_top_p(probs, 0.5)
    assert torch.equal(probs, PROBS)


def test_temperature() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]]).expand(2000, 3)
    torch.manual_seed(0)
    assert next_token(logits, 0.0, 0.9).unique().tolist() == [1]
    assert next_token(logits, 1e-45, 1.0).unique().tolist() == [1]  # Meta's code divides to infinity here
    warm = next_token(logits, 1.0, 1.0).bincount(minlength=3) / 2000
    torch.testing.assert_close(warm, torch.softmax(logits[0], 0), atol=0.05, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_marked(temperature: float, bad: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    ids = next_token(logits, temperature, 0.9).tolist()
    assert ids[0] >= 0
    assert ids[1] == -1


@pytest.mark.parametrize("value", [-0.1, float("nan"), None, "1", True])
def test_bad_options(value: float) -> None:
    with pytest.raises(ValueError, match="temperature=.* must be a number of 0 or more"):
        Sampling(value, 0.9)
    with pytest.raises(ValueError, match="top_p=.* must be a number of 0 or more"):
        Sampling(0.5, value)
    with pytest.raises(ValueError, match="temperature=inf"):
        Sampling(float("inf"), 0.9)
