"""The chat at the terminal: messages, and commands such as /undo."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn, Optional, cast

from ..completion import Chunk
from ..options import DEFAULTS, SETTABLE
from ..session import ContextFull
from ..system.files import user_path
from ..system.launch import is_first_process
from ..system.printable import counted
from .console import Read, complain, note, number, on_first, say, texts

SETTINGS = {name: DEFAULTS[name] for name in SETTABLE}  # what /set knows, with the values that `/set NAME none` gives


class Conversation:
    """What can be typed into `chat`. A method `do_x` is the command /x, and its docstring is the line that /help shows.

    It runs alike on every process; only the first one reads what is typed, and touches files.
    """

    def __init__(self, session: Any) -> None:
        self.session = session
        self.refused: Optional[str] = None  # the message that did not fit; /drop makes room for it
        self.last: Optional[str] = None  # what /stats says about the last reply

    def run(self, read: Optional[Read]) -> None:
        """Obey lines until they end. read: None on processes other than the first."""
        interactive = on_first(lambda: sys.stdin.isatty())
        if interactive:
            note("Type a message. /help lists the commands; Ctrl-C stops a reply; Ctrl-D ends.")
        while (line := on_first(lambda: read(lambda: self.context) if read else None)) is not None:
            try:
                if line.strip():
                    self.obey(line)
            except (ValueError, OSError) as error:
                complain(str(error))
            except EOFError:
                return
            except KeyboardInterrupt:
                if not interactive:
                    raise SystemExit(130) from None

    def obey(self, line: str) -> None:
        """Run a command, or answer a message."""
        if not line.startswith("/"):
            return self.reply(line)
        name, argument = re.findall(r"(?s)/(\S*)\s*(.*)", line)[0]
        command = getattr(self, f"do_{name}", None)
        if command is None:
            raise ValueError(f"unknown command /{name}; /help lists them. A message that begins with / needs a space before it")
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
            raise ValueError(told.replace("build with a larger max_seq_len", "start with a larger --max_seq_len")) from error
        self.refused = None
        self.show(chunks)

    def show(self, reply: Iterator[Chunk], goes_on: bool = False) -> None:
        """Print a reply as it comes, without the spaces before it. goes_on: it is more of an earlier reply."""
        # A generator keeps the turn when it is closed, also if it is left early.
        chunks = cast("Generator[Chunk, None, None]", reply)
        count, waited, reason, began = 0, 0.0, None, time.perf_counter()
        shown = goes_on
        try:
            with closing(chunks):
                for chunk in chunks:
                    waited = waited or time.perf_counter() - began
                    count, reason = count + len(chunk["tokens"]), chunk["finish_reason"]
                    text = chunk["text"] if shown else chunk["text"].lstrip()
                    shown = shown or bool(text)
                    say(text)
        except KeyboardInterrupt:
            say("\n")
            note("stopped; the reply is kept as far as it came" if waited else "stopped before the reply began")
            raise
        except ValueError:  # a server may be lost in the middle
            say("\n" if shown else "")
            raise
        finally:
            rest = time.perf_counter() - began - waited
            self.last = f"{count} tokens, {(count - 1) / rest if count > 1 else 0:.1f} a second; the first after {waited:.3f} s"
        say("\n")
        if reason == "context":
            note(f"the context is full ({self.limit} tokens): /drop forgets the oldest turn, /clear all of them")
        elif reason == "length":
            note(f"stopped at max_gen_len={self.session.options['max_gen_len']}")

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
        """/help  this list"""
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
        turn = self.session.undo()
        if turn is None:
            raise ValueError("nothing was said that could be tried again")
        left = len(self.session.turns)
        try:
            self.reply(turn["user"])
        finally:
            if len(self.session.turns) == left:  # no other reply has come
                self.session.turns.append(turn)

    def do_continue(self, beginning: str) -> None:
        """/continue [BEGINNING]  let the last reply go on, or replace it by BEGINNING and let that go on"""
        if beginning and self.session.turns:
            self.session.turns = [*self.session.turns[:-1], {**self.session.turns[-1], "assistant": beginning}]
        self.show(self.session.continue_reply(), goes_on=True)

    def do_clear(self, _: str) -> None:
        """/clear  forget all turns; the system message stays"""
        self.session.clear()
        self.refused = None
        note("all forgotten")

    def do_drop(self, text: str) -> None:
        """/drop [N]  forget the N oldest turns, or as many as the message needs that did not fit; then send it again"""
        if text and not (text.isdecimal() and int(text)):
            raise ValueError(f"/drop {text}: it takes how many turns to forget, 1 or more")
        message, self.refused = self.refused, None
        count = int(text or 1)
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
        """/save FILE  write the conversation as JSON"""
        path = _path(text)
        on_first(lambda: self.session.save(path))
        note(f"{path} is written: {self._turns()}")

    def do_load(self, text: str) -> None:
        """/load FILE  go on with a saved conversation in place of this one"""
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

    def do_stats(self, _: str) -> None:
        """/stats  speed of the last reply, and how much of the context is used"""
        note(f"last reply  {self.last or 'none'}\ncontext     {self.context}, {self._turns()}")

    def do_set(self, text: str) -> None:
        """/set [NAME VALUE]  show the options of replies, or change one: temperature, max_gen_len, stop, seed, …"""
        options = self.session.options
        if text:
            name, *value = text.split(None, 1)
            if name not in SETTINGS:
                raise ValueError(f"unknown option {name}; there are {', '.join(SETTINGS)}")
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


def _path(text: str) -> Path:
    if not text:
        raise ValueError("it needs the name of a file")
    return user_path(text)
