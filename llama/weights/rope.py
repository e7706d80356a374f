"""What folders say of rotary positions: config.json's settings, and params.json's own key, <-> `RotaryScaling`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Optional

from ..rotary import KINDS, METAS_BASE, OWN_NUMBERS, RotaryScaling, metas_positions
from ..system.checks import real
from ..system.files import Number
from ..system.printable import shortened

ORIGINAL, STATED = "original_max_position_embeddings", "max_position_embeddings"
POSITIONS = Number(int, 1, 2**31 - 1, required=True)
UNSTATED = 2048  # transformers' default for STATED


def read_rope(config: Mapping[str, Any]) -> tuple[Any, Optional[RotaryScaling], list[str]]:
    """Of a config.json: the base (not checked), the scaling if there is any, and what is not computed.

    transformers 5 has all settings in `rope_parameters`; older ones have the base beside `rope_scaling`, which goes
    first.
    """
    settings = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope: dict[str, Any] = settings if isinstance(settings, dict) else {"rope_type": settings}
    theta = rope.get("rope_theta", config.get("rope_theta", METAS_BASE))
    problems = [] if theta is not None else ["rope_theta=None is not a number"]
    if any(isinstance(value, dict) and "rope_type" in value for value in rope.values()):
        problems.append("its layers have rotary positions of several kinds, which is not computed")
    whole_head = [1] if "partial_rotary_factor" in rope else [None, 1]
    if (partial := rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))) not in whole_head:
        problems.append(f"only a part ({shortened(partial)}) of each head is rotated, which is not computed")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default" or problems:
        return theta, None, problems
    values = {STATED: UNSTATED, **config}
    if kind in KINDS:
        problems = POSITIONS.problem(STATED, values)
    try:
        scaling = _scaling(kind, rope, config, 1 if problems else values[STATED], theta)
    except ValueError as error:
        return theta, None, [*problems, str(error)]
    return theta, None if kind == "linear" and scaling.factor == 1.0 else scaling, problems


def _scaling(kind: Any, rope: Mapping[str, Any], config: Mapping[str, Any], stated: int, theta: Any) -> RotaryScaling:
    """stated: the folder's positions. ValueError for what is not computed."""
    factor: Any = rope.get("factor")
    original, after = stated, None
    if kind in ("yarn", "llama3"):
        original = {ORIGINAL: stated, **rope, **config}[ORIGINAL]
        after = stated if kind == "llama3" and stated != original else None
    elif kind == "linear" and stated > metas_positions(theta) and (real(factor) or 0) >= 1:
        # Vicuna and LongChat state the positions before they were scaled, and LLaMA-2-7B-32K those after: nobody has
        # first trained a model of this family for more than Meta did.
        original, after = max(1, round(stated / factor)), stated
    own = OWN_NUMBERS[kind] if kind in KINDS else ()
    # null means a number's default, but not that of `truncate`
    numbers = {key: rope[key] for key in own if key in rope and (key == "truncate" or rope[key] is not None)}
    return RotaryScaling(kind, factor, original, after, **numbers)


def rope_settings(scaling: RotaryScaling) -> dict[str, Any]:
    """As config.json has them, in the form that transformers has read since 4.31; the positions stand elsewhere
    there."""
    own = {f.name: f.default for f in fields(scaling) if f.name in OWN_NUMBERS[scaling.kind]}
    changed = {key: getattr(scaling, key) for key, default in own.items() if getattr(scaling, key) != default}
    original = {ORIGINAL: scaling.original_max_position_embeddings} if scaling.kind in ("yarn", "llama3") else {}
    return {"type": scaling.kind, "factor": scaling.factor, **original, **changed}


def stated_positions(scaling: RotaryScaling, theta: float) -> int:
    """max_position_embeddings of a config.json with `rope_settings`, so that `read_rope` finds the same scaling."""
    before, after = scaling.original_max_position_embeddings, scaling.positions
    counts_before = scaling.kind == "dynamic" or (
        scaling.kind == "linear" and before <= metas_positions(theta) and after == int(scaling.factor * before)
    )
    return before if counts_before or after is None else after


def meta_rope(scaling: RotaryScaling) -> dict[str, Any]:
    """The value of params.json's own key "rope_scaling"."""
    return {
        **rope_settings(scaling),
        ORIGINAL: scaling.original_max_position_embeddings,
        "positions": scaling.positions,
    }


def read_meta_rope(stated: Any) -> RotaryScaling:
    """`meta_rope` backwards. ValueError for anything else."""
    values = dict(stated) if isinstance(stated, dict) else {}
    kind = values.pop("type", None)
    if kind not in KINDS or values.keys() - {"factor", ORIGINAL, "positions", *OWN_NUMBERS[kind]}:
        raise ValueError(
            f"rope_scaling={shortened(stated)} has no type of {', '.join(KINDS)}, or other keys than that one's"
        )
    return RotaryScaling(kind, **{"factor": None, ORIGINAL: None, **values})
