"""Logits -> the next id."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Optional

import torch

from ..runtime import to_device
from ..system.checks import real, whole, whole_number
from ..system.printable import shortened

# Logits, of some hundreds at most, stay finite in float32 under all three.
LEAST_TEMPERATURE = 1e-20  # picks the best id only; lower temperatures are raised to it
MOST_PENALTY = 1e10
MOST_BIAS = 1e10
FORBIDDING = 1e30  # an id whose logit is lowered by more is never drawn


@dataclass(frozen=True)
class Sampling:
    """How the next id is chosen. ValueError where a number is out of range.

    temperature: 0 takes the best id; above it ids are drawn, the more freely the higher it is. What may be drawn:
    top_k: one of the k best (0: of all). top_p: one of the fewest best whose mass exceeds p (Holtzman et al. 2020).
    min_p: one at least this share as probable as the best (Nguyen et al. 2024). They apply in this order, each to the
    distribution that the one before it left.
    repetition_penalty: logits of ids that the row has already, prompt included, are divided by it where positive and
    multiplied where negative (Keskar et al. 2019), from 1e-10 to 1e10. logit_bias: id -> what is added to its logit, at most
    1e10, -inf to forbid it.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Optional[Mapping[int, float]] = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "min_p", "repetition_penalty")}
        for name, value in given.items():
            number = real(value)
            if number is None or number < 0:
                raise ValueError(f"{name}={shortened(value)} must be a number of 0 or more")
            object.__setattr__(self, name, number)  # a number of Python, whatever type it came in
        if math.isinf(self.temperature):
            raise ValueError("temperature=inf has no distribution; use a finite number")
        if self.top_p > 1:
            raise ValueError(f"top_p={given['top_p']} must be at most 1, which keeps all ids")
        if self.min_p > 1:
            raise ValueError(f"min_p={given['min_p']} must be at most 1, which keeps the best id only")
        if not 1 / MOST_PENALTY <= self.repetition_penalty <= MOST_PENALTY:
            limits = f"above 0, from {1 / MOST_PENALTY:g} to {MOST_PENALTY:g}"
            raise ValueError(f"repetition_penalty={given['repetition_penalty']} must be {limits}; 1 does nothing")
        object.__setattr__(self, "top_k", whole_number("top_k", self.top_k, 0))
        if isinstance(self.logit_bias, Mapping):  # sorted by id; `bias` refuses what is not a number
            pairs = [(whole(token), real(value)) for token, value in self.logit_bias.items()]
            if all(token is not None and value is not None for token, value in pairs):
                object.__setattr__(self, "logit_bias", dict(sorted(pairs)))

    def bias(self, vocab_size: int, device: torch.device) -> Optional[torch.Tensor]:
        """`logit_bias` as float32 (vocab_size,), or None."""
        if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias={shortened(self.logit_bias)} must map ids to what is added to their logits")
        if not self.logit_bias:
            return None
        bias = torch.zeros(vocab_size, dtype=torch.float32, device="cpu")
        for token, value in self.logit_bias.items():
            place, number = whole(token), real(value)
            if place is None:
                told = f"logit_bias has the key {shortened(token)}, a {type(token).__name__}"
                raise ValueError(f"{told}; ids are whole numbers, as in logit_bias={{29871: -1.5}}")
            if not 0 <= place < vocab_size:
                raise ValueError(f"logit_bias has the id {shortened(token)}; ids go from 0 to {vocab_size - 1}")
            if number is None or number > MOST_BIAS:
                told = f"logit_bias[{place}]={shortened(value)}"
                raise ValueError(f"{told} must be a number of at most {MOST_BIAS:g}, or -inf to forbid the id")
            bias[place] = number if number >= -FORBIDDING else -math.inf
        if bias.max() < -MOST_BIAS:
            raise ValueError("logit_bias forbids every id of the vocabulary; leave at least one")
        return to_device(bias, device)


def exponential_noise(
    rows: int, vocab_size: int, device: torch.device, generator: Optional[torch.Generator] = None
) -> torch.Tensor:
    """What `torch.multinomial` on (rows, vocab_size) probabilities would draw, and as much of the generator's state."""
    return torch.empty(rows, vocab_size, dtype=torch.float32, device=device).exponential_(1, generator=generator)


def multinomial_no_sync(probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw one column of each row, (B, V) -> (B, 1): with noise from `exponential_noise` the draws are those of
    `torch.multinomial(probs, 1)`, without its checks, which make the host wait for the device."""
    return (probs / noise).argmax(dim=-1, keepdim=True)


def keep_top_p(sorted_probs: torch.Tensor, p: float) -> torch.Tensor:
    """Zero what stands behind the token that crosses `p`: the first always stays. Descending (B, V), not renormalised."""
    mass_before = torch.cumsum(sorted_probs, dim=-1) - sorted_probs
    return sorted_probs.masked_fill(mass_before > p, 0.0)


def sample_top_p(probs: torch.Tensor, p: float) -> torch.Tensor:
    """Nucleus sampling: draw from the fewest most probable tokens whose mass exceeds `p`. Float32 (B, V) -> int64 (B, 1)."""
    if not p >= 0:  # NaN too
        raise ValueError(f"p={p} must be a number of 0 or more")
    sorted_probs, ids = torch.sort(probs, dim=-1, descending=True)
    sorted_probs = keep_top_p(sorted_probs, p)
    sorted_probs /= sorted_probs.sum(dim=-1, keepdim=True)
    return ids.gather(-1, multinomial_no_sync(sorted_probs, exponential_noise(len(probs), probs.shape[-1], probs.device)))


def next_token(
    logits: torch.Tensor,
    sampling: Sampling,
    noise: Optional[torch.Tensor] = None,
    seen: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """The next id of each row, int64 (B,); -1 where one of a row's logits is not finite.

    logits float32 (B, V); noise (B, V) from `exponential_noise`, for temperatures above 0; seen bool (B, V), the ids
    that a row has already, for a repetition penalty; bias (V,) or None.
    """
    finite = logits.sum(dim=-1).isfinite()  # a sum of numbers that are not is none either
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if bias is not None:
        logits = logits + bias
    if sampling.temperature == 0 or noise is None:
        return logits.argmax(dim=-1).where(finite, -1)
    probs = torch.softmax(logits / max(sampling.temperature, LEAST_TEMPERATURE), dim=-1)
    sorted_probs, ids = torch.sort(probs, dim=-1, descending=True)
    if 0 < sampling.top_k < sorted_probs.shape[-1]:
        sorted_probs[:, sampling.top_k :] = 0.0
        sorted_probs /= sorted_probs.sum(dim=-1, keepdim=True)
    sorted_probs = keep_top_p(sorted_probs, sampling.top_p)
    if sampling.min_p > 0:
        sorted_probs = sorted_probs.masked_fill(sorted_probs < sampling.min_p * sorted_probs[:, :1], 0.0)
    sorted_probs /= sorted_probs.sum(dim=-1, keepdim=True)
    return ids.gather(-1, multinomial_no_sync(sorted_probs, noise)).squeeze(-1).where(finite, -1)
