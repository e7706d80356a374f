"""Drafts from a row's own ids: what they propose, that they change no id, and that they save passes where text
repeats."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from conftest import random_weights, shared, write_checkpoint
from workers import Pool

from llama import Llama
from llama.decoding.calls import Call, Source
from llama.decoding.drafting import COST, LONGEST, Drafter
from llama.decoding.requests import Request
from llama.decoding.rows import Row
from llama.decoding.sampling import Sampling
from llama.decoding.verifying import CLEAR, Verifier


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Thousands of tiny products: threads that wait for each other on a busy machine would take minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Drafting, by hand


def reader(ids: list[int], credit: float = 16.0) -> Drafter:
    drafter = Drafter()
    drafter.read(ids)
    drafter.credit = credit
    return drafter


@pytest.mark.parametrize(
    ("ids", "draft"),
    [
        ([1, 2, 3, 4, 5, 6], []),
        ([1, 2, 3, 4, 5, 2, 3], []),  # a pair is no evidence
        ([1, 2, 3, 4, 5, 9, 2, 3, 4], [5, 9, 2, 3]),
        ([1, 2, 3, 7, 9, 1, 2, 3, 8, 9, 1, 2, 3], [8, 9, 1, 2]),  # the latest occurrence
        ([4, 1, 2, 3, 7, 5, 1, 2, 3, 8, 9, 4, 1, 2, 3], [7, 5, 1, 2]),  # a longer one counts more than a later one
        ([9, 1, 2, 1, 2, 1, 2], [1, 2, 1, 2]),  # a loop shorter than the draft goes on
        ([5, 5, 5, 5], [5, 5, 5, 5]),
    ],
)
def test_what_followed_before(ids: list[int], draft: list[int]) -> None:
    assert reader(ids).draft(4) == draft
    piecewise = Drafter()
    for token in ids:
        piecewise.read([token])
    piecewise.credit = 16.0
    assert piecewise.draft(4) == draft


def test_length_follows_success() -> None:
    drafter = reader([5, 6, 7] * 5, credit=2.0)
    lengths = []
    for _ in range(8):
        lengths.append(len(drafter.draft(99)))
        drafter.judge(lengths[-1], lengths[-1])
    assert lengths[0] == 2
    assert lengths == sorted(lengths)
    assert lengths[-1] == LONGEST
    lengths.clear()
    for _ in range(100):
        lengths.append(len(drafter.draft(99)))
        drafter.judge(lengths[-1], 0)
    assert lengths[0] == LONGEST
    assert lengths[6:40].count(1) <= 2
    assert set(lengths[6:]) == {0, 1}  # backs off, and still tries
    assert sum(lengths[6:]) * COST <= 0.03 * 94
    assert drafter.draft(0) == []


# The model's ids


class Counting:
    """A model that runs op by op, and how often it was run."""

    def __init__(self, llama: Llama) -> None:
        torch.set_num_threads(1)  # `build` has set it
        self.llama, self.passes = llama, 0
        run = llama.model.hidden_states

        def counted(*args: Any, **more: Any) -> torch.Tensor:
            self.passes += 1
            return run(*args, **more)

        llama.model.hidden_states = counted  # type: ignore[method-assign]

    def steps(self, prompt: list[int], count: int, draft: bool, **options: Any) -> tuple[list[Any], int]:
        """The steps as tuples, and the passes they took."""
        self.passes = 0
        return list(self.llama.steps([prompt], 0, 1, count, draft=draft, **options)), self.passes

    def ids(self, prompt: list[int], count: int, draft: bool, **options: Any) -> tuple[list[int], int]:
        steps, passes = self.steps(prompt, count, draft, **options)
        return [step.token for step in steps if step.token is not None], passes


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: str) -> Counting:
    """Random weights whose small matrices let the embedding through, so that greedy text soon runs in a loop."""
    weights = {name: w * (0.5 if "layers" in name and w.ndim > 1 else 1) for name, w in random_weights().items()}
    folder = write_checkpoint(tmp_path_factory.mktemp("loops"), weights)
    return Counting(Llama.build(str(folder), tokenizer_path, 512, 2, device="cpu", compile=False))


@pytest.fixture(scope="module")
def demo32() -> Counting:
    return Counting(Llama.build(device="cpu", dtype="float32", compile=False))


@pytest.fixture(scope="module")
def demo16() -> Counting:
    return Counting(Llama.build(device="cpu", dtype="bfloat16", compile=False))


@pytest.fixture(scope="module")
def stories() -> Counting:
    folder = shared("models/stories260K")
    return Counting(Llama.build(str(folder), None, 512, 1, device="cpu", compile=False))


TEXTS = [
    "Once upon a time there was a little dog",
    "The cat sat on the mat. The dog ran home. " * 4,
    "Tom had a red ball. Tom lost it. Tom had a red",
]


@pytest.mark.parametrize("name", ["tiny_model", "demo32", "stories"])
def test_no_id_changes(name: str, request: pytest.FixtureRequest) -> None:
    model: Counting = request.getfixturevalue(name)
    saved = 0
    model.llama.tokenizer.eos_id, eos = -1, model.llama.tokenizer.eos_id  # long texts
    try:
        for text in TEXTS:
            prompt = model.llama.tokenizer.encode(text, bos=True, eos=False)
            plain, single = model.ids(prompt, 320, draft=False)
            drafted, passes = model.ids(prompt, 320, draft=True)
            assert drafted == plain
            assert len(plain) > 300
            assert single >= 320
            saved = max(saved, single - passes)
    finally:
        model.llama.tokenizer.eos_id = eos
    assert saved > 100


def test_in_bfloat16_only_ties_are_decided_otherwise(demo16: Counting) -> None:
    """There columns of the cache are rounded otherwise by a pass than by single steps, so it has to be asked for; and
    where the ids part, the two best were closer than the bound that a pass has to keep, twice over."""
    saved = 0
    for text in TEXTS:
        prompt = demo16.llama.tokenizer.encode(text, bos=True, eos=False)
        plain, single = demo16.ids(prompt, 160, draft=False)
        assert demo16.ids(prompt, 160, draft=None) == (plain, single)  # type: ignore[arg-type]
        drafted, passes = demo16.ids(prompt, 160, draft=True)
        saved = max(saved, single - passes)
        if drafted != plain:
            parted = next(i for i, (a, b) in enumerate(zip(drafted, plain)) if a != b)
            with torch.inference_mode():
                logits = demo16.llama.model(torch.tensor([prompt + plain[:parted]]), 0)[0, -1]
            best = logits.topk(2).values
            assert best[0] - best[1] < 2 * CLEAR[torch.bfloat16] * logits.std()
    assert saved > 20


@pytest.fixture
def loop(tiny_model: Counting) -> Callable[..., list[Any]]:
    """What a call reports with drafts, after it was seen to be the same without, in more passes."""

    def both(prompt: Optional[list[int]] = None, count: int = 120, saves: bool = True, **options: Any) -> list[Any]:
        prompt = [1, 20, 30] if prompt is None else prompt
        plain, single = tiny_model.steps(prompt, count, False, **options)
        drafted, passes = tiny_model.steps(prompt, count, True, **options)
        assert [(s.token, s.finish_reason) for s in drafted] == [(s.token, s.finish_reason) for s in plain]
        for ours, theirs in zip(drafted, plain):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [i for i, _ in ours.alternatives] == [i for i, _ in theirs.alternatives]
            assert [p for _, p in ours.alternatives] == pytest.approx([p for _, p in theirs.alternatives], abs=1e-4)
            assert (ours.prompt_logprobs is None) == (theirs.prompt_logprobs is None)
        assert (passes < single) == saves
        return drafted

    return both


def test_where_rows_end(loop: Callable[..., list[Any]], tiny_model: Counting) -> None:
    """At the very place, also inside an accepted run: every length, the context's end, EOS, with no pass too many."""
    free = [step.token for step in loop()]
    for count in range(30, 60):
        assert [step.token for step in loop(count=count)] == free[:count]
    assert loop([1, *([20, 30] * 240)], 500)[-1].finish_reason == "context"
    late = next(i for i in range(60, 0, -1) if free[i] not in free[:i])  # as late as there is a new id
    steps = loop(stop_ids=[free[late]], saves=late > 20)
    assert (len(steps), steps[-1].token, steps[-1].finish_reason) == (late + 1, None, "stop")


def test_what_is_reported(loop: Callable[..., list[Any]]) -> None:
    steps = loop(logprobs=3, echo=True)
    assert len(steps[0].prompt_logprobs) == 3
    assert all(len(step.alternatives) == 3 and step.logprob < 0 for step in steps)


def test_a_bias_is_honoured(loop: Callable[..., list[Any]]) -> None:
    often = max((step.token for step in loop()), key=[step.token for step in loop()].count)
    steps = loop(logit_bias={often: -1e9})
    assert often not in [step.token for step in steps]


def test_only_greedy_rows_draft(tiny_model: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that runs alone, or beside others, which may draw."""
    calls: list[tuple[int, int]] = []
    verify = tiny_model.llama._engine.verify

    def counted(tokens: Any, *rest: Any) -> torch.Tensor:
        calls.append((len(tokens), len(tokens[0])))
        return verify(tokens, *rest)

    monkeypatch.setattr(tiny_model.llama._engine, "verify", counted)
    llama, prompt = tiny_model.llama, [1, *([20, 30, 40] * 6)]
    llama.generate([prompt], 40, 0.6)
    tiny_model.ids(prompt, 40, True, repetition_penalty=1.2)
    tiny_model.ids(prompt, 40, False)
    llama.generate([prompt, prompt], 40, 0.6)
    assert not calls
    alone = [llama.generate([[1, 20, i]], 120, 0)[0][0] for i in (30, 40)]
    assert max(width for _, width in calls) > 4
    calls.clear()
    assert llama.generate([[1, 20, 30], [1, 20, 40]], 120, 0)[0] == alone
    assert max(calls)[0] == 2
    assert max(calls)[1] > 4
    calls.clear()
    requests = [Request([1, 20, 30], 120, Sampling(0)), Request([1, 20, 30], 120, Sampling(0.9), seed=3)]
    found: list[list[int]] = [[], []]
    for step in Call(llama._scheduler, requests, Source(2)):
        found[step.index] += [] if step.token is None else [step.token]
    assert found[0] == alone[0]
    assert max(calls)[0] == 2
    drawn = [step.token for step in Call(llama._scheduler, requests[1:], Source(1))]
    assert found[1] == drawn
    with pytest.raises(ValueError, match="draft='yes' must be True, False or None"):
        llama.text_completion(["a"], draft="yes")  # type: ignore[typeddict-item]


def test_a_pass_has_room_for_guesses_only(tiny_model: Counting) -> None:
    """One row of many that repeats itself does not make a pass wide for all."""
    verifier = tiny_model.llama._scheduler.verifier
    requests = [Request([1, i, *([50, 60, 70] * 5 if i < 2 else range(100, 115))], 99) for i in range(8)]
    call = Call(tiny_model.llama._scheduler, requests, Source(1))
    rows = [Row(call, i, 128) for i in range(8)]
    for row in rows:
        row.drafter.credit = 16.0
    assert list(map(len, verifier._look_up(rows[:2], [15] * 2))) == [15] * 2
    assert list(map(len, verifier._look_up(rows[1:5], [9] * 4))) == [9, 0, 0, 0]
    assert list(map(len, verifier._look_up(rows[1:6], [9] * 5))) == [0] * 5
    assert list(map(len, verifier._look_up(rows, [2, 9, *[9] * 6]))) == [2, 2, *[0] * 6]


def test_stop_strings_cancel_inside_a_pass(tiny_model: Counting) -> None:
    llama = tiny_model.llama
    whole = llama.text_completion(["the little"], 0, 1, 120, draft=False)[0]["generation"]
    for at in range(40, 80, 3):
        stop = whole[at : at + 4]
        both = [
            llama.text_completion(["the little"], 0, 1, 120, True, stop=stop, draft=draft)[0] for draft in (False, True)
        ]
        assert both[0]["generation"] == both[1]["generation"]
        assert both[0]["tokens"] == both[1]["tokens"]
        assert both[1]["finish_reason"] == "stop"


def running(llama: Llama, count: int = 120) -> Call:
    return llama.steps([[1, 20, 30]], 0, 1, count)


def test_cancelled_between_the_steps_of_a_pass(tiny_model: Counting) -> None:
    plain, _ = tiny_model.ids([1, 20, 30], 120, False)
    for count in range(60, 80):
        batch = running(tiny_model.llama)
        tokens = []
        for step in batch:
            tokens.append(step.token)
            if len(tokens) == count:
                batch.cancel(0)
        assert tokens == plain[:count]


def test_left_or_taken_between_the_steps_of_a_pass(tiny_model: Counting) -> None:
    """What is remembered holds: a call that goes on from it gives the same ids, and one whose cache others used goes
    on."""
    llama = tiny_model.llama
    plain, _ = tiny_model.ids([1, 20, 30], 120, False)
    for count in range(60, 80):
        tokens = []
        for step in running(llama):
            tokens.append(step.token)
            if len(tokens) == count:
                break
        held = [1, 20, 30, *plain[: count - 1]]
        assert any(ids[: len(held)] == held for ids in llama._scheduler.held.ids)
        rest = [i for chunk in llama.continue_ids([1, 20, 30, *tokens], 0, 1, 20) for i in chunk["tokens"]]
        assert rest == plain[count : count + 20]
        older = iter(running(llama))
        for _ in range(count):
            next(older)
        llama.generate([[1, 50]], 3, 0)
        assert [step.token for step in older] == plain[count:]


def test_a_chat(tiny_model: Counting) -> None:
    drafted, plain = (tiny_model.llama.chat(temperature=0, max_gen_len=60, draft=draft) for draft in (True, False))
    for message in ("the little dog", "and then?", "the little dog"):
        assert drafted.ask(message) == plain.ask(message)
        tiny_model.llama.forget()
    assert drafted.turns == plain.turns


def test_a_near_tie_is_left_to_single_steps(tiny_model: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that rounds the other way, forced: two ids so close that its error would swap them, at drafted places."""
    engine = tiny_model.llama._engine
    prompts = [[1, 20, 30], [1, 20, 40]]
    plain = [tiny_model.ids(prompt, 120, False)[0] for prompt in prompts]
    verify, swapped = engine.verify, []

    def wrong(ids: Any, at: Any, slots: Any = None) -> torch.Tensor:
        logits = verify(ids, at, slots)
        if not at[0] % 3 and slots is None:
            best = logits[:, :1].topk(2)
            logits[:, :1].scatter_(-1, best.indices[..., 1:], best.values[..., :1] + 1e-6)
            swapped.append(at)
        return logits

    monkeypatch.setattr(engine, "verify", wrong)
    drafted, _ = tiny_model.ids(prompts[0], 120, True)
    assert swapped
    assert drafted == plain[0]
    swapped.clear()
    assert tiny_model.llama.generate(prompts, 120, 0)[0] == plain
    assert max(map(len, swapped)) == 2


@pytest.mark.parametrize("passes", [1, 3])
def test_what_passes_have_left_is_run_again(passes: int, tiny_model: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a place that is left to a single step, all that passes have left in the cache since the last such place: so
    that it is to the bit as if there had been no drafts."""
    plain, _ = tiny_model.ids([1, 20, 30], 120, False)
    keys = [attention.cache_k[0, :122].clone() for attention in tiny_model.llama.model.attentions()]
    count = itertools.count(1)
    clear = lambda _, logits, rows: torch.full((len(logits),), next(count) % passes > 0)  # noqa: E731
    monkeypatch.setattr(Verifier, "_clear", clear)
    assert tiny_model.ids([1, 20, 30], 120, True)[0] == plain
    for alone, attention in zip(keys, tiny_model.llama.model.attentions()):
        assert torch.equal(attention.cache_k[0, :122], alone)


def drafted_ids(folder: str, tokenizer_path: str, processes: int) -> list[Any]:
    llama = Llama.build(folder, tokenizer_path, 512, 1, processes, device="cpu")
    counting = Counting(llama)
    prompt = [1, 20, 30]
    return [counting.ids(prompt, 120, draft) for draft in (False, True)]


def test_several_processes_agree(tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    outcomes = pool.run(drafted_ids, str(tiny), tokenizer_path, 2)
    assert all(outcome == outcomes[0] for outcome in outcomes)
    (plain, _), (drafted, _) = outcomes[0]
    assert drafted == plain
