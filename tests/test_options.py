"""What callers give as options and ids: numbers of any kind are taken, anything else is told before any work."""

from __future__ import annotations

import inspect
import math
from collections import deque
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama import Llama
from llama.chat import DialogError
from llama.decoding.requests import LEAST_SHARED, Request
from llama.decoding.sampling import Sampling
from llama.options import DEFAULTS, IN_JSON, METAS_OPTIONS, SETTABLE, Options
from llama.system.checks import whole_number

NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def llama(tiny: Path, tokenizer_path: str) -> Llama:
    return Llama.build(str(tiny), tokenizer_path, 64, 2, device="cpu")


def ids(llama: Llama, **options: Any) -> Any:
    chunks = list(llama.stream_text(["the tree"], **{"max_gen_len": 4, "temperature": 0.7, "seed": 1, **options}))
    return [i for chunk in chunks for i in chunk["tokens"]]


def test_every_option_has_one_default() -> None:
    """The same in Python, in the terminal and in a line of --jsonl, where some have no place."""
    assert DEFAULTS == {
        "temperature": 0.6, "top_p": 0.9, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "logit_bias": None, "max_gen_len": None, "logprobs": False, "stop": None,
        "stop_ids": (),
        "seed": None, "draft": None, "n": 1, "constraint": None,
    }  # fmt: skip
    assert DEFAULTS.keys() == {*Options.__annotations__, *METAS_OPTIONS}
    for call in (Llama.text_completion, Llama.chat_completion, Llama.stream_text, Llama.stream_chat, Llama.steps):
        parameters = inspect.signature(call).parameters
        assert {name: parameters[name].default for name in METAS_OPTIONS} == {
            name: DEFAULTS[name] for name in METAS_OPTIONS
        }
    assert set(IN_JSON) == DEFAULTS.keys() - {"logprobs", "logit_bias", "seed", "n"}
    assert set(SETTABLE) == DEFAULTS.keys() - {"logprobs", "logit_bias", "stop_ids", "draft", "n", "constraint"}


def test_a_request_by_default() -> None:
    """Takes the best ids, ends at none of them, reports no numbers, and has lists of its own."""
    request = Request([1, 5], 3)
    assert (request.draws, request.sampling, request.seed, request.ends) == (
        False,
        Sampling(temperature=0),
        None,
        frozenset(),
    )
    assert (request.logprobs, request.alternatives, request.scored) == (False, 0, ())
    assert (request.draft, request.grammar, request.least_shared) == (None, None, LEAST_SHARED)
    assert Request([1, 5], 3, Sampling(1e-9)).draws


@pytest.mark.parametrize("penalty", [1e10, 1e-10])
def test_bounds_are_within(penalty: float) -> None:
    sampling = Sampling(0.0, 1.0, 0, 1.0, penalty, -1e10, 1e10)
    assert (sampling.top_p, sampling.min_p, sampling.repetition_penalty) == (1.0, 1.0, penalty)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1e10, 1e10)


@pytest.mark.parametrize(
    ("name", "none"), [("repetition_penalty", 1), ("presence_penalty", 0), ("frequency_penalty", 0)]
)
def test_which_penalties_count_ids(name: str, none: float) -> None:
    counts = [Sampling(0, **{name: none + more}).counts_ids for more in (-0.5, 0, 0.5, 1)]  # type: ignore[arg-type]
    assert counts == [True, False, True, True]


WRONG: list[tuple[dict[str, Any], str]] = [
    *[({name: value}, f"{name}=.* must be a number of 0 or more")
      for name in ("temperature", "top_p", "min_p", "repetition_penalty")
      for value in (NAN, -INF, -1, "0.5", None, True, np.True_, [1], 10**400, torch.tensor([0.5]), np.array(NAN), 1j)],
    ({"temperature": INF}, "temperature=inf has no distribution"),
    ({"top_p": 1.01}, ("top_p=1.01 must be at most 1, which keeps all "
                      "ids")), ({"top_p": INF}, "top_p=inf must be at most 1"),
    ({"min_p": INF}, "min_p=inf must be at most 1"), ({"min_p": 1.01}, "min_p=1.01 must be at most 1"),
    *[({"repetition_penalty": v}, "repetition_penalty=.* must be above 0, from 1e-10 to 1e.10; 1 does nothing")
      for v in (0, 1e-45, 1e-11, 1e11, 1e300, INF)],
    *[({name: v}, f"{name}=.* must be a number from -1e.10 to 1e.10; 0 does nothing")
      for name in ("presence_penalty", "frequency_penalty") for v in (-1.1e10, 1.1e10, NAN, INF, "1", None, True)],
    *[({"top_k": v}, ("top_k=.* must be a whole number of 0 or "
                     "more")) for v in (-1, 1.0, "5", None, True, torch.tensor(True))],
    *[({"max_gen_len": v}, "max_gen_len=.* must be a whole number of 0 or more")
      for v in (-1, 1.5, "3", True, NAN, -(10**5000))],
    *[({"logprobs": v}, "logprobs=.* must be True, False, or how many") for v in (-1, 1.5, "3", None, np.False_)],
    *[({"logit_bias": {5: v}}, r"logit_bias\[5\]=.* must be a number of at most 1e.10, or -inf")
      for v in (NAN, INF, "x", None, True, [1], 1e39, 1e308, 10**400)],
    *[({"logit_bias": {k: 1.0}}, ("logit_bias has the key .*ids are whole numbers, as "
                                 "in")) for k in ("5", True, 1.0, None)],
    ({"logit_bias": {3: 1.0, "5": 1.0}}, "logit_bias has the key '5'"),
    ({"logit_bias": {"5": 1.0, 3: "x"}}, "logit_bias has the key '5'"),
    *[({"logit_bias": {k: 1.0}}, "logit_bias has the id .*; ids go from 0 to 399") for k in (-1, 400, 10**5000)],
    *[({"logit_bias": v}, "logit_bias=.* must map ids") for v in ([1], "x", 5, {5})],
    ({"logit_bias": dict.fromkeys(range(400), -1e38)}, "forbids every id"),
    *[({"seed": v}, r"seed=.* must be a whole number from 0 to 2\*\*63 - 1")
      for v in (1.5, "1", -1, 2**63, True, [True], [1.0], {1}, NAN, 10**5000)],
    ({"seed": iter([1])}, "seed=.* must be a whole number"), ({"seed": {1: 2}}, ("seed=.* must be a whole number, or "
                                                                                "one for")),
    *[({"seed": v}, "seeds for 1 prompt; give one seed, or") for v in ([], [1, 2], np.arange(2))],
    *[({"stop": v}, "stop=.* must be texts") for v in (5, "", ["a", ""], [1], b"x", {"a": 1}, iter(["a"]), [["a"]],
        1.5)],
    *[({"stop_ids": v}, "stop_ids=.* must be ids")
      for v in (5, "5", [400], [-1], ["a"], [1.0], [True], {1: 2}, iter([1]), [10**30])],
    *[({"draft": v}, "draft=.* must be True, False or None") for v in ("yes", 2, 1, [])],
    ({"temprature": 1}, (r"unknown option temprature \(did you mean temperature\?\); there are stop, .*, temperature, "
                         "top_p, max_gen_len, logprobs")),
    ({"max_tokens": 1}, r"unknown option max_tokens \(did you mean max_gen_len\?\); there are"),
    ({"x": 1}, "unknown option x; there are stop"),
]  # fmt: skip


def test_wrong_options_are_told_in_every_way(llama: Llama) -> None:
    """Of a completion, a stream, and of a chat when it is made."""
    for options, message in WRONG:
        for call in (
            lambda o: llama.stream_text(["a"], **o),
            lambda o: llama.continue_ids([1], **o),
            lambda o: llama.chat(**o),
            lambda o: llama.chat().send("a", **o),
        ):
            with pytest.raises(ValueError, match=message):
                call(options)


SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": np.float32(0.5), "top_p": np.float64(0.5)}, {"temperature": 0.5, "top_p": 0.5}),
    ({"temperature": torch.tensor(0.5), "min_p": np.array(0.25)}, {"temperature": 0.5, "min_p": 0.25}),
    (
        {"temperature": Fraction(1, 2), "repetition_penalty": np.float16(1.5)},
        {"temperature": 0.5, "repetition_penalty": 1.5},
    ),
    (
        {"presence_penalty": torch.tensor(0.5), "frequency_penalty": Fraction(1, 2)},
        {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    ),
    ({"top_k": torch.tensor(5), "seed": np.uint64(7)}, {"top_k": 5, "seed": 7}),
    ({"seed": range(3, 4)}, {"seed": 3}),
    ({"max_gen_len": np.int8(3), "stop_ids": deque([9])}, {"max_gen_len": 3, "stop_ids": [9]}),
    ({"logit_bias": {np.int64(5): np.float32(2)}}, {"logit_bias": {5: 2}}),
    ({"logprobs": np.int64(2)}, {"logprobs": 2}),
    ({"stop": {"the"}}, {"stop": "the"}),
    # At the ends of the ranges nothing overflows into nonsense.
    ({"temperature": 5e-324}, {"temperature": 0}),
    ({"temperature": 1e-30, "repetition_penalty": 1e10}, {"temperature": 0, "repetition_penalty": 1e10}),
    ({"temperature": 1e-30, "repetition_penalty": 1e-10}, {"temperature": 0, "repetition_penalty": 1e-10}),
    ({"temperature": 1e-30, "logit_bias": {5: 1e10}}, {"temperature": 0, "stop_ids": [], "logit_bias": {5: 1e5}}),
    ({"temperature": 0.7, "logit_bias": {5: 1e10, 6: -3.4e38, 7: -1e300}}, {"temperature": 0, "logit_bias": {5: 1e5}}),
]


@pytest.mark.parametrize(
    "options",
    [{"top_p": 0}, {"top_p": 1}, {"min_p": 0}, {"min_p": 1}, {"temperature": 0}, {"repetition_penalty": 1e-10},
     {"repetition_penalty": 1e10}, {"top_k": 0}, {"max_gen_len": 0}, {"logprobs": 0},
     {"logit_bias": {0: 1e10, 399: -1e10}},
     {"seed": 0}, {"seed": 2**63 - 1}, {"stop_ids": [0, 399]}, {"logit_bias": dict.fromkeys(range(400), -1e10)}],
)  # fmt: skip
def test_options_at_their_bounds(options: dict[str, Any], llama: Llama) -> None:
    llama.check_options(options)


def test_whole_numbers_at_their_bounds() -> None:
    assert [whole_number("n", n, 2, 5) for n in (2, 5)] == [2, 5]
    assert whole_number("n", 10**9, 2) == 10**9
    for n in (1, 6):
        with pytest.raises(ValueError, match=f"n={n} must be a whole number from 2 to 5"):
            whole_number("n", n, 2, 5)


def test_what_a_bias_forbids() -> None:
    """1e30 less is still a number, so that a sum stays finite; more forbids the id."""
    given = Sampling(logit_bias={3: -1e30, 4: -1.1e30})
    given.check_bias(5)
    bias = given.bias(5, torch.device("cpu"))
    assert bias is not None
    assert bias.isfinite().tolist() == [True, True, True, True, False]


def test_numbers_of_any_kind(llama: Llama) -> None:
    for given, plain in SAME:
        assert ids(llama, **given) == ids(llama, **plain), given
    penalty: Any = Fraction(1, 2)
    assert repr(Sampling(presence_penalty=penalty)) == repr(Sampling(presence_penalty=0.5))  # so processes compare them


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        *[([value], "prompt_tokens must be lists of ids, and .* is no (list; put one prompt into a list|whole number)")
          for value in ([True], [1.0], ["a"], [None], {1: 2}, {1}, 5, torch.tensor(5), [torch.tensor(True)], "ab")],
        *[([[value]], "id .*, which is outside the vocabulary; ids go from 0 to 399") for value in (-1, 400, 2**70)],
    ],
)  # fmt: skip
def test_wrong_prompts(prompts: Any, message: str, llama: Llama) -> None:
    with pytest.raises(ValueError, match=message):
        llama.generate(prompts, 1)


def test_what_is_to_be_a_list(llama: Llama) -> None:
    """The place is named, and the way out: a list in a list, a tensor's own list, a loader."""
    for call in (llama.text_completion, llama.stream_text, llama.score):
        for prompts in ("a", b"a", None, {"a"}):
            with pytest.raises(ValueError, match="prompts is a list of texts, not .*; put one text into a list"):
                list(call(prompts))
        with pytest.raises(ValueError, match=r"prompts\[1\] is None, and not a text; prompts is a list of texts"):
            list(call(["a", None]))  # type: ignore[list-item]
    with pytest.raises(ValueError, match="not Tensor; pass its .tolist()"):
        llama.generate(torch.tensor([[1, 5]]), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a dialog is a list of messages, not dict; put its messages into a list"):
        llama.chat_completion([{"role": "user", "content": "a"}])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="dialogs is a list of dialogs, not dict; put one into a list"):
        llama.chat_completion({"role": "user", "content": "a"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model='7b/' is no Transformer; Llama.build\('7b/'\) loads a folder"):
        Llama("7b/", llama.tokenizer)  # type: ignore[arg-type]
    for ids in ("ab", [1.0], [True], [None]):
        with pytest.raises(ValueError, match="is no id; ids are whole numbers, in a list"):
            llama.tokenizer.decode(ids)  # type: ignore[arg-type]
    assert llama.tokenizer.decode(torch.tensor([5, 6])) == llama.tokenizer.decode([5, 6])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([1, 5]), r"must be ids in an int64 tensor of shape \(batch, positions\), not .* shape \(2,\)"),
        (torch.tensor([[1.0]]), "not a Tensor of torch.float32"), ([[1]], "not a list"),
        (torch.tensor([[True]]), "torch.bool"),
        (torch.tensor([[1, 400]]), "the id 400 is outside the vocabulary; ids go from 0 to 399"),
        (torch.tensor([[-1]]), "the id -1 is outside the vocabulary"),
    ],
)  # fmt: skip
def test_wrong_tokens_of_the_model(tokens: Any, message: str, llama: Llama) -> None:
    with pytest.raises(ValueError, match=message):
        llama.model(tokens, 0)
    for start in (1.0, "0", None, True):
        with pytest.raises(ValueError, match="start_pos=.* must be a whole number"):
            llama.model(torch.tensor([[1]]), start)


def test_wrong_arguments_of_other_calls(llama: Llama, tiny: Path) -> None:
    for name, value in [
        ("max_seq_len", 2**63),
        ("max_seq_len", 1.0),
        ("max_batch_size", True),
        ("seed", 1.5),
        ("seed", 2**64),
    ]:
        with pytest.raises(ValueError, match=f"{name}=.* must be a whole number of"):
            Llama.build(str(tiny), **{name: value})
    with pytest.raises(ValueError, match="stride=1.0 must be a whole number from 1"):
        llama.score(["a"], stride=1.0)  # type: ignore[arg-type]
    for layer in (True, -2, 3):
        with pytest.raises(ValueError, match=f"layer={layer} must be from 0 to 2, or -1 for all"):
            llama.embed(["a"], layer=layer)
    assert torch.equal(llama.embed(["a"], layer=np.int64(1)), llama.embed(["a"], layer=1))  # type: ignore[arg-type]
    stride: Any = np.int32(9)
    assert llama.score(["the tree"], stride=stride) == llama.score(["the tree"], stride=9)
    with pytest.raises(DialogError, match="message 0 must be"):
        llama.chat_completion([[[[]]]])  # type: ignore[list-item]
