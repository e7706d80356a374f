"""One `Llama` used from several threads, from the loop of a stream, through a second `Llama`, or from inside a step."""

from __future__ import annotations

import copy
import ctypes
import itertools
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import near
from torch.utils.hooks import RemovableHandle
from workers import Pool

from llama import Llama, cache_use
from llama.system import openmp

CPU = torch.device("cpu")
PROMPTS = ["The little dog found", "a red ball under the tree", "Once upon a time", "She laughed"]
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "drafted": {"temperature": 0, "draft": True},
    "seeded": {"temperature": 0.8, "seed": 7},
    "penalized": {"temperature": 0, "repetition_penalty": 1.3, "draft": False},
    "scored": {"temperature": 0, "logprobs": 2},
}


@pytest.fixture(scope="module")
def llama(tiny: Path, tokenizer_path: str) -> Llama:
    return Llama.build(str(tiny), tokenizer_path, 192, 4, device="cpu")


def streamed(llama: Llama, prompts: list[str], **options: Any) -> list[str]:
    texts = [""] * len(prompts)
    for chunk in llama.stream_text(prompts, max_gen_len=8, **options):
        texts[chunk["index"]] += chunk["text"]
    return texts


def calls(llama: Llama) -> dict[str, Callable[[], Any]]:
    """Every way to use the model, each with an answer that depends on nobody else."""
    ids = [llama.tokenizer.encode(p, bos=True, eos=False) for p in PROMPTS]
    dialog: Any = [{"role": "user", "content": PROMPTS[0]}]
    return {
        "generate": lambda: llama.generate(ids[:3], 6, 0),
        "text_completion": lambda: llama.text_completion(PROMPTS, 0, max_gen_len=5),
        "seeded": lambda: llama.text_completion(PROMPTS[:2], 0.9, max_gen_len=5, seed=[3, 4]),
        "stream_text": lambda: streamed(llama, PROMPTS[1:], temperature=0),
        "chat_completion": lambda: llama.chat_completion([dialog], 0, max_gen_len=4),
        "chat": lambda: [llama.chat(temperature=0, max_gen_len=4).ask(p) for p in PROMPTS[:2]],
        "continue_ids": lambda: [i for c in llama.continue_ids(ids[0], 0, max_gen_len=9) for i in c["tokens"]],
        "score": lambda: llama.score(PROMPTS[:2]),
        "embed": lambda: llama.embed(PROMPTS[:1]).tolist(),
    }


def test_threads_wait_for_each_other(llama: Llama) -> None:
    """39 of 216 calls gave other texts without a word."""
    ways = calls(llama)
    expected = {name: call() for name, call in ways.items()}
    order = list(ways) * 4
    with ThreadPoolExecutor(8) as threads:
        near(list(threads.map(lambda name: ways[name](), order)), [expected[name] for name in order])


def beside_a_call(folder: str, tokenizer_path: str) -> Any:
    """On the first process a second thread comes in the middle of a call, on the others after it."""
    llama = Llama.build(folder, tokenizer_path, 64, 2, device="cpu")
    with ThreadPoolExecutor(1) as thread:
        come = partial(thread.submit, llama.generate, [[1, 6]], 3, 0)
        with llama.lock:
            early = come() if torch.distributed.get_rank() == 0 else None
            wait([early] if early else [], timeout=0.1)  # it gets no further than the lock
            first = llama.generate([[1, 5]], 3, 0)
        return first, (early or come()).result()


def test_threads_of_several_processes_wait_for_each_other(
    llama: Llama, tiny: Path, tokenizer_path: str, pool: Pool
) -> None:
    """All processes make the same calls: none begins in the middle of another one."""
    expected = llama.generate([[1, 5]], 3, 0), llama.generate([[1, 6]], 3, 0)
    assert pool.run(beside_a_call, str(tiny), tokenizer_path) == [expected] * 4


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("prompts", [PROMPTS[:1], [*PROMPTS, PROMPTS[1]]], ids=["one", "more than slots"])
def test_a_stream_goes_on_after_other_calls(llama: Llama, prompts: list[str], options: dict[str, Any]) -> None:
    """In the stream's own loop, with other calls between its steps."""
    expected = streamed(llama, prompts, **options)
    others = itertools.cycle([lambda: llama.generate([[1, 9, 8]] * 4, 2, 0), lambda: llama.embed(PROMPTS[:1])])
    texts = [""] * len(prompts)
    for chunk in llama.stream_text(prompts, max_gen_len=8, **options):
        texts[chunk["index"]] += chunk["text"]
        next(others)()
    assert texts == expected


def test_streams_take_turns(llama: Llama) -> None:
    """Three at once, each step of each in another thread; one of them is never finished."""
    expected = [streamed(llama, [p], temperature=0)[0] for p in PROMPTS[:3]]
    streams = [llama.stream_text([p], temperature=0, max_gen_len=8) for p in PROMPTS[:3]]
    texts = [""] * 3

    def step(i: int) -> bool:
        chunk = next(streams[i], None)
        texts[i] += chunk["text"] if chunk else ""
        return chunk is not None

    going = [0, 1, 2]
    while going:
        with ThreadPoolExecutor(1) as one:
            going = [i for i in going if one.submit(step, i).result()]
        if 2 in going and len(texts[2]) > 3:
            going.remove(2)
    assert texts[:2] == expected[:2]
    assert texts[2]
    assert expected[2].startswith(texts[2])


def test_two_over_one_model(llama: Llama) -> None:
    """The cache is the model's, not the Llama's: each went on over the other's keys."""
    other = Llama(llama.model, llama.tokenizer)
    expected = streamed(llama, PROMPTS[:2], temperature=0)
    texts = ["", ""]
    for chunk in llama.stream_text(PROMPTS[:2], temperature=0, max_gen_len=8):
        texts[chunk["index"]] += chunk["text"]
        other.generate([[1, 50, 60, 70]], 3, 0)
    assert texts == expected
    chat, again = llama.chat(temperature=0, max_gen_len=6), other.chat(temperature=0, max_gen_len=6)
    chat.ask("red")
    again.ask("blue")
    replies = [chat.ask("tree"), again.ask("dog")]
    for first, then, reply in zip(("red", "blue"), ("tree", "dog"), replies):
        alone = llama.chat(temperature=0, max_gen_len=6)
        alone.ask(first)
        assert alone.ask(then) == reply


def test_one_chat_in_several_threads(llama: Llama) -> None:
    """Each message is answered behind all that stand before it; a stream that another message overtakes says so."""
    chat = llama.chat(temperature=0, max_gen_len=3)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(chat.ask, "abcdef"))
    for i, turn in enumerate(chat.turns):
        alone = llama.chat(temperature=0, max_gen_len=3)
        alone.turns = chat.turns[:i]
        assert alone.ask(turn["user"]) == turn["assistant"]
    chat = llama.chat(temperature=0, max_gen_len=3)
    for overtaken in (
        chat.send("a"),
        chat.send("b"),
        chat.continue_reply(max_gen_len=2) if chat.turns else chat.send("c"),
    ):
        chat.ask("d")
        with pytest.raises(RuntimeError, match="another message was sent"):
            next(overtaken)
        assert [turn["user"] for turn in chat.turns] == ["d"] * len(chat.turns)
    chat.clear()
    replies = [chat.send("x"), chat.send("y")]
    next(replies[1])
    chat.undo()
    next(replies[0])
    chat.ask("z")
    for reply in replies:
        with pytest.raises(RuntimeError, match="another message was sent"):
            next(reply)
    assert [turn["user"] for turn in chat.turns] == ["x", "z"]


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda llama: pickle.loads(pickle.dumps(llama))], ids=["copy", "pickle"]
)
def test_a_copy_has_a_cache_of_its_own(llama: Llama, make: Callable[[Llama], Llama]) -> None:
    other, expected = make(llama), streamed(llama, PROMPTS[:2], temperature=0)
    stream = llama.stream_text(PROMPTS[:2], temperature=0, max_gen_len=8)
    first = next(stream)["text"]
    assert streamed(other, PROMPTS[:2], temperature=0) == expected
    assert first + "".join(chunk["text"] for chunk in stream if chunk["index"] == 0) == expected[0]
    assert other.model.cache_use is other._engine._use is not llama.model.cache_use


@pytest.mark.parametrize("step", ["forward", "hidden_states"])
def test_the_model_called_past_a_stream(llama: Llama, step: str) -> None:
    """What such a call overwrites is read anew."""
    expected = streamed(llama, PROMPTS[:2], temperature=0)
    for others in ([], [lambda: llama.generate([[1, 5]], 2, 0)]):
        texts = ["", ""]
        for chunk in llama.stream_text(PROMPTS[:2], temperature=0, max_gen_len=8):
            texts[chunk["index"]] += chunk["text"]
            getattr(llama.model, step)(torch.tensor([[1, 2, 3]]), 0)
            for other in others:
                other()
        assert texts == expected


class Wrapped(torch.nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.params, self.vocab_size = inner, inner.params, inner.vocab_size

    def forward(self, tokens: torch.Tensor, start_pos: int) -> torch.Tensor:
        return self.inner(tokens, start_pos)  # type: ignore[no-any-return]


def test_a_wrapped_model_has_the_same_cache(llama: Llama) -> None:
    """A stream through the wrapper went on over the keys of other calls, in silence."""
    other: Any = Wrapped(llama.model)
    stream = Llama(other, llama.tokenizer).stream_text(PROMPTS[:1], temperature=0)
    next(stream)
    llama.generate([[1, 5]], 2, 0)
    with pytest.raises(RuntimeError, match="another call has used the model"):
        list(stream)


def test_a_compiled_model_is_compiled_once(llama: Llama) -> None:
    """Each call counted itself, and a number that changes is compiled in."""
    graphs: list[Any] = []
    compiled: Any = torch.compile(llama.model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    ids = torch.tensor([[1, 2, 3]])
    [expected] = streamed(llama, PROMPTS[:1], temperature=0)
    for _ in range(5):
        torch.testing.assert_close(compiled(ids, 0), llama.model(ids, 0))
    stream = llama.stream_text(PROMPTS[:1], temperature=0, max_gen_len=8)
    text = next(stream)["text"]
    compiled(ids, 0)
    assert len(graphs) <= 2
    assert text + "".join(chunk["text"] for chunk in stream) == expected  # what was overwritten is read anew
    torch._dynamo.reset()


@pytest.mark.parametrize("inner", ["generate", "forward"])
def test_called_in_the_middle_of_a_step(llama: Llama, inner: str) -> None:
    """A hook that asks the model it hooks: its keys would stand among those of the step."""
    calls = {
        "generate": lambda: llama.generate([[1, 5]], 2, 0),
        "forward": lambda: llama.model(torch.tensor([[1, 2]]), 0),
    }
    inside: list[bool] = []

    def hook(*_: Any) -> None:
        if not inside:
            inside.append(True)
            calls[inner]()
            inside.clear()

    expected = llama.generate([[1, 9, 8]], 4, 0)
    handle = llama.model.layers[1].register_forward_hook(hook)
    try:
        with pytest.raises(RuntimeError, match="in the middle of a step"):
            llama.generate([[1, 9, 8]], 4, 0)
    finally:
        handle.remove()
    assert llama.generate([[1, 9, 8]], 4, 0) == expected


@pytest.mark.parametrize("hooked_first", [True, False])
def test_streams_of_a_model_with_hooks(llama: Llama, hooked_first: bool) -> None:
    """What a hook remembers cannot be kept aside: the newer stream wins, and the older says so. Hooks that come between
    two steps count too."""
    hook = partial(llama.model.layers[0].register_forward_hook, lambda *_: None)
    handle = hook() if hooked_first else None
    try:
        stream = llama.stream_text(PROMPTS[:1], temperature=0)
        next(stream)
        handle = handle or hook()
        llama.generate([[1, 5]], 2, 0)
        with pytest.raises(RuntimeError, match="hooks or patches"):
            list(stream)
    finally:
        if handle is not None:
            handle.remove()


@contextmanager
def a_thread_in_a_step(llama: Llama) -> Iterator[RemovableHandle]:
    """The block runs while another thread is in the middle of a step. Gives the hook that holds it there."""
    entered, leave = threading.Event(), threading.Event()

    def hook(*_: Any) -> None:
        entered.set()
        leave.wait(60)

    handle = llama.model.layers[0].register_forward_hook(hook)
    thread = threading.Thread(target=lambda: llama.generate([[1, 5]], 1, 0))
    thread.start()
    entered.wait(60)
    try:
        yield handle
    finally:
        leave.set()
        thread.join(60)
        handle.remove()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_another_thread_steps(llama: Llama) -> None:
    """The child waited for a thread that it does not have."""
    with a_thread_in_a_step(llama) as handle:
        if (child := os.fork()) == 0:
            handle.remove()
            signal.alarm(30)
            os._exit(len(llama.generate([[1, 5]], 3, 0)[0][0]))
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 3


def test_interrupted_anywhere(llama: Llama) -> None:
    """Ctrl-C, or whatever ends a thread, in a step and while waiting for another's: nobody waits for ever
    afterwards."""
    expected = llama.generate([[1, 9, 8]], 4, 0)
    entered, leave, ends = threading.Event(), threading.Event(), []

    def hook(*_: Any) -> None:
        if threading.current_thread() is threads[0]:
            entered.set()
            while not leave.wait(0.001):
                pass

    def call() -> None:
        try:
            llama.generate([[1, 5]], 3, 0)
        except KeyboardInterrupt:
            ends.append("interrupted")

    handle = llama.model.layers[0].register_forward_hook(hook)
    threads = [threading.Thread(target=call, daemon=True) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
            entered.wait(60)
        for thread in threads:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident or 0), ctypes.py_object(KeyboardInterrupt)
            )
        for thread in threads:
            thread.join(60)
    finally:
        handle.remove()
    assert ends == ["interrupted"] * 3
    assert llama.generate([[1, 9, 8]], 4, 0) == expected


def test_a_stream_that_ends_while_another_steps(llama: Llama) -> None:
    """The garbage collector may close a stream in any thread; it waits for nobody."""
    stream = llama.stream_text(PROMPTS[:1], temperature=0)
    next(stream)
    closing = threading.Thread(target=stream.close)  # type: ignore[attr-defined]
    with a_thread_in_a_step(llama):
        closing.start()
        closing.join(60)
        assert not closing.is_alive()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_openmp_keeps_no_threads_for_a_thread_that_waits() -> None:
    """libgomp lets its threads sleep after each product where more of them live than processors: with those of the
    thread that had built the model, each step of another thread took a tenth longer."""

    def live() -> int:
        return len(os.listdir("/proc/self/task"))

    def compute() -> list[bool]:
        mine = []
        for _ in range(2):
            torch.randn(2**20).mul(2)
            before, until = live(), time.monotonic() + 60
            openmp.rest()
            while live() > before - 2 and time.monotonic() < until:
                time.sleep(0.001)  # they end by themselves
            mine.append(live() <= before - 2)
        return mine

    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(compute).result() == [True, True]
    finally:
        torch.set_num_threads(threads)


class User:
    """Somebody whose steps fill a cache."""


def test_a_fork_in_the_middle_of_a_step() -> None:
    """The thread that stepped is not there: nobody waits for it, or goes on with what it has written."""
    use, user, begun, goes_on = cache_use.CacheUse(), User(), threading.Event(), threading.Event()

    def step() -> None:
        with suppress(RuntimeError), use.turn(CPU), use.call():
            begun.set()
            goes_on.wait(10)

    assert not use.take(user)
    assert use.take(user)
    thread = threading.Thread(target=step)
    thread.start()
    assert begun.wait(10)
    cache_use._in_forked_child()
    assert not use.is_of(user)
    with use.turn(CPU), use.call():
        pass
    with pytest.raises(RuntimeError, match="in the middle of a step"), use.turn(CPU), use.call(), use.call():
        pass
    goes_on.set()
    thread.join()


def test_a_turn_waits_for_the_stream_of_the_last() -> None:
    use, waits = cache_use.CacheUse(), []
    streams = [SimpleNamespace(wait_stream=partial(lambda i, other: waits.append((i, other)), i)) for i in range(2)]
    for i in (0, 0, 1, 1, 0):
        use._follow(streams[i])
    assert waits == [(1, streams[0]), (0, streams[1])]
