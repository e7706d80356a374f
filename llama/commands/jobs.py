"""Long lists of prompts as JSON lines: checked before any work, answered in order, and resumed after an
interruption."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Optional

from ..chat import check_dialog, is_unsafe
from ..decoding.settings import FinishReason
from ..options import ALSO_CALLED, IN_JSON
from ..system.checks import whole_number
from ..system.files import is_there, listed, parse_json, read_file
from ..system.printable import json_line, shortened
from ..system.program import nearest
from ..system.progress import bar

if TYPE_CHECKING:
    from ..generation import Llama

KEYS = ("prompt", "messages", "continue_final_message", "id", "seed", *IN_JSON)


@dataclass(frozen=True)
class Job:
    """A line of the input: a prompt or messages, and how they are to be answered."""

    line: int
    prompt: Any
    is_chat: bool
    is_begun: bool  # the messages end with the beginning of the reply
    seed: int
    options: dict[str, Any]
    extra: dict[str, Any]  # is copied into the output: the id

    @property
    def digest(self) -> str:
        """A fingerprint for the output, so that a later run knows whether its input is the same."""
        told = [self.prompt, self.is_chat, self.seed, self.options, self.extra, *[True] * self.is_begun]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def read_jobs(path: Path, options: Mapping[str, Any], seed: int) -> list[Job]:
    """The input's lines, without empty ones. ValueError names the first line that is wrong.

    options: what holds for a line that does not set them itself. Line n draws with seed + n if it has no seed, so its
    text depends neither on the lines around it nor on where an earlier run was interrupted.
    """
    seed = whole_number("seed", seed, 0, 2**62, "from 0 to 2**62")
    jobs = []
    for number, raw in enumerate(read_file(path).split(b"\n"), start=1):
        if raw.strip():
            try:
                jobs.append(_read_job(number, parse_json(raw), options, seed))
            except ValueError as error:
                raise ValueError(f"line {number} of {path}: {error}") from error
    return jobs


def _read_job(number: int, line: Any, options: Mapping[str, Any], seed: int) -> Job:
    if not isinstance(line, dict) or ("prompt" in line) == ("messages" in line):
        raise ValueError('it must be {"prompt": "…"} or {"messages": […]}')
    if unknown := sorted(set(line) - set(KEYS)):
        near = nearest(unknown[0], KEYS, also_called=ALSO_CALLED)
        raise ValueError(f"unknown {listed(unknown)}{near}; a line may have {', '.join(KEYS)}")
    is_chat = "messages" in line
    prompt = line["messages"] if is_chat else line["prompt"]
    is_begun = line.get("continue_final_message", False)
    if not isinstance(is_begun, bool) or (is_begun and not is_chat):
        raise ValueError(f"continue_final_message={shortened(is_begun)} must be true or false, and is for messages")
    if is_chat:
        check_dialog(prompt, is_begun)
    elif not isinstance(prompt, str):
        raise ValueError(f"prompt={shortened(prompt)} must be a text")
    own = whole_number("seed", line.get("seed", seed + number), 0, 2**63 - 1, "from 0 to 2**63 - 1")
    chosen = {**options, **{name: line[name] for name in IN_JSON if name in line}}
    return Job(number, prompt, is_chat, is_begun, own, chosen, {"id": line["id"]} if "id" in line else {})


def finished(path: Path, jobs: list[Job]) -> tuple[int, int]:
    """(lines, bytes) of an earlier run's output that are whole; half a line may follow them.

    ValueError if these lines do not belong to these jobs.
    """
    data = read_file(path) if is_there(path) else b""
    size = data.rfind(b"\n") + 1
    lines = data[:size].split(b"\n")[:-1]
    way_out = "pass the same input and options to go on with it, or name another file"
    if len(lines) > len(jobs):
        raise ValueError(f"{path} has {len(lines)} lines, but there are {len(jobs)} prompts; {way_out}")
    for number, (raw, job) in enumerate(zip(lines, jobs), start=1):
        try:
            digest = parse_json(raw)["input"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of {path} was not written by complete; name another file") from error
        if digest != job.digest:
            raise ValueError(
                f"line {number} of {path} answers something else than line {job.line} of the input; {way_out}"
            )
    return len(lines), size


def check_jobs(llama: Llama, jobs: list[Job], path: Path) -> None:
    """Check what only the model can tell: whether prompts fit, and options are in range. ValueError names the line."""
    limit = llama.model.params.max_seq_len
    good: list[dict[str, Any]] = []
    for job in jobs:
        try:
            tokenizer = llama.tokenizer
            if job.is_chat:
                ids = llama.chat_format.encode_dialog(job.prompt, tokenizer, job.is_begun)
            else:
                ids = tokenizer.encode(job.prompt, bos=True, eos=False)
            if len(ids) > limit:
                raise ValueError(
                    f"its {len(ids)} tokens are more than max_seq_len={limit}; shorten it, or pass "
                    f"--max_seq_len {len(ids)} or more"
                )
            if job.options not in good:
                llama.check_options(job.options)
                good.append(job.options)
        except ValueError as error:
            raise ValueError(f"line {job.line} of {path}: {error}") from error


class _Answer:
    """The answer to a job, as it comes."""

    def __init__(self, llama: Llama, job: Job) -> None:
        self.job, self.text = job, ""
        self.reason: Optional[FinishReason] = None
        if job.is_chat:
            refused = is_unsafe(job.prompt, llama.chat_format.tags(llama.tokenizer))
            seed = [] if refused else [job.seed]  # a refused dialog is not run, so it needs none
            self.chunks = llama.stream_chat([job.prompt], seed=seed, continue_final_message=job.is_begun, **job.options)
        else:
            self.chunks = llama.stream_text([job.prompt], seed=[job.seed], **job.options)

    def read(self) -> bool:
        """Take what comes next; whether there is more."""
        chunk = next(self.chunks)
        self.text, self.reason = self.text + chunk["text"], chunk["finish_reason"]
        return self.reason is None

    @property
    def line(self) -> dict[str, Any]:
        told: Any = {"role": "assistant", "content": self.text} if self.job.is_chat else self.text
        return {**self.job.extra, "input": self.job.digest, "generation": told, "finish_reason": self.reason}


def run(llama: Llama, jobs: list[Job]) -> Iterator[dict[str, Any]]:
    """The output's lines, in order. As many jobs run at once as there are slots, in all copies of the model
    together."""
    from ..layers.parallel import replica

    slots = llama.model.params.max_batch_size * replica()[1]
    todo, begun, running = deque(jobs), deque[_Answer](), list[_Answer]()
    while todo or begun:
        while todo and len(running) < slots:
            running.append(_Answer(llama, todo.popleft()))
            begun.append(running[-1])
        running = [answer for answer in running if answer.read()]
        while begun and begun[0] not in running:
            yield begun.popleft().line


def write(lines: Iterator[dict[str, Any]], total: int, done: int, out: BinaryIO) -> None:
    """Write each line as soon as it comes, and show a progress bar at a terminal."""
    with bar(total=total, initial=done, unit="line", stays=True) as progress:
        for line in lines:
            out.write(json_line(line).encode() + b"\n")
            out.flush()
            progress.update()


def open_output(path: Path, size: int) -> BinaryIO:
    """Open the output to go on behind its first `size` bytes; the rest is cut off."""
    file = path.open("r+b" if path.exists() else "wb")
    file.truncate(size)
    file.seek(size)
    return file
