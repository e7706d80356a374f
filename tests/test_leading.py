"""One process takes requests for all, at any time and from any thread: `Llama.lead`."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import Any

import events
import pytest
import torch
from workers import Pool

from llama import Llama
from llama.decoding.calls import Call, Source
from llama.decoding.requests import Request
from llama.layers.parallel import is_first_process

TEXTS = ["Once upon a time", "The dog", "Lily", "A big red ball", "There was", "One day"]
DIALOG = [{"role": "user", "content": "Hi."}]


@pytest.fixture(scope="module")
def alone(tiny: Path, tokenizer_path: str) -> Llama:
    return Llama.build(str(tiny), tokenizer_path, 128, 4, device="cpu")


def build(folder: str, tokenizer_path: str, parallel: int) -> Llama:
    return Llama.build(folder, tokenizer_path, 128, 4, parallel, device="cpu")


def in_many_ways(llama: Llama) -> Any:
    """What each way to call gives, where it is the same whatever runs beside it."""
    chat = llama.chat(temperature=0, max_gen_len=6)
    stream = llama.stream_text(TEXTS[:2], 0, max_gen_len=9)
    first = next(stream)["index"]
    stream.close()  # type: ignore[attr-defined]
    with ThreadPoolExecutor(6) as threads:
        at_once = list(threads.map(lambda i: llama.text_completion([TEXTS[i]], 0.9, max_gen_len=12, seed=i), range(6)))
    return {
        "generate": llama.generate([[1, 5, 6], [1, 9]], 8, 0),
        "more than slots": [c["generation"] for c in llama.text_completion(TEXTS, 0, max_gen_len=10, stop="e", n=2)],
        "one seed": [c["generation"] for c in llama.text_completion(TEXTS[:3], 0.8, max_gen_len=10, seed=7)],
        "chat": [chat.ask("A dog."), chat.ask("Then?")],
        "dialogs": [c["generation"]["content"] for c in llama.chat_completion([DIALOG, DIALOG], 0, max_gen_len=6)],
        "at once": [c["generation"] for (c,) in at_once],
        "left": first,
        "nothing": (llama.text_completion([]), llama.chat_completion([[{"role": "user", "content": "[INST]"}]])),
        "score": [round(x, 3) for x in llama.score(["The dog ran."])[0]["logprobs"]],
        "pairs": [round(score["logprob"], 3) for score in llama.score(["The dog"] * 5,
            [" ran.", " a", "s", " b", " c"])],
        "embed": [round(x, 3) for x in llama.embed(["The dog"]).flatten().tolist()[:5]],
        "forgotten": (llama.forget(), llama.generate([[1, 5, 6]], 8, 0)),
    }  # fmt: skip


def leading(folder: str, tokenizer_path: str, parallel: int) -> Any:
    llama = build(folder, tokenizer_path, parallel)
    found = llama.lead(lambda: in_many_ways(llama))
    return found, llama.text_completion(TEXTS[:2], 0, max_gen_len=5)


@pytest.mark.parametrize("parallel", [1, 2, 4])
def test_every_way_to_call(parallel: int, alone: Llama, tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    """On the first of four processes, which hold one to four copies; afterwards all of them make calls alike again."""
    first, *others = pool.run(leading, str(tiny), tokenizer_path, parallel)
    assert first[0] == in_many_ways(alone)
    assert [found for found, _ in others] == [None] * 3
    assert [after for _, after in others] == [first[1]] * 3


@pytest.mark.parametrize("parallel", [1, 2])
def test_random_events(parallel: int, tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    answers = events.answers(events.Alone(Llama.build(str(tiny), tokenizer_path, 128, 1, device="cpu")), 300, 8)
    found, *_ = pool.run(events.led, str(tiny), tokenizer_path, parallel, answers, 300, 8)
    assert found["texts"] > 40


def shares(folder: str, tokenizer_path: str) -> Any:
    """Which copies were given the requests of calls that run at once."""
    llama = build(folder, tokenizer_path, 1)

    def work() -> Any:
        leader = llama._leader
        assert leader is not None
        calls = [Call(leader, [Request([1, 5 + i], 20)] * 2, Source(2)) for i in range(4)]
        readers = [iter(call) for call in calls]
        for reader in readers:
            next(reader)
        return [set(where.values()) for where in leader._where.values()], leader._load

    return llama.lead(work)


def test_each_request_goes_where_there_is_room(tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    (where, load), *_ = pool.run(shares, str(tiny), tokenizer_path)
    assert where == [{0, 1}, {2, 3}, {0, 1}, {2, 3}]
    assert load == [2, 2, 2, 2]


def sampled(folder: str, tokenizer_path: str, parallel: int) -> Any:
    llama = build(folder, tokenizer_path, parallel)
    return llama.lead(lambda: [llama.text_completion([TEXTS[0]] * 4, 1.0, 1.0, max_gen_len=8) for _ in range(2)])


def test_rows_without_seeds_differ(tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    first, *_ = pool.run(sampled, str(tiny), tokenizer_path, 2)
    assert len({answer["generation"] for call in first for answer in call}) == 8
    assert first == pool.run(sampled, str(tiny), tokenizer_path, 2)[0]  # torch's generators are seeded by build


class Unsendable(events.OnlyEven):
    def __reduce__(self) -> Any:
        raise TypeError("it has a lock")


class Failing(events.OnlyEven):
    def accept(self, token: int) -> None:
        raise KeyError("my own mistake")


def told_of(folder: str, tokenizer_path: str, parallel: int) -> Any:
    llama = build(folder, tokenizer_path, parallel)

    def work() -> Any:
        assert llama._leader is not None
        try:
            return list(Call(llama._leader, [Request([1, 5], 4, grammar=Failing())], Source(1)))
        except Exception as error:
            return type(error), str(error)

    return llama.lead(work)


def test_an_error_of_a_grammar(tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    """It is the caller's own if the first process has the whole model; what comes from another copy can be sent."""
    for parallel, kind in ((4, KeyError), (2, RuntimeError)):
        assert pool.run(told_of, str(tiny), tokenizer_path, parallel)[0] == (kind, "'my own mistake'")


NOT_TAKEN_BACK = ("hook", "hook later", "hook, then a vector", "another model")


def refusing(folder: str, tokenizer_path: str, case: str) -> Any:
    llama = build(folder, tokenizer_path, 2)
    if case == "hook":
        llama.model.layers[0].register_forward_hook(lambda *_: None)

    def work() -> Any:
        if case == "grammar":
            assert llama._leader is not None
            grammar = Unsendable()
            list(Call(llama._leader, [Request([1, 5], 4, grammar=grammar)], Source(1)))
        elif case == "id":
            llama.generate([[1, 10**6]], 4)
        elif case == "texts":
            llama.embed(text for text in TEXTS)  # type: ignore[arg-type]
        elif case == "layer":
            llama.embed(["x"], layer=99)
        elif case == "hook later":
            llama.model.layers[0].register_forward_hook(lambda *_: None)
            llama.generate([[1, 5]], 4)
        elif case == "within":
            llama.lead(lambda: None)
        elif case == "hook, then a vector":
            llama.model.layers[0].register_forward_hook(lambda *_: None)
            llama.embed(["x"])
        elif case == "another model":
            llama.model = copy(llama.model)
            llama.generate([[1, 5]], 4)
        elif case == "the model's own call":
            llama.model(torch.tensor([[1, 5]]), 0)
        elif case == "its weights":
            weight = llama.model.norm.weight.data
            kept = weight[0].clone()
            weight[0] = torch.nextafter(kept, kept + 1)
            try:
                llama.generate([[1, 5]], 4)
            finally:
                weight[0] = kept

    def after_a_mistake() -> Any:
        try:
            work()
        except (ValueError, RuntimeError) as error:
            return (
                type(error).__name__,
                str(error),
                llama.generate([[1, 5]], 4, 0) if case not in NOT_TAKEN_BACK else None,
            )
        raise AssertionError("nothing was raised")

    return llama.lead(after_a_mistake)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("grammar", "pickle can send it to the other processes: it has a lock"),
        ("id", "prompt 0 has the id 1000000"),
        ("texts", "pickle can send it to the other processes"),
        ("layer", "layer=99 must be from 0"),
        ("hook later", "needs a model that is as it was built"),
        ("within", "leads the others already"),
        ("hook, then a vector", "needs a model that is as it was built"),
        ("another model", "needs a model that is as it was built"),
        ("the model's own call", "follow the methods of this Llama"),
        ("its weights", "weights of this process's part of the model have changed"),
    ],
)
def test_mistakes_of_the_work(case: str, message: str, tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    """They are the first process's own; what comes after them runs."""
    (kind, told, after), *others = pool.run(refusing, str(tiny), tokenizer_path, case)
    assert (kind, others) == ("ValueError", [None] * 3)
    assert message in told
    assert after is None or len(after[0][0]) == 4


def failing(folder: str, tokenizer_path: str) -> Any:
    llama, left = build(folder, tokenizer_path, 4), []

    def work() -> None:
        left.append(llama.stream_text(TEXTS[:1], 0, max_gen_len=50))
        next(left[0])
        raise KeyError("my own mistake")

    try:
        llama.lead(work)
    except Exception as error:
        told = type(error).__name__, str(error), getattr(error, "told_by", None)
    problem, prompt = "", [[1, *range(20, 80)]]
    before = llama.generate(prompt, 5, 0)
    if is_first_process():
        try:
            next(left[0])
        except RuntimeError as error:
            problem = str(error)
    return told, problem, (before, llama.generate(prompt, 5, 0))  # which starts behind what all processes hold


def test_work_that_fails_ends_the_others(tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    """And the streams that it left open; calls that all make alike go on."""
    outcomes = pool.run(failing, str(tiny), tokenizer_path)
    assert outcomes[0][0] == ("KeyError", "'my own mistake'", None)
    assert {told for told, _, _ in outcomes[1:]} == {("RuntimeError", "KeyError: 'my own mistake' (on process 0)", 0)}
    assert "lead() has returned" in outcomes[0][1]
    assert len({str(after) for _, _, after in outcomes}) == 1


def hooked(folder: str, tokenizer_path: str) -> str:
    llama = build(folder, tokenizer_path, 4)
    llama.model.layers[0].register_forward_hook(lambda *_: None)
    try:
        llama.lead(lambda: None)
    except ValueError as error:
        return str(error)
    return ""


def test_a_model_with_hooks_is_refused(tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    assert all("needs a model that is as it was built" in told for told in pool.run(hooked, str(tiny), tokenizer_path))


def cancelling(folder: str, tokenizer_path: str) -> Any:
    llama = build(folder, tokenizer_path, 2)

    def work() -> Any:
        assert llama._leader is not None
        call = Call(llama._leader, [Request([1, 5], 60), Request([1, 6], 60)], Source(2))
        steps = iter(call)
        for _ in range(6):
            next(steps)
        call.cancel(0)
        rest = [step.index for step in steps]
        busy = threading.Thread(target=lambda: llama.generate([[1, 7]], 30, 0))
        busy.start()
        busy.join()
        return set(rest), llama._leader._load, len(llama._leader._calls)

    return llama.lead(work)


def test_cancelled_requests_leave_their_slots(tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    (rest, load, calls), *_ = pool.run(cancelling, str(tiny), tokenizer_path)
    assert (rest, load, calls) == ({1}, [0, 0], 0)


def test_one_process_just_works(alone: Llama) -> None:
    torch.manual_seed(0)
    assert alone.lead(lambda: alone.generate([[1, 5]], 3, 0)) == alone.generate([[1, 5]], 3, 0)
