"""Requests at any time, from any thread, each with its own options: who runs, who waits, who shares a prefix."""

from __future__ import annotations

import gc
import itertools
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import events
import pytest
import torch
from helpers import chosen, near, watch_prefill
from hypothesis import given
from hypothesis import strategies as st
from workers import Pool

from llama import Llama
from llama.decoding import scheduler
from llama.decoding.calls import Call, Source
from llama.decoding.held import Held, common_prefix
from llama.decoding.pace import FIRST, LEAST, MOST, Pace
from llama.decoding.requests import Request, Step
from llama.decoding.rows import Decision
from llama.decoding.sampling import Sampling

LONG = [1, *range(20, 100)]


@pytest.fixture(scope="module")
def llama(tiny: Path, tokenizer_path: str) -> Llama:
    return Llama.build(str(tiny), tokenizer_path, 128, 4, device="cpu")


@pytest.fixture(scope="module")
def alone(tiny: Path, tokenizer_path: str) -> events.Alone:
    return events.Alone(Llama.build(str(tiny), tokenizer_path, 128, 1, device="cpu"))


@pytest.fixture
def passes(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, tokens of each) of the passes over prompts."""
    llama.forget()
    return watch_prefill(
        llama._engine, monkeypatch, lambda prompts, start: (len(prompts), max(map(len, prompts)) - start)
    )


def ids(steps: Iterator[Step] | Call) -> list[int]:
    return [step.token for step in steps if step.token is not None]


@pytest.mark.parametrize("seed", range(3))
def test_random_events(seed: int, llama: Llama, alone: events.Alone) -> None:
    """Requests come, are read, cancelled and left in any order: each gives what it gives alone."""
    assert events.run(llama, alone, 700, seed)["texts"] > 100


def in_this_process(folder: str, tokenizer_path: str, count: int) -> int:
    shared = Llama.build(folder, tokenizer_path, 128, 4, 2, device="cpu")
    return int(events.run(shared, events.Alone(Llama(shared.model, shared.tokenizer)), count, 5)["texts"])


def test_random_events_on_two_processes(tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    counts = pool.run(in_this_process, str(tiny), tokenizer_path, 60)
    assert len(set(counts)) == 1
    assert counts[0] > 10


def test_threads_share_the_steps(llama: Llama, alone: events.Alone) -> None:
    """Calls of eight threads run together, each with options of its own."""
    requests = [Request([1, 30 + i, *range(40, 40 + i)], 20, events.SAMPLINGS[i % 7], seed=i) for i in range(24)]
    most: list[int] = []
    expected = [alone(request)[0] for request in requests]

    def answer(request: Request) -> list[int]:
        call = Call(llama._scheduler, [request], Source(1))
        found = []
        for step in call:
            most.append(len(llama._scheduler.rows))
            found += [step.token] if step.token is not None else []
        return found

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(answer, requests)) == expected
    assert max(most) > 1
    assert not llama._scheduler._waiters


def test_a_lock_that_was_released_in_time_is_left_to_others(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a thread's first look at it, and before that thread is in the list of those who wait."""
    expected = llama.generate([[1, 9]], 3, 0)
    lock, looks = llama._engine._use.lock, iter([False])
    late = mock.MagicMock(wraps=lock)
    late.acquire.side_effect = lambda blocking=True: next(looks, True) and lock.acquire(blocking)
    late.__enter__.side_effect, late.__exit__.side_effect = lock.__enter__, lock.__exit__
    monkeypatch.setattr(llama._engine._use, "lock", late)
    assert llama.generate([[1, 9]], 3, 0) == expected
    assert not next(looks, False)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(lambda: lock.acquire(blocking=False) and lock.release() is None).result()


def test_a_stream_that_nobody_reads_goes_on_beside_others(llama: Llama) -> None:
    """It holds up no one else, and what it has not read waits for it."""
    expected = ids(llama.steps([LONG], 0, max_gen_len=20))
    unread = iter(llama.steps([LONG], 0, max_gen_len=20))
    first = next(unread).token
    llama.generate([[1, 9, 8]] * 3, 30, 0)
    assert llama._scheduler.rows == []  # it has ended meanwhile
    assert [first, *ids(unread)] == expected


def test_first_come_first_served(llama: Llama) -> None:
    """Prompts of several calls, in the order in which they came; a call that draws waits for all its slots."""
    order: list[str] = []
    calls = {
        "five": llama.steps([[1, 20 + i] for i in range(5)], 0, max_gen_len=6),
        "drawing": llama.steps([[1, 30], [1, 31], [1, 32]], 0.8, max_gen_len=4),
        "last": llama.steps([[1, 40]], 0, max_gen_len=2),
    }
    streams = {name: iter(call) for name, call in calls.items()}
    threads = []
    for name, stream in streams.items():
        if name == "five":
            next(stream)
            continue

        def drain(name: str = name, stream: Iterator[Step] = stream) -> None:
            next(stream)
            order.append(name)
            for _ in stream:
                pass

        threads.append(threading.Thread(target=drain))
    with llama._engine.turn():  # in which no thread steps
        for count, thread in enumerate(threads, start=1):
            thread.start()
            while len(llama._scheduler._inbox) < count:
                time.sleep(0.001)
    assert len(list(streams["five"])) == 29
    for thread in threads:
        thread.join(60)
    assert order == ["drawing", "last"]


def test_a_call_that_draws_leaves_what_it_does_not_need(llama: Llama) -> None:
    """It has two slots until its last request has come; another call that waits takes a third."""
    requests = [Request([1, 30 + i], 9, Sampling(0.8)) for i in range(6)]
    drawing = iter(Call(llama._scheduler, requests, Source(2)))
    next(drawing)
    assert len(ids(Call(llama._scheduler, [Request([1, 5], 3)], Source(1)))) == 3
    assert len(ids(drawing)) > 40


def test_the_id_0_is_like_any_other(llama: Llama) -> None:
    """It is counted, scored, and shared."""
    bias = {"logit_bias": {0: 1000.0, 3: 900.0}, "frequency_penalty": 500.0}
    steps = list(llama.steps([LONG], 0, max_gen_len=4, logprobs=True, draft=False, **bias))
    assert [step.token for step in steps] == [0, 3, 0, 3]
    expected = torch.log_softmax(llama.model(torch.tensor([LONG]), 0)[0, -1], -1)[0].item()
    assert steps[0].logprob == pytest.approx(expected, abs=1e-4)
    llama.forget()
    list(llama.steps([LONG], 0, max_gen_len=1, logit_bias={0: 1000.0}))
    assert cached(llama.steps([[*LONG, 7]], 0, max_gen_len=1)) == [len(LONG)]


# Prefixes


def cached(call: Call) -> list[int]:
    list(call)
    return call.cached


def test_what_prompts_share_is_read_once(llama: Llama, passes: list[tuple[int, int]]) -> None:
    """In one call: the first row reads what the others wait for; a later call starts behind what slots hold."""
    prompts = [[*LONG, 200 + i, 210] for i in range(6)]
    call = llama.steps(prompts, 0, max_gen_len=3)
    assert cached(call) == [0, *[len(LONG)] * 5]
    assert sum(rows * tokens for rows, tokens in passes) == len(LONG) + 2 * 6
    passes.clear()
    assert cached(llama.steps([[*LONG, 300]], 0, max_gen_len=1)) == [len(LONG)]
    assert passes == [(1, 1)]
    assert cached(llama.steps([[*LONG[:50], 300]], 0, max_gen_len=1)) == [50]
    assert cached(llama.steps([[*LONG[:20], 300]], 0, max_gen_len=1)) == [0]  # few ids are read again


def test_several_answers_to_one_prompt(llama: Llama, passes: list[tuple[int, int]]) -> None:
    llama.steps([LONG] * 4, 0.9, max_gen_len=2)
    assert cached(llama.steps([LONG] * 4, 0.9, max_gen_len=2)) == [0, *[len(LONG) - 1] * 3]
    assert passes == [(1, len(LONG)), (3, 1)]


def test_a_running_row_shares_what_it_has_read(llama: Llama, passes: list[tuple[int, int]]) -> None:
    running = iter(llama.steps([LONG], 0, max_gen_len=30))
    next(running)
    call = llama.steps([[*LONG, 7, 7]], 0, max_gen_len=5)
    found = ids(call)
    assert call.cached == [len(LONG)]
    rest = ids(running)
    llama.forget()
    assert found == ids(llama.steps([[*LONG, 7, 7]], 0, max_gen_len=5))
    llama.forget()
    assert rest == ids(llama.steps([LONG], 0, max_gen_len=30))[1:]


def test_several_chats_keep_their_slots(llama: Llama, passes: list[tuple[int, int]]) -> None:
    """Another call, or another chat's turn, cost a chat its whole history."""
    chats = [llama.chat(system=f"be {word}", temperature=0, max_gen_len=3) for word in ("kind", "red", "a dog")]
    for chat in chats:
        chat.ask("the tree")
    passes.clear()
    for chat in chats:
        known = sum(len(turn["ids"]) for turn in chat.turns)
        chat.ask("ran")
        new = sum(len(turn["ids"]) for turn in chat.turns) - known
        assert passes.pop()[1] <= new + 3  # EOS, and a reply's newest id that was never run
    llama.generate([[1, 300 + i] for i in range(4)], 2, 0)
    assert not llama._scheduler.rows


def test_the_slot_that_was_used_longest_ago_is_given_up(llama: Llama, passes: list[tuple[int, int]]) -> None:
    prompts = [[1, *[20 + i] * 40] for i in range(5)]
    for prompt in prompts[:4]:
        llama.generate([prompt], 2, 0)
    assert cached(llama.steps([prompts[0]], 0, max_gen_len=1)) == [40]
    llama.generate([prompts[4]], 2, 0)  # in place of the second, which was used longest ago
    assert [cached(llama.steps([prompts[i]], 0, max_gen_len=1))[0] for i in (0, 2, 3, 4)] == [40] * 4
    assert cached(llama.steps([prompts[1]], 0, max_gen_len=1)) == [0]


@pytest.mark.parametrize(("shared", "kept"), [(40, 82), (41, 41)])
def test_a_long_prefix_is_kept_beside_one_that_shares_less_than_half(shared: int, kept: int, llama: Llama) -> None:
    """Else the new prompt takes its place."""
    llama.forget()
    llama.generate([[*LONG, 7]], 1, 0)
    assert cached(llama.steps([[*LONG[:shared], 300]], 0, max_gen_len=1)) == [shared]
    assert cached(llama.steps([[*LONG, 7, 8]], 0, max_gen_len=1)) == [kept]


@given(a=st.lists(st.integers(0, 2)), b=st.lists(st.integers(0, 2)))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    assert common_prefix(a, b) == sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


def test_held() -> None:
    held = Held(3)
    assert held.oldest([2, 1]) == 1
    for slot in (1, 0, 2):
        held.set(slot, [slot])
    held.swap(0, 1)
    assert held.ids == [[1], [0], [2]]
    assert held.oldest([0, 1, 2]) == 0
    held.set(2, [])
    assert held.oldest([0, 1, 2]) == 2


# Long prompts


def test_long_prompts_are_read_between_the_steps_of_streams(
    llama: Llama, passes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of 81 tokens joins three streams: each has an id between any two pieces. No piece has one token only."""
    monkeypatch.setattr(Pace, "piece", 16)
    streams = [iter(llama.steps([[1, 300 + i]], 0, max_gen_len=40)) for i in range(3)]
    expected = [list(llama.steps([[1, 300 + i]], 0, max_gen_len=40)) for i in range(3)]
    found: list[list[Step]] = [[], [], []]
    passes.clear()
    joining, tokens = llama.steps([LONG], 0, max_gen_len=4), list[int]()
    thread = threading.Thread(target=lambda: tokens.extend(ids(joining)))
    for turn in range(40):
        if turn == 5:
            with llama._engine.turn():  # in which no thread steps
                thread.start()
                while not llama._scheduler._inbox:
                    time.sleep(0.001)
        before = len(passes)
        for stream, steps in zip(streams, found):
            steps.append(next(stream))
        if turn > 5:
            assert sum(rows * width for rows, width in passes[before:]) <= 3 * 16
    thread.join(60)
    assert found == expected
    assert [width for _, width in passes if width > 2] == [16, 16, 16, 16, 17]
    llama.forget()
    assert tokens == ids(llama.steps([LONG], 0, max_gen_len=4))


@pytest.mark.parametrize(("streams", "calls"), [(True, 1), (False, 2)])
def test_prompts_that_nobody_elses_stream_waits_for_are_read_whole(
    streams: bool, calls: int, llama: Llama, passes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "piece", 16)
    requests = [*(Request([1, 300 + i], 3 + 3 * i) for i in range(4)), Request(LONG, 2)]
    first = iter(Call(llama._scheduler, requests[:4] if calls == 2 else requests, Source(4), streams=streams))
    next(first)
    if calls == 2:
        ids(Call(llama._scheduler, requests[4:], Source(1)))
    ids(first)
    assert passes[-1] == (1, len(LONG))


def test_the_pace_is_told_what_each_step_did(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many ids of prompts it read, how many rows it ran, and its time; nothing of a pass over guesses."""
    llama.forget()
    told: list[tuple[int, int, float]] = []
    monkeypatch.setattr(llama._scheduler.pace, "saw", lambda *what: told.append(what))
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(perf_counter=itertools.count(5).__next__))
    list(llama.steps([LONG, [1, 5]], 0, max_gen_len=3, draft=False))
    assert told == [(2 * len(LONG), 2, 1), (0, 2, 1), (0, 2, 1)]
    told.clear()
    verifier = llama._scheduler.verifier
    monkeypatch.setattr(verifier, "decide", lambda rows: [[Decision(7), Decision(8)] for _ in rows])
    assert ids(llama.steps([[1, 5, 6]], 0, max_gen_len=5))[1:] == [7, 8, 7, 8]
    assert told == [(3, 1, 1)]


def settled(pace: Pace, seconds: Callable[[int], float]) -> int:
    """The size of most pieces, after some of them were read, between steps of 10 ms."""
    sizes = []
    for _ in range(60):
        pace.saw(0, 3, 0.010)
        sizes.append(pace.piece)
        pace.saw(sizes[-1], 3, 0.010 + seconds(sizes[-1]))
    return max(set(sizes[20:]), key=sizes.count)


def test_the_piece_follows_what_was_measured() -> None:
    pace = Pace()
    assert pace.piece == FIRST
    pace.saw(2, 0, 9.0)  # too few tokens to say anything
    assert pace.piece == FIRST
    assert (
        settled(pace, lambda tokens: tokens * 0.001) == 16
    )  # the largest power of two that three steps' time has room for
    assert settled(pace, lambda tokens: tokens * 0.0001) == 256
    assert settled(pace, lambda tokens: tokens * 1e-9) == MOST
    assert settled(pace, lambda tokens: tokens * 0.1) == LEAST
    for _ in range(3):  # what it knew of longer pieces is out of date
        size = settled(pace, lambda tokens: tokens * 0.0001)
    assert size == 256
    # A GPU takes hardly longer for many tokens than for few: shorter pieces would only be more.
    assert settled(Pace(), lambda tokens: 0.040 + tokens * 0.0001) == 512
    assert settled(Pace(), lambda tokens: 0.040 + tokens * 0.001) == 64


def test_a_slot_is_lent_while_all_are_in_use(llama: Llama) -> None:
    """Its row is read anew."""
    prompts = [[*LONG, 300 + i] for i in range(4)]
    vectors, expected = llama.embed(["the dog"]), llama.generate(prompts, 9, 0)[0]
    streams = [iter(llama.steps([prompt], 0, max_gen_len=9)) for prompt in prompts]
    found = [[next(stream).token] for stream in streams]
    assert torch.equal(llama.embed(["the dog"]), vectors)
    assert [[*first, *ids(stream)] for first, stream in zip(found, streams)] == expected


def test_what_a_lent_slot_held_is_forgotten(llama: Llama) -> None:
    """It is the one that was used longest ago."""
    llama.forget()
    prompts = [[1, *[20 + i] * 40] for i in range(4)]
    for prompt in prompts:
        llama.generate([prompt], 2, 0)
    llama.embed(["the dog"])
    assert [cached(llama.steps([prompt], 0, max_gen_len=1)) for prompt in prompts[::-1]] == [[40], [40], [40], [0]]


# Options


def test_any_mixture_of_options_in_one_step(llama: Llama, alone: events.Alone) -> None:
    """Each row as it is alone, whatever its neighbours ask for."""
    requests = [Request([1, 26, 30 + i], 25, sampling, seed=i) for i, sampling in enumerate(events.SAMPLINGS)]
    found: list[list[int]] = [[] for _ in requests]
    for step in Call(llama._scheduler, requests, Source(4)):
        found[step.index] += [step.token] if step.token is not None else []
    for request, tokens in zip(requests, found):
        assert tokens == alone(request)[0]


def test_grammars_are_obeyed_while_rows_move(llama: Llama) -> None:
    """Rows of different lengths, so that slots change hands; each grammar is told its own row's ids, once."""
    grammars = [events.OnlyEven() if i % 3 else None for i in range(12)]
    requests = [Request([1, 50 + i], 3 + 5 * i % 17, Sampling(0.9), seed=i, grammar=g) for i, g in enumerate(grammars)]
    found: list[list[int]] = [[] for _ in requests]
    for step in Call(llama._scheduler, requests, Source(4)):
        found[step.index] += [step.token] if step.token is not None else []
    for tokens, grammar in zip(found, grammars):
        if grammar is not None:
            assert grammar.accepted == tokens
            assert all(token % 2 == 0 for token in tokens)
    assert any(token % 2 for tokens in found for token in tokens)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 64, 992, 1000])
def test_a_grammar_has_a_bit_for_each_id(vocab_size: int) -> None:
    """In as few int32 as hold them, and the last id is one of them."""

    class OnlyLast(events.OnlyEven):
        def fill(self, bits: torch.Tensor) -> None:
            assert (bits.shape, bits.dtype) == ((math.ceil(vocab_size / 32),), torch.int32)
            bits.numpy().view("uint32")[-1] = 1 << (vocab_size - 1) % 32

    assert chosen(torch.zeros(1, vocab_size), Sampling(), grammar=OnlyLast()).tolist() == [vocab_size - 1]


# What goes wrong


def test_a_prompt_that_fails_fails_alone(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [ids(llama.steps([prompt], 0, max_gen_len=9)) for prompt in ([1, 60], [1, 70])]
    prefill = llama._engine.prefill

    def failing(prompts: Any, *rest: Any, **more: Any) -> Any:
        if any(333 in prompt for prompt in prompts):
            raise RuntimeError("no memory for this one")
        return prefill(prompts, *rest, **more)

    monkeypatch.setattr(llama._engine, "prefill", failing)
    stream = iter(llama.steps([[1, 60]], 0, max_gen_len=9))
    first = next(stream)
    beside = llama.steps([[1, 70]], 0, max_gen_len=9)
    llama._scheduler.submit(beside)  # to be read in one pass with the prompt that fails
    with pytest.raises(RuntimeError, match="no memory for this one"):
        llama.generate([[1, 333], [1, 70]], 3, 0)
    assert [[first.token, *ids(stream)], ids(beside)] == expected
    assert not llama._scheduler.rows


def test_a_row_whose_prefix_never_comes(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for another row to read what both begin with; that one is left before it has, and it reads itself."""
    monkeypatch.setattr(Pace, "piece", 16)
    stream = iter(llama.steps([[1, 300]], 0, max_gen_len=40))
    expected = ids(llama.steps([[*LONG, 7]], 0, max_gen_len=5))
    llama.forget()
    next(stream)
    first, second = (llama.steps([[*LONG, i]], 0, max_gen_len=5) for i in (6, 7))
    for call in (first, second):
        llama._scheduler.submit(call)
    next(stream)
    assert second.cached == [len(LONG)]  # of which the first 16 are read
    first.leave()
    assert ids(second) == expected
    assert second.cached == [0]


def test_a_row_waits_for_the_longest_prefix(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "piece", 16)
    stream = iter(llama.steps([[1, 300]], 0, max_gen_len=40))
    llama.forget()
    next(stream)
    calls = [llama.steps([prompt], 0, max_gen_len=2) for prompt in ([*LONG[:40], *range(200, 240)], LONG, [*LONG, 7])]
    for call in calls:
        llama._scheduler.submit(call)
    next(stream)
    assert [call.cached for call in calls] == [[0], [40], [len(LONG)]]
    assert [len(ids(call)) for call in calls] == [2, 2, 2]


def test_requests_that_are_cancelled_give_up_their_slots(llama: Llama) -> None:
    call = llama.steps([[1, 60], [1, 61]], 0, max_gen_len=50)
    stream = iter(call)
    next(stream)
    call.cancel(0)
    assert len(llama._scheduler.running) == 1
    assert {step.index for step in itertools.islice(stream, 4)} == {1}
    call.cancel(1)
    assert list(stream) == []
    llama.generate([[1, 9]], 1, 0)
    assert llama._scheduler.rows == []


@torch.no_grad()
def test_weights_that_change_under_a_stream(tiny: Path, tokenizer_path: str) -> None:
    """What they made is read anew with the next call: the rows that run too."""
    llama = Llama.build(str(tiny), tokenizer_path, 128, 4, device="cpu")
    call = llama.steps([LONG], 0, max_gen_len=12, logprobs=True)
    stream = iter(call)
    tokens = [next(stream).token for _ in range(4)]
    llama.model.layers[1].attention.wv.weight.data.mul_(1.5)
    llama.generate([[1, 5]], 1, 0)
    rest = [(step.token, step.logprob) for step in stream]
    assert call.cached == [0]
    llama.forget()
    known = [token for token in tokens[:4] if token is not None]
    for (token, logprob), step in zip(rest, llama.steps([[*LONG, *known]], 0, max_gen_len=8, logprobs=True)):
        assert (token, logprob) == (step.token, pytest.approx(step.logprob, abs=1e-5))


@torch.no_grad()
def changed_on_one(folder: str, tokenizer_path: str) -> Any:
    llama = Llama.build(folder, tokenizer_path, 128, 4, device="cpu")
    _, shared = (cached(llama.steps([[*LONG, i]], 0, max_gen_len=1)) for i in (7, 8))
    stream = iter(llama.steps([LONG], 0, max_gen_len=12, logprobs=True))
    tokens: list[Any] = [next(stream).token for _ in range(4)]
    if torch.distributed.get_rank() == 1:
        llama.model.layers[1].attention.wv.weight.data.mul_(1.5)
    llama.generate([[1, 5]], 1, 0)
    rest = list(stream)
    llama.forget()
    again = llama.steps([[*LONG, *tokens]], 0, max_gen_len=8, logprobs=True)
    return shared, *([(step.token, step.logprob) for step in steps] for steps in (rest, again))


def test_weights_that_change_on_one_of_several_processes(tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    """All read anew then; and none if no weight has changed."""
    for shared, rest, expected in pool.run(changed_on_one, str(tiny), tokenizer_path):
        assert shared == [len(LONG)]
        near(rest, expected)


def test_seeding_a_generator_under_a_queued_step(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is undone puts back what it drew; not over a seed that somebody has set since."""
    scheduler = llama._scheduler
    monkeypatch.setattr(type(llama._engine), "looks_ahead", property(lambda engine: True))
    torch.manual_seed(3)
    expected = llama.generate([[1, 70]], 5, 0.9)
    stream = iter(llama.steps([[1, 60]], 0.9, max_gen_len=30, frequency_penalty=0.1))
    next(stream)
    assert scheduler._begun
    torch.manual_seed(3)
    stream.close()  # type: ignore[attr-defined]
    assert llama.generate([[1, 70]], 5, 0.9) == expected


def test_n_answers(llama: Llama, passes: list[tuple[int, int]]) -> None:
    """Each prompt is read once; its answers stand together, each as it is when it is asked for by itself."""
    texts, options = ["the little dog", "a"], {"temperature": 0.9, "max_gen_len": 6}
    many = [p["generation"] for p in llama.text_completion(texts, n=3, seed=[5, 50], **options)]
    singly = [llama.text_completion([texts[i // 3]], seed=[(5, 50)[i // 3] + i % 3], **options) for i in range(6)]
    assert many == [answer["generation"] for [answer] in singly]
    assert len(set(many)) == 6
    dialogs: list[Any] = [[{"role": "user", "content": text}] for text in ("hi", "[INST]", "you")]
    replies = llama.chat_completion(dialogs, n=2, max_gen_len=3)
    assert ["Error" in reply["generation"]["content"] for reply in replies] == [False, False, True, True, False, False]
    chunks = list(llama.stream_chat(dialogs, n=2, max_gen_len=3))
    assert {chunk["index"] for chunk in chunks if chunk["finish_reason"]} == set(range(6))
    drawn = llama.text_completion(["the"], n=4, **options)
    assert len({answer["generation"] for answer in drawn}) > 1
    with pytest.raises(ValueError, match="n=0 must be a whole number of 1 or more"):
        llama.text_completion(texts, n=0)
    with pytest.raises(ValueError, match="n=2: here a prompt has one answer"):
        llama.chat(n=2)


def test_a_stream_that_is_collected_within_a_step(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector may run anywhere, also in the thread that steps."""
    expected = [ids(llama.steps([[1, 60 + i]], 0, max_gen_len=9)) for i in range(2)]
    streams = [iter(llama.steps([[1, 60 + i]], 0, max_gen_len=9)) for i in range(3)]
    found = [[next(stream).token] for stream in streams]
    decode = llama._engine.decode

    def collecting(tokens: torch.Tensor, positions: Any) -> torch.Tensor:
        del streams[2:]
        return decode(tokens, positions)

    monkeypatch.setattr(llama._engine, "decode", collecting)
    assert [[*found[i], *ids(streams[i])] for i in range(2)] == expected
    assert not llama._scheduler.rows


@torch.no_grad()
def test_a_doubt_lasts_until_it_is_settled(tiny: Path, tokenizer_path: str) -> None:
    """A call that looked at the weights, and ended before its first step, made their change forgotten."""
    llama = Llama.build(str(tiny), tokenizer_path, 128, 4, device="cpu")
    list(llama.steps([LONG], 0, max_gen_len=2))
    llama.model.layers[1].attention.wv.weight.data.mul_(1.5)
    call = llama.steps([[1, 5]], 0, max_gen_len=2)
    call.before_step = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        list(call)
    call = llama.steps([LONG], 0, max_gen_len=2)
    list(call)
    assert call.cached == [0]


class Failing(events.OnlyEven):
    """A grammar that fails at its third id, when it is asked or told; or allows nothing from there on."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def fill(self, bits: torch.Tensor) -> None:
        super().fill(bits)
        if len(self.accepted) == 2 and self.how == "asked":
            raise KeyError("my own mistake")
        if len(self.accepted) == 2 and self.how == "nothing":
            bits.zero_()

    def accept(self, token: int) -> None:
        super().accept(token)
        if len(self.accepted) == 3 and self.how == "told":
            raise KeyError("my own mistake")


@pytest.mark.parametrize(
    ("how", "message"), [("asked", "my own"), ("told", "my own"), ("nothing", "prompt 0 allows no id")]
)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_grammar_that_fails_fails_alone(how: str, message: str, temperature: float, llama: Llama) -> None:
    expected = ids(llama.steps([[1, 60]], 0, max_gen_len=12))
    stream = iter(llama.steps([[1, 60]], 0, max_gen_len=12))
    found = [next(stream).token]
    wrong = Call(
        llama._scheduler, [Request([1, 70], 9, Sampling(temperature), seed=1, grammar=Failing(how))], Source(1)
    )
    with pytest.raises((KeyError, ValueError), match=message):
        list(wrong)
    assert [*found, *ids(stream)] == expected
    assert not llama._scheduler.rows


@pytest.mark.parametrize("place", ["copy", "swap", "prefill", "decode", "fetch", "refresh", "weights_state"])
def test_interrupted_in_a_step(place: str, llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was under way, what is held is right afterwards, and the other rows go on, with their draws and
    penalties."""
    prompts, options = [[*LONG[:40], 60 + i] for i in range(3)], {"frequency_penalty": 0.3, "max_gen_len": 9}
    llama.forget()
    expected = [ids(llama.steps([prompt], 0.9, seed=i, **options)) for i, prompt in enumerate(prompts)]
    original, engine = getattr(llama._engine, place), llama._engine
    for after in range(3):
        llama.forget()
        streams = [iter(llama.steps([prompt], 0.9, seed=i, **options)) for i, prompt in enumerate(prompts)]
        found = [[next(stream).token for _ in range(i)] for i, stream in enumerate(streams)]
        calls = itertools.count()

        def interrupted(*args: Any, **more: Any) -> Any:
            result = original(*args, **more)
            if next(calls) == after:  # noqa: B023
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(engine, place, interrupted)
        others = [iter(llama.steps([[*LONG[:40], 80 + i]], 0, max_gen_len=1 + i)) for i in range(2)]
        for other in others:
            try:
                list(other)
            except KeyboardInterrupt:
                break
        monkeypatch.setattr(engine, place, original)
        for stream, tokens, right in zip(streams, found, expected):
            assert [*tokens, *ids(stream)] == right
        for i, prompt in enumerate(prompts):
            assert ids(llama.steps([prompt], 0.9, seed=i, **options)) == expected[i]


def test_a_request_is_not_lost_when_it_cannot_be_placed(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    admit = llama._scheduler.chooser.admit

    def failing(row: Any) -> None:
        if row.request.prompt[1] == 77:
            raise MemoryError("no room for its penalties")
        admit(row)

    monkeypatch.setattr(llama._scheduler.chooser, "admit", failing)
    stream = iter(llama.steps([[1, 60]], 0, max_gen_len=5))
    next(stream)
    with pytest.raises(MemoryError, match="no room"):
        llama.generate([[1, 77]], 3, 0)
    assert len(ids(stream)) == 4


def test_a_model_that_is_let_go_is_freed(tiny: Path, tokenizer_path: str) -> None:
    """Without the garbage collector: calls that ended at once, were left while some waited, or raised."""
    gc.collect()
    gc.disable()
    try:
        for use in (
            lambda m: m.generate([[1, 5]], 1, 0),
            lambda m: m.generate([[1, 5]], 0, 0),
            lambda m: next(iter(m.steps([[1, 5 + i] for i in range(6)], 0, max_gen_len=5))),
            lambda m: m.text_completion(["a"] * 3, 0.9, max_gen_len=3, repetition_penalty=1.2),
        ):
            llama = Llama.build(str(tiny), tokenizer_path, 32, 4, device="cpu")
            use(llama)
            model = weakref.ref(llama.model)
            del llama
            assert model() is None
    finally:
        gc.enable()


def test_equal_calls_give_equal_numbers(llama: Llama) -> None:
    """To the bit, for prompts so short that reading them again costs nothing to speak of."""
    calls = [llama.generate([[1, *range(20, 20 + n)]], 6, 0, logprobs=True) for n in (3, 20) for _ in range(3)]
    assert calls[0] == calls[1] == calls[2]
    assert calls[3] == calls[4] == calls[5]


def test_nothing_moves_without_need(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that shares nothing took the second slot, and changed places with the first, at each call."""
    llama.forget()
    monkeypatch.setattr(llama._engine, "swap", lambda *_: pytest.fail("a slot was moved"))
    llama.generate([[1, 20, 30]], 2, 0)
    assert llama._scheduler.held.ids[0] == [1, 20, 30, *llama._scheduler.held.ids[0][3:]]
