"""Scaled rotary positions: rules by which a model reads texts that are longer than what it was trained for. No files.

Pair j of a head of D numbers turns by t theta^(-2j/D) at position t (RoFormer, Su et al. 2021). Each rule has
frequencies of its own in place of theta^(-2j/D). The numbers have the names that config.json gives them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

import torch

from .system.checks import real
from .system.files import Number
from .system.printable import shortened

# The rules, and the numbers that only one of them has.
OWN_NUMBERS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": (),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}
KINDS = tuple(OWN_NUMBERS)
METAS_BASE = 10000.0  # theta of Llama 1 and 2
NUMBERS = {
    "factor": Number(float, 1.0, 1e4, True),
    "original_max_position_embeddings": Number(int, 1, 2**31 - 1, True),
    "positions": Number(int, 1, 2**31 - 1),
    "attention_factor": Number(float, 1e-3, 1e3),
    "beta_fast": Number(float, 1e-3, 1e6, True),
    "beta_slow": Number(float, 1e-3, 1e6, True),
    "mscale": Number(float, 0.0, 1e3),
    "mscale_all_dim": Number(float, 0.0, 1e3),
    "low_freq_factor": Number(float, 1e-3, 1e6),
    "high_freq_factor": Number(float, 1e-3, 1e6),
}


def metas_positions(theta: float) -> int:
    """The positions that Meta trained a model with this base for: Llama 2, or Code Llama."""
    return 4096 if theta == METAS_BASE else 16384


@dataclass(frozen=True)
class RotaryScaling:
    """A rule and its numbers. ValueError, with every reason in one message, for what cannot be computed.

    kind: "linear", "dynamic", "yarn" or "llama3". factor: how many times as long the texts may be.
    original_max_position_embeddings: the positions that the model was first trained for. positions: those that it is
    made for with the scaling; factor times the original ones if not given. The others are yarn's, and llama3's, which
    needs both.
    """

    kind: str
    factor: float
    original_max_position_embeddings: int
    positions: Optional[int] = None
    attention_factor: Optional[float] = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: Optional[float] = None
    mscale_all_dim: Optional[float] = None
    truncate: bool = True
    low_freq_factor: Optional[float] = None
    high_freq_factor: Optional[float] = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"its rotary positions are scaled ({shortened(self.kind)}), which is not computed; only "
                f"{', '.join(KINDS)} are"
            )
        given, needed = vars(self), OWN_NUMBERS["llama3"] if self.kind == "llama3" else ()
        numbers = {key: number._replace(required=number.required or key in needed) for key, number in NUMBERS.items()}
        problems = [problem for key, number in numbers.items() for problem in number.problem(key, given)]
        if self.truncate not in (True, False):
            problems.append(f"truncate={shortened(self.truncate)} is neither true nor false")
        low, high = self.low_freq_factor, self.high_freq_factor
        if needed and not problems and low is not None and high is not None and low >= high:
            problems.append(f"high_freq_factor={high:g} is not above low_freq_factor={low:g}")
        if problems:
            raise ValueError(f"its rotary positions are scaled ({self.kind!r}), but {', '.join(problems)}")
        for key, number in NUMBERS.items():  # Python's own numbers in place of numpy's
            if (value := real(given[key])) is not None:
                object.__setattr__(self, key, number.kind(value))
        if self.positions is None:
            object.__setattr__(self, "positions", int(self.factor * self.original_max_position_embeddings))

    def one_pass(self, length: int) -> bool:
        """Whether the tokens of a pass that reaches this length turn otherwise than if they came one by one."""
        return self.kind == "dynamic" and length > self.original_max_position_embeddings

    @property
    def magnitude(self) -> float:
        """What queries and keys are multiplied with: the root of the temperature of YaRN's section 3.4."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        over, under = (self.mscale, self.mscale_all_dim) if self.mscale and self.mscale_all_dim else (1.0, 0.0)
        growth = 0.1 * math.log(self.factor)
        return (over * growth + 1) / (under * growth + 1)

    def frequencies(self, dim: int, theta: float, lengths: torch.Tensor) -> torch.Tensor:
        """Radians that each pair of a head turns by from one position to the next, float32.

        lengths: int64 (S,), the length of the text when each token is read. -> (dim // 2,), and (S, dim // 2) for
        "dynamic".
        """
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=lengths.device)[: dim // 2] / dim
        if self.kind == "dynamic":
            # The base grows with the text, so that the slowest pair turns about as far as in one of the original length
            # ("NTK-aware" and its dynamic form, by bloc97 and emozilla; sections 3.1 and 3.3 of YaRN's paper).
            longer = (
                lengths.clamp(min=self.original_max_position_embeddings).double()
                / self.original_max_position_embeddings
            )
            bases = theta * (self.factor * longer - (self.factor - 1)) ** (dim / (dim - 2))
            return 1.0 / bases.float()[:, None] ** exponents
        plain = 1.0 / theta**exponents
        if self.kind == "linear":  # Position Interpolation (Chen et al. 2023, https://arxiv.org/abs/2306.15595)
            return plain / self.factor
        kept = self._kept_by_yarn(dim, theta, plain) if self.kind == "yarn" else self._kept_by_llama3(plain)
        return plain / self.factor * (1 - kept) + plain * kept

    def _kept_by_yarn(self, dim: int, theta: float, plain: torch.Tensor) -> torch.Tensor:
        """The share of each pair that is not slowed down: all of one that turns beta_fast times within the original
        length, none of one that turns beta_slow times (YaRN, Peng et al. 2023, section 3.2,
        https://arxiv.org/abs/2309.00071)."""

        def pair(turns: float) -> float:
            length = self.original_max_position_embeddings
            return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first, last = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        if first == last:
            last += 0.001
        pairs = torch.arange(len(plain), dtype=torch.float32, device=plain.device)
        return 1 - ((pairs - first) / (last - first)).clamp(0, 1)

    def _kept_by_llama3(self, plain: torch.Tensor) -> torch.Tensor:
        """The same share by Llama 3.1's release (apply_scaling in models/llama3/model.py of meta-llama/llama-models):
        by how often a pair turns within the original length."""
        assert self.low_freq_factor is not None
        assert self.high_freq_factor is not None
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)
        return ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)


def scaled_freqs_cis(
    dim: int, start: int, end: int, theta: float, scaling: RotaryScaling, pass_length: int = 0
) -> torch.Tensor:
    """Rows start … end - 1 of a table of rotations: complex64 (end - start, dim // 2), magnitudes included, on the CPU.

    pass_length: "dynamic" turns all tokens of a pass by the length that the pass reaches, as transformers does: those
    in front of this length are of one pass, and each of the others comes alone.
    """
    positions = torch.arange(start, end, device="cpu")
    frequencies = scaling.frequencies(dim, theta, (positions + 1).clamp(min=pass_length))
    angles = positions[:, None].float() * frequencies
    return torch.polar(torch.full_like(angles, scaling.magnitude), angles)
