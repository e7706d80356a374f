"""What GGUF files say of scaled rotary positions, in metadata or in a table of factors, <-> `RotaryScaling`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Optional

import torch

from ..rotary import METAS_BASE, RotaryScaling
from ..system.checks import real
from ..system.printable import shortened
from .rope import ORIGINAL, POSITIONS, STATED, read_rope, stated_positions

TABLE = "rope_freqs.weight"  # what each pair's frequency is divided by: llama3's rule, worked out
SCALING = "llama.rope.scaling."
CONTEXT = "llama.context_length"
# config.json's names of yarn's numbers, and theirs (llama.cpp's converter copies them).
YARN = {ORIGINAL: "original_context_length", "attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow"}  # fmt: skip


def read_gguf_rope(metadata: Mapping[str, Any]) -> tuple[Optional[RotaryScaling], list[str]]:
    """The scaling that the metadata tell, as a config.json with the same numbers tells it, and what is not computed.

    As in llama.cpp, the kind is "linear" if none is given, and a factor of 0 means 1.
    """
    kind = metadata.get(f"{SCALING}type", "linear")
    factor = metadata.get(f"{SCALING}factor", metadata.get("llama.rope.scale_linear"))  # the latter is old
    factor = 1 if factor in (None, 0) else factor
    extrapolated, magnified = (metadata.get(SCALING + name) for name in ("yarn_ext_factor", "attn_factor"))
    problems = []
    if extrapolated not in (None, -1, float(kind == "yarn")):
        problems.append(f"{SCALING}yarn_ext_factor={shortened(extrapolated)}, which is not computed")
    if magnified not in (None, 1) and (kind != "yarn" or real(magnified) is None):
        problems.append(f"{SCALING}attn_factor={shortened(magnified)}, which is not computed with {shortened(kind)}")
    if kind == "none" or (kind == "linear" and factor == 1):
        return None, problems
    problems += POSITIONS.problem(CONTEXT, metadata)
    if problems:
        return None, problems
    own = {name: value for name, theirs in YARN.items() if (value := metadata.get(SCALING + theirs)) is not None}
    settings = {"rope_type": kind, "factor": factor, **(own if kind == "yarn" else {})}
    base = metadata.get("llama.rope.freq_base", METAS_BASE)
    _, scaling, problems = read_rope({"rope_theta": base, STATED: metadata[CONTEXT], "rope_scaling": settings})
    if scaling is None or magnified in (None, 1):
        return scaling, problems
    try:
        return replace(scaling, attention_factor=scaling.magnitude * magnified), problems
    except ValueError as error:
        return None, [str(error)]


def read_table(table: torch.Tensor, theta: float, positions: Optional[int]) -> Optional[RotaryScaling]:
    """llama3's rule, of which this is the table of factors, float32 (D/2,); None if the table changes nothing.

    ValueError for a table of another rule.
    """
    frequencies = theta ** -(torch.arange(len(table), dtype=torch.float64, device="cpu") / len(table))
    plain = torch.allclose(table, torch.ones_like(table), rtol=1e-6)
    if plain or torch.allclose(table.double(), frequencies, rtol=1e-3):  # old files have Meta's own table
        return None
    try:
        for digits in (6, 12):  # most folders have short numbers
            scaling = _llama3(table.double(), frequencies, positions, digits)
            if torch.allclose(factors(scaling, 2 * len(table), theta), table, rtol=2e-6):
                return scaling
    except (ValueError, ArithmeticError, RuntimeError):  # not numbers that the rule could have
        pass
    raise ValueError(
        f"its rotary positions are scaled by a table ({TABLE}) that is not of llama3's rule; take another model"
    )


def _llama3(table: torch.Tensor, frequencies: torch.Tensor, positions: Optional[int], digits: int) -> RotaryScaling:
    """The rule keeps a share of each pair's frequency: slope · frequency - offset, between 0 and 1.

    Slope and offset follow from two pairs with a share between. If there is one such pair or none, the offset is that
    of the usual low_freq_factor and high_freq_factor, 1 and 4, if that fits. Many settings have the same slope and
    offset: this takes a low_freq_factor near 1 that makes the positions whole. digits: of low_freq_factor and
    high_freq_factor.
    """
    factor = table.max().item()
    kept = (1 / table - 1 / factor) / (1 - 1 / factor)
    is_between = (kept > 1e-4) & (kept < 1 - 1e-4)
    pairs = list(zip(frequencies[is_between].tolist(), kept[is_between].tolist()))
    if len(pairs) > 1:
        (high, most), (low, least) = pairs[0], pairs[-1]
        slope = (most - least) / (high - low)
        offset = slope * high - most
    else:
        none = frequencies[kept <= 1e-4].max().item()
        whole = min(frequencies[kept >= 1 - 1e-4].tolist(), default=16 * none)
        at, share = pairs[0] if pairs else (math.sqrt(none * whole), 1 / 3)
        slope = max((share + 1 / 3) / at, (1 - share) / (whole - at), share / (at - none))
        offset = slope * at - share
    before = max(1, round(2 * math.pi * slope / offset))
    low = float(f"{before * offset / (2 * math.pi * slope):.{digits}g}")
    high = float(f"{low * (1 + offset) / offset:.{digits}g}")
    after = positions if positions != before else None
    return RotaryScaling("llama3", factor, before, after, low_freq_factor=low, high_freq_factor=high)


def factors(scaling: RotaryScaling, dim: int, theta: float) -> torch.Tensor:
    """The table of llama3's rule for heads of `dim` numbers, float32 (dim/2,); `read_table` backwards."""
    positions = torch.arange(1, device="cpu")
    plain = replace(scaling, kind="linear", factor=1.0)
    return plain.frequencies(dim, theta, positions) / scaling.frequencies(dim, theta, positions)


def gguf_rope(scaling: Optional[RotaryScaling], theta: float, positions: int) -> dict[str, Any]:
    """The metadata of a scaling, and of the positions that a model without one is made for; `read_gguf_rope` backwards.

    ValueError for what llama.cpp does not compute.
    """
    if scaling is None:
        return {CONTEXT: positions}
    usual = RotaryScaling("yarn", scaling.factor, scaling.original_max_position_embeddings)
    own = ("beta_fast", "beta_slow", "truncate")
    if scaling.kind == "dynamic" or any(getattr(scaling, name) != getattr(usual, name) for name in own):
        what = "dynamic" if scaling.kind == "dynamic" else f"yarn with an unusual {', '.join(own[:-1])} or {own[-1]}"
        raise ValueError(
            f"its rotary positions are scaled ({what}), which llama.cpp does not compute; use to='hf' or 'meta'"
        )
    metadata: dict[str, Any] = {CONTEXT: stated_positions(scaling, theta)}
    if scaling.kind == "llama3":  # `factors` tell the rest
        return metadata
    metadata |= {f"{SCALING}type": scaling.kind, f"{SCALING}factor": scaling.factor}
    if scaling.kind == "yarn":
        metadata[SCALING + YARN[ORIGINAL]] = scaling.original_max_position_embeddings
        if (magnified := scaling.magnitude / usual.magnitude) != 1:
            metadata[f"{SCALING}attn_factor"] = magnified
    return metadata
