"""Matches regular expressions that a file brings. Some take for ever, so they run in a process with a time limit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from .printable import escaped, shortened

SECONDS = 10.0
# Names with dots, the usual case, match in linear time here.
PLAIN = re.compile(r"[\w.]*|\(\.\*\\\.\)\?\([\w.]*\)\$", re.ASCII)
CHILD = """
import json, re, sys
patterns, names = json.load(sys.stdin)
try:
    json.dump([[name for name in names if re.fullmatch(pattern, name)] for pattern in patterns], sys.stdout)
except Exception as error:
    json.dump(str(error), sys.stdout)
"""


def matches(patterns: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    """The names that each pattern matches whole. ValueError if one is no regular expression, or takes too long."""
    odd = [pattern for pattern in patterns if not PLAIN.fullmatch(pattern)]
    found = dict(zip(odd, _in_a_process(odd, names))) if odd else {}
    return [
        found[pattern] if pattern in found else [name for name in names if re.fullmatch(pattern, name)]
        for pattern in patterns
    ]


def _in_a_process(patterns: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    asked = json.dumps([patterns, names])
    shown = shortened(patterns[0] if len(patterns) == 1 else list(patterns))
    try:
        ended = subprocess.run(
            [sys.executable, "-I", "-S", "-c", CHILD],
            input=asked,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{shown} takes longer than {SECONDS:g} seconds to match; write plain names") from error
    answer = json.loads(ended.stdout) if ended.returncode == 0 else "the process that matched it failed"
    if isinstance(answer, str):
        raise ValueError(f"{shown} is no regular expression: {escaped(answer)}")
    return answer
