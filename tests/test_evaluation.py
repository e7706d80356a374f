"""Continuations after contexts, perplexity by named methods, and the answers to lm-evaluation-harness. harness.py and
perplexities.py, which are run by hand, compare them with the tools themselves."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pytest
import torch
from helpers import command, watch_prefill

from llama import Llama
from llama.harness import Answers, check_examples, side_by_side
from llama.perplexity import (
    _figures,
    chunks,
    detokenized,
    documents,
    joined,
    joined_windows,
    parse_method,
    perplexity,
    rolling,
)

CONTEXT = "The little dog found a red ball under the tree and ran back to the house with it. She"
TEXT = CONTEXT + " laughed, and they played.\nOnce upon a time there was a river; nobody knew where it came from.\n" * 4


@pytest.fixture(scope="module")
def llama(tiny: Path, tokenizer_path: str) -> Llama:
    return Llama.build(str(tiny), tokenizer_path, 64, 3, device="cpu")


def told(llama: Llama, ids: list[int], start: int) -> tuple[list[float], list[bool]]:
    """ln p of the ids from `start` on, and whether each is the likeliest, by Meta's call."""
    with torch.inference_mode():
        scores = llama.model(torch.tensor([ids[:-1]]), 0)[0, start - 1 :].log_softmax(-1)
    llama.forget()
    new = ids[start:]
    return [scores[i, token].item() for i, token in enumerate(new)], [
        scores[i].argmax().item() == token for i, token in enumerate(new)
    ]


# Continuations


def test_continuations(llama: Llama) -> None:
    """In any order, after long, short and no contexts; each is what the model says of it alone."""
    encode = llama.tokenizer.encode
    pairs = [
        (CONTEXT, " laughed"),
        ("", "Once upon"),
        (CONTEXT, " ran back"),
        ("A dog ", "ran."),
        (CONTEXT, " found a river"),
    ]
    scores = llama.score(*map(list, zip(*pairs)))
    for (context, continuation), score in zip(pairs, scores):
        ids, start = encode(context + continuation, True, False), len(encode(context.rstrip(), True, False))
        logprobs, greedy = told(llama, ids, start)
        assert score["logprobs"] == pytest.approx(logprobs, abs=1e-4)
        assert score["logprob"] == sum(score["logprobs"])
        assert score["is_greedy"] is all(greedy)
        assert "".join(score["tokens"]).strip() == continuation.strip()
    assert "".join(scores[0]["tokens"]) == " laughed"
    assert llama.score([], []) == []


def test_what_the_model_writes_is_greedy(llama: Llama) -> None:
    prompt = llama.tokenizer.encode(CONTEXT, True, False)
    (ids,), _ = llama.generate([prompt], 5, 0)
    right, wrong = llama.score_ids([prompt, prompt], [ids, [*ids[:-1], ids[-1] ^ 1]])
    assert (right["is_greedy"], wrong["is_greedy"]) == (True, False)


def test_contexts_are_read_once(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices of one question, as a harness asks them; behind it only their own ids run, and the last of these not at
    all."""
    context = llama.tokenizer.encode(CONTEXT, True, False)
    assert len(context) > 32
    llama.forget()
    passes = watch_prefill(
        llama._engine, monkeypatch, lambda prompts, start: sum(len(prompt) - start for prompt in prompts)
    )
    llama.score_ids([context] * 6, [[40 + i, 50] for i in range(6)])
    assert sum(passes) == len(context) + 1 + 5 * 2  # the others read the context's last id again, and their own first


def test_a_pair_may_fill_the_cache(llama: Llama) -> None:
    """And one id more, which is not read: the harness' windows are so long."""
    ids = llama.tokenizer.encode(TEXT, True, False)
    [score] = llama.score_ids([ids[:1]], [ids[1:65]])
    assert score["logprobs"] == pytest.approx(told(llama, ids[:65], 1)[0], abs=1e-4)
    with pytest.raises(
        ValueError, match="continuation 1 have 66 tokens, but with max_seq_len=64 at most 65 are scored"
    ):
        llama.score_ids([ids[:1], ids[:3]], [ids[1:3], ids[3:66]])


@pytest.mark.parametrize(
    ("contexts", "continuations", "message"),
    [
        (["a"], ["b", "c"], "1 contexts for 2 continuations"),
        (["a", "a"], ["b", ""], "continuation 1 has no ids of its own"),
        (["a"], "b", "continuations is a list of texts, not str"),
        ("a", ["b"], "texts is a list of texts, not str"),
        (["a"], [3], "continuations\\[0\\] is 3, and not a text; continuations is a list of texts"),
        ([[]], [[5]], "prompt 0 is empty"),
        ([[1]], [[400]], "has the id 400, which is outside the vocabulary"),
        ([[1]], [7], "must be lists of ids"),
    ],
)
def test_bad_pairs(contexts: Any, continuations: Any, message: str, llama: Llama) -> None:
    by_ids = isinstance(contexts[0], list)
    with pytest.raises(ValueError, match=message):
        (llama.score_ids if by_ids else llama.score)(contexts, continuations)


def test_no_stride_with_pairs(llama: Llama) -> None:
    with pytest.raises(ValueError, match="stride=9 is for texts without continuations"):
        llama.score(["a"], ["b"], stride=9)  # type: ignore[call-overload]


# Perplexity


def test_windows() -> None:
    """Worked by hand."""
    ids = list(range(10, 19))
    assert rolling(ids, 1, 4) == [([1], [10, 11, 12, 13]), ([13], [14, 15, 16, 17]), ([14, 15, 16, 17], [18])]
    assert rolling(ids[:8], 1, 4) == [([1], [10, 11, 12, 13]), ([13], [14, 15, 16, 17])]
    assert rolling(ids[:1], 1, 4) == [([1], [10])]
    assert rolling([], 1, 4) == []
    assert joined_windows(ids, 4) == [([10], [11, 12, 13]), ([14], [15, 16, 17])]
    assert joined_windows(ids[:4], 4) == [([10], [11, 12, 13])]
    with pytest.raises(ValueError, match="the text has 3 tokens, fewer than one window of 4"):
        joined_windows(ids[:3], 4)
    assert chunks(ids, 1, 4) == chunks(ids[:8], 1, 4) == [([1, 11, 12], [13]), ([1, 15, 16], [17])]
    assert chunks(ids, 1, 3) == [([1, 11], [12]), ([1, 14], [15]), ([1, 17], [18])]
    with pytest.raises(ValueError, match="the text has 7 tokens, and llama.cpp's method needs two windows of 4 at"):
        chunks(ids[:7], 1, 4)
    assert joined(" a \n\n \nb") == " a \n\n\n\n\n\n\nb"  # the rows " a \n", "", "" and "b"


def test_wikitext() -> None:
    text = " \n = A = \n \n = = B = = \n one \n = C D = \n two \n"
    assert documents(text) == [" = A = \n \n = = B = = \n one ", " = C D = \n two \n"]
    for line in (" = = = C = = = ", " = A = = = ", " = A", "A = ", " = = = A = "):
        assert documents(f"one\n{line}\ntwo") == [f"one\n{line}\ntwo"]
    raw = " = A = \n It 's 1 @,@ 000 , ( not two ) and \" x \" ; the boys ' N at 3 @.@ 5 ° C . \n = = B = = \n"
    marks = "a : b ; c . d ! e ? f @-@ g [ h ] { i } ' j ' 's\n k = = = = L = = = = = = = M = = ="
    assert detokenized(marks) == "a: b; c. d! e? f-g [h] {i} 'j''s\nk ==== L ======= M ==="
    assert detokenized(raw) == " = A =\nIt's 1,000, (not two) and \"x\"; the boys' 1 at 3.5°C.\n== B ==\n"


def test_methods(llama: Llama) -> None:
    """Each beside a loop of its definition."""
    encode, bos = llama.tokenizer.encode, llama.tokenizer.bos_id
    ids = encode(joined(TEXT), True, False)
    losses = [-x for at in range(0, len(ids) - 31, 32) for x in told(llama, ids[at : at + 32], 1)[0]]
    ours = perplexity(llama, TEXT, "joined-32")
    assert (ours["windows"], ours["tokens"]) == (len(ids) // 32, len(losses))
    assert ours["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert ours["bits_per_token"] == pytest.approx(math.log2(ours["perplexity"]))

    ids = encode(TEXT.removesuffix("\n"), True, False)
    parts = [told(llama, [bos, *ids[at + 1 : at + 32]], 17)[0] for at in range(0, len(ids) - 31, 32)]
    x = -torch.tensor(parts, dtype=torch.float64).flatten()
    ours = perplexity(llama, TEXT, "llama.cpp-32")
    assert ours["perplexity"] == pytest.approx(x.mean().exp().item(), rel=1e-4)
    assert ours["standard_error"] == pytest.approx((x.std() / len(x) ** 0.5 * x.mean().exp()).item(), rel=1e-4)

    text = " = A = \n The little dog . \n = B = \n A river \n"
    pages = [" = A =\nThe little dog. ", " = B =\nA river\n"]
    total = sum(sum(told(llama, encode(page, True, False), 1)[0]) for page in pages)
    ours = perplexity(llama, text.replace("\n", "\r\n", 2).replace("B = \n", "B = \r"), "lm-eval")
    assert (ours["documents"], ours["words"], ours["bytes"]) == (2, 9 + 7, len(text) - 1)
    assert ours["nll"] == pytest.approx(-total, rel=1e-4)
    assert ours["word_perplexity"] == pytest.approx(math.exp(ours["nll"] / ours["words"]))
    assert ours["bits_per_byte"] == pytest.approx(math.log2(ours["byte_perplexity"]))


def test_figures() -> None:
    """Worked by hand; where all tokens are alike, no rounding makes their variance negative."""

    def told(*losses: float, error: bool = True) -> Any:
        model: Any = SimpleNamespace(score_ids=lambda *_: [{"logprobs": [-loss]} for loss in losses])
        return _figures(model, [([1], [2])] * len(losses), "a method", 8, error)

    figures = {"method": "a method", "window": 8, "windows": 3, "tokens": 3, "nll": 6.0, "perplexity": math.exp(2),
               "bits_per_token": 2 / math.log(2)}  # fmt: skip
    assert told(1.0, 2.0, 3.0, error=False) == figures
    assert told(1.0, 2.0, 3.0) == {**figures, "standard_error": pytest.approx(math.sqrt(1 / 3) * math.exp(2))}
    assert told(0.05, 0.05, 0.05)["standard_error"] == 0


@pytest.mark.parametrize("name", ["joined-4", "llama.cpp-4", "joined-9999999", "llama.cpp-2048"])
def test_the_name_of_a_method(name: str) -> None:
    kind, _, window = name.partition("-")
    assert parse_method(name) == (kind, int(window))
    assert parse_method("lm-eval") == ("lm-eval", None)
    for wrong in (f"{name}9999999", f"{name} ", f" {name}", f"{kind}-3", f"{kind}-\u0664", f"{kind}-", "llamaXcpp-9"):
        with pytest.raises(ValueError, match="there is no method"):
            parse_method(wrong)


@pytest.mark.parametrize(
    ("method", "text", "message"),
    [
        ("joined-2048", TEXT, "joined-2048 reads windows of 2048 tokens, but the model has room for 64"),
        ("joined-64", "a dog", "the text has . tokens, fewer than one window of 64"),
        ("llama.cpp-64", "a dog", "two windows of 64 at least"),
        ("lm-eval", " \n", "the text is empty"),
        ("joint-2048", TEXT, r"no method 'joint-2048' \(did you mean joined-2048\?\); there are lm-eval, joined-2048"),
        ("llama.cpp-2", TEXT, "4 at least"),
    ],
)
def test_what_is_refused(method: str, text: str, message: str, llama: Llama) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(llama, text, method)


def test_a_vocabulary_without_bos(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.tokenizer, "bos_id", -1)
    with pytest.raises(ValueError, match="the vocabulary has no BOS"):
        perplexity(llama, TEXT, "lm-eval")
    monkeypatch.setattr(llama.tokenizer, "bos_id", 0)
    assert perplexity(llama, TEXT, "joined-32")["tokens"] > 32


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It gives the demo model the room that the method needs, or all that it was trained on."""
    file = tmp_path / "text"
    file.write_text(TEXT * 4)
    how = {"file": file, "device": "cpu", "dtype": "float32"}
    command("perplexity", method="llama.cpp-128", json=True, **how)
    found = json.loads(capsys.readouterr().out)
    assert (found["window"], found["method"], found["file"]) == (128, "llama.cpp-128", str(file))
    command("perplexity", method="lm-eval", **how)
    first, second, third = capsys.readouterr().out.splitlines()
    assert "of up to 512" in first
    assert "of a word" in second
    assert "of a byte" in third
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for options, message in [
        ({"method": "joined-1024"}, "room for 512"),
        ({"method": "joined-256", "max_seq_len": 100}, "room for 100"),
        ({"method": "lm-eval", "max_seq_len": 0}, "max_seq_len=0 must be a whole number of 1 or more"),
        ({"method": "perplexity"}, "no method 'perplexity'"),
        ({"method": "lm-eval", "file": tmp_path / "none"}, "none is missing"),
        ({"method": "lm-eval", "file": tmp_path / "empty"}, "empty is empty"),
        ({"method": "lm-eval", "file": tmp_path / "latin"}, "latin is not UTF-8 at byte 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            command("perplexity", **{**how, **options})
    assert "Loaded" not in capsys.readouterr().err  # all was refused before


# lm-evaluation-harness


def test_answers(llama: Llama) -> None:
    """Of numbers; a context that is too long loses its beginning, as with the harness' own models."""
    answers, encode = Answers(llama), llama.tokenizer.encode
    [score] = llama.score([CONTEXT], [" laughed"])
    ids, start = encode(TEXT + " dog", True, False), len(encode(TEXT.rstrip(), True, False))
    with pytest.warns(UserWarning, match=r"a context of \d+ tokens lost its first \d+, since max_seq_len is 64"):
        (short, greedy), (cut, _) = answers.loglikelihood([(CONTEXT, " laughed"), (TEXT, " dog")])
    assert (short, greedy) == (pytest.approx(score["logprob"], abs=1e-4), score["is_greedy"])
    assert cut == pytest.approx(sum(told(llama, ids[-65:], 65 + start - len(ids))[0]), abs=1e-4)
    with pytest.raises(ValueError, match="the continuation '' has 0 ids of its own"):
        answers.loglikelihood([("a", "")])
    for asks, add_bos in ((Answers(llama), True), (Answers(llama, add_bos=False), False)):
        windows = rolling(encode(TEXT, add_bos, False), llama.tokenizer.bos_id, 64)  # hf scores its tokenizer's BOS
        expected = sum(sum(told(llama, [*before, *ids], len(before))[0]) for before, ids in windows)
        assert asks.loglikelihood_rolling([TEXT, ""])[0] == pytest.approx(expected, rel=1e-5)


def test_generated_answers(llama: Llama) -> None:
    """Each with options of its own."""
    answers, context = Answers(llama), "The dog ran"
    [whole] = llama.text_completion([context], 0, max_gen_len=12)
    stop = whole["generation"][3:5]
    expected = llama.text_completion([context], 0, max_gen_len=12, stop=stop)[0]["generation"]
    drawn = llama.text_completion([context], 0.8, 1.0, max_gen_len=12, seed=3)[0]["generation"]
    asked = {"until": [stop, ""], "max_gen_toks": 12}
    draws = {"until": None, "max_tokens": 12, "do_sample": True, "temperature": 0.8, "seed": 3}
    more = {"until": "nothing", "max_new_tokens": 12, "do_sample": False, "temperature": 0.8}
    assert answers.generate_until([(context, asked), (context, draws), (context, more), (context, asked)]) == [
        expected, drawn, whole["generation"], expected,
    ]  # fmt: skip
    for options, message in [
        ({}, "max_gen_toks=256 leaves no room for a context, since max_seq_len is 64"),
        ({"num_beams": 2}, "generation has no option 'num_beams'; there are until"),
        ({"do_sample": True}, "do_sample=True needs a temperature above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            answers.generate_until([(context, options)])


def test_chats(llama: Llama) -> None:
    """A chat as text has the ids of the chat; and a message cannot make control ids of its text."""
    answers, dialog = Answers(llama), [{"role": "user", "content": "The dog?"}]
    text = answers.apply_chat_template(dialog)  # type: ignore[arg-type]
    assert text == "<s>[INST] The dog? [/INST]"
    assert answers._encode(text) == llama.encode_dialogs([dialog], "raise", False).ids[0]  # type: ignore[list-item]
    started = [*dialog, {"role": "assistant", "content": "It ran"}]
    begun = answers.apply_chat_template(started, False)  # type: ignore[arg-type]
    assert begun == "<s>[INST] The dog? [/INST] It ran"
    assert Answers(llama)._encode("</s>").count(llama.tokenizer.eos_id) == 0
    with pytest.raises(ValueError, match="'</s>' is a control piece, and no message may have it"):
        answers.apply_chat_template([{"role": "user", "content": "a </s> b"}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": True}, "name a file with --out too"),
        ({"limit": 0}, "limit=0 must be a number above 0"),
        ({"gen_kwargs": "temperature"}, "gen_kwargs: 'temperature' must be NAME=VALUE"),
        ({"num_fewshot": -1}, "num_fewshot=-1 must be a whole number of 0 or more"),
        ({"bootstrap_iters": 0.5}, "bootstrap_iters=0.5 must be a whole number"),
        ({"out": "."}, "is a folder; name a file in it"),
        ({"out": "none/out.json"}, "there is no folder none"),
    ],
)
def test_eval_refuses_at_once(options: dict[str, Any], message: str) -> None:
    """Before the harness is imported, and before tasks and models are loaded."""
    with pytest.raises(ValueError, match=message):
        command("eval", tasks="hellaswag", **options)


def test_examples_are_counted_before_a_model_is_loaded() -> None:
    """The harness found out in the middle, by an error of `random.sample`."""

    def task(documents: Any, own: Optional[int] = None) -> Any:
        return SimpleNamespace(fewshot_docs=lambda: documents, get_config={"num_fewshot": own}.get)

    check_examples({"enough": task(range(9)), "none of its own accord": task([], 0)}, 9)
    for eight in (range(8), iter(range(8))):
        with pytest.raises(ValueError, match="num_fewshot=9, but few has 8 documents to take examples from; pass 8 at"):
            check_examples({"enough": task(range(9)), "few": task(eight)}, 9)


def test_requests_at_once() -> None:
    """A text that is no number was once an error of `int`, and 4.5 was 4."""
    assert [side_by_side(size, 3) for size in (2, "2", "auto", "auto:4")] == [2, 2, 3, 3]
    assert side_by_side("auto") == 8
    for size in ("x", 4.5, "4.5", 0, None, "auto4"):
        with pytest.raises(ValueError, match='batch_size=.* must be a whole number of 1 or more, or "auto"'):
            side_by_side(size)
    with pytest.raises(ValueError, match="max_batch_size=0 must be"):
        side_by_side("auto", 0)


def test_eval_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "llama.lm_eval_model", raising=False)
    with pytest.raises(ValueError, match=r"tasks need lm-evaluation-harness: pip install 'llama\[eval\]'"):
        command("eval", tasks="hellaswag")
