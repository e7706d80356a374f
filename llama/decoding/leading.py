"""One process takes requests for all: it tells the others who came and who went, in one message a step, and all step
alike.

The first process has the calls that people read. Each copy of the model runs a share of a call's requests; what its
first process decides goes back to the call.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, Optional, Protocol, Union

import torch

from ..layers.parallel import (
    a_step,
    between_steps,
    from_first_process,
    group_rank,
    patient_group,
    replica,
    to_first_process,
)
from ..system.interrupts import held_back
from ..system.printable import shortened
from .calls import Call, Draw, Source
from .requests import Request, Step
from .scheduler import Scheduler

OVER = "the processes no longer run steps together: lead() has returned, or a step of it was interrupted"
AGAIN = "the processes of this Llama have ended; build it again"
PATIENCE = 2.0  # seconds in which a process that has lost its connection has to end
CHANGED = (
    "the weights of this process's part of the model have changed since other processes follow it, and theirs have "
    "not; build again from a folder with the new weights (or let torchrun start a script in which all processes change "
    "theirs)"
)


@dataclass
class _Came:
    """A share of a call: its requests at these places, for one copy of the model."""

    call: int
    copy: int
    places: list[int]
    requests: list[Request]
    lanes: int
    seed: int
    draw: Optional[Draw]
    streams: bool


@dataclass
class _Went:
    """Requests of a call that are to end before their time."""

    call: int
    places: list[int]


@dataclass
class _Do:
    """A method of `Llama` that all processes run."""

    name: str
    arguments: tuple[Any, ...]


@dataclass
class _End:
    error: Optional[str]


@dataclass
class _Decided:
    """A step of one of a call's requests; or the error that ended the call."""

    call: int
    number: int = 0
    step: Optional[Step] = None
    cached: int = 0
    error: Optional[BaseException] = None


class _Share(Call):
    """Runs on a copy of the model; nobody iterates over it."""

    def __init__(self, scheduler: Scheduler, came: _Came, decided: list[_Decided]) -> None:
        source = Source(came.lanes, torch.Generator(scheduler.engine.device).manual_seed(came.seed), came.draw)
        super().__init__(scheduler, came.requests, source, streams=came.streams)
        self.came, self.decided = came, decided

    def tell(self, number: int, step: Step) -> None:
        told = replace(step, index=self.came.places[step.index])
        self.decided.append(_Decided(self.came.call, number, told, self.cached[step.index]))
        if step.finish_reason is not None:
            self.over.add(step.index)


class _Copy:
    """This process's copy of the model, and the shares that run on it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.index, self.copies = replica()
        self._everyone = patient_group()
        self._shares: dict[int, _Share] = {}
        self._decided: list[_Decided] = []

    def step(self, changes: list[Union[_Came, _Went]]) -> list[_Decided]:
        """Let those come and go, and step. -> on the first process, what all copies decided"""
        for change in changes:
            if isinstance(change, _Went):
                if (share := self._shares.get(change.call)) is not None:
                    share.over.update(i for i, place in enumerate(share.came.places) if place in change.places)
            elif change.copy == self.index:
                share = self._shares[change.call] = _Share(self.scheduler, change, self._decided)
                self.scheduler.submit(share)
        self.scheduler.step()
        for call, share in list(self._shares.items()):
            if share.error is not None:
                self._decided.append(_Decided(call, error=share.error if self.copies == 1 else _sent(share.error)))
            if share.is_over:
                del self._shares[call]
        decided = self._decided[:]
        self._decided.clear()
        if self.copies == 1:
            return decided
        speaks = group_rank(self.scheduler.group) == 0
        return list(itertools.chain.from_iterable(to_first_process(decided if speaks else [], self._everyone)))

    def close(self) -> None:
        """End what still runs."""
        for share in self._shares.values():
            share.left = True
        self.scheduler.let_go()


class Line:
    """What the first process says to the others."""

    def __init__(self) -> None:
        self._everyone = patient_group()
        self.is_whole = True  # whether the last message, and the step that it began, came to their end
        self._is_open = True

    def say(self, message: list[Any]) -> None:
        """Send a message. It begins a step, at the end of which the line is whole again."""
        if not self.is_whole:
            raise RuntimeError(OVER)
        self.is_whole = False
        from_first_process(message, self._everyone)

    def hang_up(self, error: Optional[str] = None) -> None:
        """Let the others go. If they wait within a step, they end with this process."""
        if self._is_open and self.is_whole:
            self.say([_End(error)])
        self._is_open = False


class Started(Protocol):
    """The other processes, if this one has started them itself."""

    def why_lost(self, patience: float = 0) -> str:
        """Why one of them is gone; empty if none is after `patience` seconds."""

    def lose(self) -> None:
        """End them."""


class Leader:
    """What the calls of the first process have in place of a scheduler."""

    def __init__(self, scheduler: Scheduler, started: Optional[Started] = None) -> None:
        self.scheduler, self._started = scheduler, started
        self.line, self._copy = Line(), _Copy(scheduler)
        self._load = [0] * self._copy.copies  # requests that each copy has to run
        self._numbers = itertools.count()
        self._new: deque[tuple[Call, list[_Came]]] = deque()
        self._calls: dict[int, Call] = {}
        self._where: dict[int, dict[int, int]] = {}  # call -> its places that are not over -> the copy that has each
        self._pid = os.getpid()
        self._over = ""  # why nothing can run any more
        scheduler.engine.refresh()
        self._weights = scheduler.engine.weights_state()
        between_steps(scheduler.group)

    @property
    def copies(self) -> int:
        """How many copies of the model share the requests."""
        return self._copy.copies

    def submit(self, call: Call) -> None:
        """Share a call's requests out: each goes to the copy with the most room, and all to one if they draw
        together."""
        number, shares = next(self._numbers), dict[int, list[int]]()
        seed = 0 if call.source.generator is None else call.source.generator.initial_seed()
        with self.scheduler.engine.lock:
            load = list(self._load)
            for place in range(len(call.requests)):
                copy = next(iter(shares)) if shares and call.together else load.index(min(load))
                shares.setdefault(copy, []).append(place)
                load[copy] += 1
            if not shares:
                return  # a call of no requests is over
            more = (seed, call.source.draw, call.streams)
            came = [
                _Came(number, copy, places, [call.requests[i] for i in places], min(call.lanes, len(places)), *more)
                for copy, places in shares.items()
            ]
            self._check_it_can_be_sent(came)
            self._load = load
            self._where[number] = {place: copy for copy, places in shares.items() for place in places}
            self._new.append((call, came))

    def advance(self, call: Call) -> None:
        with self._all():
            self.scheduler.advance(call, self._step)

    def let_go(self) -> None:
        """Note that a call was left; the next step tells the others. Nobody is woken: the garbage collector may run
        this anywhere."""

    @contextmanager
    def all_do(self, name: str, *arguments: Any) -> Iterator[None]:
        """A block that does what a method of `Llama` does, which the other processes run meanwhile. Hold the lock for
        it."""
        with self._all(), a_step(self.scheduler.group):
            self._check_weights(self.scheduler.engine.weights_state())
            message = [_Do(name, arguments)]
            self._check_it_can_be_sent(message)
            self.line.say(message)
            try:
                yield
            except ValueError:  # all have raised it
                self.line.is_whole = True
                raise
            self.line.is_whole = True

    def end(self, error: Optional[BaseException], why: str = OVER) -> None:
        """Let the other processes go. why: what later calls say."""
        done = error is None or (isinstance(error, SystemExit) and not error.code)
        with self.scheduler.engine.lock:
            self._end_calls(why)
            self.line.hang_up(None if done else f"{type(error).__name__}: {error}")
            self._copy.close()
        if self._started is None:
            between_steps(self.scheduler.group, False)
        self.scheduler.wake_others(instead=True)

    def _end_calls(self, why: str) -> None:
        self._over = self._over or why
        for call in [*self._calls.values(), *(call for call, _ in self._new)]:
            call.error = call.error or RuntimeError(self._over)

    @contextmanager
    def _all(self) -> Iterator[None]:
        """A block in which all processes may take part. Ctrl-C takes effect behind it, so that they stay together."""
        if self._over:
            raise RuntimeError(self._over)
        if self._pid != os.getpid():
            raise RuntimeError("a forked process has no part in the steps; call the Llama in the process that built it")
        try:
            with held_back():
                yield
        except BaseException as error:
            if self._started is None:
                raise
            lost = self._started.why_lost(PATIENCE if isinstance(error, Exception) and not self.line.is_whole else 0)
            if not lost and self.line.is_whole:
                raise
            self._started.lose()
            self._end_calls(f"{lost or f'a step was cut short by {shortened(error)}'}; {AGAIN}")
            if not lost:
                raise
            raise RuntimeError(self._over) from error

    def _step(self) -> None:
        changes: list[Union[_Came, _Went]] = []
        while self._new:
            call, shares = self._new.popleft()
            self._calls[shares[0].call] = call
            changes += shares
        changes += self._gone()
        with a_step(self.scheduler.group):
            self.line.say(changes)
            outcome = self._copy.step(changes)
        if self._started is not None:
            self._check_others(outcome)
        self.line.is_whole = True
        try:
            if any(isinstance(change, _Came) and change.copy == self._copy.index for change in changes):
                self._check_weights(self.scheduler.weights)
        except ValueError as error:
            for call in self._calls.values():
                call.error = call.error or error
            return
        for decided in outcome:
            self._hand_on(decided)

    def _check_others(self, outcome: list[_Decided]) -> None:
        """Raise if a process is gone, or may be: the scheduler takes an error of a prompt's pass for one of its
        calls."""
        assert self._started is not None
        if lost := self._started.why_lost():
            raise RuntimeError(lost)
        for decided in outcome:
            if isinstance(decided.error, RuntimeError):
                raise decided.error

    def _check_weights(self, now: tuple[Any, torch.Tensor]) -> None:
        """ValueError if the weights are not what they were when the others began to follow."""
        (key, numbers), (key_now, numbers_now) = self._weights, now
        if key != key_now or not torch.allclose(numbers, numbers_now, rtol=0, atol=0, equal_nan=True):
            raise ValueError(CHANGED)

    def _check_it_can_be_sent(self, message: list[Any]) -> None:
        try:
            (pickle.Pickler if self._started is None else _Elsewhere)(io.BytesIO()).dump(message)
        except Exception as error:
            raise ValueError(
                f"what is asked must be such that pickle can send it to the other processes: {error}"
            ) from error

    def _gone(self) -> list[_Went]:
        """What readers have cancelled or left since the last step."""
        gone = []
        for number, call in list(self._calls.items()):
            where = self._where[number]
            over = call.over
            if places := list(where) if call.is_over else [place for place in where if place in over] if over else []:
                gone.append(_Went(number, places))
                self._forget(number, places)
        return gone

    def _forget(self, number: int, places: list[int]) -> None:
        where = self._where[number]
        for place in places:
            self._load[where.pop(place)] -= 1
        if not where:
            del self._calls[number], self._where[number]

    def _hand_on(self, decided: _Decided) -> None:
        if (call := self._calls.get(decided.call)) is None:
            return
        if decided.error is not None:
            call.error = decided.error
        if (step := decided.step) is not None:
            call.cached[step.index] = decided.cached
            call.tell(decided.number, step)
            if step.finish_reason is not None and step.index in self._where[decided.call]:
                self._forget(decided.call, [step.index])


def follow(scheduler: Scheduler, do: Callable[..., Any]) -> None:
    """Run the first process's steps until it ends. do: runs a method of `Llama`, by its name."""
    copy, everyone = _Copy(scheduler), patient_group()
    scheduler.engine.refresh()  # as `Leader` does
    while True:
        message = from_first_process(None, everyone)
        first = message[0] if message else None
        if isinstance(first, _End):
            copy.close()
            if first.error is not None:
                error = RuntimeError(f"{first.error} (on process 0)")
                error.told_by = 0  # type: ignore[attr-defined]  # one process speaks for all: see runtime
                raise error
            return
        if isinstance(first, _Do):
            with suppress(ValueError):  # it is the first process's as well, which raises it
                do(first.name, *first.arguments)
        else:
            with scheduler.stepping():
                copy.step(message)


class _Elsewhere(pickle.Pickler):
    """Makes messages for processes that do not run this script or notebook."""

    def reducer_override(self, value: Any) -> Any:
        if getattr(value, "__module__", "") == "__main__" and isinstance(value, (FunctionType, type)):
            raise ValueError(
                f"{value.__qualname__} is this script's or notebook's; put it into a module that they can import"
            )
        return NotImplemented


def _sent(error: BaseException) -> Exception:
    """An error that survives pickling."""
    return (ValueError if isinstance(error, ValueError) else RuntimeError)(str(error))
