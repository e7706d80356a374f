"""Which ids the cache holds, slot by slot, also after their rows have ended. No tensors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


class Held:
    """The ids whose keys and values stand in each slot's first columns, and which slots were used last."""

    def __init__(self, slots: int) -> None:
        self.ids: list[list[int]] = [[] for _ in range(slots)]
        self._used = [0] * slots
        self._clock = itertools.count(1)

    def set(self, slot: int, ids: list[int]) -> None:
        """Note what a slot holds from now on."""
        self.ids[slot] = ids
        self._used[slot] = next(self._clock) if ids else 0

    def swap(self, a: int, b: int) -> None:
        """Note that two slots have changed places."""
        self.ids[a], self.ids[b] = self.ids[b], self.ids[a]
        self._used[a], self._used[b] = self._used[b], self._used[a]

    def clear(self) -> None:
        """Note that no slot holds anything."""
        for slot in range(len(self.ids)):
            self.set(slot, [])

    def oldest(self, slots: Sequence[int]) -> int:
        """The slot whose ids were used longest ago; an empty one, if there is one."""
        return min(slots, key=lambda slot: (self._used[slot], slot))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two lists begin with in common. Compares slices, which is quick."""
    same, different = 0, min(len(a), len(b))
    if a[:different] == b[:different]:
        return different
    while different - same > 1:  # they agree before `same`, and differ before `different`
        middle = (same + different) // 2
        if a[same:middle] == b[same:middle]:
            same = middle
        else:
            different = middle
    return same
