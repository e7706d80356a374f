"""What every system is asked to do: continue so many prompts of so many ids by so many new ones."""

from __future__ import annotations

from typing import NamedTuple


class Task(NamedTuple):
    batch: int
    prompt: int
    new: int  # the first comes with the prompt, the others are steps

    @property
    def context(self) -> int:
        """Tokens in the cache, in the middle of the steps."""
        return self.prompt + self.new // 2


class Profile(NamedTuple):
    tasks: dict[str, Task]
    max_seq_len: int


FULL = Profile(
    {
        "decode": Task(1, 8, 49),
        "decode 4": Task(4, 8, 49),
        "decode 16": Task(16, 8, 49),
        "short": Task(1, 32, 1),
        "middle": Task(1, 480, 17),
        "long": Task(1, 2000, 33),
    },
    max_seq_len=2200,
)
QUICK = Profile(
    {
        "decode": Task(1, 2, 4),
        "decode 4": Task(4, 2, 4),
        "decode 16": Task(16, 2, 4),
        "short": Task(1, 4, 1),
        "middle": Task(1, 12, 3),
        "long": Task(1, 24, 3),
    },
    max_seq_len=64,
)
