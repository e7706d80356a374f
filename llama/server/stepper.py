"""One thread steps for all requests, and hands what was decided to the event loop, which writes it to the clients."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from contextlib import suppress
from typing import Optional

from ..completion import Chunk, Completions


class Busy(Exception):
    """As many answers wait for a slot as may wait."""


class Ended(Exception):
    """The server has ended before the answer did."""


class Gone(Exception):
    """The client has left."""


class Answer:
    """The completions of one request, for its handler. Used in the event loop only, but for `completions`."""

    def __init__(self, stepper: Stepper, completions: Completions, streams: bool) -> None:
        self.completions, self.streams = completions, streams
        self.rows = len(completions.call.requests)
        self._stepper, self._news = stepper, asyncio.Event()
        self._chunks: list[Chunk] = []
        self._over = False
        self._error: Optional[BaseException] = None

    async def chunks(self) -> list[Chunk]:
        """What was decided since the last time; waits for it. Nothing when all is over. Raises what went wrong."""
        while not self._chunks and not self._over:
            await self._news.wait()
            self._news.clear()
        if self._error is not None:
            raise self._error
        chunks, self._chunks = self._chunks, []
        return chunks

    def take(self, chunks: list[Chunk], over: bool, error: Optional[BaseException] = None) -> None:
        """Take what comes next."""
        if not self._over:
            self._chunks += chunks
            self._over, self._error = over, error
            self._news.set()

    def leave(self) -> None:
        """The client has left: its rows end before the next step."""
        if not self._over:
            self.take([], True, Gone())
            self._stepper.drop(self)


class Stepper:
    """Runs the answers of all requests, each step for all of them."""

    def __init__(self, slots: int, max_waiting: int, alone: bool = True) -> None:
        """slots: rows that run at once. max_waiting: rows that may wait beside them. alone: no other process runs the
        same steps, so that the next one can be right after one that failed."""
        self.slots, self.max_waiting, self.alone = slots, max_waiting, alone
        self.rows = 0  # rows of all answers that are not over
        self.error: Optional[BaseException] = None  # what ends all requests
        self.failed: Optional[BaseException] = None  # what ended a step of several, or the thread itself
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self._new, self._dropped = deque[Answer](), deque[Answer]()
        self._running: dict[Answer, Completions] = {}
        self._wake, self._end = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="llama-steps", daemon=True)

    # In the event loop

    def start(self) -> None:
        """Start the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def check_room(self) -> None:
        """Raise Busy if no more may wait."""
        if self.waiting >= self.max_waiting:
            raise Busy(f"{self.waiting} answers wait for a slot, and no more may wait; try again later")

    @property
    def waiting(self) -> int:
        """Rows that wait for a slot."""
        return max(0, self.rows - self.slots)

    def submit(self, completions: Completions, streams: bool) -> Answer:
        """Run the completions of a request. streams: hand on each chunk as it comes, and not all at the end."""
        answer = Answer(self, completions, streams)
        self.rows += answer.rows
        self._new.append(answer)
        self._wake.set()
        return answer

    def drop(self, answer: Answer) -> None:
        """Stop running an answer."""
        self._dropped.append(answer)
        self._wake.set()

    def end(self, error: BaseException) -> None:
        """Stop all. Answers that run end with this error."""
        self.error = self.error or error
        self._end = True
        self._wake.set()

    def join(self) -> None:
        """Wait until the thread has ended, if it was started."""
        if self._loop is not None:
            self._thread.join()

    def _hand_on(self, news: list[tuple[Answer, list[Chunk], bool, Optional[BaseException]]]) -> None:
        for answer, chunks, over, error in news:
            if over:
                self.rows -= answer.rows
            answer.take(chunks, over, error)

    # In the thread

    def _run(self) -> None:
        kept: dict[Answer, list[Chunk]] = {}
        try:
            while not self._end:
                self._admit()
                if self._running:
                    self._step()
                else:
                    self._wake.wait()
                    self._wake.clear()
                self._tell(kept)
        except BaseException as error:  # nobody is to wait for a thread that is gone
            self.failed = error
            self.end(error)
        for completions in self._running.values():
            completions.call.error = completions.call.error or self.error
        self._admit()
        self._tell(kept)

    def _admit(self) -> None:
        while self._new:
            answer = self._new.popleft()
            self._running[answer] = answer.completions
            if self._end:
                answer.completions.call.error = self.error
            else:
                answer.completions.call.scheduler.submit(answer.completions.call)
        while self._dropped:
            if (completions := self._running.get(self._dropped.popleft())) is not None:
                completions.call.leave()

    def _step(self) -> None:
        call = next(iter(self._running.values())).call
        if call.is_over:
            return
        try:
            call.scheduler.advance(call)
        except Exception as error:
            call.error = call.error or error
            if not self.alone:
                self.failed = error
                self.end(error)

    def _tell(self, kept: dict[Answer, list[Chunk]]) -> None:
        """Hand on what was decided. kept: chunks of answers that do not stream."""
        news = []
        for answer, completions in list(self._running.items()):
            call, chunks = completions.call, kept.pop(answer, [])
            try:
                chunks += [chunk for step in call.news() if (chunk := completions.add(step)) is not None]
            except Exception as error:  # a tokenizer of the user's own may raise anything
                call.error = call.error or error
            if call.is_over:
                del self._running[answer]
                call.leave()
            elif not answer.streams:
                kept[answer] = chunks
                continue
            if chunks or call.is_over:
                news.append((answer, chunks, call.is_over, call.error))
        if news and self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._hand_on, news)
