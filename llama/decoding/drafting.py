"""Drafts of what comes next, looked up in a row's own ids (prompt lookup decoding, a form of speculative decoding:
Leviathan et al. 2023, https://arxiv.org/abs/2211.17192). Ids only; a model has to verify them.
"""

from __future__ import annotations

from collections.abc import Sequence

SIZES = (4, 3)  # lengths of the n-grams, the longest first; pairs repeat too often by chance
LONGEST = 15  # drafted ids, at most; with the newest token, one pass runs 16
COST = 0.5  # credit that one drafted token costs, in decode steps; set above its real cost on purpose
INCOME = 0.02  # credit that each step earns: at most 2 % of the time goes to refused drafts


class Drafter:
    """Proposes the ids that followed an earlier occurrence of a row's last few ids.

    Its credit, counted in decode steps, says how many: accepted drafts earn, refused ones cost. So drafts grow while
    the text repeats itself; when it does not, they stop, and one is tried now and then.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.credit = 2.0
        self._follower: dict[tuple[int, ...], int] = {}  # n-gram -> the position behind its latest occurrence

    def read(self, new: Sequence[int]) -> None:
        """Take in the row's next ids."""
        for token in new:
            # An n-gram is entered once the id behind it is known, so that none finds itself.
            for size in SIZES:
                if len(self.ids) >= size:
                    self._follower[tuple(self.ids[-size:])] = len(self.ids)
            self.ids.append(token)

    def draft(self, most: int) -> list[int]:
        """At most `most` ids that may come next; an empty list without credit or an earlier occurrence."""
        count = min(most, LONGEST, int(self.credit))
        self.credit += INCOME
        if count < 1:
            return []
        grams = (tuple(self.ids[-size:]) for size in SIZES)
        place = next((self._follower[gram] for gram in grams if gram in self._follower), None)
        if place is None:
            return []
        drafted = self.ids[place : place + count]
        period = len(self.ids) - place  # text that repeats itself goes on with what was just drafted
        while len(drafted) < count:
            drafted.append(drafted[-period])
        return drafted

    def judge(self, drafted: int, accepted: int) -> None:
        """Count `accepted` of `drafted` ids as right."""
        self.credit = min(self.credit + accepted - COST * drafted, LONGEST + 1)
