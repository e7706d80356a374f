"""What all processes do alike: an error on one is an error on all, and what their calls differ in is named."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, Optional

import torch.distributed as dist

from ..system import peers
from .parallel import Group, all_alike, gather_objects, members


class Agreement:
    """What `together` compares between the processes, by names, if the block sets it. Values whose `repr` says all."""

    values: Optional[Mapping[str, Any]] = None


@contextmanager
def together(group: Group = None, *, everyone: bool = False) -> Iterator[Agreement]:
    """Run a block on every process of the group, or on all that there are; if it fails on some, it fails on all, with the
    message of the lowest rank. So it does where the values that the block sets differ, which the error names.

    Without this the processes that succeeded would wait for the others in the next collective.
    """
    error: Optional[Exception] = None
    agreement = Agreement()
    try:
        yield agreement
    except Exception as caught:
        error = caught
    if group is not None or (everyone and dist.is_available() and dist.is_initialized()):
        values = dict(agreement.values or {})
        if not all_alike(repr(values) if error is None else None, group):
            error = _settle(error, values, group)
    if error is not None:
        raise error


def keep_pace(group: Group) -> None:
    """Before each step of a stream, whose reader may have left it on some processes: ValueError on all that meet then."""
    if group is not None and not all_alike("a step", group):
        raise _settle(None, {"the step": "next"}, group)


def _settle(error: Optional[Exception], values: Mapping[str, Any], group: Group) -> Exception:
    """The error that all processes of the group are to raise: the first one's that failed, or what differs."""
    # Not the exceptions themselves: not all of them survive pickling.
    failure = None if error is None else (isinstance(error, ValueError), str(error))
    name, _, line = peers.place(peers.stack(sys._getframe())).partition(" (")
    call = f"goes on with a stream ({line}" if "the step" in values else f"calls {name} ({line}"
    mine = failure, {name: repr(value) for name, value in values.items()}, call
    outcomes = gather_objects(mine, group)
    ranks, _ = members(group)
    failed = [(rank, other) for rank, (other, *_) in zip(ranks, outcomes) if other is not None]
    if not failed:
        error = ValueError(_difference({rank: (given, call) for rank, (_, given, call) in zip(ranks, outcomes)}))
    else:
        rank, (is_value_error, message) = failed[0]
        if len(failed) < len(outcomes) or {other for _, other in failed} != {failure}:
            message = f"{message} (on process {rank})"
        if error is None or failed[0][1] != failure:
            error = (ValueError if is_value_error else RuntimeError)(message)
        elif is_value_error:
            error.args = (message,)
    error.told_by = ranks[0]  # type: ignore[attr-defined]  # one process speaks for all: see runtime
    return error


def _difference(told: Mapping[int, tuple[dict[str, str], str]]) -> str:
    """What the processes (rank -> values, call) have not in common."""
    first, *others = told
    values, call = told[first]
    calls, words = [], []
    for rank in others:
        theirs, their_call = told[rank]
        if theirs.keys() != values.keys() or their_call.partition(" (")[0] != call.partition(" (")[0]:
            calls.append(f"process {rank} {their_call}")
        for name, value in values.items():
            if (theirs_of_it := theirs.get(name, value)) != value:
                alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(value, theirs_of_it)))
                at = alike - 12 if alike > 24 and len(value) > 60 else 0
                here, there = (("…" if at else "") + _shorter(text[at:]) for text in (value, theirs_of_it))
                words.append(f"{name} is {here} on process {first}, but {there} on process {rank}")
    if calls:
        return (
            f"process {first} {call}, but {' and '.join(calls)}; all processes must make the same calls, and leave a stream "
            "at the same step"
        )
    more = f", and {len(words) - 4} more differences" if len(words) > 4 else ""
    return f"the {len(told)} processes were given different arguments: {'; '.join(words[:4])}{more}; give all of them the same"


def _shorter(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
