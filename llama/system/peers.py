"""Says what the processes of one launcher do: whom this one waits for, who has ended, and how.

A thread writes a sign of life into the process group's store once a second, and reads those of the others there. It
takes part in no collective and delays none: a step costs the same with it. It also ends this process when torchrun is
gone.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Optional, TypeVar

from . import pipes
from .launch import Launch, error_file
from .printable import escaped

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

T = TypeVar("T")
BEAT = 1.0  # seconds between two signs of life
SILENT = 5.0  # seconds without one, after which a process seems to be stopped
LATE = 10.0  # seconds that a process waits in a collective before it says for whom
COMING = 30.0  # seconds that a process waits for others to come to `Llama.build`
GRACE = 5.0  # seconds that a process whose launcher is gone has for handlers of SIGTERM
PATIENCE = 5.0  # seconds that a process at its end waits for the others

# The ways a process can end, beside "failed: …"
ENDED = "has ended: it returned, or called sys.exit or runtime.shutdown"
NOBODY_READS = "has ended because nobody reads its output any more"
GONE = "torchrun, which started it, is gone"
LOST = "lost a connection"  # it is not the first to end

PACKAGE = str(Path(__file__).parents[1])
TORCH = str(Path(str(getattr(find_spec("torch"), "origin", ""))).parent)  # not imported: that takes a second
NOT_THE_USERS = (PACKAGE, TORCH, *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), "<frozen")


@dataclass
class Sign:
    """One process's message to the others about itself."""

    beat: int = 0  # counts up while it lives
    meeting: str = ""  # group and count of the collective that it waits in; empty: it is elsewhere
    at: str = ""  # file and line that its program has reached
    end: str = ""  # how it ended


def place(frames: Iterable[FrameType]) -> str:
    """The line of the user's program: "text_completion (my.py, line 3)"; outside of this package "my.py, line 3".

    frames: those of a thread, the innermost first.
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
    """Exchanges this process's signs with the others."""

    rank: int
    size: int
    launcher: Optional[int] = None  # the id of the process to end with, if there is one
    why_gone: Optional[Callable[[], str]] = None  # see `Launch`
    store: Optional[Store] = None
    sign: Sign = field(default_factory=Sign)
    thread: int = field(default_factory=threading.get_ident)  # the one that the user's calls run in
    since: Optional[float] = None  # time when this process began to wait for `awaited`
    awaited: Sequence[int] = ()
    meetings: dict[str, int] = field(default_factory=dict)  # group -> how many meetings it had
    heard: dict[int, tuple[int, float]] = field(default_factory=dict)  # rank -> last beat, and the time when it was new
    seen: dict[int, Sign] = field(default_factory=dict)  # rank -> last sign
    silent: set[int] = field(default_factory=set)  # ranks that a line called silent
    late_in: str = ""  # the meeting that a line called others late for
    stopped: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="llama-peers", daemon=True).start()

    def wait_for(self, ranks: Sequence[int], group: str) -> None:
        """This process comes to a meeting, and waits for these ranks until `arrived`."""
        count = self.meetings[group] = self.meetings.get(group, 0) + 1
        self.thread, self.awaited, self.since = threading.get_ident(), ranks, time.monotonic()
        self.sign.meeting = f"{group} {count}"

    def arrived(self) -> None:
        """The others have come."""
        self.since = None
        self.sign.meeting = ""

    def end(self, how: str) -> None:
        """Tell the others how this process ends. Only the first call counts."""
        if not self.sign.end:
            self.sign.end = how
            with contextlib.suppress(RuntimeError):  # the process that keeps the store is gone
                self._write()

    def publish(self, store: Store) -> None:
        """Exchange signs in this store from now on."""
        self.store = store
        self._write()

    def stop(self) -> None:
        """End the thread."""
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
        """RuntimeError if torchrun is gone. The store would raise it too, but would print many lines."""
        if self._launcher_is_gone():
            raise RuntimeError(GONE)

    def _end_with_launcher(self) -> None:
        """End this process: nothing else does once torchrun is killed, and processes of other nodes may wait for it."""
        tell(f"process {self.rank} ends because {GONE}")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(1)

    def _write(self) -> None:
        self._look_for_launcher()
        if self.store is not None:
            self.store.set(str(self.rank), json.dumps(asdict(self.sign)))

    def _read(self, rank: int) -> Optional[Sign]:
        """The last sign of a process. None if it has not come to `Llama.build` yet."""
        self._look_for_launcher()
        if self.store is not None and self.store.check([str(rank)]):
            self.seen[rank] = Sign(**json.loads(self.store.get(str(rank))))
        return self.seen.get(rank)

    def _ends(self) -> dict[int, str]:
        """rank -> how it ended, for the other processes that ended by themselves."""
        return {rank: sign.end for rank, sign in self.seen.items() if rank != self.rank and sign.end not in ("", LOST)}

    def _is_silent(self, rank: int, sign: Optional[Sign]) -> bool:
        beat, now = -1 if sign is None else sign.beat, time.monotonic()
        if self.heard.get(rank, (None, 0))[0] != beat:
            self.heard[rank] = beat, now
        return now - self.heard[rank][1] > (COMING if sign is None else SILENT) and not (sign and sign.end)

    def _speak_of_silent(self) -> None:
        """Name the silent processes. Only the lowest one that lives speaks: each first looks for one below it."""
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
                continue  # `_speak_of_joining` has said that this process waits for all
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
                f"process {self.rank} of {self.size} has waited {COMING:g} s for the others to come to Llama.build "
                f"({meeting})"
            )

    def _speak_of_late(self) -> None:
        since, meeting = self.since, self.sign.meeting
        if since is None or time.monotonic() - since < LATE or meeting == self.late_in:
            return
        missing = []
        for rank in self.awaited:
            sign = self._read(rank) if rank != self.rank else self.sign
            if sign is not None and sign.meeting == meeting and rank < self.rank:
                return  # the other process prints this line
            if sign is not None and not sign.end and sign.meeting != meeting and rank not in self.silent:
                missing.append(f"process {rank}, which is {'in ' + sign.at if sign.at else 'elsewhere'}")
        if missing and self.since == since:
            self.late_in = meeting
            tell(f"process {self.rank} has waited {LATE:g} s in {self.sign.at} for {' and for '.join(missing)}")

    def linger(self) -> None:
        """Give the others time to read how this process ended, if the store ends with it."""
        if self.rank == 0 and self.size > 1 and self.launcher is None:  # torchrun keeps the store itself
            time.sleep(2 * BEAT)

    def wait_for_ends(self) -> None:
        """Wait until the others end too: a slow one that finds its peers gone can abort. This is no collective: a
        process that leaves early, by sys.exit for example, must not wait for ever for others that wait for it."""
        deadline = time.monotonic() + PATIENCE
        others = {rank for rank in range(self.size) if rank != self.rank}
        with contextlib.suppress(RuntimeError):  # the process that keeps the store is gone already
            while others and time.monotonic() < deadline:
                others = {rank for rank in others if not ((sign := self._read(rank)) and sign.end)}
                time.sleep(0.01 if others else 0)

    def why_lost(self) -> str:
        """Why a connection was cut: which process has ended, and how. Waits until one says so, or gives no more
        signs."""
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
    """Print a line, or several, on stderr, which may be closed. The text is escaped, so that it steers no terminal."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write("\n".join(map(escaped, line.split("\n"))) + "\n")
        sys.stderr.flush()


watch: Optional[Watch] = None  # this process's watch while it belongs to a process group


def end(how: str) -> None:
    """Tell the other processes and torchrun, if there are any, how this one ends."""
    if how.startswith("failed: "):
        _tell_launcher(how.removeprefix("failed: "))
    if watch is not None:
        watch.end(how)


def _tell_launcher(line: str) -> None:
    """Leave the line where torchrun looks for it, which ends its own report of a failure with it."""
    if (path := error_file()) is not None and not path.exists():
        told = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            path.write_text(json.dumps({"message": told}), encoding="utf-8")


def is_refused(address: str) -> bool:
    """Whether nobody listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=GRACE).close()
    except (OSError, ValueError) as error:  # another error may pass: the host does not answer yet
        return isinstance(error, ConnectionRefusedError)
    return False


def begin(launch: Launch) -> Watch:
    """Make and start this process's `watch`."""
    global watch
    watch = Watch(launch.rank, launch.world_size, launch.launcher, launch.why_gone)
    watch.start()
    return watch


@contextlib.contextmanager
def waiting(ranks: Sequence[int], group: str) -> Iterator[None]:
    """A block in which this process waits for these ranks of the group. All of them must run it equally often."""
    here = watch
    if here is not None:
        here.wait_for(ranks, group)
    try:
        yield
    finally:
        if here is not None:
            here.arrived()


def wait_until(has_ended: Callable[[float], bool]) -> None:
    """Wait for something that the other processes take part in. has_ended: waits for so many seconds at most.

    RuntimeError if a process that this one has started is gone, and torch has not noticed it within a second. No
    launcher ends this process then, and torch may wait on for hours. Ctrl-C takes effect within a second, unless it is
    held back.
    """
    gone = ""
    while not has_ended(BEAT):
        if gone:
            raise RuntimeError(f"connection closed by peer: {gone}")
        gone = watch.why_gone() if watch is not None and watch.why_gone is not None else ""


def connected(connect: Callable[[], T]) -> T:
    """What `connect` returns, which meets the other processes in torch's store. Raises the errors of `wait_until`."""
    if watch is None or watch.why_gone is None:
        return connect()
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(connect())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="llama-connects", daemon=True)
    thread.start()

    def has_ended(seconds: float) -> bool:
        thread.join(seconds)
        return not thread.is_alive()

    wait_until(has_ended)
    return outcome.result()


def tell_failure(error: BaseException) -> bool:
    """Print why an exception ends this process, and tell the others. False: let Python print it.

    The process that failed first matters: its peers only lost their connection to it. If nobody reads the output, all
    end with status 0.
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
    end(f"failed: {last_line}")
    if isinstance(error, KeyboardInterrupt):
        tell(f"process {here.rank} was interrupted in {place(frames)}")
        return True
    return getattr(error, "told_by", here.rank) != here.rank  # True: another process prints the same


def _is_lost_connection(error: BaseException, frames: Sequence[FrameType]) -> bool:
    """Whether a collective failed because another process is gone, and not a connection of the user's own."""
    lost = ("connection closed by peer", "connection reset by peer", "broken pipe", "nccl communicator was aborted")
    if not isinstance(error, RuntimeError) or not any(words in str(error).lower() for words in lost):
        return False
    file = next((frame.f_code.co_filename for frame in frames), "")
    return file.startswith((PACKAGE, TORCH)) or "inductor" in file  # "inductor": compiled code
