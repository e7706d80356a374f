"""Requests that were made together, and the steps that are decided for them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Optional, Protocol

import torch

from .requests import Request, Step

Draw = Callable[[torch.Tensor, float], torch.Tensor]  # somebody's own `sample_top_p`


@dataclass(eq=False)
class Source:
    """What the rows of one call draw from if they have no seeds of their own.

    As in Meta's release, one draw makes the noise for all `lanes`, finished ones included: the draws of a row must not
    depend on which others have ended. generator: the device's own if not given.
    """

    lanes: int
    generator: Optional[torch.Generator] = None
    draw: Optional[Draw] = None


class Runs(Protocol):
    """What a call needs of the scheduler: to be taken in, to be stepped, and to be dropped when it was left."""

    def submit(self, call: Call) -> None: ...
    def advance(self, call: Call) -> None: ...
    def let_go(self) -> None: ...


class Call:
    """Requests to iterate over for their steps, in the order in which these are decided: once, and as far as you like.

    source: what the rows draw from. streams: whether somebody reads the steps as they come, who is not to wait for long
    while other prompts are read. plainly: run it in Meta's way, since the model is not as it was built. before_step:
    called before each step that this call waits for.
    """

    def __init__(
        self,
        scheduler: Runs,
        requests: Sequence[Request],
        source: Source,
        *,
        streams: bool = False,
        plainly: bool = False,
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.scheduler, self.requests, self.source = scheduler, list(requests), source
        self.streams, self.plainly, self.before_step = streams, plainly, before_step
        self.cached = [0] * len(self.requests)  # how many of each prompt's ids were not read, since a slot held them
        self.admitted = 0  # requests that have been given a slot, the first ones
        self.over: set[int] = set()  # requests that have ended, or are to end
        self.error: Optional[BaseException] = None
        self.left = False
        self.scored = any(request.logprobs for request in self.requests)
        self.alternatives = max((request.alternatives for request in self.requests), default=0)
        self.plain_steps: Optional[Iterator[None]] = None
        self.wake = threading.Event()
        self._cancelled: set[int] = set()
        # Steps that nobody has read, each with its number in its request.
        self._events: deque[tuple[int, Step]] = deque()
        self._read = [0] * len(self.requests)  # how many steps of each request were read
        # Rows that draw from one source step together: then each draws the same whatever else runs. Prompts that are
        # scored whole are read together, so that their numbers are the same to the bit, unless they are read in pieces.
        self.together = source.lanes > 1 and any(
            (r.draws and r.seed is None) or (r.scored and not r.scored_from) for r in self.requests
        )

    @property
    def lanes(self) -> int:
        """How many of the requests run at once, at most."""
        return self.source.lanes

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is to run any more."""
        return self.left or self.error is not None or len(self.over) == len(self.requests)

    @property
    def has_news(self) -> bool:
        """Whether there is a step to read, or an error to raise."""
        return bool(self._events) or self.error is not None

    def cancel(self, index: int) -> None:
        """End a request before its time; no more steps of it come."""
        self._cancelled.add(index)
        self.over.add(index)

    def tell(self, number: int, step: Step) -> None:
        """Take a step that was decided, the `number`-th of its request. It may come twice, if a thread was
        interrupted."""
        self._events.append((number, step))
        if step.finish_reason is not None:
            self.over.add(step.index)

    def __iter__(self) -> Iterator[Step]:
        self.scheduler.submit(self)
        try:
            while True:
                yield from self.news()
                if self.has_news:  # an error, behind all steps
                    assert self.error is not None
                    raise self.error
                if self.is_over:
                    return
                self.scheduler.advance(self)
        finally:
            self.leave()

    def news(self) -> Iterator[Step]:
        """The steps that were decided, and not read yet. None is waited for."""
        while self._events:
            number, step = self._events.popleft()
            if number == self._read[step.index] and step.index not in self._cancelled:
                self._read[step.index] += 1
                yield step

    def leave(self) -> None:
        """Nobody reads on: end what still runs."""
        self.left, self.plain_steps = True, None
        self.scheduler.let_go()
