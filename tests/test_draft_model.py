"""A draft model guesses, the model verifies: no greedy id changes, what is drawn keeps its distribution, seeds their
texts."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import events
import pytest
import torch
from conftest import PARAMS, near, random_weights, shared, write_checkpoint
from helpers import COLUMNS, PROMPTS, build, command, watch_prefill, write_twin
from workers import Pool

from llama import Llama, memory
from llama.decoding.calls import Call, Source
from llama.decoding.draft_model import LONGEST_REST, PERIOD, DraftModel
from llama.decoding.pace import Pace
from llama.decoding.requests import Request
from llama.decoding.rows import Row
from llama.decoding.sampling import Sampling
from llama.decoding.verifying import Verifier
from llama.loading import DEMO

TINY_PARAMS = {**PARAMS, "dim": 32, "n_layers": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Draft models: one whose guesses are half right, one of another shape whose guesses are wrong."""
    root = tmp_path_factory.mktemp("drafts")
    made = {
        "near": write_checkpoint(root / "near", near(random_weights())),
        "other": write_checkpoint(root / "other", random_weights(TINY_PARAMS, seed=5), params=TINY_PARAMS),
    }
    return {name: str(folder) for name, folder in made.items()}


def with_draft(tiny: Path, tokenizer_path: str, draft: str, rows: int = 4, **options: Any) -> Llama:
    llama = Llama.build(str(tiny), tokenizer_path, COLUMNS, rows, device="cpu", draft=draft, **options)
    llama.tokenizer.eos_id = -1
    return llama


@pytest.fixture(scope="module")
def plain(tiny: Path, tokenizer_path: str) -> Llama:
    return build(tiny, tokenizer_path)


@pytest.fixture(scope="module")
def drafted(tiny: Path, tokenizer_path: str, folders: dict[str, str]) -> Llama:
    """The model, with a draft model that guesses in each pass, from 1 to 4 ids by turns."""
    llama = with_draft(tiny, tokenizer_path, folders["near"])
    events.insist(llama)
    return llama


def passes(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, width) of the passes that verify."""
    seen: list[tuple[int, int]] = []
    verify = llama._engine.verify

    def counted(tokens: Any, *rest: Any) -> torch.Tensor:
        seen.append((len(tokens), len(tokens[0])))
        return verify(tokens, *rest)

    monkeypatch.setattr(llama._engine, "verify", counted)
    return seen


def followed(llama: Llama, requests: Sequence[Request], lanes: int = 4) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in requests]
    for step in Call(llama._leader or llama._scheduler, requests, Source(min(lanes, len(requests)))):
        found[step.index] += [] if step.token is None else [step.token]
    return found


# No greedy id changes


@pytest.mark.parametrize("name", ["near", "other", "itself"])
def test_greedy_ids_stay(
    name: str, tiny: Path, tokenizer_path: str, folders: dict[str, str], plain: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever guesses: one row, several, more than there are slots, to the end of the cache; and good guesses save
    passes."""
    llama = with_draft(tiny, tokenizer_path, {**folders, "itself": str(tiny)}[name])
    right, seen = events.insist(llama), passes(llama, monkeypatch)
    for prompts, most in (([PROMPTS[1]], 200), ([[1, 30 + i, 7] for i in range(6)], 30)):
        before = len(seen)
        requests = [Request(prompt, most, Sampling(0)) for prompt in prompts]
        assert followed(llama, requests) == followed(plain, requests)
        longest = max(min(COLUMNS - len(prompt), most) for prompt in prompts) * math.ceil(len(prompts) / 4)
        assert 0 < len(seen) - before < longest * (0.4 if name == "itself" else 1.0)
    found = sum(right) / len(right)
    assert found > 2.4 if name == "itself" else found > 0.3 if name == "near" else found < 0.2


def test_greedy_ids_stay_in_trained_models() -> None:
    """In float32, where only near ties could be decided otherwise; the draft model is the model itself in 16 bits."""
    for folder, prompts in ((DEMO, [[1, 403, 407], [1, 300]]), (shared("models/stories260K"), [[1, 403, 407]])):
        plain = Llama.build(str(folder), None, 96, 2, device="cpu", dtype="float32")
        both = Llama.build(str(folder), None, 96, 2, device="cpu", dtype="float32", draft=str(folder))
        assert both.draft_model is not None
        both.draft_model.to(torch.bfloat16)
        right = events.insist(both)
        assert both.generate(prompts, 40, 0) == plain.generate(prompts, 40, 0)
        assert sum(right) > 1.5 * len(right)


def test_all_that_is_reported_stays(plain: Llama, drafted: Llama) -> None:
    """Log-probabilities, alternatives, ends in the middle of a run, lengths, penalties, biases, grammars beside
    them."""
    free = followed(plain, [Request(PROMPTS[0], 40)])[0]
    for count in range(12):
        assert followed(drafted, [Request(PROMPTS[0], count)])[0] == free[:count]
        ends = frozenset({free[count]})
        request = Request(PROMPTS[0], 40, ends=ends)
        steps = [list(Call(llama._scheduler, [request], Source(1))) for llama in (plain, drafted)]
        assert [(s.token, s.finish_reason) for s in steps[0]] == [(s.token, s.finish_reason) for s in steps[1]]
    requests = [
        Request(PROMPTS[0], 20, logprobs=True, alternatives=3, scored=PROMPTS[0]),
        Request(PROMPTS[1], 20, Sampling(0, repetition_penalty=1.4, frequency_penalty=0.2)),
        Request(PROMPTS[2], 20, Sampling(0, logit_bias={free[3]: -9.0})),
        Request(PROMPTS[0], 20, Sampling(0, presence_penalty=1.0), draft=False),
    ]
    ours, theirs = ([list(Call(llama._scheduler, requests, Source(4)))][0] for llama in (drafted, plain))
    for index in range(4):
        for a, b in zip([s for s in ours if s.index == index], [s for s in theirs if s.index == index], strict=True):
            assert (a.token, a.finish_reason) == (b.token, b.finish_reason)
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4) or index
            assert [i for i, _ in a.alternatives] == [i for i, _ in b.alternatives]
            assert (a.prompt_logprobs is None) == (b.prompt_logprobs is None)
    grammars = [events.OnlyEven(), events.OnlyEven()]
    beside = [[Request(PROMPTS[0], 20, grammar=grammar), Request(PROMPTS[1], 20)] for grammar in grammars]
    assert followed(drafted, beside[0]) == followed(plain, beside[1])
    assert grammars[0].accepted == grammars[1].accepted


def test_near_ties_behind_guesses_that_held(plain: Llama, drafted: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single steps decide them, and count these guesses."""
    monkeypatch.setattr(Verifier, "_clear", lambda _, logits, places: torch.arange(len(logits)) % 2 == 0)
    requests = [Request(prompt, 40, Sampling(0, repetition_penalty=1.4, frequency_penalty=0.5)) for prompt in PROMPTS]
    assert followed(drafted, requests) == followed(plain, requests)


def test_random_events(drafted: Llama, tiny: Path, tokenizer_path: str) -> None:
    """Each request gives what it gives alone and without guesses, drawn ids too."""
    alone = events.Alone(build(tiny, tokenizer_path, rows=1), guessed=True)
    assert events.run(drafted, alone, 400, 0)["texts"] > 50


# What is drawn


CASES = [
    Sampling(1.0, 1.0, top_k=2),
    Sampling(0.7, 0.6, top_k=4),
    Sampling(0.3, 1.0, min_p=0.5),
    Sampling(1.2, 0.95, top_k=2, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3),
    Sampling(0.9, 0.9, top_k=3, logit_bias={331: 1.0, 26: -1.0}),
]
PROMPT, IDS = [1, 20, 30, 40], 3


@torch.inference_mode()
def distribution(llama: Llama, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """What each run of ids after the prompt is drawn with, by the words of `Sampling` and without its code."""
    runs = {(): 1.0}
    for _ in range(IDS):
        longer = {}
        for run, chance in runs.items():
            llama._engine.take(None)
            logits = llama.model(torch.tensor([[*PROMPT, *run]]), 0)[0, -1].double()
            for token in set(PROMPT) | set(run):
                logits[token] *= 1 / sampling.repetition_penalty if logits[token] > 0 else sampling.repetition_penalty
            for token, count in Counter(run).items():
                logits[token] -= sampling.presence_penalty + count * sampling.frequency_penalty
            for token, bias in (sampling.logit_bias or {}).items():
                logits[token] += bias
            probs = torch.softmax(logits / sampling.temperature, -1)
            order = probs.sort(descending=True).indices[: sampling.top_k or None].tolist()
            kept, mass = {}, 0.0
            total = sum(float(probs[token]) for token in order)
            for token in order:
                if mass > sampling.top_p:
                    break
                kept[token] = float(probs[token]) / total
                mass += kept[token]
            kept = {token: p for token, p in kept.items() if p >= sampling.min_p * max(kept.values())}
            longer |= {(*run, token): chance * p / sum(kept.values()) for token, p in kept.items()}
        runs = longer
    return runs


def chance(found: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """How probable counts are that are as far from what is expected, by the chi-square test. Runs that are expected
    less than five times are put together."""
    count = found.total()
    assert found.keys() <= expected.keys()
    often = [run for run, p in expected.items() if count * p >= 5]
    cells = [(found[run], count * expected[run]) for run in often]
    rest = count - sum(c for c, _ in cells), count - sum(e for _, e in cells)
    cells += [rest] if rest[1] >= 5 else []
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


@pytest.mark.parametrize(("draft", "rows", "cases", "draws"), [("other", 4, CASES, 120), ("near", 1, CASES[3:4], 120)])
def test_the_distribution_stays(
    draft: str, rows: int, cases: list[Sampling], draws: int, tiny: Path, tokenizer_path: str, folders: dict[str, str]
) -> None:
    """All options in one batch, many draws of each, half of them with seeds: as what the model alone is drawn with."""
    llama = with_draft(tiny, tokenizer_path, folders[draft], rows)
    right = events.insist(llama)
    torch.manual_seed(11)
    requests = [Request(PROMPT, IDS, s, seed=i if i % 2 else None) for i in range(draws) for s in cases]
    found = followed(llama, requests, rows)
    for i, sampling in enumerate(cases):
        counts = Counter(map(tuple, found[i :: len(cases)]))
        expected = distribution(llama, sampling)
        assert sum(expected.values()) == pytest.approx(1)
        assert len(expected) > 3
        assert chance(counts, expected) > 1e-4
    assert len(right) >= draws
    assert sum(right) > 20 or draft == "other"


def test_the_chi_square_test_sees_another_distribution(drafted: Llama) -> None:
    """A little cooler, or with another bias."""
    for i, other in (
        (0, Sampling(0.5, 1.0, top_k=2)),
        (4, Sampling(0.9, 0.9, top_k=3, logit_bias={331: 0.4, 26: -1.0})),
    ):
        expected, wrong = distribution(drafted, CASES[i]), distribution(drafted, other)
        counts = Counter({run: round(1500 * wrong.get(run, 0)) for run in expected})
        assert chance(counts, expected) < 1e-4
        assert chance(Counter({run: round(600 * p) for run, p in expected.items()}), expected) > 0.9


def test_a_seed_gives_the_same_whatever_is_guessed(
    drafted: Llama, tiny: Path, tokenizer_path: str, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft model changes no draw by its guesses: only by being there. So neighbours, moves and interrupts change
    none."""
    requests = [Request([1, 30 + i], 16, sampling, seed=i) for i, sampling in enumerate(events.SAMPLINGS)]
    expected = followed(drafted, requests)
    assert [followed(drafted, [request])[0] for request in requests] == expected
    other = with_draft(tiny, tokenizer_path, folders["other"], 2)
    assert followed(other, requests) == expected
    monkeypatch.setattr(DraftModel, "count", lambda *_: 0)
    silent = with_draft(tiny, tokenizer_path, folders["near"], 3)
    assert followed(silent, requests) == expected
    # Of a call without seeds too, after its own or torch's seed.
    torch.manual_seed(9)
    first = drafted.generate(PROMPTS, 20, 0.9)
    torch.manual_seed(9)
    assert silent.generate(PROMPTS, 20, 0.9) == first
    both = (
        llama.text_completion(["the little dog", "ran", "a"], 0.9, seed=4, max_gen_len=9) for llama in (drafted, silent)
    )
    assert next(both) == next(both)


def test_without_guesses_draws_are_metas(plain: Llama, drafted: Llama) -> None:
    """draft=False: as if there were no draft model."""
    requests = [Request([1, 30 + i], 20, sampling, seed=i, draft=False) for i, sampling in enumerate(events.SAMPLINGS)]
    assert followed(drafted, requests) == followed(plain, requests)
    options: dict[str, Any] = {"seed": 7, "max_gen_len": 9, "draft": False}
    assert drafted.text_completion(["the", "a"], 0.9, **options) == plain.text_completion(["the", "a"], 0.9, **options)


def test_equal_models_guess_all_that_is_drawn(tiny: Path, tokenizer_path: str) -> None:
    llama = with_draft(tiny, tokenizer_path, str(tiny))
    right = events.insist(llama)
    followed(llama, [Request([1, 30 + i], 30, sampling, seed=i) for i, sampling in enumerate(events.SAMPLINGS)])
    assert sum(right) > 2.3 * len(right)  # of 2.5


# How many guesses


def row(number: int = 0) -> Row:
    return Row(Call(None, [Request([1, 2], 9)], Source(1)), 0, 99, number=number)  # type: ignore[arg-type]


@pytest.fixture
def model(drafted: Llama) -> DraftModel:
    engine = drafted._scheduler.draft_model
    assert engine is not None
    return DraftModel(engine.engine)


def measured(model: DraftModel, guess: float, place: float) -> Pace:
    """A plain step takes 1 second."""
    pace = Pace()
    pace.steps[2] = 1.0
    model._step[2] = guess
    for count in range(1, 9):
        model.saw_pass(2, count, 1 + place * count)
    return pace


@pytest.mark.parametrize(
    ("guess", "place", "share", "most", "least"),
    [(0.1, 0.05, 0.8, 6, 3), (0.02, 0.01, 0.95, 8, 8), (0.1, 0.05, 0.3, 1, 1), (0.5, 0.1, 0.9, 3, 1),
      (0.9, 0.3, 0.9, 0, 0),
     (0.1, 0.1, 0.05, 0, 0)],
)  # fmt: skip
def test_as_many_as_pay(guess: float, place: float, share: float, most: int, least: int, model: DraftModel) -> None:
    pace = measured(model, guess, place)
    model.agreement = share
    assert least <= model.count([row(), row()], pace) <= most


def test_a_bad_draft_model_costs_little(model: DraftModel) -> None:
    """It rests, for longer each time; one that becomes good is found out."""
    pace, rows = measured(model, 0.3, 0.1), [row(), row()]
    counts = []
    for _ in range(4000):
        counts.append(model.count(rows, pace))
        if counts[-1]:
            for each in rows:
                model.judge(each, counts[-1], 0)
    assert sum(count * 0.4 for count in counts[1000:]) < 0.01 * 3000
    assert sum(count * 0.4 for count in counts) < 0.02 * 4000
    for _ in range(LONGEST_REST * 40):
        if count := model.count(rows, pace):
            for each in rows:
                model.judge(each, count, count)
    assert model.agreement > 0.9
    late = [model.count(rows, pace) for _ in range(PERIOD)]
    assert late.count(0) == 1  # a plain step is measured again
    assert Pace().steps == {}
    assert model.count(rows, Pace()) == 0  # nothing was measured


def test_shares_by_hand(model: DraftModel) -> None:
    each = row()
    model.judge(each, 3, 3)
    assert each.agreement == pytest.approx(1 - 0.3 * 0.9**3)
    each.agreement = 0.5
    model.judge(each, 4, 1)  # one right, one wrong, and two of which nothing is known
    assert each.agreement == pytest.approx(0.5)


# What its cache holds


def read(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of prompts that the draft model reads."""
    model = llama._scheduler.draft_model
    assert model is not None
    return watch_prefill(model.engine, monkeypatch, lambda prompts, start: sum(map(len, prompts)) - start)


def test_rows_that_move_and_share_are_read_once(
    tiny: Path, tokenizer_path: str, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = with_draft(tiny, tokenizer_path, folders["near"])
    events.insist(llama)
    seen, long = read(llama, monkeypatch), [1, *range(20, 80)]
    followed(llama, [Request(long, 9, Sampling(0.9), seed=i) for i in range(4)])
    assert len(long) <= sum(seen) < len(long) + 16  # of four
    seen.clear()
    followed(
        llama, [Request([1, 100 + i, *range(200, 240)], 2 + 9 * i) for i in range(4)]
    )  # those that go on move down
    assert sum(seen) < 4 * 44
    seen.clear()
    answer = followed(llama, [Request([1, *range(300, 350)], 8)])[0]
    first = sum(seen)
    followed(llama, [Request([1, *range(300, 350), *answer, 9, 8, 7], 8)])  # a chat's next turn
    assert first >= 50
    assert sum(seen) - first < 16


# Parts of one's own, errors, several processes


def test_own_parts_run_without_guesses(plain: Llama, drafted: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks on the model: Meta's loop. On the draft model: no guesses. What is said stays the same."""
    requests = [Request(PROMPTS[0], 12), Request(PROMPTS[1], 12, Sampling(0.9), seed=3)]
    expected = followed(drafted, requests)
    seen = passes(drafted, monkeypatch)
    assert drafted.draft_model is not None
    for model in (drafted.model, drafted.draft_model):
        handle = model.layers[0].register_forward_hook(lambda *_: None)
        assert drafted.generate([PROMPTS[0]], 12, 0)[0] == expected[:1]
        assert drafted.steps([PROMPTS[1]], 0.9, max_gen_len=12, seed=[3]).plainly == (model is drafted.model)
        assert [s.token for s in drafted.steps([PROMPTS[1]], 0.9, 0.9, 12, seed=[3])] == expected[1]
        assert not seen
        handle.remove()
    assert followed(drafted, requests) == expected
    assert seen
    drafted.draft_model.layers[0].attention.wv.weight.data.mul_(1.5)  # guesses become worse, answers do not
    assert followed(drafted, requests) == expected
    drafted.draft_model.layers[0].attention.wv.weight.data.div_(1.5)


def test_a_draft_model_that_fails(tiny: Path, tokenizer_path: str, folders: dict[str, str], plain: Llama) -> None:
    """One whose logits are not finite guesses nothing; an error or an interrupt of it ends one call, and no draw is
    lost."""
    llama = with_draft(tiny, tokenizer_path, folders["near"])
    model = llama._scheduler.draft_model
    assert model is not None
    events.insist(llama)
    requests = [Request(PROMPTS[0], 12), Request(PROMPTS[1], 12, Sampling(0.9), seed=3)]
    expected = followed(llama, requests)
    guess, calls = model.guess, itertools.count()

    def failing(*args: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return guess(*args)

    model.guess = failing  # type: ignore[method-assign]
    other = iter(Call(llama._scheduler, [requests[1]], Source(1)))
    found = [next(other).token]
    with pytest.raises(KeyboardInterrupt):
        followed(llama, requests[:1])
    assert [*found, *(step.token for step in other)] == expected[1]
    assert llama.draft_model is not None
    llama.draft_model.norm.weight.data.fill_(math.nan)
    assert followed(llama, requests) == expected
    assert model.guess([row()], [0]) == [[]]


@pytest.mark.parametrize("rows", [400, 401, 464])
def test_rows_that_no_id_has_are_left_out(
    rows: int, tiny: Path, tokenizer_path: str, plain: Llama, tmp_path: Path
) -> None:
    """As fine-tunes are padded."""
    folder = write_twin(tmp_path, {"vocab_size": rows, "max_position_embeddings": COLUMNS})
    llama = with_draft(tiny, tokenizer_path, str(folder))
    guesser = llama._scheduler.draft_model
    assert guesser is not None
    draft = guesser.engine.model
    assert (draft.vocab_size, draft.output.weight.shape[0], draft.tok_embeddings.weight.shape[0]) == (400,) * 3
    assert llama.generate(PROMPTS, 20, 0) == plain.generate(PROMPTS, 20, 0)


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ("nowhere", "no checkpoint folder at .*nowhere"),
        ("words", "another tokenizer than the model, .*; take a draft model that was made with the model's own"),
        ("pieces", "has 512 ids, but the model has 400; take a draft model"),
        ("few", "has 399 ids, but the model has 400"),
        ("short", "was made for 64 positions, but max_seq_len is 128; build with max_seq_len=64 or less, or without"),
    ],
)
def test_wrong_drafts(draft: str, message: str, tiny: Path, tokenizer_path: str, tmp_path: Path) -> None:
    """Told before any weight is loaded."""
    folder = write_checkpoint(tmp_path / draft, random_weights()) if draft != "nowhere" else tmp_path / "nowhere"
    if draft == "words":
        (folder / "tokenizer.model").write_bytes((DEMO / "tokenizer.model").read_bytes())
    if draft == "pieces":
        params = (folder / "params.json").read_text()
        (folder / "params.json").write_text(params.replace("-1", "512"))
    if draft == "few":
        folder = write_twin(tmp_path / "hf", {"vocab_size": 399})
    if draft == "short":
        command("convert", str(tiny), str(tmp_path / "hf"), to="hf", tokenizer_path=tokenizer_path)
        folder = tmp_path / "hf"
        config = (folder / "config.json").read_text()
        (folder / "config.json").write_text(
            config.replace('"max_position_embeddings": 4096', '"max_position_embeddings": 64')
        )
    with pytest.raises(ValueError, match=message):
        with_draft(tiny, tokenizer_path, str(folder))


def test_memory_advice_counts_the_draft(
    tiny: Path, tokenizer_path: str, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = build(tiny, tokenizer_path).model.params
    alone = memory.Placement(args, torch.float32)
    both = memory.Placement(args, torch.float32, draft=alone)
    one, two = memory.estimate(alone), memory.estimate(both)
    assert (two.weights, two.cache) == (2 * one.weights, 2 * one.cache)
    monkeypatch.setattr(memory, "free_bytes", lambda device: (one.resident + two.resident) // 2)
    memory.check_fits(alone)
    with pytest.raises(ValueError, match=r"the model and its draft model take .*; .* or no draft= would fit"):
        with_draft(tiny, tokenizer_path, str(tiny))
    monkeypatch.setattr(memory, "free_bytes", lambda device: two.resident - two.cache // 2)
    with pytest.raises(ValueError, match=r"; max_batch_size=2 or max_seq_len=64 or .*2 processes.* or no draft= "):
        with_draft(tiny, tokenizer_path, str(tiny))


def on_processes(folder: str, draft: str, tokenizer_path: str, processes: int) -> Any:
    llama = Llama.build(folder, tokenizer_path, COLUMNS, 4, processes, device="cpu", draft=draft)
    llama.tokenizer.eos_id = -1
    right = events.insist(llama)
    requests = [Request([1, 30 + i], 24, sampling, seed=i) for i, sampling in enumerate(events.SAMPLINGS)]
    found = followed(llama, requests)
    model = llama._scheduler.draft_model
    assert model is not None
    del model.count  # type: ignore[method-assign]  # now each measures, and they agree
    return found, followed(llama, requests), sum(right), llama.lead(lambda: followed(llama, requests))


def test_two_processes_give_the_same_as_one(
    tiny: Path, tokenizer_path: str, folders: dict[str, str], drafted: Llama, pool: Pool
) -> None:
    requests = [Request([1, 30 + i], 24, sampling, seed=i) for i, sampling in enumerate(events.SAMPLINGS)]
    expected = followed(drafted, requests)
    outcomes = pool.run(on_processes, str(tiny), folders["near"], tokenizer_path, 2)
    for rank, (found, measured, right, led) in enumerate(outcomes):
        assert found == measured == expected
        assert right > 10
        assert led == (None if rank else expected)  # the first takes requests for two copies of the model


def test_at_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for options in ({}, {"draft": str(DEMO)}):
        command("complete", "Once upon a time", max_gen_len=12, temperature=0, dtype="float32", **options)
    first, second = capsys.readouterr().out.split("\n")[:2]
    assert first == second
