"""What a check has found."""

from __future__ import annotations

from typing import NamedTuple

PASS, FAIL, NOT_APPLICABLE = "pass", "fail", "not applicable"


class Result(NamedTuple):
    """The outcome of a check. verdict: PASS, FAIL or NOT_APPLICABLE. told: what was found, with its figures. means:
    what a failure usually means, and what to do."""

    name: str
    verdict: str
    told: str
    means: str = ""


def passed(name: str, told: str) -> Result:
    return Result(name, PASS, told)


def failed(name: str, told: str, means: str) -> Result:
    return Result(name, FAIL, told, means)


def not_applicable(name: str, told: str) -> Result:
    return Result(name, NOT_APPLICABLE, told)
