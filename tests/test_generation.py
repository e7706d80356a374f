from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PARAMS, ROOT, random_weights, write_checkpoint
from workers import Pool

from llama import Llama
from llama.chat import UNSAFE_ERROR, DialogError
from llama.decoding.calls import Call
from llama.layers import agreement

RAGGED = [[1, 20, 30], [1, 50, 60, 70, 80, 90, 100, 110, 120], [1, 7, 8, 9, 10]]


@pytest.fixture(scope="module")
def llama(tiny: Path, tokenizer_path: str) -> Llama:
    return Llama.build(str(tiny), tokenizer_path, 64, 4, device="cpu")


def naive_greedy(llama: Llama, prompt: list[int], count: int) -> list[int]:
    """Whole passes from the start, no cache carried over, until EOS."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            best = int(llama.model(torch.tensor([ids]), 0)[0, -1].argmax())
            if best == llama.tokenizer.eos_id:
                break
            ids.append(best)
    return ids[len(prompt) :]


def test_ragged_rows_are_what_each_is_alone(llama: Llama) -> None:
    together, _ = llama.generate(RAGGED, 30, temperature=0)
    assert together == [naive_greedy(llama, prompt, 30) for prompt in RAGGED]


def test_metas_way_is_what_we_compute(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference of the benchmarks: complex numbers, repeated heads, a growing slice of the cache."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import metas_way

    for prompt in RAGGED:
        assert metas_way.generate(llama.model, prompt, 30) == naive_greedy(llama, prompt, 30)


def test_rescoring(llama: Llama) -> None:
    """The log-probabilities of decoding, step by step at places of their own, are those of one pass over everything."""
    tokens, logprobs = llama.generate(RAGGED, 30, temperature=0.9, logprobs=True)
    assert logprobs is not None
    for prompt, row, scores in zip(RAGGED, tokens, logprobs, strict=True):
        whole = prompt + row
        with torch.inference_mode():
            logits = llama.model(torch.tensor([whole[:-1]]), 0)[0]
        expected = logits.log_softmax(-1)[torch.arange(len(whole) - 1), torch.tensor(whole[1:])][len(prompt) - 1 :]
        assert scores == pytest.approx(expected.tolist(), abs=1e-4)
    # And by the library itself: nothing to generate, everything echoed.
    whole_rows = [prompt + row for prompt, row in zip(RAGGED, tokens, strict=True)]
    again, rescored = llama.generate(whole_rows, 0, logprobs=True, echo=True)
    assert again == whole_rows
    assert rescored is not None
    for prompt, scores, all_scores in zip(RAGGED, logprobs, rescored, strict=True):
        assert all_scores[0] == 0.0
        assert all_scores[len(prompt) :] == pytest.approx(scores, abs=1e-4)


def test_echo_scores_prompt_and_answer_once(llama: Llama) -> None:
    """The prompt's numbers come with the first of several new ids, and not again with each."""
    tokens, logprobs = llama.generate(RAGGED, 5, temperature=0, logprobs=True, echo=True)
    _, rescored = llama.generate(tokens, 0, logprobs=True, echo=True)
    assert [len(row) for row in tokens] == [len(prompt) + 5 for prompt in RAGGED]
    for scores, expected in zip(logprobs or [], rescored or [], strict=True):
        assert scores == pytest.approx(expected, abs=1e-4)


def test_nothing_to_generate_scores_the_prompt(llama: Llama) -> None:
    """Meta's code compares each position's logits with that position's own token here, not with the next one."""
    prompt = [1, 20, 2, 30]
    tokens, logprobs = llama.generate([prompt], 0, logprobs=True, echo=True)
    with torch.inference_mode():
        logits = llama.model(torch.tensor([prompt]), 0)[0].log_softmax(-1)
    assert tokens == [prompt]
    assert logprobs is not None
    assert logprobs[0] == pytest.approx([0.0] + [float(logits[i, prompt[i + 1]]) for i in range(3)], abs=1e-4)


def test_eos_ends_a_row_and_not_the_others(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    free, _ = llama.generate(RAGGED, 20, temperature=0)
    eos = next(token for i, token in enumerate(free[0]) if 2 <= i and token not in free[0][:i] + free[1] + free[2])
    monkeypatch.setattr(llama.tokenizer, "eos_id", eos)
    tokens, logprobs = llama.generate(RAGGED, 20, temperature=0, logprobs=True)
    assert tokens == [free[0][: free[0].index(eos)], free[1], free[2]]
    assert [len(row) for row in logprobs or []] == [len(row) for row in tokens]


def test_eos_in_an_echoed_prompt_is_only_text(llama: Llama) -> None:
    """Meta's code cuts the echoed prompt at its EOS and drops what was generated."""
    prompt = [1, 20, 2, 1, 30, 40]
    tokens, _ = llama.generate([prompt], 5, temperature=0, echo=True)
    assert tokens[0][:6] == prompt
    assert tokens[0][6:] == naive_greedy(llama, prompt, 5)


def test_the_context_ends_a_row(llama: Llama) -> None:
    long, full = [1] + [9] * 59, [1] + [8] * 63
    tokens, _ = llama.generate([long, full, [1, 5]], 100, temperature=0)
    assert [len(row) for row in tokens] == [4, 0, 62]
    assert tokens[2] == naive_greedy(llama, [1, 5], 62)


def test_calls_do_not_leave_anything_behind(llama: Llama) -> None:
    first, _ = llama.generate([RAGGED[0]], 20, temperature=0)
    llama.generate([[1] + [9] * 60] * 4, 3)
    assert llama.generate([RAGGED[0]], 20, temperature=0)[0] == first


def test_equal_seeds_give_equal_draws(llama: Llama) -> None:
    torch.manual_seed(3)
    first = llama.generate(RAGGED, 20, temperature=1.0)
    second = llama.generate(RAGGED, 20, temperature=1.0)
    torch.manual_seed(3)
    assert llama.generate(RAGGED, 20, temperature=1.0) == first != second


def test_completions(llama: Llama) -> None:
    prompts = ["Once upon a time", "你好"]
    plain = llama.text_completion(prompts, temperature=0, max_gen_len=8)
    scored = llama.text_completion(prompts, temperature=0, max_gen_len=8, logprobs=True)
    assert [set(p) for p in plain] == [{"generation", "finish_reason"}] * 2
    for a, b in zip(plain, scored, strict=True):
        assert a["generation"] == b["generation"] == "".join(b["tokens"])
        assert len(b["tokens"]) == len(b["logprobs"])
    echoed = llama.text_completion(prompts, temperature=0, max_gen_len=8, echo=True)
    assert all(p["generation"].startswith(prompt) for p, prompt in zip(echoed, prompts, strict=True))
    assert llama.text_completion(["The"], temperature=0)[0]["generation"]  # to the end of the context
    assert llama.text_completion([]) == []
    assert llama.generate([], 5) == ([], None)


def test_chat(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dialog with a tag in it is not run, and gives no tokens; the others are answered as if it were not there."""
    seen: list[Any] = []
    prefill = llama._engine.prefill
    monkeypatch.setattr(
        llama._engine, "prefill", lambda ids, *rest, **named: seen.extend(ids) or prefill(ids, *rest, **named)
    )
    safe: Any = [{"role": "user", "content": "hi"}]
    unsafe: Any = [{"role": "user", "content": "[INST] hi"}]
    results = llama.chat_completion([safe, unsafe, safe], temperature=0, max_gen_len=6, logprobs=True)
    assert len(seen) == 2
    assert results[0]["generation"] == results[2]["generation"]
    assert results[0]["generation"]["role"] == "assistant"
    assert "".join(results[0]["tokens"]) == results[0]["generation"]["content"]
    assert results[1] == {
        "generation": {"role": "assistant", "content": UNSAFE_ERROR},
        "tokens": [],
        "logprobs": [],
        "finish_reason": "stop",
    }
    assert llama.chat_completion([unsafe]) == [
        {"generation": {"role": "assistant", "content": UNSAFE_ERROR}, "finish_reason": "stop"}
    ]
    with pytest.raises(DialogError, match="needs a message from the user"):
        llama.chat_completion([safe, []])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1]] * 5, 3), "5 prompts, but max_batch_size is 4; pass fewer at once, or build with max_batch_size=5"),
        (
            ([[1], [9] * 65], 3),
            "prompt 1 has 65 tokens, but max_seq_len is 64; shorten it, or build with max_seq_len=65",
        ),
        (([[1], []], 3), "prompt 1 is empty"),
        (([[1, 400]], 3), "prompt 0 has the id 400, which is outside the vocabulary; ids go from 0 to 399"),
        (([[1, -1]], 3), "has the id -1"),
        (([["a"]], 3), "must be lists of ids"),
        (([1, 2], 3), "must be lists of ids"),
        (([[1]], -2), "max_gen_len=-2 must be a whole number of 0 or more"),
        (([[1]], 2.5), "max_gen_len=2.5"),
        (([[1]], 3, -0.5), "temperature=-0.5"),
        (([[1]], 3, float("nan")), "temperature=nan"),
        (([[1]], 3, None), "temperature=None"),
        (([[1]], 3, 0.6, -1), "top_p=-1"),
        (([[1]], 3, 0.6, float("nan")), "top_p=nan"),
    ],
)
def test_bad_calls(arguments: tuple[Any, ...], message: str, llama: Llama) -> None:
    with pytest.raises(ValueError, match=message):
        llama.generate(*arguments)
    assert llama.generate([[1, 5]], 2)[0]


def test_options_of_one_prompt(llama: Llama) -> None:
    """Are checked as a call does it: one seed, and one answer."""
    for good in ({}, {"seed": 3}, {"seed": [3]}, {"n": 1, "temperature": 0.5}):
        llama.check_options(good)
    for bad, message in (
        ({"seed": []}, "0 seeds for 1 prompt;"), ({"seed": [3, 4]}, "2 seeds for 1 prompt;"),
        ({"n": 2}, "n=2: here a prompt"),
        ({"max_gen_length": 2}, "unknown option max_gen_length"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            llama.check_options(bad)


def test_who_waits_for_each_step(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only of calls whose steps somebody reads as they come are other prompts read in pieces."""
    streams: list[bool] = []

    class Seen(Call):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            streams.append(self.streams)

    monkeypatch.setattr("llama.generation.Call", Seen)
    dialog: Any = [{"role": "user", "content": "a"}]
    llama.generate([[1, 5]], 2)
    llama.text_completion(["a"], max_gen_len=2)
    llama.chat_completion([dialog], max_gen_len=2)
    llama.score(["a dog"])
    assert streams == [False] * 4
    for stream in (llama.steps([[1, 5]], max_gen_len=2), llama.stream_text(["a"], max_gen_len=2),
                   llama.stream_chat([dialog], max_gen_len=2), llama.continue_ids([1, 5], max_gen_len=2)):  # fmt: skip
        list(stream)
    assert streams[4:] == [True] * 4


def test_a_lone_text_is_no_list(llama: Llama) -> None:
    with pytest.raises(ValueError, match="put one text into a list"):
        llama.text_completion("Once upon a time")


@pytest.mark.parametrize("temperature", [0, 0.6])
def test_logits_that_are_not_finite(temperature: float, tmp_path: Path, tokenizer_path: str) -> None:
    """In float16 the sums overflow; multinomial would have said something about inf, nan or element < 0."""
    weights = random_weights()
    weights["layers.1.feed_forward.w2.weight"] *= 1e6
    folder = write_checkpoint(tmp_path / "big", weights)
    llama = Llama.build(str(folder), tokenizer_path, 16, 2, device="cpu", dtype="float16")
    for length in (1, 3):
        with pytest.raises(ValueError, match="prompt 0 are not finite in torch.float16; build it with dtype='float32'"):
            llama.generate([[1, 5]], length, temperature)
    assert llama.generate([[1, 5]], 0, temperature) == ([[]], None)  # no id is chosen by them


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, tiny: Path, tokenizer_path: str, llama: Llama) -> None:
    half = Llama.build(str(tiny), tokenizer_path, 64, 4, device="cpu", dtype=dtype)
    assert {p.dtype for p in half.model.parameters()} == {getattr(torch, dtype)}
    tokens, logprobs = half.generate(RAGGED, 6, temperature=0, logprobs=True)
    _, rescored = half.generate([p + t for p, t in zip(RAGGED, tokens, strict=True)], 0, logprobs=True, echo=True)
    assert logprobs is not None
    assert rescored is not None
    for prompt, a, b in zip(RAGGED, logprobs, rescored, strict=True):
        assert a == pytest.approx(b[len(prompt) :], abs=0.2)
    tokens32, _ = llama.generate(RAGGED, 1, temperature=0)
    assert [row[0] for row in tokens] == [row[0] for row in tokens32]


def test_build_leaves_the_process_as_it_was(
    tiny: Path, tokenizer_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Meta's build sets the default tensor type for good, and takes stdout away."""
    before = (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
        sys.stdout,
        sys.excepthook,
    )
    llama = Llama.build(str(tiny), tokenizer_path, 16, 1, seed=5, device="cpu")
    after = (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(), sys.stdout, sys.excepthook)
    assert after == before
    assert not torch.distributed.is_initialized()
    assert torch.initial_seed() == 5
    assert capsys.readouterr().out.startswith("Loaded in ")
    assert not llama.model.training
    assert not any(p.requires_grad for p in llama.model.parameters())
    assert not llama.model(torch.tensor([[1]]), 0).is_inference()


def test_positions_beyond_training_are_announced(tiny: Path, tokenizer_path: str) -> None:
    with pytest.warns(UserWarning, match="max_seq_len=5000 goes beyond the 4096 positions") as told:
        Llama.build(str(tiny), tokenizer_path, 5000, 1, device="cpu")
    assert [warning.filename for warning in told] == [__file__]  # the line that a reader can change
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Llama.build(str(tiny), tokenizer_path, 4096, 1, device="cpu")


def sampled(folder: str, tokenizer_path: str, processes: int) -> Any:
    """On every rank: a ragged batch, after each rank's generator was spoiled in its own way."""
    llama = Llama.build(folder, tokenizer_path, 64, 4, processes, device="cpu", seed=7)
    torch.rand(torch.distributed.get_rank() + 1)
    return llama.generate(RAGGED, 12, temperature=0.9, logprobs=True)


def different(folder: str, tokenizer_path: str) -> Any:
    llama = Llama.build(folder, tokenizer_path, 64, 4, 4, device="cpu")
    return llama.generate([[1, torch.distributed.get_rank()]], 3)


def test_ranks_agree(tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    """Each rank draws for itself, so a rank whose generator ran ahead used to write a text of its own, silently."""
    results = pool.run(sampled, str(tiny), tokenizer_path, 4)
    assert all(result == results[0] for result in results)
    for _, error in pool.try_run(different, str(tiny), tokenizer_path):
        assert "the 4 processes were given different arguments" in error


def corrected(folder: str, tokenizer_path: str) -> Any:
    """Rank 1 alone makes a mistake; all hear of it, and the corrected call is in step again."""
    llama = Llama.build(folder, tokenizer_path, 64, 4, 4, device="cpu")
    wrong: Any = {"generate": [[]], "text_completion": [None], "chat_completion": [[]]}
    right: Any = {
        "generate": [[1, 5]],
        "text_completion": ["a"],
        "chat_completion": [[{"role": "user", "content": "a"}]],
    }
    told = []
    for method in wrong:
        mistaken = torch.distributed.get_rank() == 1
        try:
            getattr(llama, method)((wrong if mistaken else right)[method], max_gen_len=2)
        except ValueError as error:
            told.append("(on process 1)" in str(error) or mistaken)
    return told, llama.generate([[1, 5]], 4, 0)[0]


def sizes(folder: str, tokenizer_path: str) -> Any:
    """Models over 4, 1 and 4 processes in one process; each keeps to its own group."""
    four = Llama.build(folder, tokenizer_path, 64, 4, device="cpu")
    one = Llama.build(folder, tokenizer_path, 64, 4, 1, device="cpu")
    again = Llama.build(folder, tokenizer_path, 64, 4, device="cpu")
    widths = [llama.model.output.output_size_per_partition for llama in (four, one, again)]
    torch.manual_seed(torch.distributed.get_rank())
    drawn = four.generate(RAGGED, 12, temperature=0.9)
    own = one.generate([[1, 5 + torch.distributed.get_rank()]], 3, 0)
    return widths, drawn, own


def test_mistakes_of_one_rank_leave_the_others_in_step(tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    results = pool.run(corrected, str(tiny), tokenizer_path)
    assert all(told == [True] * 3 for told, _ in results)
    assert all(tokens == results[0][1] for _, tokens in results)


def test_models_over_different_counts_of_processes(tiny: Path, tokenizer_path: str, pool: Pool, llama: Llama) -> None:
    results = pool.run(sizes, str(tiny), tokenizer_path)
    for rank, (widths, drawn, own) in enumerate(results):
        assert widths == [100, 400, 100]
        assert drawn == results[0][1]
        assert own == llama.generate([[1, 5 + rank]], 3, 0)


def test_log_probabilities_that_are_not_numbers(tmp_path: Path, tokenizer_path: str) -> None:
    weights = random_weights()
    weights["norm.weight"][:] = float("nan")
    broken = Llama.build(str(write_checkpoint(tmp_path, weights)), tokenizer_path, 16, 2, device="cpu")
    with pytest.raises(ValueError, match="not finite in torch.float32; check the weights"):
        broken.generate([[1, 5]], 0, logprobs=True, echo=True)


def test_built_in_inference_mode(tiny: Path, tokenizer_path: str) -> None:
    with torch.inference_mode():
        inside = Llama.build(str(tiny), tokenizer_path, 16, 2, device="cpu")
    assert inside.model(torch.tensor([[1]]), 0).shape == (1, 1, 400)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ckpt_dir": "~nosuchuser/x"}, "home folder that does not exist"),
        ({"tokenizer_path": "~nosuchuser/x"}, "home folder that does not exist"),
        ({"ckpt_dir": 7}, "no checkpoint folder at 7"),
        ({"tokenizer_path": ""}, "the path is empty; write . for the current folder"),
        ({"seed": None}, "seed=None"),
        ({"seed": 2**70}, "seed=1180591620717411303424 must be"),
        ({"model_parallel_size": "2"}, "model_parallel_size='2' must be a whole number"),
        ({"model_parallel_size": True}, "model_parallel_size=True must be a whole number"),
    ],
)
def test_bad_builds(changes: dict[str, Any], message: str, tiny: Path, tokenizer_path: str) -> None:
    with pytest.raises(ValueError, match=message):
        Llama.build(
            **{"ckpt_dir": str(tiny), "tokenizer_path": tokenizer_path, "max_seq_len": 16, "device": "cpu", **changes}
        )


def test_arguments_that_are_no_lists(llama: Llama) -> None:
    for wrong in (None, 5):
        with pytest.raises(ValueError, match="must be a list of lists of ids"):
            llama.generate(wrong, 3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="is a list of texts"):
            llama.text_completion(wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="is a list of dialogs"):
            llama.chat_completion(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="characters that UTF-8 cannot encode"):
        llama.text_completion(["\ud800"])


def test_rope_theta_is_read(tmp_path: Path, tokenizer_path: str, llama: Llama) -> None:
    """Code Llama's params.json carries it."""
    write_checkpoint(tmp_path, random_weights(), params={**PARAMS, "rope_theta": 1e6})
    code = Llama.build(str(tmp_path), tokenizer_path, 64, 4, device="cpu")
    assert code.model.params.rope_theta == 1e6
    prompts = [[1] + list(range(50, 90))]
    assert code.generate(prompts, 10, temperature=0, logprobs=True) != llama.generate(
        prompts, 10, temperature=0, logprobs=True
    )


def test_a_long_text_is_shown_from_where_processes_differ() -> None:
    long = "the same words " * 20
    cat, dog = ({"prompts": f"{long}a {animal}. {long}"} for animal in ("cat", "dog"))
    message = agreement._difference({0: (cat, "has called generate"), 3: (dog, "has called generate")})
    assert "prompts is …ame words a cat. the" in message
    assert "on process 0, but …ame words a dog. the" in message
