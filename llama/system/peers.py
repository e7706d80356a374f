"""What a process says about the others that a launcher started with it: whom it waits for, who has ended, and how.

A thread writes a sign of life into the process group's store once a second, and reads those of the others there. It takes
part in no collective and holds none up: a step costs the same with it. It also ends this process when torchrun is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Optional

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from . import pipes
from .printable import escaped

BEAT = 1.0  # seconds between two signs of life
SILENT = 5.0  # seconds without one, after which a process seems to be stopped
LATE = 10.0  # seconds that a process waits in a call before it says for whom
COMING = 30.0  # seconds that it waits for others to come to `Llama.build` at all
GRACE = 5.0  # seconds that a process whose launcher is gone has for handlers of SIGTERM
PATIENCE = 5.0  # seconds that a process which has ended waits for the others

# How a process ended, beside "failed: …"
ENDED = "has ended: it returned, or called sys.exit or runtime.shutdown"
NOBODY_READS = "has ended because nobody reads its output any more"
GONE = "torchrun, which started it, is gone"
LOST = "lost a connection"  # it is not the first to end

PACKAGE, TORCH = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)
NOT_THE_USERS = (PACKAGE, TORCH, *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), "<frozen")


@dataclass
class Sign:
    """What one process lets the others know."""

    beat: int = 0  # counts up while it lives
    meeting: str = ""  # the collective that it is in, and the how manieth of its group; empty: it is elsewhere
    at: str = ""  # file and line that its program has reached
    end: str = ""  # how it ended


def place(frames: Iterable[FrameType]) -> str:
    """Where the user's program is: "text_completion (my.py, line 3)"; outside of this package "my.py, line 3".

    frames: of a thread, the innermost first.
    """
    ours = ""
    for frame in frames:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(PACKAGE):
            ours = ours if name == "main" or not name.isidentifier() or name.startswith("_") else name
        elif not file.startswith(NOT_THE_USERS):
            line = f"{Path(file).name}, line {frame.f_lineno}"
            return f"{ours} ({line})" if ours else line
    return ours


def stack(frame: Optional[FrameType]) -> Iterator[FrameType]:
    """A frame, and those that called it."""
    while frame is not None:
        yield frame
        frame = frame.f_back


@dataclass
class Watch:
    """The signs of this process and of the others. launcher: the id of the process to end with, if there is one."""

    rank: int
    size: int
    launcher: Optional[int] = None
    store: Optional[Store] = None
    sign: Sign = field(default_factory=Sign)
    thread: int = field(default_factory=threading.get_ident)  # the one that the user's calls run in
    since: Optional[float] = None  # when it began to wait for `awaited`
    awaited: Sequence[int] = ()
    meetings: dict[str, int] = field(default_factory=dict)  # how many there were, by their groups
    heard: dict[int, tuple[int, float]] = field(default_factory=dict)  # the others' last beats, and when they were new
    seen: dict[int, Sign] = field(default_factory=dict)  # the others' last signs
    silent: set[int] = field(default_factory=set)  # those that were spoken of as silent
    late_in: str = ""  # the meeting to which others were spoken of as late
    stopped: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        threading.Thread(target=self._run, name="llama-peers", daemon=True).start()

    def wait_for(self, ranks: Sequence[int], group: str) -> None:
        """This process comes to a meeting; until `arrived` it waits for these others."""
        count = self.meetings[group] = self.meetings.get(group, 0) + 1
        self.thread, self.awaited, self.since = threading.get_ident(), ranks, time.monotonic()
        self.sign.meeting = f"{group} {count}"

    def arrived(self) -> None:
        self.since = None
        self.sign.meeting = ""

    def end(self, how: str) -> None:
        """Let the others know how this process ends. The first word counts."""
        if not self.sign.end:
            self.sign.end = how
            with contextlib.suppress(RuntimeError):  # the process that keeps the store is gone
                self._write()

    def publish(self, store: Store) -> None:
        """From now on signs are exchanged in this store."""
        self.store = store
        self._write()

    def stop(self) -> None:
        self.stopped.set()

    def _run(self) -> None:
        while not self.stopped.wait(BEAT):
            if self._launcher_is_gone():
                self._end_with_launcher()
            self.sign.beat, self.sign.at = self.sign.beat + 1, place(stack(sys._current_frames().get(self.thread)))
            try:
                if self.store is not None:
                    self._write()
                    self._speak_of_silent()
                    self._speak_of_late()
                    if self.launcher is None and self._ends().get(0, ENDED) != ENDED:
                        self.store = None  # the store ends with process 0
                elif self.since is not None and not self.seen:
                    self._speak_of_joining()
            except RuntimeError:
                self.store = None

    def _launcher_is_gone(self) -> bool:
        return self.launcher not in (None, os.getppid())

    def _look_for_launcher(self) -> None:
        """RuntimeError, as the store would raise without torchrun, but without the many lines that it would print."""
        if self._launcher_is_gone():
            raise RuntimeError(GONE)

    def _end_with_launcher(self) -> None:
        """torchrun was killed: nothing else ends what it started, and processes of other nodes may wait for this one."""
        tell(f"process {self.rank} ends because {GONE}")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(1)

    def _write(self) -> None:
        self._look_for_launcher()
        if self.store is not None:
            self.store.set(str(self.rank), json.dumps(asdict(self.sign)))

    def _read(self, rank: int) -> Optional[Sign]:
        """None where it has not come to `Llama.build` yet."""
        self._look_for_launcher()
        if self.store is not None and self.store.check([str(rank)]):
            self.seen[rank] = Sign(**json.loads(self.store.get(str(rank))))
        return self.seen.get(rank)

    def _ends(self) -> dict[int, str]:
        """How other processes have ended that did not end because of others."""
        return {rank: sign.end for rank, sign in self.seen.items() if rank != self.rank and sign.end not in ("", LOST)}

    def _is_silent(self, rank: int, sign: Optional[Sign]) -> bool:
        beat, now = -1 if sign is None else sign.beat, time.monotonic()
        if self.heard.get(rank, (None, 0))[0] != beat:
            self.heard[rank] = beat, now
        return now - self.heard[rank][1] > (COMING if sign is None else SILENT) and not (sign and sign.end)

    def _speak_of_silent(self) -> None:
        """The lowest process that lives speaks. So each asks those below it first, and few of them ask about all."""
        silent = {}
        for rank in (*range(self.rank), *range(self.rank + 1, self.size)):
            sign = self._read(rank)
            if self._is_silent(rank, sign):
                silent[rank] = sign
            elif rank < self.rank:
                return
        for rank in silent.keys() - self.silent:
            sign = silent[rank]
            if sign is None and self.late_in:
                continue  # it has said that it waits for all
            if sign is None:
                why = f"has not come to Llama.build for {COMING:g} s"
            else:
                where = f", in {sign.at}" if sign.at else ""
                why = f"has given no sign of life for {SILENT:g} s: it is stopped or cut off{where}"
            tell(f"process {self.rank} waits for process {rank}, which {why}")
        self.silent = set(silent)

    def _speak_of_joining(self) -> None:
        meeting = self.sign.meeting
        if meeting != self.late_in and self.since is not None and time.monotonic() - self.since > COMING:
            self.late_in = meeting
            tell(
                f"process {self.rank} of {self.size} has waited {COMING:g} s for the others to come to Llama.build ({meeting})"
            )

    def _speak_of_late(self) -> None:
        since, meeting = self.since, self.sign.meeting
        if since is None or time.monotonic() - since < LATE or meeting == self.late_in:
            return
        missing = []
        for rank in self.awaited:
            sign = self._read(rank) if rank != self.rank else self.sign
            if sign is not None and sign.meeting == meeting and rank < self.rank:
                return  # its message says the same
            if sign is not None and not sign.end and sign.meeting != meeting and rank not in self.silent:
                missing.append(f"process {rank}, which is {'in ' + sign.at if sign.at else 'elsewhere'}")
        if missing and self.since == since:
            self.late_in = meeting
            tell(f"process {self.rank} has waited {LATE:g} s in {self.sign.at} for {' and for '.join(missing)}")

    def linger(self) -> None:
        """The store may end with this process: first the others read there how it ended."""
        if self.rank == 0 and self.size > 1 and self.launcher is None:  # torchrun keeps the store itself
            time.sleep(2 * BEAT)

    def wait_for_ends(self) -> None:
        """Let the processes leave together, or a slow one can find its peers gone and abort. Not a collective: a process
        that leaves early, by sys.exit for example, must not wait for ever for others that wait for it."""
        deadline = time.monotonic() + PATIENCE
        others = {rank for rank in range(self.size) if rank != self.rank}
        with contextlib.suppress(RuntimeError):  # the process that keeps the store is gone already
            while others and time.monotonic() < deadline:
                others = {rank for rank in others if not ((sign := self._read(rank)) and sign.end)}
                time.sleep(0.01 if others else 0)

    def why_lost(self) -> str:
        """Which process's end has cut a connection, and how that ended: waits until it has said so, or gives no more signs."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        deadline = time.monotonic() + 2.5 * BEAT
        first: dict[int, Optional[Sign]] = {}
        silent: list[int] = []
        try:
            while not self._ends() and not silent:
                signs = {rank: self._read(rank) for rank in others}
                first = first or signs
                if time.monotonic() > deadline:
                    silent = [rank for rank in others if signs[rank] == first[rank]]
                    break
                time.sleep(0.1)
        except RuntimeError:  # the store is gone
            if self._launcher_is_gone():
                return GONE
            silent = [] if self.launcher else [0]
        if ends := self._ends():
            rank = min(ends, key=lambda rank: not ends[rank].startswith("failed"))
            return f"process {rank} {ends[rank]}"
        return f"process {silent[0]} was killed or crashed" if silent else "it lost its connection to another one"


def tell(line: str) -> None:
    """A line, or several, on stderr, which may be closed. Names of files and the like steer no terminal there."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write("\n".join(map(escaped, line.split("\n"))) + "\n")
        sys.stderr.flush()


watch: Optional[Watch] = None  # this process's watch while it belongs to a process group


def end(how: str) -> None:
    """Let the other processes, if there are any, know how this one ends."""
    if watch is not None:
        watch.end(how)


def is_refused(address: str) -> bool:
    """Whether nobody listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=GRACE).close()
    except (OSError, ValueError) as error:  # others: a host that does not answer yet, for example
        return isinstance(error, ConnectionRefusedError)
    return False


def begin(rank: int, size: int, launcher: Optional[int]) -> Watch:
    global watch
    watch = Watch(rank, size, launcher)
    watch.start()
    return watch


@contextlib.contextmanager
def waiting(ranks: Sequence[int], group: str) -> Iterator[None]:
    """A block in which this process waits for others, all of which run it as often."""
    here = watch
    if here is not None:
        here.wait_for(ranks, group)
    try:
        yield
    finally:
        if here is not None:
            here.arrived()


def tell_failure(error: BaseException) -> bool:
    """Say why an exception ends this process, and let the others know. False where Python's own words are to say it.

    The process that failed first is the one to be heard: its peers only lost their connection to it. Where nobody reads
    what they write, all end well.
    """
    here, frames = watch, [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]
    if here is None:
        return False
    last_line = traceback.format_exception_only(type(error), error)[-1].strip()
    if _is_lost_connection(error, frames):
        why = here.why_lost()
        here.end(LOST)
        if why.endswith(NOBODY_READS):
            sys.exit(0)
        tell(f"process {here.rank} ends because {why}; it saw:\n    {last_line.partition('. ')[0]}")
        return True
    if isinstance(error, BrokenPipeError) and pipes.lost_reader():
        here.end(NOBODY_READS)
        sys.exit(0)
    here.end(f"failed: {last_line}")
    if isinstance(error, KeyboardInterrupt):
        tell(f"process {here.rank} was interrupted in {place(frames)}")
        return True
    return getattr(error, "told_by", here.rank) != here.rank  # the other process says the same


def _is_lost_connection(error: BaseException, frames: Sequence[FrameType]) -> bool:
    """Whether a collective failed because another process is gone, and not a connection of the user's own."""
    lost = ("connection closed by peer", "connection reset by peer", "broken pipe", "nccl communicator was aborted")
    if not isinstance(error, RuntimeError) or not any(words in str(error).lower() for words in lost):
        return False
    file = next((frame.f_code.co_filename for frame in frames), "")
    return file.startswith((PACKAGE, TORCH)) or "inductor" in file  # the last is compiled code
