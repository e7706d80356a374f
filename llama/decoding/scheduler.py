"""Who runs, who waits, who shares a prefix: requests that come at any time, from any thread, over the slots of one
cache.

The rows that run own the first slots, so that the cache is read in place. Each step admits what has come, reads a piece
of the prompts that are still to be read, runs the newest id of all other rows, and chooses. Whoever waits for an answer
steps, for all: there is no thread of our own, and nothing runs that nobody waits for.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Optional

import torch

from ..layers.parallel import Group, all_agree, least
from ..runtime import to_device
from ..system import openmp
from . import metas_way
from .calls import Call
from .choosing import Chooser
from .draft_model import DraftModel
from .engine import Engine
from .forcing import Forcing
from .held import Held, common_prefix
from .pace import Pace
from .requests import Grammar
from .rows import NOT_FINITE, Decision, Row
from .verifying import Verifier

WHOLE = 1.5  # pieces; the rest of a prompt is read in one pass if it is no longer: a small one takes nearly as long
WAIT = 0.02  # seconds; one of those who wait for another thread's step looks that often whether that thread still steps
OTHERS_USED_IT = (
    "another call has used the model since, and this stream cannot go on: the model has parts, hooks or patches of "
    "somebody's own, which may remember more than our cache does; finish a stream, or leave it, before the next call"
)


@dataclass(eq=False)
class _Begun:
    """A step that was begun: its rows and their lengths before it, what it takes to undo it, and what came of it."""

    rows: list[Row]
    lengths: list[int]
    # Each generator, and its state before and after the step drew.
    states: list[tuple[torch.Generator, torch.Tensor, Optional[torch.Tensor]]]
    logits: Optional[torch.Tensor] = None
    chosen: Optional[torch.Tensor] = None
    decisions: Optional[list[list[Decision]]] = None  # for each row; several if drafts held


class Scheduler:
    """Runs the requests of all calls over one engine."""

    def __init__(
        self,
        engine: Engine,
        group: Group = None,
        draft: Optional[Engine] = None,
        never: Collection[int] = (),
        grammars: Callable[[Any], Grammar] = lambda grammar: grammar,
    ) -> None:
        """group: the processes that share the model, and make the same calls. draft: of a model that guesses for it.
        never, grammars: see `Chooser`."""
        self.engine, self.group = engine, group
        self.pace = Pace()
        self.chooser = Chooser(engine, draft is not None, never, grammars)
        self.draft_model = None if draft is None else DraftModel(draft, group, never)
        self.verifier = Verifier(engine, self.chooser, self.pace, self.draft_model)
        self.forcing = Forcing(engine, self.chooser)
        slots = engine.model.params.max_batch_size
        self.held = Held(slots)
        self._slots: list[Optional[Row]] = [None] * slots
        self._inbox: deque[Call] = deque()
        self._waiting: list[Call] = []  # calls that have requests to admit, in the order in which they came
        self._state: tuple[object, torch.Tensor] = (), torch.empty(0)  # the state of the weights that made what is held
        self._doubt: Optional[torch.Tensor] = None  # whether they have changed since, on the device
        self._begun: deque[_Begun] = deque()  # the step that is under way, and one that was queued ahead
        self._newest: tuple[list[Row], torch.Tensor] = [], torch.empty(0)  # rows, and their newest ids on the device
        self._numbers = itertools.count()
        self._broken = False  # whether a step has ended in an exception, anywhere in it
        self._waiters: list[Call] = []  # calls whose threads wait for another thread's step

    @property
    def rows(self) -> list[Row]:
        """The rows that run. Between two steps row i owns slot i."""
        return [row for row in self._slots if row is not None]

    @property
    def weights(self) -> tuple[Any, torch.Tensor]:
        """The engine's `weights_state` when the last call came."""
        return self._state

    @property
    def _limit(self) -> int:
        return int(self.engine.model.params.max_seq_len)

    @property
    def running(self) -> list[list[int]]:
        """The ids so far of the rows that are to run on."""
        return [list(row.ids) for row in self.rows if not row.is_over]

    # Calls, from any thread

    def submit(self, call: Call) -> None:
        if call.plainly:
            call.plain_steps = metas_way.steps(call, self.engine, self.chooser)
        else:
            self._inbox.append(call)

    def advance(self, call: Call, step: Optional[Callable[[], object]] = None) -> None:
        """Step, or wait for the thread that does. step: what to run in place of our own step."""
        if call.plain_steps is not None:
            with self.engine.turn():
                if call.admitted and not self.engine.owned_by(call):
                    raise RuntimeError(OTHERS_USED_IT)
                next(call.plain_steps)
            return
        lock = self.engine.lock
        if not lock.acquire(blocking=False):
            self._waiters.append(call)
            openmp.rest()
            try:
                if lock.acquire(blocking=False):  # it was released before this call stood in the list
                    lock.release()
                else:
                    call.wake.wait(WAIT * len(self._waiters))
                    call.wake.clear()
            finally:
                with suppress(ValueError):
                    self._waiters.remove(call)
            return
        goes_on = False
        try:
            if not call.has_news:  # otherwise another thread has stepped meanwhile
                with self.stepping():
                    call.before_step()
                    (step or self.step)()
            goes_on = not call.has_news and not call.is_over
        finally:
            lock.release()
            self.wake_others(instead=not goes_on)

    def wake_others(self, instead: bool) -> None:
        """Wake those for whom there is news; and one more to step in this thread's place, if it leaves. If all woke,
        they would take the interpreter's lock from whoever steps."""
        for call in list(self._waiters):
            leaves = call.has_news or call.is_over
            if leaves or instead:
                instead = instead and leaves
                call.wake.set()

    def let_go(self) -> None:
        """Note that a call was left. This never waits, because the garbage collector may end a stream in any thread.
        A thread that holds the lock meanwhile finds out at its next step."""
        if not self.engine.lock.acquire(blocking=False):
            return
        try:
            if not self.engine.stepping:  # not within a step of this very thread
                if any(row.call.is_over for begun in self._begun for row in begun.rows):
                    self._take_back()
                self._dismiss()
                self._waiting = [call for call in self._waiting if not call.is_over]
                for call in [call for call in self._inbox if call.is_over]:
                    self._inbox.remove(call)
                if not self.rows:  # nothing here is to keep the calls that have ended
                    self._newest = [], torch.empty(0)
                    self.chooser.let_go()
                elif self._waiters:  # another thread steps on
                    openmp.rest()
        finally:
            self.engine.lock.release()

    def forget(self) -> None:
        """Forget what the cache holds of prompts that have ended."""
        with self.engine.lock:
            self._dismiss()
            self.held.clear()

    def lend_slot(self) -> int:
        """A slot for somebody else's use within this turn. What was held there is forgotten."""
        with torch.inference_mode(), self._whole():
            self.engine.refresh()
            if not self.engine.as_built:  # then all rows stand in the first slots
                self.engine.take(None)
                return 0
            self._own_cache()
            self._dismiss()
            slot = self.held.oldest(
                [slot for slot, row in enumerate(self._slots) if row is None] or [len(self._slots) - 1]
            )
            if (row := self._slots[slot]) is not None:
                self._read_anew(row)
            self.held.set(slot, [])
            return slot

    # A step

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """A block of one step."""
        with self.engine.turn(), torch.inference_mode(), self._whole():
            yield

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """A block after which nothing is trusted if an exception ends it, wherever that comes."""
        if self._broken:
            self._mend()
        self._broken = True
        try:
            yield
        except BaseException:
            self._take_back()  # at once: what it drew may be drawn by others, or the generators be seeded anew
            raise
        self._broken = False

    def step(self) -> None:
        """Give free slots to requests that wait, read pieces of their prompts, and decide the next id of each row."""
        self._own_cache(news=bool(self._inbox))
        self._dismiss()
        if self._inbox or self._waiting:
            self._admit()
        self._close_gaps()
        began, read, rows = time.perf_counter(), 0, self.rows
        ahead = self._begun[0] if self._begun else None
        if ahead is None or ahead.chosen is None or ahead.rows != rows or any(row.reading for row in rows):
            self._take_back()
            read = self._read_prompts()
            if deciding := self._deciding():
                self._begin(deciding)
        decided = len(self._begun[0].rows) if self._begun else 0
        plain = decided == 0 or self._begun[0].decisions is None
        if decided:
            self._settle()
        if (read or decided) and plain:  # a pass over several tokens says nothing about steps
            self.pace.saw(read, decided, time.perf_counter() - began)

    def _mend(self) -> None:
        """After a step that ended in an exception: tell what it had decided, and trust nothing else."""
        for row in self.rows:  # a grammar may lack the newest id, and is to be told what follows it
            self.chooser.recount(row)
        while self._begun and self._begun[0].decisions is not None:
            self._tell()
        self._lose_all()
        self.chooser.let_go()
        for row in self.rows:
            self.chooser.recount(row)

    def _begin(self, rows: list[Row]) -> None:
        """Run and choose; or take what is forced as well; or verify guesses, if all rows run."""
        begun = _Begun(rows, [len(row.ids) for row in rows], [])
        forced = [self.chooser.forced(row) for row in rows]
        if any(forced):
            begun.states = [(g, g.get_state(), None) for g in self.chooser.generators(rows)]
            self._begun.append(begun)
            slots = list(map(self._slots.index, rows))
            decided, changed = self.forcing.decide(rows, forced, slots, self._logits, self._doubt)
            self._doubt, self._newest = None, ([], self._newest[1])
            if any(changed):
                self._lose_all()
            else:
                begun.decisions = decided
                self.chooser.count_decided(rows, decided)
            return
        run = rows == self.rows and all(row.last is None for row in rows)
        if run and self._doubt is None and self.verifier.takes(rows):
            begun.states = [(g, g.get_state(), None) for g in self.chooser.generators(rows)]
            self._begun.append(begun)
            begun.decisions = self.verifier.decide(rows)
            if begun.decisions is not None:
                self._newest = [], self._newest[1]
                return
            self._begun.pop()
        self._advance(begun)

    def _settle(self) -> None:
        """Read what was chosen, and tell it. Meanwhile the device goes on with the next step, if it can."""
        begun = self._begun[0]
        if begun.decisions is None:
            assert begun.logits is not None
            assert begun.chosen is not None
            self._newest = begun.rows, begun.chosen
            ahead = self._look_ahead if self.engine.looks_ahead else None
            decisions, changed = self.chooser.read(
                begun.logits, begun.chosen, begun.rows, more=self._doubt, meanwhile=ahead
            )
            self._doubt = None
            if any(changed):
                self._lose_all()
                return
            begun.decisions = [[decision] for decision in decisions]
        self._tell()

    def _tell(self) -> None:
        begun = self._begun[0]
        assert begun.decisions is not None
        decided = zip(begun.rows, begun.lengths, begun.decisions)
        for row, length, decisions in sorted(decided, key=lambda each: each[0].number):
            call = row.call
            for number, decision in enumerate(decisions, start=length - row.prompt_length):
                if row.is_over or row.generated != number:
                    continue
                if decision.token < 0 and row.room > 0:
                    call.error = self._refused(row, decision.token)
                    continue
                row.proven = row.proven or decision.token >= 0
                step = row.step(decision)
                call.tell(number, step)  # twice rather than never, if this thread is interrupted
                try:
                    row.accept(step)
                except Exception as error:  # the row's grammar may be somebody's own
                    call.error = error
        self._begun.popleft()

    def _refused(self, row: Row, token: int) -> ValueError:
        """The error of a row for which there is no id. Nothing of it is held."""
        row.read, row.reading = 0, True
        return self.chooser.error(row, token, self._slots.index(row))

    # Who owns the cache

    def _own_cache(self, news: bool = False) -> None:
        """Make sure that the cache holds what we think, and the engine runs what the model has become. news: a call has
        come, before which anybody may have changed the model."""
        kept = self.engine.take(self)
        if kept and not news and self.engine.as_built:
            return
        self.engine.refresh()
        if self.draft_model is not None:
            self.draft_model.refresh(self.engine)
        self.chooser.let_go()
        before, self._state = self._state, self.engine.weights_state() if self.engine.as_built else ((), torch.empty(0))
        same = kept and self._state[0] == before[0]
        if same:  # then some of the weights' numbers are compared as well, without a wait: the next step tells
            doubt = self._state[1].ne(before[1]).any()[None]
            self._doubt = doubt if self._doubt is None else doubt | self._doubt
        if self.group is not None:
            same, self._doubt = all_agree(same and self._doubt is not None and not self._doubt.item(), self.group), None
        if not same:
            self._lose_all()
        if not self.engine.as_built:  # other threads' calls find out when they step
            raise RuntimeError(OTHERS_USED_IT)

    def _lose_all(self) -> None:
        """Forget all that the cache holds: it is not valid any more."""
        self._take_back()
        self._doubt = None
        self.held.clear()
        for row in self.rows:
            self._read_anew(row)

    def _read_anew(self, row: Row) -> None:
        row.read, row.reading, row.last, row.behind, row.scores, row.rounded = 0, True, None, None, [], None
        row.cached = row.call.cached[row.index] = 0

    # Who runs

    def _dismiss(self) -> None:
        """Take the rows out that have ended."""
        for slot, row in enumerate(self._slots):
            if row is not None and row.is_over:
                kept = row.proven and not row.apart
                self.held.set(slot, row.ids[: row.columns] if kept else [])
                if not row.proven:
                    self.engine.clear(slot)
                self._slots[slot] = None

    def _admit(self) -> None:
        """Give the free slots to requests that wait, in the order in which they came."""
        while self._inbox:
            if self._inbox[0] not in self._waiting:
                self._waiting.append(self._inbox[0])
            self._inbox.popleft()
        self._waiting = [call for call in self._waiting if not call.is_over and call.admitted < len(call.requests)]
        # A call whose rows step together has its slots until its last request has come.
        for call in sorted(self._waiting, key=lambda call: not (call.together and call.admitted > 0)):
            free = self._slots.count(None)
            if call.together and not call.admitted and free < call.lanes:
                break
            for _ in range(min(free, len(call.requests) - call.admitted)):
                if call.together and self._free_lane(call) is None:
                    break
                try:
                    self._place(call)
                except Exception as error:  # no memory for what its options need, for example
                    call.error = error
                    break
            if call.admitted < len(call.requests) and not call.together:
                break

    def _free_lane(self, call: Call) -> Optional[int]:
        taken = {row.lane for row in self.rows if row.call is call}
        return next((lane for lane in range(call.lanes) if lane not in taken), None)

    def _place(self, call: Call) -> None:
        """Give the call's next request a slot."""
        index = call.admitted
        row = Row(call, index, self._limit, lane=self._free_lane(call) or 0, number=next(self._numbers))
        scaling = self.engine.model.params.rope_scaling
        row.apart = scaling is not None and scaling.one_pass(row.prompt_length)
        if index not in call.over:
            self.chooser.admit(row)
            slot = self._share(row)
            call.cached[index] = row.cached
            self.held.set(slot, [])
            self._slots[slot] = row
        call.admitted += 1

    def _share(self, row: Row) -> int:
        """Choose a free slot for a row; let it start behind the longest prefix that any slot has, or is about to
        have."""
        free = [slot for slot, other in enumerate(self._slots) if other is None]
        if row.apart:
            return self.held.oldest(free)
        beginning = row.request.sharable
        rows = [None if other is not None and other.apart else other for other in self._slots]
        holds = [self.held.ids[i] if other is None else other.ids[: other.columns] for i, other in enumerate(rows)]

        def common(ids: list[int]) -> int:
            count = common_prefix(ids, beginning)
            return count if count >= row.request.least_shared else 0

        shared = [common(ids) for ids in holds]
        best = max(range(len(shared)), key=lambda slot: (shared[slot], slot in free))
        coming = [(common(other.ids), other) for other in rows if other is not None and other.reading]
        row.cached, later = max(coming, key=lambda pair: pair[0], default=(0, None))
        if later is not None and row.cached > shared[best]:
            row.behind = later
            return self.held.oldest(free)
        # In place, if less is lost than is won; else from a copy.
        if best in free and 0 < len(holds[best]) <= 2 * shared[best]:
            slot = best
        else:
            kept = {best} if shared[best] else set()
            slot = self.held.oldest([other for other in free if other not in kept] or free)
            if shared[best] > shared[slot]:
                self.held.set(slot, [])
                self.engine.copy(best, slot, shared[best])
                shared[slot] = shared[best]
        row.read = row.cached = shared[slot]
        return slot

    def _close_gaps(self) -> None:
        """Move the rows that run into the first slots."""
        for gap in range(len(self._slots) - self._slots.count(None)):
            if self._slots[gap] is None:
                last = max(slot for slot, row in enumerate(self._slots) if row is not None)
                row = self._slots[last]
                assert row is not None
                self.engine.swap(gap, last, (len(self.held.ids[gap]), row.columns))
                self.held.swap(gap, last)
                self._slots[gap], self._slots[last] = row, None

    # Reading prompts

    def _read_prompts(self) -> int:
        """Read what is to be read of the rows' ids: all; or a piece, if streams wait meanwhile. -> how many tokens"""
        if not any(row.reading for row in self.rows):
            return 0
        waiting = {row.call for row in self.rows}
        hurry = len(waiting) > 1 and any(row.call.streams and not row.reading for row in self.rows)
        left = budget = least(self.pace.piece, self.group) if hurry else math.inf
        read = 0
        while left > 0 and (rows := self._next_to_read()):
            start = rows[0].read
            end = max(len(row.ids) for row in rows)
            if len(rows) * (end - start) > WHOLE * budget:
                rows, end = rows[:1], len(rows[0].ids)
            tokens = len(rows) * (end - start)
            if read and tokens > left:
                break  # with the next step, and not in a small piece now
            if tokens > WHOLE * budget:
                end = start + int(budget)
            self._read(rows, start, end)
            read += len(rows) * (end - start)
            left = budget - read
        return read

    def _next_to_read(self) -> list[Row]:
        """The row that has waited longest to be read on, with all that stand at the same place."""
        rows = []
        for row in self.rows:
            if row.reading and row.behind is not None:
                self._take_over(row)
            if row.reading and row.behind is None and not row.call.is_over:
                rows.append(row)
        rows.sort(key=lambda row: row.number)
        # Scores are then the same to the bit as if their call had come alone.
        return [
            row
            for row in rows
            if row is rows[0]
            or (
                (row.read == rows[0].read and not (row.apart or rows[0].apart))
                and (row.call is rows[0].call or not self._scores(row, rows[0]))
            )
        ]

    @staticmethod
    def _scores(*rows: Row) -> bool:
        return any(row.request.scored for row in rows)

    def _take_over(self, row: Row) -> None:
        """Copy what the row waits for, if it was read; let it read itself, if it never will be."""
        other = row.behind
        assert other is not None
        if other in self._slots and other.columns >= row.cached:
            self.engine.copy(self._slots.index(other), self._slots.index(row), row.cached)
            row.read, row.behind = row.cached, None
        elif other not in self._slots:
            row.behind, row.cached = None, 0
        row.call.cached[row.index] = row.cached

    def _read(self, rows: list[Row], start: int, end: int) -> None:
        """Read ids of rows from one place on. If that fails, the calls that own these rows fail, and no other."""
        try:
            self._pass(rows, start, end)
        except Exception as error:
            first, *others = dict.fromkeys(row.call for row in rows)
            if others:  # reading each call by itself shows which one fails
                for call in (first, *others):
                    self._read([row for row in rows if row.call is call], start, end)
                return
            first.error = error
            for row in rows:
                self._read_anew(row)
            self._dismiss()
            self._close_gaps()

    def _pass(self, rows: list[Row], start: int, end: int) -> None:
        slots = [self._slots.index(row) for row in rows]
        parts = [row.ids[:end] for row in rows]
        whole = {"pass_length": rows[0].prompt_length} if rows[0].apart else {}
        for which, hidden, at in self.engine.prefill(parts, slots, start, **whole):
            for states, i in zip(hidden, which):
                row, length = rows[i], len(rows[i].ids)
                if row.request.scored and not row.generated:
                    first, ids = row.request.targets(at, at + len(states))
                    targets, after = to_device(ids, self.engine.device), states[first - at :][: len(ids)]
                    row.scores.append(self.engine.logprobs(after, targets, row.request.alternatives))
                if at < length <= at + len(states):
                    row.last = states[length - 1 - at].clone()
        for row, ids in zip(rows, parts):
            row.read, row.reading = len(ids), len(ids) < len(row.ids)
        self._score([row for row in rows if row.scores and not row.reading])

    def _score(self, rows: list[Row]) -> None:
        """Prompts' log-probabilities, on the host."""
        whole = [[torch.cat(parts) for parts in zip(*row.scores)] for row in rows]
        fetched = iter(self.engine.fetch(list(itertools.chain(*whole))) if rows else [])
        for row, parts in zip(rows, whole):
            if not row.take_scores(*itertools.islice(fetched, len(parts))):
                row.call.error = self._refused(row, NOT_FINITE)

    # Running rows

    def _deciding(self) -> list[Row]:
        """The rows for which an id is to be chosen now: those whose ids are all in the cache, but for the newest."""
        rows = self.rows
        late = {row.call for row in rows if row.reading and row.call.together}
        return [row for row in rows if not row.reading and row.call.error is None and row.call not in late]

    def _advance(self, begun: _Begun, known: bool = True) -> None:
        """Run the newest tokens of rows, and choose their next ones. known: whether the rows have these tokens already,
        or they are only on the device."""
        rows = begun.rows
        begun.states = [(g, g.get_state(), None) for g in self.chooser.generators(rows)]
        self._begun.append(begun)
        logits = self._logits(rows, known)
        chosen = self.chooser.choose(logits, rows)
        self.chooser.count(chosen, rows)
        begun.states = [(generator, before, generator.get_state()) for generator, before, _ in begun.states]
        begun.logits, begun.chosen = logits, chosen

    def _logits(self, rows: list[Row], known: bool = True) -> torch.Tensor:
        """Behind the newest tokens of rows, which are run if they were not: float32 (rows, V)"""
        running = [i for i, row in enumerate(rows) if row.last is None]
        logits = torch.empty(0)
        if running:
            logits = self._run([rows[i] for i in running], known)
        if len(running) < len(rows):
            read = [i for i, row in enumerate(rows) if row.last is not None]
            first = self.engine.logits(torch.stack([row.last for row in rows if row.last is not None]))
            if running:
                order = sorted(range(len(rows)), key=lambda i: [*running, *read][i])
                first = torch.cat((logits, first))
                first = first if order == list(range(len(rows))) else first[to_device(order, logits.device)]
            logits = first
        return logits

    def _run(self, rows: list[Row], known: bool) -> torch.Tensor:
        """One token of each row -> float32 logits (rows, V). Rows between them take part, with a token behind their
        columns that is overwritten before any query sees it."""
        end = self._slots.index(rows[-1]) + 1
        among = [row for row in self._slots[:end] if row is not None]
        last = self._limit - 1
        if rows == self._newest[0] == among:
            # A row that has ended shows no id, and this process may not know yet that it has ended.
            tokens = self._newest[1] if known else self._newest[1].clamp(min=0)
        else:
            assert known
            tokens = to_device([row.ids[-1] for row in among], self.engine.device)
        positions = [min(row.columns + (not known), last) for row in among]
        if self.engine.fills_up:
            self.engine.keep_columns(
                [len(self.held.ids[i]) if r is None else r.columns for i, r in enumerate(self._slots)]
            )
        logits = self.engine.decode(tokens, positions)
        if len(rows) == len(among):
            return logits
        return logits[to_device([i for i, row in enumerate(among) if row in rows], logits.device)]

    def _look_ahead(self) -> None:
        """Queue the next step before the host knows this one's ids: the device need not wait for it. If a row turns out
        to have ended, the step leaves only columns that are overwritten before any query reads them."""
        rows = self._begun[0].rows
        waits = rows != self.rows or any(
            row.request.grammar is not None or row.call.source.draw is not None for row in rows
        )
        if not waits and not self.verifier.takes(rows) and not self._inbox and all(row.room > 1 for row in rows):
            lasts = [row.last for row in rows]
            for row in rows:
                row.last = None
            self._advance(_Begun(rows, [len(row.ids) + 1 for row in rows], []), known=False)
            for row, state in zip(rows, lasts):
                row.last = state

    def _take_back(self) -> None:
        """Undo steps that were begun, and are not told: what they drew is drawn again."""
        while self._begun and self._begun[-1].decisions is None:
            with torch.inference_mode():
                self._undo(self._begun.pop())

    def _undo(self, begun: _Begun) -> None:
        if begun.chosen is not None:
            self.chooser.count(begun.chosen, begun.rows, -1)
        for generator, before, after in begun.states:
            if after is None or torch.equal(generator.get_state(), after):  # otherwise somebody has seeded it meanwhile
                generator.set_state(before)
        self._newest = [], self._newest[1]
