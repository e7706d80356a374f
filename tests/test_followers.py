"""`Llama.build(processes=2)`: this process starts the other one itself, and ends it with its `Llama`."""

from __future__ import annotations

import atexit
import copy
import gc
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from forks import Forks
from helpers import run_cells
from test_leading import TEXTS, in_many_ways
from torch.distributed import TCPStore

from llama import Llama, followers, generation, runtime
from llama.decoding import leading
from llama.layers import parallel
from llama.server.app import Settings
from llama.system.children import Child
from llama.system.interrupts import held_back
from llama.system.launch import Launch

PROMPTS, LENGTH = [[1, 5, 6], [1, 9]], 40


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 20
    while is_alive(pid):
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.01)


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


def pid_of(llama: Llama) -> int:
    assert llama._followers is not None
    (child,) = llama._followers._children
    return child.pid


class Built:
    """The `Llama` of two processes that the tests share, built anew where one has ended it; and one of this process
    alone."""

    def __init__(self, folder: Path, tokenizer_path: str) -> None:
        self.arguments = str(folder), tokenizer_path, 128, 4
        self.alone = Llama.build(*self.arguments, device="cpu")
        self.ids = self.alone.generate(PROMPTS, LENGTH, 0)
        self.environment, self.hook = environment(), sys.excepthook
        self.build()

    def build(self, **more: Any) -> Llama:
        self.llama = Llama.build(*self.arguments, device="cpu", processes=2, **more)
        return self.llama


@pytest.fixture(scope="module")
def built(tiny: Path, tokenizer_path: str) -> Iterator[Built]:
    built = Built(tiny, tokenizer_path)
    yield built
    built.llama.close()


def test_every_way_to_call(built: Built) -> None:
    assert in_many_ways(built.llama) == in_many_ways(built.alone)
    assert built.llama.lead(lambda: built.llama.generate(PROMPTS, LENGTH, 0)) == built.ids
    assert built.alone.lead(lambda: built.alone.generate(PROMPTS, LENGTH, 0)) == built.ids
    first, second = (built.llama.text_completion(TEXTS[:1] * 2, 1.0, 1.0, max_gen_len=9) for _ in range(2))
    assert len({answer["generation"] for answer in [*first, *second]}) == 4


def test_the_server(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = pytest.importorskip("llama.server.serving")
    began: list[Any] = []

    def run(server: Any) -> None:
        stepper = server.server.stepper
        began.append((stepper.slots, stepper.alone, built.llama.generate(PROMPTS, LENGTH, 0)))
        server.started = True

    monkeypatch.setattr(serving._Uvicorn, "run", run)
    serving.serve(built.llama, Settings(model="tiny", key=None, max_waiting=9, origins=[], hosts=()))
    assert began == [(4, False, built.ids)]


def test_nothing_else_changes(built: Built, tiny: Path, tokenizer_path: str) -> None:
    """The environment, what Python does with errors, and what is built in this process alone."""
    beside = Llama.build(str(tiny), tokenizer_path, 128, 4, device="cpu")
    assert beside.generate(PROMPTS, LENGTH, 0) == built.ids
    assert beside.model.output.group is None
    assert built.llama.generate(PROMPTS, LENGTH, 0) == built.ids
    assert (environment(), sys.excepthook) == (built.environment, built.hook)


@pytest.mark.parametrize("way", ["whole", "stream", "embed"])
def test_ctrl_c(way: str, built: Built) -> None:
    """In the middle of a step. It takes effect behind that, and the next call is right."""
    llama = built.llama
    before = signal.getsignal(signal.SIGINT)

    def interrupt(*_: Any) -> None:
        threading.Timer(0.002, os.kill, (os.getpid(), signal.SIGINT)).start()

    def work() -> None:
        interrupt()
        while True:
            if way == "whole":
                llama.generate(PROMPTS, LENGTH, 0)
            elif way == "stream":
                list(llama.stream_text(TEXTS[:2], 0, max_gen_len=LENGTH))
            else:
                llama.embed(TEXTS)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            work()
        assert llama.generate(PROMPTS, LENGTH, 0) == built.ids
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_takes_effect_at_once() -> None:
    reached = []

    def work() -> None:
        with held_back():
            for number in range(3):
                reached.append(number)
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == [0, 1]


def mine(probs: torch.Tensor, p: float) -> torch.Tensor:
    return probs.argmax(-1, keepdim=True)


def change(llama: Llama, what: str, other: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """-> what undoes it"""
    if what == "hook":
        return llama.model.layers[0].register_forward_hook(lambda *_: None).remove
    if what == "model":
        monkeypatch.setattr(llama, "model", other)
    elif what == "draw":
        monkeypatch.setattr(mine, "__module__", "__main__")
        monkeypatch.setattr(generation, "sample_top_p", mine)
    return lambda: None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("hook", "needs a model that is as it was built"),
        ("model", "needs a model that is as it was built"),
        ("draw", "mine is this script's or notebook's; put it into a module"),
    ],
)
def test_what_acts_on_one_process_only(what: str, message: str, built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    undo = change(built.llama, what, built.alone.model, monkeypatch)
    with pytest.raises(ValueError, match=message):
        built.llama.generate(PROMPTS, LENGTH, 0.5)
    if what != "draw":
        with pytest.raises(ValueError, match=message):
            built.llama.embed(TEXTS)
    undo()
    monkeypatch.undo()
    assert built.llama.generate(PROMPTS, LENGTH, 0) == built.ids


def test_calls_that_would_wait_for_ever(built: Built) -> None:
    """Of the model and of its parts: the other process follows methods of `Llama` only. A copy has nobody who follows
    it."""
    model = built.llama.model
    for call in (
        lambda: model(torch.tensor([[1, 5]]), 0),
        lambda: model.output(torch.zeros(1, 64)),
        lambda: model.layers[0].feed_forward(torch.zeros(1, 64)),
        lambda: copy.copy(built.llama),
    ):
        with pytest.raises(ValueError, match="follow the methods of this Llama|cannot be copied"):
            call()
    assert built.llama.generate(PROMPTS, LENGTH, 0) == built.ids


def test_a_fork_takes_no_part(built: Built) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        pid = os.fork()
    if not pid:
        try:
            built.llama.close()
            built.llama.generate(PROMPTS, LENGTH, 0)
        except RuntimeError as error:
            os._exit("forked process" not in str(error))
        os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    assert built.llama.generate(PROMPTS, LENGTH, 0) == built.ids


def test_other_weights(built: Built) -> None:
    """This process's part changes, the other's does not. An edit can be taken back; for load_state_dict see below."""
    texts, row = TEXTS[:1], built.llama.model.norm.weight.data
    row.mul_(2)
    for call in (lambda: built.llama.text_completion(texts), lambda: built.llama.embed(texts)):
        with pytest.raises(ValueError, match="weights of this process's part of the model have changed"):
            call()
    row.div_(2)
    assert built.llama.generate(PROMPTS, LENGTH, 0) == built.ids


def test_a_process_that_dies(built: Built) -> None:
    llama, stream = built.llama, built.llama.stream_text(TEXTS[:1], 0, max_gen_len=LENGTH)
    next(stream)
    os.kill(pid_of(llama), signal.SIGKILL)
    wait_for_end(pid_of(llama))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"process 1 was killed by SIGKILL.*build it again"):
            llama.score(TEXTS)
    with pytest.raises(RuntimeError, match="build it again"):
        list(stream)
    assert not dist.is_initialized()
    assert built.alone.generate(PROMPTS, LENGTH, 0) == built.ids


def test_on_gpus_a_thread_looks_whether_one_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else ends a sum there that waits for it."""
    told, lost = iter(["", "", "was killed or crashed"]), threading.Event()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(runtime, "release_first", lambda *_: None)
    monkeypatch.setattr(runtime, "lose", lost.set)
    monkeypatch.setattr(followers, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: None))
    watching, leader = followers.Followers(2), mock.MagicMock()
    watching._children = [SimpleNamespace(why_ended=lambda: next(told))]  # type: ignore[list-item]
    watching.follow(leader)
    assert lost.wait(10)
    assert next(told, None) is None
    watching._is_over = True


def test_builds_in_a_row(built: Built) -> None:
    """The next one closes what there was, though a process of it has died meanwhile. One that nobody has any more ends,
    but not before the streams that it began."""
    pytest.importorskip("llguidance")  # for a cell of the notebook
    notebook = run_cells("docs/working.ipynb")
    assert notebook["answers"][0] == notebook["answers"][1]
    older = notebook["shared"]
    older.model.load_state_dict(older.model.state_dict())
    with pytest.raises(ValueError, match="weights of this process's part of the model have changed"):
        older.score(TEXTS)
    os.kill(pid_of(older), signal.SIGKILL)
    wait_for_end(pid_of(older))
    newer = built.build(model_parallel_size=1)  # each process has a copy of the model
    with pytest.raises(RuntimeError, match="closed when another one was built"):
        older.generate(PROMPTS, LENGTH, 0)
    assert newer.generate(PROMPTS * 2, LENGTH, 0)[0] == built.ids[0] * 2
    assert newer.led_copies == 2

    pid, stream = pid_of(newer), newer.stream_text(TEXTS[:1], 0, max_gen_len=LENGTH)
    built.llama = built.alone
    del newer
    assert is_alive(pid)
    text = "".join(chunk["text"] for chunk in stream)
    assert text == built.alone.text_completion(TEXTS[:1], 0, max_gen_len=LENGTH)[0]["generation"]
    del stream
    gc.collect()
    assert not is_alive(pid)
    assert not dist.is_initialized()


def follows_until(when: str, port: int, launch: Launch, build: Any, given: dict[str, Any]) -> None:
    """What a process does that is killed before it joins the others, or meets them; or is stopped within a message."""
    store = TCPStore("127.0.0.1", port, is_master=False)
    store.set(str(launch.rank), "here")
    if when == "it joins":
        kill_itself()
    with runtime.placed(replace(launch, store=store)):
        llama = build(**given)
        if when == "it meets":
            parallel.patient_group = kill_itself
        leading.from_first_process = stop_in_a_message
        llama.lead(lambda: None)


def kill_itself() -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_in_a_message(_: Any, group: Any) -> None:
    for size in (8, 2**26):
        dist.broadcast(torch.empty(size, dtype=torch.uint8), 0, group=group, async_op=True)
    time.sleep(0.3)  # the first process knows by now that both are awaited, and will send them at once
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("when", ["it joins", "it meets"])
def test_a_process_that_dies_before_it_is_connected(when: str, built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch waited in its store: six hours, or a year."""
    monkeypatch.setattr(followers, "_follow", partial(follows_until, when))
    with pytest.raises(RuntimeError, match="the model was not built: process 1 was killed by SIGKILL"):
        built.build()
    assert not dist.is_initialized()


IN_A_MESSAGE = """
import os, signal, sys, threading, time
from functools import partial
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_followers import follows_until, pid_of
from llama import Llama, followers
kept, followers._follow = followers._follow, partial(follows_until, "a message")
llama = Llama.build(sys.argv[1], sys.argv[2], 128, 4, device="cpu", processes=2)
pid = pid_of(llama)
while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
    time.sleep(0.01)
def kill():
    while llama._leader.line.is_whole:
        time.sleep(0.01)
    time.sleep(1)  # the message is on its way
    os.kill(pid, signal.SIGKILL)
threading.Thread(target=kill).start()
try:
    llama.embed(["a" * 2**25])
except RuntimeError as error:
    print(error)
followers._follow = kept
with Llama.build(sys.argv[1], sys.argv[2], 128, 4, device="cpu", processes=2) as llama:
    print(llama.generate([[1, 5, 6], [1, 9]], 40, 0))
"""


def test_a_process_that_dies_in_a_message(built: Built, tiny: Path, tokenizer_path: str, forks: Forks) -> None:
    """gloo waited a year for the rest of the message to be sent; and a process that ends waits for its messages."""
    ended = forks.run(IN_A_MESSAGE, str(tiny), tokenizer_path, str(Path(__file__).parent), seconds=240)
    assert ended.returncode == 0, ended.stderr
    first, second = (line for line in ended.stdout.splitlines() if not line.startswith("Loaded"))
    assert first.startswith("process 1 was killed by SIGKILL")
    assert second == str(built.ids)


@pytest.mark.parametrize(
    ("function", "arguments", "how"),
    [
        (atexit.register, (os.abort,), "has ended: status 0"),  # at once: nothing of this kind runs any more
        (os.write, (2, b"the last\n \n"), "has ended: the last"),
        (int, ("x",), "has ended: ValueError: invalid literal for int() with base 10: 'x'"),
        (os._exit, (3,), "has ended: status 3"),
        (os.abort, (), "was killed by SIGABRT"),
        (signal.raise_signal, (signal.SIGKILL,), "was killed by SIGKILL, as Linux does where memory runs out"),
    ],
)
def test_how_a_child_ended(function: Any, arguments: tuple[Any, ...], how: str) -> None:
    child = Child(function, *arguments)
    assert child.why_ended(60) == how
    child.end()
    assert child.why_ended() == (how if "killed" in how else "has ended")


KILLED = """
import os, signal, sys
from llama import Llama
llama = Llama.build(sys.argv[1], sys.argv[2], 128, 4, device="cpu", processes=2)
print("follows:", llama._followers._children[0].pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_first_process_is_killed(tiny: Path, tokenizer_path: str, forks: Forks) -> None:
    ended = forks.run(KILLED, str(tiny), tokenizer_path)
    found = re.search(r"follows: (\d+)", ended.stdout)
    assert found, ended.stderr
    wait_for_end(int(found[1]))


def test_ctrl_c_while_it_builds(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    children = []

    class Child(followers.Child):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            children.append(self.pid)
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()

    monkeypatch.setattr(followers, "Child", Child)
    with pytest.raises(KeyboardInterrupt):
        built.build()
    assert not any(map(is_alive, children))
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        ({"processes": 3}, {}, "cannot be shared by 3 processes; use 1 or 2 or 4"),
        ({"processes": 0}, {}, "processes=0 must be a whole number of 1 or more"),
        ({"processes": 4, "model_parallel_size": 3}, {}, "model_parallel_size=3 does not fit processes=4"),
        ({"processes": 2, "max_batch_size": 0}, {}, "max_batch_size=0"),
        ({"processes": 2, "device": "mps"}, {}, "device='mps' needs"),
        (
            {"processes": 2},
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            "leave processes out",
        ),
        ({"processes": 3, "device": "cuda"}, {}, "processes=3, each with a GPU of its own, but torch sees 2 GPUs"),
        ({"processes": 2, "device": "cuda:1"}, {}, "device='cuda:1' is one GPU"),
    ],
)
def test_nothing_starts_in_vain(
    options: dict[str, Any], environment: dict[str, str], message: str, tiny: Path, tokenizer_path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(followers, "Child", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        Llama.build(str(tiny), tokenizer_path, **{"max_seq_len": 128, "device": "cpu", **options})


def test_one_process_starts_none(tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followers, "Child", None)
    with Llama.build(str(tiny), tokenizer_path, 128, device="cpu", processes=1) as llama:
        assert llama.model.output.group is None
    assert len(llama.generate([[1, 5]], 4, 0)[0][0]) == 4  # close() does nothing here
