"""What is typed at a terminal: messages with a history, and keys that are pressed during a reply."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from ..system.launch import is_first_process
from .console import Read, note

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession


@contextmanager
def keys_wait() -> Iterator[None]:
    """A block in which keys are not shown. They wait, as they were pressed, for the next prompt; Ctrl-C still
    interrupts."""
    try:
        import termios
    except ImportError:  # no Unix
        yield
        return
    if not (is_first_process() and sys.stdin.isatty()):
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    during = termios.tcgetattr(terminal)
    during[0] &= ~termios.ICRNL  # Enter stays Enter
    during[3] &= ~(termios.ECHO | termios.ICANON)
    during[6][termios.VMIN], during[6][termios.VTIME] = 1, 0
    termios.tcsetattr(terminal, termios.TCSADRAIN, during)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def typed_lines(commands: Sequence[str]) -> Read:
    """Read messages at the terminal, with a history that outlives the program."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory, InMemoryHistory
    except ImportError as error:
        raise ValueError(
            'a chat at the terminal needs prompt_toolkit; pip install "prompt_toolkit>=3.0.53", or send messages by a '
            "pipe"
        ) from error
    path = history_file()
    prompt: PromptSession[str] = PromptSession(
        history=FileHistory(str(path)) if path else InMemoryHistory(),
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
        multiline=True,
        key_bindings=_keys(),
        prompt_continuation="… ",
    )

    def read(below: Callable[[], str], text: str = "") -> Optional[str]:
        asked = False
        while True:
            try:
                return prompt.prompt("> ", bottom_toolbar=f" {below()}", default=text)
            except EOFError:
                return None
            except KeyboardInterrupt:  # begin a new line, as a shell does
                empty = not prompt.default_buffer.text
                if text or (asked and empty):
                    return None
                if empty:
                    note("Ctrl-C again or /quit leaves")
                asked = empty

    return read


def _keys() -> Any:
    """Enter sends, unless the line ends with a backslash; Esc Enter begins a line. (prompt_toolkit does the
    reverse.)"""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def history_file() -> Optional[Path]:
    """The file of what was typed, which only this user may read; None if there is no place for it."""
    state = {"darwin": "Library/Application Support", "win32": "AppData/Local"}.get(sys.platform, ".local/state")
    try:
        path = Path.home() / state / "llama" / "history"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.open("ab").close()
    except (OSError, RuntimeError):
        return None
    return path
