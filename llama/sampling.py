"""Logits -> the next id."""

from __future__ import annotations

import torch


def multinomial_no_sync(probs: torch.Tensor) -> torch.Tensor:
    """Draw one column of each row, (..., V) -> (..., 1): the draws of `torch.multinomial(probs, 1)`, without its checks,
    which make the host wait for the device."""
    return (probs / torch.empty_like(probs).exponential_(1)).argmax(dim=-1, keepdim=True)


def sample_top_p(probs: torch.Tensor, p: float) -> torch.Tensor:
    """Nucleus sampling (Holtzman et al. 2020): draw from the fewest most probable tokens whose mass exceeds `p`.

    probs float32 (B, V). The token that crosses `p` is kept, so the best one always is. -> int64 (B, 1)
    """
    if not p >= 0:  # NaN too
        raise ValueError(f"p={p} must be a number of 0 or more")
    sorted_probs, ids = torch.sort(probs, dim=-1, descending=True)
    mass_before = torch.cumsum(sorted_probs, dim=-1) - sorted_probs
    sorted_probs = sorted_probs.masked_fill(mass_before > p, 0.0)
    sorted_probs /= sorted_probs.sum(dim=-1, keepdim=True)
    return ids.gather(-1, multinomial_no_sync(sorted_probs))


def next_token(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """float32 (B, V) -> int64 (B,): the best token at temperature 0, else a draw; -1 where a logit is not finite."""
    if temperature > 0:
        # 1e-30 already picks the best token only; below it the quotient would overflow.
        probs = torch.softmax(logits / max(temperature, 1e-30), dim=-1)
        chosen = sample_top_p(probs, top_p).squeeze(-1)
    else:
        chosen = logits.argmax(dim=-1)
    return chosen.where(logits.isfinite().all(dim=-1), -1)


def check_sampling(temperature: float, top_p: float) -> None:
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        # Also refuses NaN, which compares false with everything.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise ValueError(f"{name}={value!r} must be a number of 0 or more")
    if temperature == float("inf"):
        raise ValueError("temperature=inf has no distribution; use a finite number")
