"""What a caller may say of how ids are chosen, checked, without torch: the terminal knows it before that is
imported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Optional

from ..system.checks import real, whole, whole_number
from ..system.printable import shortened

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "context"]

# Under these three limits logits, of some hundreds at most, stay finite in float32.
LEAST_TEMPERATURE = 1e-20  # picks the best id only; lower temperatures are raised to it
MOST_PENALTY = 1e10
MOST_BIAS = 1e10
FORBIDDING = 1e30  # an id whose logit is lowered by more is never drawn


@dataclass(frozen=True)
class Sampling:
    """How the next id is chosen. ValueError if a number is out of range.

    temperature: 0 takes the best id; above it ids are drawn, the more freely the higher it is. What may be drawn:
    top_k: one of the k best (0: of all). top_p: one of the fewest best whose mass exceeds p (Holtzman et al. 2020).
    min_p: one at least this share as probable as the best (Nguyen et al. 2024). They apply in this order, each to the
    distribution that the one before it left.
    repetition_penalty: logits of ids that the row has already, prompt included, are divided by it if positive and
    multiplied if negative (Keskar et al. 2019), from 1e-10 to 1e10. presence_penalty, frequency_penalty: what is
    subtracted from the logits of ids that were generated, once, and for each time (as OpenAI's API has them), from
    -1e10 to 1e10. logit_bias: id -> what is added to its logit, at most 1e10, -inf to forbid it.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
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
        for name in ("presence_penalty", "frequency_penalty"):
            number = real(getattr(self, name))
            if number is None or abs(number) > MOST_PENALTY:
                told = f"{name}={shortened(getattr(self, name))}"
                raise ValueError(f"{told} must be a number from {-MOST_PENALTY:g} to {MOST_PENALTY:g}; 0 does nothing")
            object.__setattr__(self, name, number)
        object.__setattr__(self, "top_k", whole_number("top_k", self.top_k, 0))
        if isinstance(self.logit_bias, Mapping):  # sorted by id; `check_bias` refuses what is not a number
            pairs = [(whole(token), real(value)) for token, value in self.logit_bias.items()]
            if all(token is not None and value is not None for token, value in pairs):
                object.__setattr__(self, "logit_bias", dict(sorted(pairs)))

    @property
    def counts_ids(self) -> bool:
        """Whether it matters which ids the row has."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def check_bias(self, vocab_size: int) -> None:
        """ValueError if `logit_bias` is wrong. Without torch: a server checks while another thread steps."""
        if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias={shortened(self.logit_bias)} must map ids to what is added to their logits")
        numbers = []
        for token, value in (self.logit_bias or {}).items():
            place, number = whole(token), real(value)
            if place is None:
                told = f"logit_bias has the key {shortened(token)}, a {type(token).__name__}"
                raise ValueError(f"{told}; ids are whole numbers, as in logit_bias={{29871: -1.5}}")
            if not 0 <= place < vocab_size:
                raise ValueError(f"logit_bias has the id {shortened(token)}; ids go from 0 to {vocab_size - 1}")
            if number is None or number > MOST_BIAS:
                told = f"logit_bias[{place}]={shortened(value)}"
                raise ValueError(f"{told} must be a number of at most {MOST_BIAS:g}, or -inf to forbid the id")
            numbers.append(number)
        if len(numbers) == vocab_size and max(numbers) < -MOST_BIAS:
            raise ValueError("logit_bias forbids every id of the vocabulary; leave at least one")

    def bias(self, vocab_size: int, device: torch.device) -> Optional[torch.Tensor]:
        """`logit_bias`, which was checked, as float32 (vocab_size,), or None."""
        if not self.logit_bias:
            return None
        import torch

        from ..runtime import to_device

        bias = torch.zeros(vocab_size, dtype=torch.float32, device="cpu")
        for token, number in self.logit_bias.items():
            bias[token] = number if number >= -FORBIDDING else -math.inf
        return to_device(bias, device)
