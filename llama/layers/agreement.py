"""Keeps processes alike: an error on one is raised on all, and an error names what their calls differ in."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, Optional

from ..system import peers
from ..system.printable import clipped, counted
from .parallel import Group, all_alike, gather_objects, members, world

SHOWN = 60  # characters of a value that an error shows


class Agreement:
    """A block of `together` may set `values`, by name: they are compared between the processes, by their `repr`."""

    values: Optional[Mapping[str, Any]] = None


@contextmanager
def together(group: Group = None, *, everyone: bool = False) -> Iterator[Agreement]:
    """Run a block on every process of the group. If it fails on some, it fails on all, with the message of the lowest
    of them. ValueError, which names the differences, if the values that the block sets differ.

    Without this the processes that succeeded would wait for the others in the next collective. everyone: without a
    group, the block is run by all processes that there are.
    """
    error: Optional[Exception] = None
    agreement = Agreement()
    try:
        yield agreement
    except Exception as caught:
        error = caught
    if group is not None or (everyone and world() is not None):
        values = dict(agreement.values or {})
        if not all_alike(repr(values) if error is None else None, group):
            error = _settle(error, values, group)
    if error is not None:
        raise error


def keep_pace(group: Group) -> None:
    """Call it before each step of a stream. ValueError on all processes if the readers of some have left the stream."""
    if group is not None and not all_alike("a step", group):
        raise _settle(None, {"the step": "next"}, group)


def _settle(error: Optional[Exception], values: Mapping[str, Any], group: Group) -> Exception:
    """The error that all processes raise: that of the first one that failed, or the differences of `values`."""
    # Messages are gathered, because some exceptions do not survive pickling.
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
    """The message that says how the processes (rank -> values, call) differ."""
    first, *others = told
    values, call = told[first]
    calls, words = [], []
    for rank in others:
        theirs, their_call = told[rank]
        if theirs.keys() != values.keys() or their_call.partition(" (")[0] != call.partition(" (")[0]:
            calls.append(f"process {rank} {their_call}")
        for name, value in values.items():
            if (their_value := theirs.get(name, value)) != value:
                alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(value, their_value)))
                at = alike - 12 if alike > 24 and len(value) > SHOWN else 0
                here, there = (("…" if at else "") + clipped(text[at:], SHOWN) for text in (value, their_value))
                words.append(f"{name} is {here} on process {first}, but {there} on process {rank}")
    if calls:
        return (
            f"process {first} {call}, but {' and '.join(calls)}; all processes must make the same calls, and leave a "
            f"stream "
            "at the same step"
        )
    more = f", and {counted(len(words) - 4, 'more difference')}" if len(words) > 4 else ""
    return (
        f"the {len(told)} processes were given different arguments: {'; '.join(words[:4])}{more}; give all of them "
        f"the same"
    )
