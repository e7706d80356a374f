"""The chat at the terminal: messages, and commands such as /undo."""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Optional, cast

from ..completion import Chunk
from ..options import DEFAULTS, SETTABLE
from ..saved import write_messages
from ..session import ContextFull
from ..system.files import user_path
from ..system.launch import is_first_process
from ..system.printable import clipped, counted
from ..system.program import nearest
from .console import Read, complain, note, number, on_first, say, texts
from .keyboard import keys_wait

if TYPE_CHECKING:
    from .screen import Screen

SHORT = {"?": "help"}
SETTINGS = {name: DEFAULTS[name] for name in SETTABLE}  # what /set knows, with the values that `/set NAME none` gives


class Conversation:
    """What can be typed into `chat`. A method `do_x` is the command /x, and its docstring is the line that /help shows.

    It runs alike on every process; only the first one reads what is typed, and touches files.
    """

    def __init__(self, session: Any) -> None:
        self.session = session
        self.forks, self.fork = {"main": session}, "main"  # by name, and where we are
        self.read: Optional[Read] = None
        self.plain = False
        self.refused: Optional[str] = None  # the message that did not fit; /drop makes room for it
        self.last: Optional[str] = None  # what /stats says about the last reply

    def run(self, read: Optional[Read]) -> None:
        """Obey lines until they end. read: None on processes other than the first."""
        self.read = read
        interactive = on_first(lambda: sys.stdin.isatty())
        if interactive:
            note("Type a message. /help lists the commands; Ctrl-C stops a reply; Ctrl-D ends.")
        with keys_wait():
            while (line := on_first(lambda: read(self._below) if read else None)) is not None:
                try:
                    if line.strip():
                        self.obey(line)
                except BrokenPipeError:  # nobody reads stdout any more: `pipe_may_close` ends it
                    raise
                except (ValueError, OSError) as error:
                    complain(str(error))
                except EOFError:
                    return
                except KeyboardInterrupt:
                    if not interactive:
                        raise SystemExit(130) from None

    def _below(self) -> str:
        return self.context + f", fork {self.fork}" * (len(self.forks) > 1)

    def obey(self, line: str) -> None:
        """Run a command, or answer a message."""
        if not line.startswith("/"):
            return self.reply(line)
        name, argument = re.findall(r"(?s)/(\S*)\s*(.*)", line)[0]
        command = getattr(self, f"do_{SHORT.get(name, name)}", None)
        if command is None:
            raise ValueError(
                f"unknown command /{name}; /help lists them. A message that begins with / needs a space before it"
            )
        return command(argument.strip())

    def reply(self, message: str) -> None:
        """Say something, and show the answer as it comes."""
        try:
            chunks = self.session.send(message)
        except ContextFull as error:
            # The message offers this only if dropping turns helps.
            offer = f"drop({error.drop})"
            self.refused = message if offer in str(error) else None
            told = str(error).replace(f"{offer} forgets", "/drop sends the message again and forgets")
            raise ValueError(
                told.replace("build with a larger max_seq_len", "start with a larger --max_seq_len")
            ) from error
        self.refused = None
        self.show(chunks)

    def show(self, reply: Iterator[Chunk], begun: Optional[str] = None) -> None:
        """Print a reply as it comes, without the spaces before it. begun: it goes on from this text, or from the last
        reply if this is empty; a terminal shows the block again that grows."""
        # A generator keeps the turn when it is closed, also if it is left early.
        chunks = cast("Generator[Chunk, None, None]", reply)
        shown, screen = begun is not None, self._screen()
        if screen and shown:
            screen.write(begun or screen.last_block(self.session.turns[-1]["assistant"]))
        count, waited, reason, began = 0, 0.0, None, time.perf_counter()
        try:
            with closing(chunks), screen or nullcontext(say) as write:
                for chunk in chunks:
                    waited = waited or time.perf_counter() - began
                    count, reason = count + len(chunk["tokens"]), chunk["finish_reason"]
                    text = chunk["text"] if shown else chunk["text"].lstrip()
                    shown = shown or bool(text)
                    write(text)
        except KeyboardInterrupt:
            say("\n")
            note("stopped; the reply is kept as far as it came" if waited else "stopped before the reply began")
            raise
        except ValueError:  # a server may be lost in the middle
            say("\n" if shown else "")
            raise
        finally:
            seconds = time.perf_counter() - began
            rate = (count - 1) / (seconds - waited) if count > 1 else 0
            self.last = f"{count} tokens, {rate:.1f} a second; the first after {waited:.3f} s"
        say("\n")
        if sys.stdout.isatty():
            told = f"{counted(count, 'token')}, {rate:.1f} tok/s, " * (count > 0)  # a server may not count
            note(f"{told}{seconds:.1f} s, context {self.context}")
        if reason == "context":
            note(f"the context is full ({self.limit} tokens): /drop forgets the oldest turn, /clear all of them")
        elif reason == "length":
            note(f"stopped at max_gen_len={self.session.options['max_gen_len']}")

    def _screen(self) -> Optional[Screen]:
        """What draws Markdown; None where replies are to be plain."""
        if self.plain or not sys.stdout.isatty() or find_spec("rich") is None:
            return None
        from .screen import Screen

        return Screen.at_terminal()

    @property
    def limit(self) -> int:
        """The tokens that there is room for."""
        return cast(int, self.session.llama.model.params.max_seq_len)

    @property
    def context(self) -> str:
        """How much of the room is used, in words."""
        used = min(self.limit, self.limit - self.session.room)
        return f"{used} of {self.limit} tokens ({used / self.limit:.0%})"

    def do_help(self, _: str) -> None:
        """/help, /?  this list"""
        note("\n".join(command.__doc__ or "" for name, command in vars(Conversation).items() if name.startswith("do_")))
        note(
            "Esc Enter, or a \\ at its end, begins a new line of the message; the arrow keys bring back earlier ones.\n"
            "Ctrl-C stops a reply, which is kept as far as it came (under torchrun it ends all processes); Ctrl-D ends."
        )

    def do_system(self, text: str) -> None:
        """/system [TEXT]  show or set the system message; - removes it (only before the first turn)"""
        if text:
            if self.session.turns:
                raise ValueError("the system message belongs to the first turn; /clear before changing it")
            self.session.system = None if text == "-" else text
        note("no system message" if self.session.system is None else f"system message: {self.session.system}")

    def do_undo(self, _: str) -> None:
        """/undo  take the last turn back"""
        turn = self.session.undo()
        note(f"took back: {turn['user']}" if turn else "nothing to take back")

    def do_retry(self, _: str) -> None:
        """/retry  ask for another reply to the last message"""
        if not self.session.turns:
            raise ValueError("nothing was said that could be tried again")
        self._ask_again(1, self.session.turns[-1]["user"])

    def do_edit(self, text: str) -> None:
        """/edit [N]  change your last message (2: the one before it), and ask again from there"""
        count = _count("edit", text, "which message to change, from the end: 1 is the last")
        said = len(self.session.turns)
        if count > said:
            raise ValueError(
                f"there are {counted(said, 'message')} of yours to change" if said else "nothing was said yet"
            )
        before = self.session.turns[-count]["user"]
        read = self.read
        message = on_first(lambda: read(lambda: "Enter sends it, Ctrl-C leaves it as it was", before) if read else None)
        if message and message.strip():
            self._ask_again(count, message)
        else:
            note("it stays as it was")

    def _ask_again(self, count: int, message: str) -> None:
        """Say something in place of the last turns. They come back if no reply comes, unless /drop is to make room for
        it."""
        turns = list(self.session.turns)
        self.session.turns = turns[:-count]
        try:
            self.reply(message)
        finally:
            if len(self.session.turns) == len(turns) - count and self.refused is None:
                self.session.turns = turns

    def do_fork(self, name: str) -> None:
        """/fork [NAME]  go on with a copy of the conversation; this one stays as it is"""
        name = name or next(n for n in map(str, itertools.count(2)) if n not in self.forks)
        before = self.fork
        if name in self.forks:
            raise ValueError(f"there is a fork {name} already; /switch {name} goes there")
        self.forks[name] = self.session.fork()
        self._go_to(name)
        note(f"this is {name} now; /switch {before} goes back to where it came from")

    def do_switch(self, name: str) -> None:
        """/switch [NAME]  list the forks, or go to one of them"""
        if name:
            if name not in self.forks:
                raise ValueError(f"there is no fork {name}; there are {', '.join(self.forks)}")
            self._go_to(name)
        lines = []
        for known, session in self.forks.items():
            last = f": {clipped(' '.join(session.turns[-1]['user'].split()), 60)}" if session.turns else ""
            lines.append(f"{'>' if known == self.fork else ' '} {known}  {counted(len(session.turns), 'turn')}{last}")
        note("\n".join(lines))

    def _go_to(self, fork: str) -> None:
        self.session, self.fork, self.refused = self.forks[fork], fork, None

    def do_continue(self, beginning: str) -> None:
        """/continue [BEGINNING]  let the last reply go on, or replace it by BEGINNING and let that go on"""
        if beginning and self.session.turns:
            self.session.turns = [*self.session.turns[:-1], {**self.session.turns[-1], "assistant": beginning}]
        self.show(self.session.continue_reply(), beginning)

    def do_clear(self, _: str) -> None:
        """/clear  forget all turns; the system message stays"""
        self.session.clear()
        self.refused = None
        note("all forgotten")

    def do_drop(self, text: str) -> None:
        """/drop [N]  forget the N oldest turns, or as many as the message needs that did not fit; then send it again"""
        count = _count("drop", text, "how many turns to forget, 1 or more")
        message, self.refused = self.refused, None
        if message is not None and not text:
            count = self._needed(message)
        before = len(self.session.turns)
        self.session.drop(count)
        note(f"forgot {before - len(self.session.turns)} of {before} turns")
        if message is not None:
            self.reply(message)

    def _needed(self, message: str) -> int:
        try:
            self.session.send(message)  # computes nothing before it is iterated over
        except ContextFull as error:
            return error.drop
        return 0

    def do_save(self, text: str) -> None:
        """/save FILE  write what was said as JSON: messages as OpenAI's API takes them"""
        path = _path(text)
        if not self.session.dialog:
            raise ValueError("nothing was said yet")
        on_first(lambda: write_messages(path, self.session.dialog))
        note(f"{path} is written: {self._turns()}")

    def do_load(self, text: str) -> None:
        """/load FILE  go on with saved messages in place of these"""
        path = _path(text)

        def read() -> tuple[Any, Any]:
            self.session.load(path)
            return self.session.system, self.session.turns

        system, turns = on_first(read)
        if not is_first_process():  # the first one has read them; the others may not see the file
            self.session.clear()
            self.session.system, self.session.turns = system, turns
        self.refused = None
        note(f"{path} is read: {self._turns()}")

    def _turns(self) -> str:
        return counted(len(self.session.turns), "turn")

    def do_plain(self, _: str) -> None:
        """/plain  show replies as they were written, also the last one; again: in color"""
        self.plain = not self.plain
        note("replies are shown as they were written" if self.plain else "replies are shown in color")
        if self.plain and self.session.turns:
            say(self.session.turns[-1]["assistant"] + "\n")

    def do_stats(self, _: str) -> None:
        """/stats  speed of the last reply, and how much of the context is used"""
        note(f"last reply  {self.last or 'none'}\ncontext     {self.context}, {self._turns()}")

    def do_set(self, text: str) -> None:
        """/set [NAME VALUE]  show the options of replies, or change one: temperature, max_gen_len, stop, seed, …"""
        options = self.session.options
        if text:
            name, *value = text.split(None, 1)
            if name not in SETTINGS:
                raise ValueError(f"unknown option {name}{nearest(name, SETTINGS)}; there are {', '.join(SETTINGS)}")
            if not value:
                raise ValueError(f'/set {name} needs a value (or the word "none" for the default)')
            changed = {**options, name: SETTINGS[name] if value[0] == "none" else _setting(name, value[0])}
            self.session.llama.check_options(changed)
            options[name] = changed[name]
        note("  ".join(f"{name}={options.get(name, default)!r}" for name, default in SETTINGS.items()))

    def do_quit(self, _: str) -> NoReturn:
        """/quit  end, as Ctrl-D does"""
        raise EOFError


COMMANDS = [f"/{name.removeprefix('do_')}" for name in vars(Conversation) if name.startswith("do_")]


def _setting(name: str, value: str) -> Any:
    if name == "stop":
        return texts(value)
    try:
        return number(value)
    except ValueError as error:
        raise ValueError(f"{name} is a number, not {value}") from error


def _count(command: str, text: str, told: str) -> int:
    """A number from 1, which is what an empty text stands for."""
    if text and not (text.isdecimal() and int(text)):
        raise ValueError(f"/{command} {text}: it takes {told}")
    return int(text or 1)


def _path(text: str) -> Path:
    if not text:
        raise ValueError("it needs the name of a file")
    return user_path(text)
