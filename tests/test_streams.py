"""Streams, stops, many prompts, seeds, scores, embeddings: what the library adds to Meta's calls."""

from __future__ import annotations

import io
import itertools
import math
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import golden, shared
from helpers import chosen
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm
from workers import Pool

from llama import Llama, Tokenizer, completion
from llama.chat import SPECIAL_TAGS, DialogError, encode_dialog
from llama.completion import window_starts
from llama.decoding import engine
from llama.decoding.sampling import Sampling
from llama.tokenizer import TextStream

WORDS = "the little dog found a red ball under tree and ran back to house 你好 世界 🌍 1985 Ärger".split()
PROMPTS = [" ".join(itertools.islice(itertools.cycle(WORDS[i % 7 :]), 1 + (i * 5) % 17)) for i in range(40)]


@pytest.fixture(scope="module")
def llama(tiny: Path, tokenizer_path: str) -> Llama:
    return Llama.build(str(tiny), tokenizer_path, 128, 4, device="cpu")


@pytest.fixture(scope="module")
def alone(llama: Llama) -> list[str]:
    """Each prompt's greedy text when it is run by itself."""
    return [llama.text_completion([p], temperature=0, max_gen_len=3 + len(p) % 11)[0]["generation"] for p in PROMPTS]


def joined(chunks: Any, count: int) -> list[str]:
    texts = [""] * count
    for chunk in chunks:
        texts[chunk["index"]] += chunk["text"]
    return texts


@pytest.mark.parametrize("count", [1, 3, 40])
def test_stream_is_call_is_each_alone(count: int, llama: Llama) -> None:
    """1, 3 and 40 ragged prompts over 4 slots, greedy: one text, however it is asked for."""
    expected = [llama.text_completion([p], temperature=0, max_gen_len=9)[0]["generation"] for p in PROMPTS[:count]]
    called = llama.text_completion(PROMPTS[:count], temperature=0, max_gen_len=9)
    streamed = joined(llama.stream_text(PROMPTS[:count], temperature=0, max_gen_len=9), count)
    assert [c["generation"] for c in called] == streamed == expected


def test_slots_change_hands_when_rows_end(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows end at EOS at different times; their slots go to the next prompt, and the last row moves into a gap."""
    free = llama.text_completion(PROMPTS, temperature=0, max_gen_len=25, logprobs=True)
    counts = Counter(i for p in free for i in llama.tokenizer.encode(p["generation"], bos=False, eos=False))
    moves: list[Any] = []
    swap = llama._engine.swap
    monkeypatch.setattr(llama._engine, "swap", lambda *a: moves.append(a) or swap(*a))
    ends = frozenset(i for i, _ in counts.most_common(12))
    one = [llama.text_completion([p], temperature=0, max_gen_len=25, stop_ids=list(ends))[0] for p in PROMPTS]
    moves.clear()
    many = llama.text_completion(PROMPTS, temperature=0, max_gen_len=25, stop_ids=list(ends))
    assert many == one
    assert {p["finish_reason"] for p in many} >= {"stop"}
    assert len({len(p["generation"]) for p in many}) > 3
    assert moves


def test_finished_rows_cost_nothing(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta's loop keeps computing rows that have ended until the last one has."""
    rows: list[int] = []
    decode = llama._engine.decode
    monkeypatch.setattr(llama._engine, "decode", lambda t, p: rows.append(len(p)) or decode(t, p))
    free, _ = llama.generate([[1, 20], [1, 30], [1, 40]], 12, 0)
    assert rows == [3] * 11
    rows.clear()
    first = free[0][2]
    llama.text_completion(["a"], temperature=0, max_gen_len=1)
    steps = list(llama.steps([[1, 20], [1, 30], [1, 40]], 0, 1, 12, stop_ids=[first]))
    lengths = [sum(s.token is not None for s in steps if s.index == i) for i in range(3)]
    assert sum(rows) == sum(length for length in lengths) - 3 + sum(s.finish_reason == "stop" for s in steps)


@pytest.mark.parametrize("name", ["toy-mha", "toy-gqa"])
def test_meta_s_numbers_through_the_stream(name: str) -> None:
    cases = golden(name)
    folder = shared(f"models/{name}")
    llama = Llama.build(str(folder), None, cases["max_seq_len"], cases["max_batch_size"], device="cpu")
    for case in cases["generate"]:
        arguments = case["args"]
        if case["name"] == "sampled_ragged" or arguments.get("echo"):
            continue
        torch.manual_seed(case["seed"])
        ids: list[list[int]] = [[] for _ in case["tokens"]]
        for step in llama.steps(case["prompt_tokens"], **arguments):
            ids[step.index] += [] if step.token is None else [step.token]
        assert ids == case["tokens"]


def test_leaving_a_stream_early(llama: Llama, alone: list[str]) -> None:
    for chunk in llama.stream_text(PROMPTS[:6], temperature=0):
        if chunk["index"] == 2:
            break
    assert (
        llama.text_completion([PROMPTS[3]], temperature=0, max_gen_len=3 + len(PROMPTS[3]) % 11)[0]["generation"]
        == alone[3]
    )


def test_an_interrupted_call(llama: Llama, alone: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, or a notebook's stop button, in the middle of a layer."""
    feed_forward, calls = llama.model.layers[1].feed_forward, itertools.count()

    def interrupt(*_: Any) -> None:
        if next(calls) == 7:
            raise KeyboardInterrupt

    hook = feed_forward.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        llama.text_completion(PROMPTS[:4], temperature=0)
    hook.remove()
    assert (
        llama.text_completion([PROMPTS[5]], temperature=0, max_gen_len=3 + len(PROMPTS[5]) % 11)[0]["generation"]
        == alone[5]
    )


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("logprobs", [False, True, 2])
def test_what_chunks_hold(logprobs: Any, echo: bool, llama: Llama) -> None:
    """Each has text or is the last; what they hold is together what the call returns, with a number for each id."""
    options: dict[str, Any] = {"temperature": 0, "max_gen_len": 12, "logprobs": logprobs, "echo": echo}
    chunks = list(llama.stream_text(PROMPTS[:5], **options))
    lists = ["tokens", *["logprobs"] * bool(logprobs), *["top_logprobs"] * (logprobs == 2)]
    for index, whole in enumerate(llama.text_completion(PROMPTS[:5], **options)):
        *others, last = (chunk for chunk in chunks if chunk["index"] == index)
        for chunk in others:
            assert list(chunk) == ["index", "text", "tokens", "finish_reason", *lists[1:]]
            assert chunk["text"]
            assert chunk["finish_reason"] is None
        assert last.keys() == {"index", "text", "tokens", "finish_reason", *lists[1:], "cached_tokens"}
        assert last["finish_reason"] == whole["finish_reason"] == "length"
        assert last["cached_tokens"] in range(len(llama.tokenizer.encode(PROMPTS[index], True, False)))
        parts: list[Any] = [*others, last]
        ids = [*llama.tokenizer.encode(PROMPTS[index], True, False)] * echo
        held = {key: [item for part in parts for item in part[key]] for key in lists}
        assert held["tokens"][:-12] == ids
        assert {key: len(items) for key, items in held.items()} == dict.fromkeys(lists, len(ids) + 12)
        assert "".join(part["text"] for part in parts) == whole["generation"]
        assert held.get("logprobs") == pytest.approx(whole.get("logprobs"), abs=1e-5)
        if logprobs == 2:
            expected = torch.log_softmax(llama.model(torch.tensor([ids]), 0)[0, :-1], -1).topk(2) if echo else None
            for place, best in enumerate(held["top_logprobs"][:-12]):
                told = [] if place == 0 or expected is None else expected.indices[place - 1].tolist()
                assert [each["id"] for each in best] == told
                values = expected.values[place - 1].tolist() if told and expected is not None else []
                assert [each["logprob"] for each in best] == pytest.approx(values)
            for token, logprob, (best, second) in list(zip(held["tokens"], held["logprobs"], held["top_logprobs"]))[
                -12:
            ]:
                assert best == {"id": token, "text": llama.tokenizer.decode([token]), "logprob": logprob}
                assert second == {**second, "text": llama.tokenizer.decode([second["id"]])}
                assert second["logprob"] <= logprob


@pytest.mark.parametrize("cut", [1, 2, 5, 11])
def test_a_text_goes_on_from_its_ids(cut: int, llama: Llama) -> None:
    """Two parts are together the whole text, with the space between two words, where the second would begin without
    one."""
    prompt = llama.tokenizer.encode("the little dog", True, False)
    ids = [step.token for step in llama.steps([prompt], 0, max_gen_len=16) if step.token is not None]
    begun = ids[:cut]
    chunks = list(llama.continue_ids([*prompt, *begun], 0, max_gen_len=16 - cut, begun=begun))
    assert [token for chunk in chunks for token in chunk["tokens"]] == ids[cut:]
    assert llama.tokenizer.decode(begun) + joined(chunks, 1)[0] == llama.tokenizer.decode(ids)


# Stops


def test_stop_strings(llama: Llama) -> None:
    """The text ends before the first one, wherever ids begin and end; tokens joined are still the text."""
    [free] = llama.text_completion(["the little dog"], temperature=0, max_gen_len=40, logprobs=True)
    whole = free["generation"]
    for start, length in [(3, 1), (5, 4), (len(whole) // 2, 7), (1, 2)]:
        stop = whole[start : start + length]
        expected = whole[: whole.index(stop)]
        for stops in (stop, [stop, "never in it"]):
            [got] = llama.text_completion(["the little dog"], temperature=0, max_gen_len=40, logprobs=True, stop=stops)
            assert got["generation"] == expected
            assert got["finish_reason"] == "stop"
            assert "".join(got["tokens"]) == expected
            assert len(got["tokens"]) == len(got["logprobs"])
            chunks = list(llama.stream_text(["the little dog"], temperature=0, max_gen_len=40, stop=stops))
            assert joined(chunks, 1) == [expected]
            assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


@pytest.mark.parametrize("length", [1, 7, 20])
def test_what_a_stop_held_back_comes_at_the_end(length: int, llama: Llama) -> None:
    """The text ends with what might have begun a stop string, and never became one."""
    [free] = llama.text_completion(["the little dog"], temperature=0, max_gen_len=length)
    stop = free["generation"][-2:] + " and never this"
    [got] = llama.text_completion(["the little dog"], temperature=0, max_gen_len=length, stop=stop)
    assert (got["generation"], got["finish_reason"]) == (free["generation"], "length")
    chunks = list(llama.stream_text(["the little dog"], temperature=0, max_gen_len=length, stop=stop))
    assert joined(chunks, 1) == [free["generation"]]
    assert chunks[-1]["text"].endswith(free["generation"][-2:])


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(st.integers(3, 399), max_size=30),
    stops=st.lists(st.text("aeto n", min_size=1, max_size=3) | st.sampled_from(["\ufffd", "you", "e\n"]), max_size=3),
)
def test_text_up_to_a_stop(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> None:
    """Whatever the ids and the stops: all text before the first stop string, and nothing of it, comes out."""
    stream = TextStream(tokenizer, stops)
    text = "".join(stream.add(i) for i in ids) + stream.finish()
    whole = tokenizer.decode(ids)
    ends = [whole.index(stop) for stop in stops if stop in whole]
    assert text == whole[: min(ends, default=len(whole))]
    assert stream.stopped == bool(ends)


def test_finish_reasons(llama: Llama) -> None:
    reasons = [
        p["finish_reason"] for p in llama.text_completion(["a", "the house " * 22], temperature=0, max_gen_len=30)
    ]
    assert 98 < len(llama.tokenizer.encode("the house " * 22, bos=True, eos=False)) < 128
    assert reasons == ["length", "context"]
    assert [p["finish_reason"] for p in llama.text_completion(["a"], max_gen_len=0)] == ["length"]


# Sampling


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_p": 0.7}, [0.625, 0.375, 0, 0]),
        ({"min_p": 0.2}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"logit_bias": {0: -math.inf}}, [0, 0.6, 0.3, 0.1]),
        ({"logit_bias": {3: math.log(10)}}, [0.5 / 1.45, 0.3 / 1.45, 0.15 / 1.45, 0.5 / 1.45]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        ({"repetition_penalty": 2.0}, [0.25**0.5 / (0.25**0.5 + 0.5), 0.3 / 1, 0.15 / 1, 0.05 / 1]),
        ({"top_k": 3, "top_p": 0.8, "min_p": 0.1, "logit_bias": {1: -math.inf}}, [0.5 / 0.65, 0, 0.15 / 0.65, 0]),
    ],
)
def test_draws_follow_the_exact_distribution(options: dict[str, Any], expected: list[float]) -> None:
    """Chi-square over 20,000 draws, each option by itself and together; 16.27 is the .999 point for 3 degrees."""
    draws = 20_000
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    if "repetition_penalty" in options:
        # The first id was seen. Its logit, ln .5 + 1 > 0, is halved: e^(x/2) against the others' e^x.
        logits = logits + 1
        first = math.exp((math.log(0.5) + 1) / 2)
        rest = [math.e * p for p in (0.3, 0.15, 0.05)]
        expected = [value / (first + sum(rest)) for value in (first, *rest)]
    sampling = Sampling(**{"temperature": 1.0, "top_p": 1.0, **options})
    torch.manual_seed(5)
    ids = chosen(logits.expand(draws, 4), sampling, prompt=[0])
    counts = ids.bincount(minlength=4).tolist()
    assert all(count == 0 for count, p in zip(counts, expected, strict=True) if p == 0)
    chi = sum((count - draws * p) ** 2 / (draws * p) for count, p in zip(counts, expected, strict=True) if p > 0)
    assert chi < 16.27, (counts, expected)


def test_a_penalty_multiplies_what_is_negative() -> None:
    logits = torch.tensor([[2.0, -1.0, 1.5, -1.5]])
    assert chosen(logits, Sampling(0, repetition_penalty=2.0), [0, 1]).item() == 2
    low = torch.tensor([[-9.0, -1.0, -1.5]])
    assert chosen(low, Sampling(0, repetition_penalty=2.0), [1]).item() == 2


def test_penalties_of_what_was_generated() -> None:
    """Once, and for each time; the prompt's ids do not count."""
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    for options, new, expected in (
        ({"presence_penalty": 1.5}, [], 0),
        ({"presence_penalty": 1.5}, [0, 0], 1),
        ({"frequency_penalty": 0.4}, [0, 0], 0),
        ({"frequency_penalty": 0.4}, [0, 0, 0], 1),
        ({"frequency_penalty": -1.1}, [1], 1),
        ({"presence_penalty": 1.5, "frequency_penalty": 1.1}, [0, 1, 1], 2),
    ):
        assert chosen(logits, Sampling(0, **options), [0, 0, 0], new).item() == expected


def test_a_penalty_knows_prompt_and_answer(llama: Llama) -> None:
    ids, _ = llama.generate([[1, 20]], 30, 0)
    [text] = llama.text_completion(["the tree"], temperature=0, max_gen_len=60, repetition_penalty=1e6, logprobs=1)
    assert len(text["top_logprobs"]) == len(text["tokens"])
    steps = llama.steps([[1, 20]], 0, 1, 60, repetition_penalty=1e6)
    new = [s.token for s in steps if s.token is not None]
    assert len(set(new)) == len(new)
    assert not {1, 20} & set(new)
    assert len(set(ids[0])) < 30


def test_seeds(llama: Llama) -> None:
    """One for the call draws as Meta's call does after torch.manual_seed; one for each prompt draws for it alone."""
    options: dict[str, Any] = {"temperature": 1.5, "max_gen_len": 12}
    torch.manual_seed(9)
    expected = llama.text_completion(PROMPTS[:3], **options)
    state = torch.get_rng_state()
    assert llama.text_completion(PROMPTS[:3], seed=9, **options) == expected
    assert torch.equal(torch.get_rng_state(), state)
    seeds = list(range(100, 140))
    many = llama.text_completion(PROMPTS, seed=seeds, **options)
    torch.rand(3)
    for i in (0, 7, 39):
        assert llama.text_completion([PROMPTS[i]], seed=[seeds[i]], **options) == [many[i]]
    assert llama.text_completion(PROMPTS[::-1], seed=seeds[::-1], **options) == many[::-1]
    same = llama.text_completion(["the"] * 5, seed=[1, 2, 3, 4, 1], **options)
    assert same[0] == same[4] != same[1]


def test_alternatives(llama: Llama) -> None:
    [text] = llama.text_completion(["the tree"], temperature=0, max_gen_len=5, logprobs=3)
    assert [len(best) for best in text["top_logprobs"]] == [3] * 5
    for best, logprob in zip(text["top_logprobs"], text["logprobs"], strict=True):
        assert best[0]["logprob"] == pytest.approx(logprob, abs=1e-5)
        assert best[0]["logprob"] >= best[1]["logprob"] >= best[2]["logprob"]
    dialog: Any = [{"role": "user", "content": "the tree"}]
    [reply] = llama.chat_completion([dialog], temperature=0, max_gen_len=5, logprobs=2)
    assert [len(best) for best in reply["top_logprobs"]] == [2] * len(reply["tokens"]) == [2] * 5
    assert "top_logprobs" not in llama.text_completion(["the tree"], temperature=0, max_gen_len=5, logprobs=True)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_q": 1}, r"unknown option top_q \(did you mean top_p\?\); there are stop, stop_ids"),
        ({"stop": ""}, "must be texts that are not empty"),
        ({"stop": [3]}, "must be texts that are not empty"),
        ({"stop_ids": [400]}, "must be ids from 0 to 399"),
        ({"seed": -1}, "seed=-1 must be a whole number"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompt;"),
        ({"seed": ["a"]}, "seed='a' must be a whole number"),
        ({"top_k": -1}, "top_k=-1 must be"),
        ({"top_k": 1.5}, "top_k=1.5 must be"),
        ({"min_p": 2}, "min_p=2 must be at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be above 0"),
        ({"logit_bias": {400: 1.0}}, "logit_bias has the id 400"),
        ({"logit_bias": {1: float("nan")}}, r"logit_bias\[1\]=nan must be a number"),
        ({"logit_bias": dict.fromkeys(range(400), -math.inf)}, "forbids every id"),
        ({"logprobs": -1}, "logprobs=-1 must be"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, llama: Llama) -> None:
    with pytest.raises(ValueError, match=message):
        llama.text_completion(["a"], **options)


# Scores and states


def test_scores(llama: Llama) -> None:
    """A text of several windows: each token once, with at least half a window before it."""
    text = " ".join(PROMPTS[:30])
    ids = llama.tokenizer.encode(text, bos=True, eos=False)
    assert len(ids) > 3 * 128
    [short, long] = llama.score(["the tree", text])
    assert "".join(short["tokens"]) == "the tree"
    _, [expected] = (
        llama.generate([llama.tokenizer.encode("the tree", bos=True, eos=False)], 0, logprobs=True, echo=True) or []
    )
    assert short["logprobs"] == pytest.approx(expected, abs=1e-5)
    assert short["perplexity"] == pytest.approx(math.exp(-sum(expected[1:]) / (len(expected) - 1)))
    assert len(long["logprobs"]) == len(long["tokens"]) == len(ids)
    _, [first] = llama.generate([ids[:128]], 0, logprobs=True, echo=True)
    _, [second] = llama.generate([ids[64:192]], 0, logprobs=True, echo=True)
    assert long["logprobs"][:128] == pytest.approx(first, abs=1e-4)
    assert long["logprobs"][128:192] == pytest.approx(second[64:], abs=1e-4)
    assert math.isnan(llama.score([""])[0]["perplexity"])
    assert llama.score([]) == []
    with pytest.raises(ValueError, match="stride=128 must be a whole number from 1 to max_seq_len - 1 = 127"):
        llama.score(["a"], stride=128)


@given(length=st.integers(1, 200), size=st.integers(2, 50), stride=st.integers(1, 49))
def test_windows_cover_every_token(length: int, size: int, stride: int) -> None:
    stride = min(stride, size - 1)
    starts = window_starts(length, size, stride)
    assert starts[0] == 0
    assert max(starts) + size >= length
    assert all(b - a == stride for a, b in itertools.pairwise(starts))
    assert len(starts) == 1 or starts[-2] + size < length


def test_perplexity() -> None:
    """The inverse of the geometric mean of the probabilities; the first id is BOS, which nothing predicts."""
    halves = [0.0, *[-math.log(2.0)] * 3]
    assert completion.perplexity(halves) == pytest.approx(2.0)
    assert completion.perplexity([-7.0, math.log(1 / 2), math.log(1 / 8)]) == pytest.approx(4.0)
    assert completion.perplexity([-7.0, math.log(1 / 3)]) == pytest.approx(3.0)
    assert math.isnan(completion.perplexity([0.0]))
    assert math.isnan(completion.perplexity([]))


def test_hidden_states(llama: Llama) -> None:
    ids = torch.tensor([llama.tokenizer.encode("the tree ran", bos=True, eos=False)])
    with torch.inference_mode():
        last = llama.model.hidden_states(ids, 0)[0]
        table = llama.model.tok_embeddings(ids)[0]
    vectors = llama.embed(["the tree ran", "a"])
    assert vectors.shape == (2, 64)
    assert (llama.embed([]).shape, llama.embed([]).dtype) == ((0, 64), torch.float32)
    torch.testing.assert_close(vectors[0], last.mean(0))
    torch.testing.assert_close(llama.embed(["the tree ran"], pooling="last")[0], last[-1])
    torch.testing.assert_close(llama.embed(["the tree ran"], layer=0)[0], table.mean(0))
    with torch.inference_mode():
        torch.testing.assert_close(
            llama.model.norm(llama.embed(["the tree ran"], layer=2, pooling="last"))[0], last[-1]
        )
    with pytest.raises(ValueError, match="layer=3 must be from 0 to 2"):
        llama.embed(["a"], layer=3)
    with pytest.raises(ValueError, match="pooling='max'"):
        llama.embed(["a"], pooling="max")  # type: ignore[arg-type]


def test_long_prompts_run_in_chunks(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 columns give what one pass gives, ragged and echoed."""
    prompts = [[1, *range(20, 20 + n)] for n in (3, 40, 16, 17)]
    whole = llama.generate(prompts, 6, 0, logprobs=True, echo=True)
    monkeypatch.setattr("llama.decoding.engine.CHUNK", 16)
    monkeypatch.setattr("llama.decoding.engine.PASS", 16)
    parts = llama.generate(prompts, 6, 0, logprobs=True, echo=True)
    assert parts[0] == whole[0]
    for a, b in zip(parts[1] or [], whole[1] or [], strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_the_switch_of_onednn() -> None:
    """The last to leave turns it back to what it was; who keeps it in place waits until all have left."""
    switch, is_on, seen = engine.WithoutOneDNN(), torch._C._get_mkldnn_enabled, list[Any]()

    def keep() -> None:
        with switch.kept_out():
            seen.append(is_on())

    waiting = threading.Thread(target=keep)
    with switch:
        with switch:
            assert not is_on()
        assert not is_on()
        waiting.start()
        waiting.join(0.1)
        seen.append("left")
    waiting.join(60)
    assert seen == ["left", True]
    torch._C._set_mkldnn_enabled(False)
    with switch:
        pass
    assert not is_on()
    torch._C._set_mkldnn_enabled(True)


@pytest.mark.parametrize(
    ("dtype", "amx", "rows", "without"),
    [("bfloat16", False, 1, True), ("bfloat16", False, 2, False), ("bfloat16", True, 1, False),
     ("float32", False, 1, False)],
)  # fmt: skip
def test_one_row_in_bfloat16_is_multiplied_without_onednn(
    dtype: str, amx: bool, rows: int, without: bool, tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "AMX", amx)
    llama = Llama.build(str(tiny), tokenizer_path, 64, 2, device="cpu", dtype=dtype, compile=False)
    used: list[None] = []

    class Watched:
        def __enter__(self) -> None:
            used.append(None)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(engine, "without_onednn", Watched())
    llama.generate([[1, 5 + i] for i in range(rows)], 3, 0)
    assert bool(used) == without


@pytest.mark.parametrize("prompts", [4, 5])
def test_many_prompts_have_a_bar(prompts: int, llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """If some prompts wait for others. It counts those that are done."""
    bars: list[Any] = []

    def bar(shown: bool, **options: Any) -> Any:
        bars.append(tqdm(file=io.StringIO(), **options))
        assert shown == (prompts > 4)
        return bars[-1]

    monkeypatch.setattr(completion, "bar", bar)
    llama.text_completion(["the dog"] * prompts, max_gen_len=3)
    llama.score_ids([[1, 5 + i] for i in range(prompts)], [[9, 8]] * prompts)
    assert [(bar.n, bar.total) for bar in bars] == [(prompts, prompts)] * 2


def test_repr(llama: Llama) -> None:
    assert repr(llama) == (
        "Llama(0.1 million parameters on this process, float32 on cpu; 2 layers of dim 64; 400 pieces; cache for 4 "
        "prompts of 128 tokens)"
    )


def test_repr_of_rounded_weights(tiny: Path, tokenizer_path: str) -> None:
    """Once the packed tensors were counted, and "float32" was all that was said of them."""
    for kind in ("int8", "int4"):
        told = repr(Llama.build(str(tiny), tokenizer_path, 128, 4, device="cpu", quantize=kind, quiet=True))
        assert told.startswith(
            f"Llama(0.1 million parameters on this process, {kind} and float32 on cpu; 2 layers of dim 64;"
        )


# Several processes


def on_replicas(folder: str, tokenizer_path: str, size: int, prompts: list[str]) -> Any:
    llama = Llama.build(folder, tokenizer_path, 128, 4, size, device="cpu")
    greedy = [p["generation"] for p in llama.text_completion(prompts, temperature=0, max_gen_len=6)]
    streamed = joined(llama.stream_text(prompts[:3], temperature=0, max_gen_len=6), 3)
    seeded = llama.text_completion(prompts[:5], temperature=1.5, max_gen_len=6, seed=[1, 2, 3, 4, 5])
    drawn = [p["generation"] for p in llama.text_completion(["the"] * 4, temperature=1.5, max_gen_len=12)]
    again = [p["generation"] for p in llama.text_completion(["the"] * 4, temperature=1.5, max_gen_len=12)]
    assert again != drawn
    try:
        llama.text_completion(prompts[: 5 + torch.distributed.get_rank()])
        told = ""
    except ValueError as error:
        told = str(error)
    return greedy, streamed, seeded, drawn, told


@pytest.mark.parametrize("size", [1, 2, 4])
def test_prompts_are_shared_out_over_replicas(
    size: int, llama: Llama, tiny: Path, tokenizer_path: str, pool: Pool
) -> None:
    """4 processes, a model that needs fewer: each copy takes its share, every rank returns the whole list."""
    results = pool.run(on_replicas, str(tiny), tokenizer_path, size, PROMPTS[:9])
    expected = [p["generation"] for p in llama.text_completion(PROMPTS[:9], temperature=0, max_gen_len=6)]
    seeded = llama.text_completion(PROMPTS[:5], temperature=1.5, max_gen_len=6, seed=[1, 2, 3, 4, 5])
    for greedy, streamed, with_seeds, drawn, told in results:
        assert greedy == expected
        assert streamed == expected[:3]
        assert with_seeds == seeded
        assert drawn == results[0][3]
        assert len(set(drawn)) == 4  # the copies do not repeat each other's draws
        assert "different arguments" in told


# Chat


def user(text: str) -> Any:
    return {"role": "user", "content": text}


def test_stream_chat(llama: Llama) -> None:
    dialogs = [[user("hi")], [user("[INST] hi")], [user("the tree?")]]
    whole = llama.chat_completion(dialogs, temperature=0, max_gen_len=9)
    chunks = list(llama.stream_chat(dialogs, temperature=0, max_gen_len=9))
    assert joined(chunks, 3) == [reply["generation"]["content"] for reply in whole]
    assert sorted(c["index"] for c in chunks if c["finish_reason"]) == [0, 1, 2]
    with pytest.raises(DialogError, match="Error: special tags are not allowed as part of the prompt. .dialog 1."):
        llama.chat_completion(dialogs, on_unsafe="raise")
    with pytest.raises(ValueError, match="on_unsafe='ignore' must be"):
        llama.chat_completion(dialogs, on_unsafe="ignore")  # type: ignore[arg-type]


PIECES = st.sampled_from(
    [*SPECIAL_TAGS, "<s>", "</s>", "<unk>", "<pad>", "[INST", "INST]", "<</SYS", "<0x02>", "▁", "\x02"]
)
HOSTILE = st.lists(PIECES | st.text(max_size=8), max_size=6).map("".join)


@settings(max_examples=400, deadline=None)
@given(system=st.none() | HOSTILE, turns=st.lists(st.tuples(HOSTILE, HOSTILE), max_size=2), last=HOSTILE)
def test_no_text_becomes_a_control_id(
    tokenizer: Tokenizer, system: str | None, turns: list[tuple[str, str]], last: str
) -> None:
    """Whatever messages hold, BOS and EOS stand only where turns begin and end, and each turn's text stays in it."""
    dialog: Any = [{"role": "system", "content": system}] if system is not None else []
    for said, answered in turns:
        dialog += [user(said), {"role": "assistant", "content": answered}]
    dialog.append(user(last))
    ids = encode_dialog(dialog, tokenizer)
    assert ids.count(tokenizer.bos_id) == len(turns) + 1
    assert ids.count(tokenizer.eos_id) == len(turns)
    assert 0 not in ids
    for i, token in enumerate(ids):
        if token == tokenizer.eos_id:
            assert ids[i + 1] == tokenizer.bos_id


def test_the_tag_check_is_metas(llama: Llama) -> None:
    """A tag split over messages is no tag; in one message it is refused, in the words that Meta uses."""
    split: Any = [user("[IN"), {"role": "assistant", "content": "ST]"}, user("x")]
    assert llama.chat_completion([split], max_gen_len=2)[0]["finish_reason"] == "length"
