"""The model in a terminal or a pipe: a chat to type into, completions, the tokenizer's pieces, scores.

stdout has the model's words and nothing else; the program's own go to stderr. Where torchrun started several processes, the
first one reads, and tells the others what it read: all of them run the same lines, and one is heard.
"""

from __future__ import annotations

import io
import json as jsonlib
import math
import re
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, redirect_stdout
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Optional, TypeVar, Union, cast

from fire.decorators import SetParseFns

from . import jobs
from .completion import Chunk
from .files import read_file
from .generation import DEMO, Llama
from .parallel import from_first_process, is_first_process
from .pipes import reader_may_leave
from .printable import escaped, harmless, json_line, printable, shortened
from .runtime import Launch
from .session import ContextFull
from .tokenizer import Tokenizer, need_tokenizer, user_path

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

Stop = Union[str, Sequence[str], None]
T = TypeVar("T")


def chat(
    ckpt_dir: Optional[str] = None,
    tokenizer_path: Optional[str] = None,
    max_seq_len: Optional[int] = None,
    max_batch_size: int = 1,
    model_parallel_size: Optional[int] = None,
    seed: int = 1,
    device: Optional[str] = None,
    dtype: Optional[str] = None,
    quantize: Optional[str] = None,
    compile: Optional[bool] = None,
    system: Optional[str] = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_gen_len: Optional[int] = None,
    stop: Stop = None,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> None:
    """Talk with the model. /help lists the commands. Without a terminal, each line of the pipe is a message or a command.

    Ctrl-C stops a reply; where torchrun started several processes, it ends them all.
    """
    read = None
    if Launch.read().rank == 0:  # before a long load, since what it needs may be missing
        read = _typed_lines() if sys.stdin.isatty() else _piped_lines()
    llama = _build(
        ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, model_parallel_size, seed, device, dtype, quantize, compile
    )
    session = llama.chat(
        system, temperature=temperature, top_p=top_p, max_gen_len=max_gen_len, stop=stop, top_k=top_k, min_p=min_p,
        repetition_penalty=repetition_penalty,
    )  # fmt: skip
    with _pipe_may_close():
        Conversation(session).run(read)


def complete(
    prompt: Optional[str] = None,
    file: Optional[str] = None,
    jsonl: Optional[str] = None,
    out: Optional[str] = None,
    ckpt_dir: Optional[str] = None,
    tokenizer_path: Optional[str] = None,
    max_seq_len: Optional[int] = None,
    max_batch_size: Optional[int] = None,
    model_parallel_size: Optional[int] = None,
    seed: int = 1,
    device: Optional[str] = None,
    dtype: Optional[str] = None,
    quantize: Optional[str] = None,
    compile: Optional[bool] = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_gen_len: Optional[int] = None,
    stop: Stop = None,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    echo: bool = False,
) -> None:
    """Continue a PROMPT, the text of a --file or of a pipe (less its last line end); or all lines of a --jsonl file.

    Lines are {"prompt": "…"} or {"messages": […]}, with "id", "seed", "max_gen_len", "stop" and other options as wanted.
    Results go to --out, a line each, in order. If that is there already, what it has is checked and not done again.
    seed: of the draws; line n of a jsonl file draws with seed + n. max_batch_size: 4 for a jsonl file, otherwise 1.
    """
    options: dict[str, Any] = {
        "temperature": temperature, "top_p": top_p, "max_gen_len": max_gen_len, "stop": stop, "top_k": top_k, "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }  # fmt: skip
    size = (1 if jsonl is None else 4) if max_batch_size is None else max_batch_size

    def build() -> Llama:
        return _build(ckpt_dir, tokenizer_path, max_seq_len, size, model_parallel_size, seed, device, dtype, quantize, compile)

    if jsonl is not None:
        if prompt is not None or file is not None or echo:
            raise ValueError("--jsonl brings its own prompts; leave out the prompt, --file and --echo")
        _complete_lines(build, user_path(jsonl), None if out is None else user_path(out), options, seed)
        return
    if out is not None:
        raise ValueError(f"--out {out} is for --jsonl; the text of one completion goes to stdout")
    text = _input(prompt, file, "prompt")
    llama = build()
    with _pipe_may_close():
        # Every process has to have the text, which only the first could read.
        chunks = llama.stream_text([_on_first(lambda: text)], echo=echo, **options)
        last = ""
        for chunk in chunks:
            last = chunk["text"] or last
            _say(chunk["text"])
        _say("" if last.endswith("\n") else "\n")


def tokenize(
    text: Optional[str] = None,
    file: Optional[str] = None,
    ids: Union[str, Sequence[int], None] = None,
    ckpt_dir: Optional[str] = None,
    tokenizer_path: Optional[str] = None,
    bos: bool = True,
    eos: bool = False,
    json: bool = False,
) -> None:
    """Show the ids and pieces of a TEXT, of a --file or of a pipe; or the text of --ids 1,306,4658. Loads no model."""
    folder = DEMO if ckpt_dir is None else user_path(ckpt_dir)
    tokenizer = Tokenizer(str(need_tokenizer(folder, tokenizer_path)))
    if ids is not None:
        if text is not None or file is not None:
            raise ValueError("give a text or --ids, not both")
        numbers = _numbers(ids)
        decoded = tokenizer.decode(numbers)  # checks them
        pieces = [tokenizer.sp_model.IdToPiece(i) for i in numbers]
    else:
        text = _input(text, file, "text")
        numbers = tokenizer.encode(text, bos, eos)
        # As they stand in the text, where IdToPiece would say <unk>.
        inner = tokenizer.sp_model.EncodeAsPieces(text)
        pieces = ["<s>"] * bos + inner + ["</s>"] * eos
        decoded = tokenizer.decode(numbers)
    with _pipe_may_close():
        if json:
            _say(json_line({"ids": numbers, "pieces": pieces, "text": decoded}) + "\n")
            return
        _say("".join(f"{i:6}  {_quoted(piece)}\n" for i, piece in zip(numbers, pieces)))
        _say(f"{len(numbers)} ids: {' '.join(map(str, numbers))}\n")
        if decoded != text:
            _say(f"they decode to {_quoted(decoded, quotes=True)}\n")


def score(
    text: Optional[str] = None,
    file: Optional[str] = None,
    stride: Optional[int] = None,
    json: bool = False,
    ckpt_dir: Optional[str] = None,
    tokenizer_path: Optional[str] = None,
    max_seq_len: Optional[int] = None,
    max_batch_size: int = 1,
    model_parallel_size: Optional[int] = None,
    seed: int = 1,
    device: Optional[str] = None,
    dtype: Optional[str] = None,
    quantize: Optional[str] = None,
    compile: Optional[bool] = None,
) -> None:
    """Show how probable the model finds each token of a TEXT, of a --file or of a pipe, and the whole text's perplexity.

    stride: between the windows in which a text longer than max_seq_len is read. json: one object in place of the table.
    """
    given = _input(text, file, "text")
    llama = _build(
        ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, model_parallel_size, seed, device, dtype, quantize, compile
    )
    result = llama.score([_on_first(lambda: given)], stride=stride)[0]
    nothing = math.isnan(result["perplexity"])
    with _pipe_may_close():
        if json:
            _say(json_line({**result, "perplexity": None if nothing else result["perplexity"]}) + "\n")
            return
        _say("    ln p        p  token\n")
        for token, logprob in list(zip(result["tokens"], result["logprobs"]))[1:]:
            _say(f"{logprob:8.3f} {math.exp(logprob):7.2%}  {_quoted(token, quotes=True)}\n")
        count = len(result["tokens"]) - 1
        _say("no tokens\n" if nothing else f"perplexity {result['perplexity']:.4g} over {count} token{'s' * (count != 1)}\n")


class Conversation:
    """What can be typed into `chat`. A method `do_x` is the command /x, its docstring what /help says about it.

    Runs on every process alike; what touches the outside (reading, files) is done by the first.
    """

    def __init__(self, session: Any) -> None:
        self.session = session
        self.refused: Optional[str] = None  # the message that did not fit, which /drop makes room for
        self.last: Optional[str] = None  # what /stats says about the last reply

    def run(self, read: Optional[Callable[[Conversation], Optional[str]]]) -> None:
        interactive = _on_first(lambda: sys.stdin.isatty())
        if interactive:
            _note("Type a message. /help lists the commands; Ctrl-C stops a reply; Ctrl-D ends.")
        # read is None where another process reads.
        while (line := _on_first(lambda: read(self) if read else None)) is not None:
            try:
                if line.strip():
                    self.obey(line)
            except (ValueError, OSError) as error:
                _complain(str(error))
            except EOFError:
                return
            except KeyboardInterrupt:
                if not interactive:
                    raise SystemExit(130) from None

    def obey(self, line: str) -> None:
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
            # Only where dropping turns helps does the message offer it.
            offer = f"drop({error.drop})"
            self.refused = message if offer in str(error) else None
            told = str(error).replace(f"{offer} forgets", "/drop sends the message again and forgets")
            raise ValueError(told.replace("build with a larger max_seq_len", "start with a larger --max_seq_len")) from error
        self.refused = None
        self.show(chunks)

    def show(self, reply: Iterator[Chunk], goes_on: bool = False) -> None:
        """A reply as it comes, without the spaces before it; or what is new of one that goes on."""
        # A generator, which has to be closed where it is left early: only then is the turn kept.
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
                    _say(text)
        except KeyboardInterrupt:
            _say("\n")
            _note("stopped; the reply is kept as far as it came" if waited else "stopped before the reply began")
            raise
        finally:
            rest = time.perf_counter() - began - waited
            self.last = f"{count} tokens, {(count - 1) / rest if count > 1 else 0:.1f} a second; the first after {waited:.3f} s"
        _say("\n")
        if reason == "context":
            _note(f"the context is full ({self.limit} tokens): /drop forgets the oldest turn, /clear all of them")
        elif reason == "length":
            _note(f"stopped at max_gen_len={self.session.options['max_gen_len']}")

    @property
    def limit(self) -> int:
        return cast(int, self.session.llama.model.params.max_seq_len)

    @property
    def context(self) -> str:
        used = min(self.limit, self.limit - self.session.room)
        return f"{used} of {self.limit} tokens ({used / self.limit:.0%})"

    def do_help(self, _: str) -> None:
        """/help  this list"""
        _note("\n".join(command.__doc__ or "" for name, command in vars(type(self)).items() if name.startswith("do_")))
        _note(
            "Esc Enter, or a \\ at its end, begins a new line of the message; the arrow keys bring back earlier ones.\n"
            "Ctrl-C stops a reply, which is kept as far as it came (under torchrun it ends all processes); Ctrl-D ends."
        )

    def do_system(self, text: str) -> None:
        """/system [TEXT]  show the system message, or say what it shall be, - for none (before the first turn)"""
        if text:
            if self.session.turns:
                raise ValueError("the system message belongs to the first turn; /clear before changing it")
            self.session.system = None if text == "-" else text
        _note("no system message" if self.session.system is None else f"system message: {self.session.system}")

    def do_undo(self, _: str) -> None:
        """/undo  take the last turn back"""
        turn = self.session.undo()
        _note(f"took back: {turn['user']}" if turn else "nothing to take back")

    def do_retry(self, _: str) -> None:
        """/retry  ask for another reply to the last message"""
        turn = self.session.undo()
        if turn is None:
            raise ValueError("nothing was said that could be tried again")
        left = len(self.session.turns)
        try:
            self.reply(turn["user"])
        finally:
            if len(self.session.turns) == left:  # there was no other reply
                self.session.turns.append(turn)

    def do_continue(self, beginning: str) -> None:
        """/continue [BEGINNING]  let the last reply go on; BEGINNING takes its place first"""
        if beginning and self.session.turns:
            self.session.turns = [*self.session.turns[:-1], {**self.session.turns[-1], "assistant": beginning}]
        self.show(self.session.continue_reply(), goes_on=True)

    def do_clear(self, _: str) -> None:
        """/clear  forget all turns; the system message stays"""
        self.session.clear()
        self.refused = None
        _note("all forgotten")

    def do_drop(self, text: str) -> None:
        """/drop [N]  forget the N oldest turns, or as many as a message needs that did not fit; then send that again"""
        if text and not (text.isdecimal() and int(text)):
            raise ValueError(f"/drop {text}: it takes how many turns to forget, 1 or more")
        message, self.refused = self.refused, None
        count = int(text or 1)
        if message is not None and not text:
            count = self._needed(message)
        before = len(self.session.turns)
        self.session.drop(count)
        _note(f"forgot {before - len(self.session.turns)} of {before} turns")
        if message is not None:
            self.reply(message)

    def _needed(self, message: str) -> int:
        try:
            self.session.send(message)  # runs nothing until it is iterated over
        except ContextFull as error:
            return error.drop
        return 0

    def do_save(self, text: str) -> None:
        """/save FILE  write the conversation as JSON"""
        path = _path(text)
        _on_first(lambda: self.session.save(path))
        _note(f"{path} is written: {self._turns()}")

    def do_load(self, text: str) -> None:
        """/load FILE  go on with a saved conversation in place of this one"""
        path = _path(text)

        def read() -> tuple[Any, Any]:
            self.session.load(path)
            return self.session.system, self.session.turns

        system, turns = _on_first(read)
        if not is_first_process():  # which has them; the others may not even see the file
            self.session.clear()
            self.session.system, self.session.turns = system, turns
        self.refused = None
        _note(f"{path} is read: {self._turns()}")

    def _turns(self) -> str:
        count = len(self.session.turns)
        return f"{count} turn{'s' * (count != 1)}"

    def do_stats(self, _: str) -> None:
        """/stats  speed of the last reply, and how much of the context is used"""
        _note(f"last reply  {self.last or 'none'}\ncontext     {self.context}, {self._turns()}")

    def do_set(self, text: str) -> None:
        """/set [NAME VALUE]  show the options of replies, or change one: temperature, max_gen_len, stop, seed, …"""
        options = self.session.options
        if text:
            name, *value = text.split(None, 1)
            if name not in SETTINGS:
                raise ValueError(f"unknown option {name}; there are {', '.join(SETTINGS)}")
            if not value:
                raise ValueError(f"/set {name} needs a value, or none")
            changed = {**options, name: SETTINGS[name] if value[0] == "none" else _setting(name, value[0])}
            self.session.llama.check_options(changed)
            options[name] = changed[name]
        _note("  ".join(f"{name}={options.get(name, default)!r}" for name, default in SETTINGS.items()))

    def do_quit(self, _: str) -> NoReturn:
        """/quit  end, as Ctrl-D does"""
        raise EOFError


SETTINGS: dict[str, Any] = {  # and what `/set NAME none` makes of them
    "temperature": 0.6, "top_p": 0.9, "max_gen_len": None, "stop": None, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
    "seed": None,
}  # fmt: skip
COMMANDS = [f"/{name.removeprefix('do_')}" for name in vars(Conversation) if name.startswith("do_")]


def _setting(name: str, value: str) -> Any:
    if name == "stop":
        return texts(value)
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            pass
    raise ValueError(f"{name} is a number, not {value}")


def _typed_lines() -> Callable[[Conversation], Optional[str]]:
    """Reads messages at the terminal, with a history that outlives the program."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory, InMemoryHistory
    except ImportError as error:
        raise ValueError(
            'a chat at the terminal needs prompt_toolkit; pip install "prompt_toolkit>=3.0.53", or send messages by a pipe'
        ) from error
    path = _history()
    prompt: PromptSession[str] = PromptSession(
        history=FileHistory(str(path)) if path else InMemoryHistory(),
        completer=WordCompleter(COMMANDS, sentence=True),
        complete_while_typing=False,
        multiline=True,
        key_bindings=_keys(),
        prompt_continuation="… ",
    )

    def read(conversation: Conversation) -> Optional[str]:
        while True:
            try:
                return prompt.prompt("> ", bottom_toolbar=f" {conversation.context}")
            except KeyboardInterrupt:  # a new line to type, as in a shell
                continue
            except EOFError:
                return None

    return read


def _keys() -> Any:
    """Enter sends, unless the line ends with a backslash; Esc Enter never does. (prompt_toolkit has it the other way.)"""
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


def _history() -> Optional[Path]:
    """The file of what was typed, for this user only; None where there is no place for it."""
    state = {"darwin": "Library/Application Support", "win32": "AppData/Local"}.get(sys.platform, ".local/state")
    try:
        path = Path.home() / state / "llama" / "history"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.open("ab").close()
    except (OSError, RuntimeError):
        return None
    return path


def _piped_lines() -> Callable[[Conversation], Optional[str]]:
    lines = _decoded(sys.stdin.buffer)

    def read(_: Conversation) -> Optional[str]:
        message = next(lines, None)
        while message is not None and message.endswith("\\"):
            message = message[:-1] + "\n" + next(lines, "")
        return message

    return read


def _decoded(file: Any) -> Iterator[str]:
    for number, raw in enumerate(file, start=1):
        try:
            yield raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"line {number} of the pipe is not UTF-8") from error


def _complete_lines(build: Callable[[], Llama], source: Path, out: Optional[Path], options: dict[str, Any], seed: int) -> None:
    todo: list[jobs.Job] = []
    done, file = 0, None
    with _pipe_may_close(), ExitStack() as opened:
        if Launch.read().rank == 0:  # before a long load; the others are told after it
            if out is not None and out.exists() and out.samefile(source):
                raise ValueError(f"--out {out} is the input itself; name another file")
            todo = jobs.read_jobs(source, options, seed)
            if out is None:
                file = sys.stdout.buffer
            else:
                done, size = jobs.finished(out, todo)
                file = opened.enter_context(jobs.open_output(out, size))
        llama = build()
        todo, done = _on_first(lambda: (todo, done))
        jobs.check_jobs(llama, todo, source)
        try:
            jobs.write(jobs.run(llama, todo[done:]), len(todo), done, file)
        except KeyboardInterrupt:
            _note("stopped" if out is None else f"stopped; the same command goes on behind what {out} has")
            raise SystemExit(130) from None


def _input(text: Optional[str], file: Optional[str], what: str) -> str:
    """The text that a command works on. Only the first process reads files and pipes; the others get theirs later."""
    if text is not None and file is not None:
        raise ValueError(f"give the {what} or --file, not both")
    if text is not None:
        return str(text)
    if Launch.read().rank > 0:
        return ""
    if file is None and sys.stdin.isatty():
        raise ValueError(f"no {what}; give one in quotes, --file FILE, or a pipe")
    path = None if file is None else user_path(file)
    data = sys.stdin.buffer.read() if path is None else read_file(path)
    try:
        decoded = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path or 'the pipe'} is not UTF-8 at byte {error.start}") from error
    return decoded.removesuffix("\n").removesuffix("\r")  # which editors and echo put there


def _build(
    ckpt_dir: Optional[str],
    tokenizer_path: Optional[str],
    max_seq_len: Optional[int],
    max_batch_size: int,
    model_parallel_size: Optional[int],
    seed: int,
    device: Optional[str],
    dtype: Optional[str],
    quantize: Optional[str],
    compile: Optional[bool],
) -> Llama:
    # Only on the first process: the others' stdout is switched off meanwhile, and would come back.
    with redirect_stdout(sys.stderr) if Launch.read().rank == 0 else nullcontext():
        return Llama.build(
            ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, model_parallel_size, seed,
            device=device, dtype=dtype, quantize=quantize, compile=compile,
        )  # fmt: skip


def _on_first(work: Callable[[], T]) -> T:
    """What the first process makes of it, on every process; a ValueError or OSError there is a ValueError on all."""
    outcome: Any = None
    if is_first_process():
        try:
            outcome = work(), None
        except (ValueError, OSError) as error:
            outcome = None, str(error)
    value, failure = from_first_process(outcome)
    if failure is not None:
        raise ValueError(failure)
    return cast(T, value)


def _path(text: str) -> Path:
    if not text:
        raise ValueError("it needs the name of a file")
    return user_path(text)


def texts(value: str) -> Union[str, list[str]]:
    """One text, or several as a JSON list."""
    if value.startswith("["):
        try:
            several = jsonlib.loads(value)
        except (ValueError, RecursionError):
            return value
        if isinstance(several, list) and all(isinstance(text, str) for text in several):
            return several
    return value


def _numbers(ids: Union[str, int, Sequence[int]]) -> list[int]:
    """Ids as fire or a caller gives them: 5, (1, 306), [1, 306], or the text "1 306"."""
    parts = re.split(r"[\s,]+", ids.strip("[]() ")) if isinstance(ids, str) else [ids] if isinstance(ids, int) else ids
    try:
        return [int(part) if isinstance(part, str) else index(part) for part in parts if part != ""]
    except (ValueError, TypeError) as error:
        raise ValueError(f"ids={shortened(ids)} must be numbers, such as 1,306,4658") from error


def _say(text: str) -> None:
    """To stdout at once."""
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def _note(text: str) -> None:
    _tell(text, "2")


def _complain(text: str) -> None:
    _tell(escaped(" ".join(text.split())), "31")


def _tell(text: str, color: str) -> None:
    """Words of the program's own, from one process, in color where there is somebody to see it."""
    if is_first_process():
        text = harmless(text)
        print(f"\x1b[{color}m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def _quoted(text: str, *, quotes: bool = False) -> str:
    """On one line, whatever it holds."""
    quoted = json_line(text)
    return quoted if quotes else quoted[1:-1].replace('\\"', '"')


@contextmanager
def _pipe_may_close() -> Iterator[None]:
    """`… | head` is no error; and what the terminal has no characters for is none either."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    with reader_may_leave():
        yield


# What is text stays text, where fire would make a number of 42 and a tuple of 1,2.
SetParseFns(system=str, stop=texts)(chat)
SetParseFns(prompt=str, file=str, jsonl=str, out=str, stop=texts)(complete)
SetParseFns(text=str, file=str, ids=str)(tokenize)
SetParseFns(text=str, file=str)(score)
