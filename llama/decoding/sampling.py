"""How the next id is chosen from logits: what each option does to rows of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Optional, Union

import torch

from ..runtime import device_kind, to_device
from .settings import LEAST_TEMPERATURE
from .settings import Sampling as Sampling


def exponential_noise(
    rows: int, vocab_size: int, device: torch.device, generator: Optional[torch.Generator] = None
) -> torch.Tensor:
    """What `torch.multinomial` on (rows, vocab_size) probabilities would draw, and as much of the generator's state."""
    return torch.empty(rows, vocab_size, dtype=torch.float32, device=device).exponential_(1, generator=generator)


def multinomial_no_sync(probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw one column of each row, (B, V) -> (B, 1): with noise from `exponential_noise` the draws are those of
    `torch.multinomial(probs, 1)`, without its checks, which make the host wait for the device."""
    return (probs / noise).argmax(dim=-1, keepdim=True)


def keep_top_p(sorted_probs: torch.Tensor, p: Union[float, torch.Tensor]) -> torch.Tensor:
    """Zero what is behind the token at which the mass exceeds `p`; the first always stays. Descending (B, V), not
    rescaled."""
    mass_before = torch.cumsum(sorted_probs, dim=-1) - sorted_probs
    return sorted_probs.masked_fill(mass_before > p, 0.0)


def sample_top_p(probs: torch.Tensor, p: float) -> torch.Tensor:
    """Nucleus sampling: draw from the fewest most probable tokens whose mass exceeds `p`. Float32 (B, V) -> int64 (B,
    1)."""
    if not p >= 0:  # NaN too
        raise ValueError(f"p={p} must be a number of 0 or more")
    sorted_probs, ids = torch.sort(probs, dim=-1, descending=True)
    sorted_probs = keep_top_p(sorted_probs, p)
    sorted_probs /= sorted_probs.sum(dim=-1, keepdim=True)
    return ids.gather(
        -1, multinomial_no_sync(sorted_probs, exponential_noise(len(probs), probs.shape[-1], probs.device))
    )


class Penalties(NamedTuple):
    """The penalties of several rows: float32 (N, 1) each."""

    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor

    @classmethod
    def of(cls, rows: Sequence[Sampling], device: torch.device) -> Penalties:
        """Those of these rows, in their order."""
        given = [[row.repetition_penalty, row.presence_penalty, row.frequency_penalty] for row in rows]
        return cls(*to_device(torch.tensor(given, dtype=torch.float32, device="cpu").T[..., None].contiguous(), device))


def penalize(logits: torch.Tensor, in_prompt: torch.Tensor, counts: torch.Tensor, penalties: Penalties) -> torch.Tensor:
    """Float32 (N, V) -> (N, V). in_prompt: bool (N, V); counts: how often each id was generated, float32 (N, V)."""
    changed = torch.where(logits > 0, logits / penalties.repetition, logits * penalties.repetition)
    logits = torch.where(in_prompt | (counts > 0), changed, logits)
    return logits - counts * penalties.frequency - (counts > 0) * penalties.presence


class Drawing(NamedTuple):
    """How rows are drawn: float32 (N, 1) each, or None if no row asks for it."""

    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: Optional[torch.Tensor]
    min_p: Optional[torch.Tensor]

    @classmethod
    def of(cls, rows: Sequence[Sampling], device: torch.device) -> Drawing:
        """How these rows are drawn, in their order."""
        given = [[max(row.temperature, LEAST_TEMPERATURE), row.top_p, row.top_k or math.inf, row.min_p] for row in rows]
        parts = to_device(torch.tensor(given, dtype=torch.float32, device="cpu").T[..., None].contiguous(), device)
        top_k = parts[2] if any(row.top_k for row in rows) else None
        return cls(parts[0], parts[1], top_k, parts[3] if any(row.min_p for row in rows) else None)


def draw(
    logits: torch.Tensor, drawing: Drawing, noise: torch.Tensor, by_id: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """One id of each row, float32 (N, V) -> int64 (N,). noise: (N, V) from `exponential_noise`, which belongs to ranks,
    the likeliest id first, as in Meta's release; or to ids, in the rows for which by_id, bool (N, 1), is set."""
    on_gpu = device_kind(logits) == "cuda"  # there torch divides by a number, as Meta's code does, like this
    scaled = logits * drawing.temperature.reciprocal() if on_gpu else logits / drawing.temperature
    sorted_probs, ids = torch.sort(torch.softmax(scaled, dim=-1), dim=-1, descending=True)
    if drawing.top_k is not None:
        dropped = torch.arange(logits.shape[-1], device=logits.device) >= drawing.top_k
        sorted_probs = sorted_probs.masked_fill(dropped, 0.0)
        sorted_probs /= sorted_probs.sum(dim=-1, keepdim=True).where(dropped.any(dim=-1, keepdim=True), 1.0)
    sorted_probs = keep_top_p(sorted_probs, drawing.top_p)
    if drawing.min_p is not None:
        sorted_probs = sorted_probs.masked_fill(sorted_probs < drawing.min_p * sorted_probs[:, :1], 0.0)
    sorted_probs /= sorted_probs.sum(dim=-1, keepdim=True)
    if by_id is not None:
        noise = torch.where(by_id, noise.gather(-1, ids), noise)
    return ids.gather(-1, multinomial_no_sync(sorted_probs, noise)).squeeze(-1)
