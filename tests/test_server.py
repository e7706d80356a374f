"""The server: what clients of OpenAI's API get from it, what it refuses, and what happens when they leave."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Optional

import pytest
import torch
from conftest import ROOT
from forks import Forks
from helpers import TORCHRUN, command, environment

from llama import Llama

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
import fuzz_server  # noqa: E402
from serving import Served, served  # noqa: E402

from llama import Tokenizer  # noqa: E402
from llama.completion import Completions  # noqa: E402
from llama.infilling import infilling_ids, infilling_prompts  # noqa: E402
from llama.options import Asked, Prompts  # noqa: E402
from llama.server import app, bodies, serving  # noqa: E402
from llama.server.app import Settings  # noqa: E402
from llama.server.replies import by_text, raw  # noqa: E402
from llama.server.serving import LOCAL_NAMES  # noqa: E402
from llama.server.stepper import Ended, Stepper  # noqa: E402
from llama.system.launch import Launch  # noqa: E402
from llama.tokenizer import AddedToken  # noqa: E402

STORY = "Once upon a time"
ASKED: Any = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama.build(max_seq_len=128, max_batch_size=3, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def server(llama: Llama) -> Iterator[Served]:
    with served(llama, alive=0.05) as it:
        yield it


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as it:
        yield it


@pytest.fixture(scope="module")
def http(server: Served) -> Iterator[Any]:
    with httpx.Client(base_url=server.url, timeout=60) as it:
        yield it


def test_chat(client: Any, llama: Llama) -> None:
    """A reply is what Python gives, whole and in pieces; the usage counts what was read and written."""
    ours = llama.chat_completion([ASKED], 0, max_gen_len=20)[0]
    whole = client.chat.completions.create(model="demo", messages=ASKED, temperature=0, max_tokens=20)
    assert whole.choices[0].message.content == ours["generation"]["content"]
    assert whole.choices[0].finish_reason == ours["finish_reason"]
    assert re.fullmatch("chatcmpl-[0-9a-f]{24}", whole.id)
    assert (whole.object, whole.model) == ("chat.completion", "demo")
    assert 0 <= time.time() - whole.created < 3600
    read = len(llama.chat_format.encode_dialog(ASKED, llama.tokenizer))
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (read, 20, read + 20)
    usage = {"include_usage": True}
    events = list(
        client.chat.completions.create(
            model="demo", messages=ASKED, temperature=0, max_completion_tokens=20, stream=True, stream_options=usage
        )
    )
    *pieces, last = events
    assert {(event.object, event.id == events[0].id) for event in events} == {("chat.completion.chunk", True)}
    assert {event.usage for event in pieces} == {None}
    assert "".join(event.choices[0].delta.content or "" for event in pieces) == ours["generation"]["content"]
    assert [event.choices[0].delta.role for event in pieces] == ["assistant", *[None] * (len(pieces) - 1)]
    assert [event.choices[0].finish_reason for event in pieces] == [*[None] * (len(pieces) - 1), ours["finish_reason"]]
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (read, 20)
    long: Any = [{"role": "user", "content": "Tell me of a dog, and of a cat. " * 6}]
    asked = {"model": "demo", "messages": long, "max_tokens": 1}
    cached = [client.chat.completions.create(**asked).usage.prompt_tokens_details.cached_tokens for _ in range(2)]
    assert cached[0] == 0
    assert cached[1] > 32


@pytest.mark.parametrize("asynchronous", [False, True])
def test_completions_go_on_from_the_prompt(asynchronous: bool, server: Served, client: Any, llama: Llama) -> None:
    """With the space between two words, where Meta's completion begins without one; for texts and for ids."""
    ids = llama.tokenizer.encode(STORY, bos=True, eos=False)
    ours = llama.text_completion([STORY, "The"], 0, max_gen_len=9, echo=True)

    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as other:
            return await other.completions.create(model="demo", prompt=[STORY, "The"], temperature=0, max_tokens=9)

    if asynchronous:
        reply = asyncio.run(ask())
    else:
        reply = client.completions.create(model="demo", prompt=[STORY, "The"], temperature=0, max_tokens=9)
    assert [prompt + choice.text for prompt, choice in zip([STORY, "The"], reply.choices)] == [
        o["generation"] for o in ours
    ]
    assert [choice.index for choice in reply.choices] == [0, 1]
    by_ids = client.completions.create(model="demo", prompt=ids, temperature=0, max_tokens=9)
    assert by_ids.choices[0].text == reply.choices[0].text
    several = client.completions.create(model="demo", prompt=[ids, ids[:1]], temperature=0, max_tokens=9)
    assert several.choices[0].text == reply.choices[0].text
    assert not several.choices[1].text.startswith(" ")  # nothing stands before it


def test_a_completion_has_16_ids_if_it_says_nothing(client: Any) -> None:
    reply = client.completions.create(model="demo", prompt=STORY, temperature=0)
    assert (reply.usage.completion_tokens, reply.object) == (16, "text_completion")
    assert re.fullmatch("cmpl-[0-9a-f]{24}", reply.id)


def test_several_answers(client: Any, llama: Llama) -> None:
    """A seed gives the same answers again, each of them another; the prompt is read and counted once."""
    given = {"model": "demo", "messages": ASKED, "n": 3, "seed": -5, "max_tokens": 12}
    one, other = (client.chat.completions.create(**given) for _ in range(2))
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in other.choices]
    assert len(set(texts)) == 3
    assert one.usage.prompt_tokens == len(llama.chat_format.encode_dialog(ASKED, llama.tokenizer))
    assert one.usage.completion_tokens == 36
    unseeded = {
        json.dumps(c.message.content) for c in client.chat.completions.create(**{**given, "seed": None}).choices
    }
    assert unseeded != set(map(json.dumps, texts))


def test_logprobs_of_a_completion(client: Any, llama: Llama) -> None:
    """With echo also the prompt's, as `score` has them: the sums that benchmarks of language models ask for."""
    text = "Once upon a time, there was a dog."
    score = llama.score([text])[0]
    choice = client.completions.create(model="demo", prompt=text, max_tokens=0, echo=True, logprobs=3).choices[0]
    assert choice.text == text
    assert choice.logprobs.tokens == score["tokens"]
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(score["logprobs"][1:], abs=1e-5)
    assert [len(best or ()) for best in choice.logprobs.top_logprobs] == [0, *[3] * (len(score["tokens"]) - 1)]
    ids = llama.tokenizer.encode(text, bos=True, eos=False)
    logits = llama.model(torch.tensor([ids]), 0)[0, :-1]
    for best, expected in zip(choice.logprobs.top_logprobs[1:], torch.log_softmax(logits, -1).topk(3).values):
        assert list(best.values()) == pytest.approx(expected.tolist(), abs=1e-5)
    offsets = choice.logprobs.text_offset
    assert [text[a:b] for a, b in zip(offsets, [*offsets[1:], len(text)])] == score["tokens"]
    ended = client.completions.create(  # lm-evaluation-harness takes all but the last for the prompt's
        model="demo", prompt=text, max_tokens=1, echo=True, logprobs=1, temperature=0, logit_bias={"2": 100}
    ).choices[0]
    assert (ended.text, ended.finish_reason) == (text, "stop")
    assert ended.logprobs.token_logprobs[1:-1] == pytest.approx(score["logprobs"][1:], abs=1e-5)
    assert ended.logprobs.token_logprobs[-1] < 0
    new = client.completions.create(model="demo", prompt=text, max_tokens=4, temperature=0, logprobs=0).choices[0]
    assert "".join(new.logprobs.tokens) == new.text
    assert new.logprobs.top_logprobs is None
    stopped = client.completions.create(
        model="demo", prompt=STORY, max_tokens=9, temperature=0, logprobs=0, stop="little"
    )
    assert "".join(stopped.choices[0].logprobs.tokens) == stopped.choices[0].text == ", there was a "
    stopped = client.completions.create(model="demo", prompt=STORY, max_tokens=9, temperature=0, logprobs=0, stop="s a")
    assert (stopped.choices[0].logprobs.tokens, stopped.choices[0].text) == ([",", " there", " wa"], ", there wa")


@pytest.mark.parametrize("echo", [False, True])
def test_pieces_of_a_completion_are_together_the_whole(echo: bool, client: Any) -> None:
    given = {"model": "demo", "prompt": STORY, "max_tokens": 9, "temperature": 0, "logprobs": 2, "echo": echo}
    whole = client.completions.create(**given).choices[0]
    pieces = [event.choices[0] for event in client.completions.create(**given, stream=True)]
    assert len(pieces) > 5
    assert "".join(piece.text for piece in pieces) == whole.text
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        found = [value for piece in pieces for value in getattr(piece.logprobs, name)]
        assert found == getattr(whole.logprobs, name)


def test_logprobs_of_a_chat(client: Any) -> None:
    given = {"model": "demo", "messages": ASKED, "temperature": 0, "max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    choice = client.chat.completions.create(**given).choices[0]
    content = choice.logprobs.content
    assert "".join(token.token for token in content) == choice.message.content
    assert all(token.logprob == token.top_logprobs[0].logprob for token in content)
    assert bytes(content[1].bytes).decode() == content[1].token == content[1].top_logprobs[0].token
    pieces = [event.choices[0] for event in client.chat.completions.create(**given, stream=True)]
    streamed = [token for piece in pieces for token in piece.logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in content]


def test_the_assistants_last_message_is_continued(client: Any, llama: Llama) -> None:
    dialog: Any = [*ASKED, {"role": "assistant", "content": "Once upon"}]
    ours = llama.chat_completion([dialog], 0, max_gen_len=6, continue_final_message=True)[0]["generation"]["content"]
    given = {"model": "demo", "messages": dialog, "temperature": 0, "max_tokens": 6}
    assert client.chat.completions.create(**given).choices[0].message.content == ours
    more = {"continue_final_message": True, "add_generation_prompt": False}
    assert client.chat.completions.create(**given, extra_body=more).choices[0].message.content == ours
    with pytest.raises(openai.BadRequestError, match="does not fit"):
        client.chat.completions.create(**given, extra_body={"add_generation_prompt": True})


def test_ids_are_told_if_asked_for(http: Any, llama: Llama) -> None:
    body = {"prompt": STORY, "max_tokens": 5, "temperature": 0, "return_token_ids": True}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    ids = llama.tokenizer.encode(STORY, bos=True, eos=False)
    assert choice["prompt_token_ids"] == ids
    assert choice["token_ids"] == llama.generate([ids], 5, 0)[0][0]


def test_answers_of_a_form(client: Any, http: Any) -> None:
    """OpenAI's client makes a schema of a class, and an object of the answer; vLLM's fields for other forms are
    known."""
    pytest.importorskip("llguidance")
    import pydantic

    class Pet(pydantic.BaseModel):
        name: Literal["Tom", "Lily"]
        legs: int = pydantic.Field(ge=2, le=4)

    given = {"model": "demo", "messages": ASKED, "temperature": 1, "max_tokens": 60}
    pet = client.chat.completions.parse(**given, response_format=Pet).choices[0].message.parsed
    assert pet.name in ("Tom", "Lily")
    assert 2 <= pet.legs <= 4
    whole = client.chat.completions.create(**given, response_format={"type": "json_object"}).choices[0]
    assert whole.message.content.lstrip().startswith("{")
    assert whole.finish_reason == "length" or isinstance(json.loads(whole.message.content), dict)
    body = {"prompt": STORY, "max_tokens": 40, "temperature": 1, "n": 3}
    for form, pattern in (({"regex": "[ab]{3} c"}, "[ab]{3} c"), ({"choice": [" yes", "no"]}, " yes|no")):
        for choice in http.post("/v1/completions", json={**body, **form}).json()["choices"]:
            assert re.fullmatch(pattern, choice["text"])
            assert choice["finish_reason"] == "stop"
    for wrong in ({"regex": "("}, {"choice": []}, {"regex": "a", "choice": ["b"]}, {"grammar": "start: ("}):
        assert http.post("/v1/completions", json={**body, **wrong}).status_code == 400


def test_embeddings(client: Any, llama: Llama) -> None:
    """OpenAI's client asks for base64."""
    ours = llama.embed(["a dog", "a cat"])
    theirs = client.embeddings.create(model="demo", input=["a dog", "a cat"])
    assert torch.tensor([each.embedding for each in theirs.data]).equal(ours)
    plain = client.embeddings.create(model="demo", input="a dog", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(ours[0].tolist())
    assert plain.usage.prompt_tokens == len(llama.tokenizer.encode("a dog", bos=True, eos=False))


def test_models_and_tokens(client: Any, http: Any, llama: Llama) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").max_model_len == 128
    ids = llama.tokenizer.encode(STORY, bos=True, eos=False)
    told = http.post("/tokenize", json={"prompt": STORY}).json()
    assert told == {"count": len(ids), "max_model_len": 128, "tokens": ids}
    assert http.post("/tokenize", json={"prompt": STORY, "add_special_tokens": False}).json()["tokens"] == ids[1:]
    messages = http.post("/tokenize", json={"messages": ASKED}).json()["tokens"]
    assert messages == llama.chat_format.encode_dialog(ASKED, llama.tokenizer)
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": STORY}
    told = http.get("/tokenizer_info").json()
    assert told == {
        "tokenizer_class": "LlamaTokenizer", "chat_template": llama.tokenizer.chat_template, "vocab_size": 2048,
        "max_model_len": 128, "bos_token": "<s>", "eos_token": "</s>", "pad_token": None,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": -1,
    }  # fmt: skip
    assert http.get("/health").json() == {"status": "ok"}
    card = client.models.retrieve("demo")
    assert (card.object, card.owned_by) == ("model", "llama")
    assert 0 <= time.time() - card.created < 3600
    assert http.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


WRONG: list[tuple[str, Any, int, str]] = [
    ("/v1/chat/completions", {"messages": ASKED, "tools": [{"type": "function"}]}, 400, "has no format for tools"),
    ("/v1/chat/completions", {"messages": ASKED, "colour": 1}, 400, "unknown colour; there are temperature"),
    (
        "/v1/chat/completions",
        {"messages": ASKED, "temprature": 1},
        400,
        "unknown temprature (did you mean temperature?)",
    ),
    ("/v1/completions", {"prompt": "a", "temprature": 1, "colour": 1}, 400, "unknown colour, temprature; there are"),
    ("/v1/chat/completions", {"messages": ASKED, "model": "gpt-4"}, 404, "no model 'gpt-4' here; this is 'demo'"),
    ("/v1/chat/completions", {"messages": []}, 400, "a list of messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "content of message 0"),
    ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, "alternating"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "reads text"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "[INST]"}]}, 400, "special tags"),
    ("/v1/chat/completions", {"messages": ASKED, "top_logprobs": 2}, 400, "needs logprobs=true"),
    ("/v1/chat/completions", {"messages": ASKED, "logprobs": True, "top_logprobs": 21}, 400, "from 0 to 20"),
    ("/v1/chat/completions", {"messages": ASKED, "max_tokens": 1, "max_completion_tokens": 2}, 400, "two names"),
    ("/v1/chat/completions", {"messages": ASKED, "max_tokens": -1}, 400, "max_tokens=-1 must be"),
    ("/v1/chat/completions", {"messages": ASKED, "temperature": "hot"}, 400, "temperature='hot'"),
    ("/v1/chat/completions", {"messages": ASKED, "temperature": -1}, 400, "temperature=-1"),
    ("/v1/chat/completions", {"messages": ASKED, "n": 129}, 400, "from 1 to 128"),
    ("/v1/chat/completions", {"messages": ASKED, "stop": ["a"] * 17}, 400, "more than 16"),
    ("/v1/chat/completions", {"messages": ASKED, "stream_options": {"include_usage": True}}, 400, "needs stream=true"),
    ("/v1/chat/completions", {"messages": ASKED, "response_format": {"type": "xml"}}, 400, "json_schema"),
    ("/v1/chat/completions", {"messages": ASKED, "logit_bias": {"a": 1}}, 400, "ids as keys"),
    ("/v1/chat/completions", {"messages": ASKED, "logit_bias": {"99999": 1}}, 400, "99999"),
    ("/v1/chat/completions", [1], 400, "must be a JSON object"),
    ("/v1/completions", {"prompt": [5, 99999]}, 400, "outside the vocabulary"),
    ("/v1/completions", {"prompt": {"a": 1}}, 400, "a list of lists of ids"),
    ("/v1/completions", {"prompt": [["a"]]}, 400, "is no whole number"),
    ("/v1/completions", {"prompt": [7] * 200}, 400, "max_seq_len is 128"),
    ("/v1/completions", {"prompt": "a", "best_of": 3}, 400, "best_of"),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "cannot fill in"),
    ("/v1/completions", {"prompt": "a", "seed": 0.5}, 400, "seed=0.5"),
    ("/v1/completions", {"prompt": "a", "stream": "yes"}, 400, "true or false"),
    ("/v1/embeddings", {"input": [[1, 2]]}, 400, "a list of texts"),
    ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, 400, "float or base64"),
    ("/detokenize", {"tokens": [-1]}, 400, "ids from 0"),
    ("/detokenize", {"tokens": [5, 2048]}, 400, "ids from 0 to 2047"),
    ("/tokenize", {}, 400, "give prompt, or messages"),
    ("/nothing", {}, 404, "there is no address '/nothing' here"),
    ("/chat/completions", {}, 404, "no address '/chat/completions' here (did you mean /v1/chat/completions?)"),
    ("/v1/models", {}, 405, "'/v1/models' is not there for POST; use GET or HEAD"),
]


@pytest.mark.parametrize(
    ("good", "wrong"),
    [
        ({"n": 1}, {"n": 0}), ({"n": 128}, {"n": 129}), ({"stop": ["a"] * 16}, {"stop": ["a"] * 17}),
        ({"logprobs": 0}, {"logprobs": -1}), ({"logprobs": 20}, {"logprobs": 21}),
        ({"prompt": ["a"] * 2048}, {"prompt": ["a"] * 2049}), ({"prompt": [[5], "a"]}, {"prompt": [[5], 5]}),
        ({"n": 2, "best_of": 2}, {"n": 2, "best_of": 1}), ({"tools": []}, {"tools": [{}]}),
        ({"modalities": ["text"], "user": "me", "suffix": None}, {"modalities": ["audio"]}),
        ({"stream": True, "stream_options": {"include_usage": False}}, {"stream": True, "stream_options": {"more": 1}}),
        (
            {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
            {"stream_options": {"include_usage": True, "include_obfuscation": False}},
        ),
        ({"stream": False, "stream_options": {}}, {"stream": True, "stream_options": []}),
    ],
)  # fmt: skip
def test_bodies_at_their_bounds(good: Any, wrong: Any, llama: Llama) -> None:
    bodies.read_completion(llama, {"prompt": "a", **good})
    with pytest.raises(bodies.Wrong):
        bodies.read_completion(llama, {"prompt": "a", **wrong})


def test_what_a_body_asks_for(llama: Llama) -> None:
    def read(**body: Any) -> bodies.Request:
        return bodies.read_completion(llama, {"prompt": ["a", "b"], "seed": 3, **body})

    api = {"temperature": 1.0, "top_p": 1.0, "max_gen_len": 16, "logprobs": False, "seed": [3, 4]}
    assert read().asked.options == api
    assert read(top_k=-1).asked.options == api
    assert read(n=2, seed=-1).asked.options == {**api, "n": 2, "seed": [2**62 - 1, 1]}
    asked = read(logprobs=0, stop_token_ids=[7], logit_bias={"5": 1.5}, top_k=4, stream=True, return_token_ids=True)
    assert asked.asked.options == {**api, "logprobs": True, "stop_ids": [7], "logit_bias": {5: 1.5}, "top_k": 4}
    assert asked[1:] == (False, 1, True, False, True, 0, True)
    assert read(logprobs=2).asked.options["logprobs"] == read(logprobs=2).alternatives == 2
    long = [*range(5, 25)]
    assert read(prompt=long).asked.prompts() == Prompts([long], [long[-8:]])  # for the space between two words
    assert read(prompt=long, echo=True).asked.prompts() == Prompts([long])
    chat = [{"messages": ASKED, name: 9} for name in ("max_tokens", "max_completion_tokens")]
    for body in (*chat, {**chat[0], **chat[1]}):
        asked = bodies.read_chat(llama, body)
        assert (asked.asked.options["max_gen_len"], asked.chat, asked.scored, asked.usage) == (9, True, False, False)
    assert bodies.read_chat(llama, {"messages": ASKED}).asked.options.get("max_gen_len") is None


@pytest.mark.parametrize(
    ("given", "form"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array"}}}},
            {"json_schema": {"type": "array"}},
        ),
        ({"json_schema": {"type": "array"}}, {"json_schema": {"type": "array"}}),
        ({"regex": "a"}, {"regex": "a"}),
    ],
)
def test_the_form_that_a_body_asks_for(given: Any, form: Any, llama: Llama) -> None:
    assert bodies.read_completion(llama, {"prompt": "a", **given}).asked.options.get("constraint") == form
    for wrong, told in (
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, 'needs {"json_schema": '),
        ({"response_format": {"type": "json_schema"}}, 'needs {"json_schema": '),
        ({"response_format": "json_object"}, "must be of the type text, json_object or json_schema"),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "an answer has one form, not json_object, regex"),
    ):
        with pytest.raises(bodies.Wrong, match=told):
            bodies.read_completion(llama, {"prompt": "a", **wrong})


def test_a_suffix(tokenizer_path: str) -> None:
    """Texts that are filled in, up to the id that ends that."""
    names = enumerate(["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"], Tokenizer(tokenizer_path).n_words)
    tokenizer = Tokenizer(tokenizer_path, added=[AddedToken(*each) for each in names])
    model: Any = SimpleNamespace(tokenizer=tokenizer)
    asked = bodies.read_completion(model, {"prompt": ["a", "b"], "suffix": "c", "stop_token_ids": [7], "logprobs": 2})
    assert asked.asked.prompts() == infilling_prompts(["a", "b"], ["c", "c"], tokenizer, False)
    assert [*asked.asked.options["stop_ids"]] == [7, infilling_ids(tokenizer).eot]
    assert (asked.chat, asked.scored, asked.alternatives) == (False, True, 2)
    for wrong in ({"suffix": 5}, {"prompt": [[5]]}, {"echo": True}):
        with pytest.raises(bodies.Wrong, match="suffix must be a text that follows prompts of text, without echo"):
            bodies.read_completion(model, {"prompt": "a", "suffix": "c", **wrong})


def test_what_stands_for_an_id(llama: Llama, server: Served) -> None:
    """Bytes of characters, also where a piece has the same text: then the likelier one counts."""
    tokenizer = llama.tokenizer
    byte = tokenizer.sp_model.PieceToId("<0x41>")
    texts = {tokenizer.eos_id: b"", byte: b"A", tokenizer.sp_model.PieceToId("<0xFF>"): b"\xff"}
    assert {i: raw(tokenizer, i) for i in texts} == texts
    own: Any = SimpleNamespace(decode="{0[0]}".format, bos_id=1, eos_id=2)
    assert (raw(own, 5), raw(own, 2)) == (b"5", b"2")
    best: Any = [{"id": byte, "logprob": -1.0}, {"id": tokenizer.sp_model.PieceToId("A"), "logprob": -2.0}]
    assert by_text(tokenizer, best) == {"A": -1.0}


def test_messages(llama: Llama) -> None:
    """Parts of text are joined, and the newer name of the system's role is known; what is empty is not given."""
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]
    written = [{"role": "developer", "content": parts}, {**ASKED[0], "name": None, "tool_calls": []}]
    plain = [{"role": "system", "content": "Be kind."}, ASKED[0]]
    assert bodies.read_tokens(llama, {"messages": written}) == bodies.read_tokens(llama, {"messages": plain})
    for wrong, told in (
        ([5], 'message 0 must be {"role": …, "content": …}, not 5'),
        ([*ASKED, {"content": "a"}], "message 1 must be"),
        ([{"role": 5, "content": "a"}], "message 0 must be"),
        ([{**ASKED[0], "name": "Tom", "audio": 1}], "message 0 has audio, name, for which Llama 2 has no format"),
        ([{"role": "user", "content": [parts[0], "a"]}], "the content of message 0 must be a text or parts of text"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "message 0 has a part of the type 'text'"),
        ("Hi", "messages='Hi' must be a list of messages"),
    ):
        with pytest.raises(bodies.Wrong, match=re.escape(told)):
            bodies.read_tokens(llama, {"messages": wrong})


@pytest.mark.parametrize(("path", "body", "status", "words"), WRONG)
def test_what_is_refused(path: str, body: Any, status: int, words: str, http: Any) -> None:
    reply = http.post(path, json=body)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert words in error["message"]
    assert re.fullmatch("[0-9a-f]{16}", reply.headers["x-request-id"])


@pytest.mark.parametrize(
    ("path", "body", "field", "code"),
    [
        ("/v1/completions", {"prompt": "a", "model": "b"}, "model", "model_not_found"),
        ("/v1/completions", {"prompt": "a", "colour": 1}, "colour", "unknown_field"),
        ("/v1/completions", {"prompt": "a", "temprature": 1, "colour": 1}, "colour", "unknown_field"),
        ("/v1/completions", {"prompt": "a", "audio": 1}, "audio", "unsupported"),
        ("/v1/completions", {"prompt": "a", "n": 0}, "n", None),
        ("/v1/embeddings", {"input": 5}, "input", None),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, None, None),
    ],
)
def test_the_field_that_is_wrong(path: str, body: Any, field: Optional[str], code: Optional[str], http: Any) -> None:
    error = http.post(path, json=body).json()["error"]
    assert (error["param"], error["code"]) == (field, code)


@pytest.mark.parametrize(
    ("given", "kept"), [("a" * 128, True), ("a" * 129, False), ("a b", False), ("a1_.:/+=-", True), ("", False)]
)
def test_the_number_of_a_request(given: str, kept: bool, http: Any) -> None:
    """The client's own if it can stand in a log."""
    told = http.get("/health", headers={"x-request-id": given}).headers["x-request-id"]
    assert told == given if kept else re.fullmatch("[0-9a-f]{16}", told)


def test_bodies_that_are_none(http: Any) -> None:
    """What is no JSON, what a page of another site could send unasked, what is too long."""
    kind = {"content-type": "application/json"}
    assert http.post("/v1/completions", content=b"{", headers=kind).status_code == 400
    assert http.post("/v1/completions", content=b"[" * 100_000, headers=kind).status_code == 400
    assert http.post("/v1/completions", content=b'{"prompt": "a"}').status_code == 415
    for more, status in ((0, 400), (1, 413)):
        assert http.post("/v1/completions", content=b" " * (8 * 2**20 + more), headers=kind).status_code == status
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize"):
        assert http.get(path).status_code == 405


def test_a_body_that_does_not_end(http: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_SECONDS", 0.05)
    answered, answer_to = threading.Event(), app.answer_to
    monkeypatch.setattr(app, "answer_to", lambda *given: answered.set() or answer_to(*given))

    def body() -> Iterator[bytes]:
        yield b"{"
        answered.wait(20)

    reply = http.post("/v1/completions", content=body(), headers={"content-type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["message"]) == (408, "the body did not arrive within 0.05 s")


def test_a_stream_keeps_its_connection_alive(http: Any, llama: Llama) -> None:
    """Comments come while others hold the model."""
    body = {"prompt": STORY, "max_tokens": 2, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert (reply.headers["cache-control"], reply.headers["x-accel-buffering"]) == ("no-store", "no")
        lines = reply.iter_lines()
        with llama.lock:
            other = httpx.Client(base_url=http.base_url)
            with other.stream("POST", "/v1/completions", json=body) as waiting:
                assert next(waiting.iter_lines()) == ": still at work"
        assert [line for line in lines if line][-1] == "data: [DONE]"
        other.close()


def free(server: Served, seconds: float = 20) -> bool:
    """Whether nothing runs any more, within some time."""
    until = time.monotonic() + seconds
    while (server.stepper.rows or server.server.llama._scheduler.rows) and time.monotonic() < until:
        time.sleep(0.005)
    return not server.stepper.rows and not server.server.llama._scheduler.rows


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(stream: bool, server: Served, llama: Llama) -> None:
    """Within one step: nobody steps for the one that left."""
    body = {"prompt": STORY, "max_tokens": 120, "stream": stream, "temperature": 0, "logit_bias": {"2": -100}}
    steps = []
    decode = llama._engine.decode

    def slow(*arguments: Any) -> Any:
        steps.append(time.monotonic())
        time.sleep(0.02)
        return decode(*arguments)

    llama._engine.decode = slow  # type: ignore[method-assign]
    try:
        with httpx.Client(base_url=server.url, timeout=0.2) as leaving:
            if stream:
                with leaving.stream("POST", "/v1/completions", json=body) as reply:
                    next(reply.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    leaving.post("/v1/completions", json=body)
        left = time.monotonic()
        assert free(server)
    finally:
        llama._engine.decode = decode  # type: ignore[method-assign]
    assert len(steps) < 60
    assert all(step < left + 0.5 for step in steps)


def test_a_full_queue(llama: Llama) -> None:
    """As many as may wait do; the next is told to come again."""
    with served(llama, max_waiting=2) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        with llama.lock:
            began = [httpx.Client(base_url=server.url, timeout=60) for _ in range(5)]
            streams = [each.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True}) for each in began]
            replies = [stream.__enter__() for stream in streams]
            full = http.post("/v1/completions", json={"prompt": "a"})
            assert (full.status_code, full.headers["retry-after"]) == (429, "1")
            error = full.json()["error"]
            assert (error["type"], error["param"], error["code"]) == ("rate_limit_error", None, "queue_full")
            numbers = http.get("/metrics").text
            assert "llama_answers_running 3.0" in numbers
            assert "llama_answers_waiting 2.0" in numbers
        assert all(list(reply.iter_lines())[-2] == "data: [DONE]" for reply in replies)
        for each in began:
            each.close()
        numbers = http.get("/metrics").text
        assert 'llama_requests_total{path="/v1/completions",status="429"} 1.0' in numbers
        assert "llama_generated_tokens_total 80.0" in numbers
        assert "llama_prompt_tokens_total 10.0" in numbers
        assert "llama_cached_tokens_total 0.0" in numbers
        assert "llama_first_token_seconds_count 5.0" in numbers
        gaps = re.search(r"llama_gap_seconds_count ([\d.]+)", numbers)
        assert gaps is not None
        assert 0 < float(gaps[1]) <= 75
        bounds = ["0.001", "0.003", "0.01", "0.03", "0.1", "0.3", "1.0", "3.0", "10.0", "30.0", "100.0", "+Inf"]
        for name in ("first_token", "gap", "request"):
            found = re.findall(rf'llama_{name}_seconds_bucket{{le="([^"]+)"', numbers)
            assert found[: len(bounds)] == bounds
        assert 'llama_request_seconds_count{path="/v1/completions"} 6.0' in numbers


def test_keys_hosts_and_pages_of_other_sites(llama: Llama) -> None:
    settings = {"key": "sesame", "hosts": LOCAL_NAMES, "origins": ["https://good.example"]}
    with served(llama, **settings) as server, httpx.Client(base_url=server.url) as http:
        refused = http.get("/v1/models")
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
        assert http.get("/v1/models", headers={"authorization": "Bearer guess"}).status_code == 401
        assert http.get("/v1/models", headers={"authorization": "Basic sesame"}).status_code == 401
        for key in ("Bearer sesame", "bearer  sesame"):
            assert http.get("/v1/models", headers={"authorization": key}).status_code == 200
        assert http.get("/").status_code == 200
        assert http.get("/health").status_code == 200
        assert http.get("/health", headers={"host": "[::1]:8000"}).status_code == 200
        reply = http.get("/health", headers={"host": "evil.example"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "wrong_host")
        for origin, told in (("https://good.example", "https://good.example"), ("https://evil.example", None)):
            reply = http.options("/v1/models", headers={"origin": origin, "access-control-request-method": "GET"})
            assert reply.headers.get("access-control-allow-origin") == told
        other = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
        with other, pytest.raises(openai.AuthenticationError, match="wants its key"):
            other.models.list()


def test_a_model_that_fails(http: Any, server: Served, llama: Llama, caplog: pytest.LogCaptureFixture) -> None:
    """Those whom it concerns are told, whole or within a stream, without a word of the reason; the log has it."""
    decode = llama._engine.decode

    def broken(*_: Any) -> Any:
        raise RuntimeError("a secret of the house")

    llama._engine.decode = broken  # type: ignore[method-assign]
    try:
        reply = http.post("/v1/completions", json={"prompt": STORY}, headers={"x-request-id": "mine-1"})
        streamed = http.post("/v1/completions", json={"prompt": STORY, "stream": True})
    finally:
        llama._engine.decode = decode  # type: ignore[method-assign]
    assert (reply.status_code, reply.headers["x-request-id"]) == (500, "mine-1")
    assert "mine-1" in reply.json()["error"]["message"]
    assert "secret" not in reply.text + streamed.text
    assert '"type":"server_error"' in streamed.text
    assert "a secret of the house" in caplog.text
    assert free(server)
    assert http.post("/v1/completions", json={"prompt": STORY, "max_tokens": 3, "temperature": 0}).status_code == 200


def test_texts_that_fail(http: Any, server: Served, caplog: pytest.LogCaptureFixture) -> None:
    """A tokenizer of the user's own may raise anything: that answer fails, and the others go on."""

    def broken(*_: Any) -> None:
        raise RuntimeError("no such piece")

    body = {"prompt": STORY, "max_tokens": 3, "temperature": 0}
    fine = http.post("/v1/completions", json=body).json()["choices"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Completions, "add", broken)
        assert http.post("/v1/completions", json=body).status_code == 500
    assert "no such piece" in caplog.text
    assert http.post("/v1/completions", json=body).json()["choices"] == fine
    with pytest.MonkeyPatch.context() as patch:  # an answer that has begun cannot become another one
        patch.setattr(app, "_count", broken)
        with pytest.raises(httpx.RemoteProtocolError):
            http.post("/v1/completions", json={**body, "stream": True}, headers={"x-request-id": "mine-2"})
    assert "request mine-2 broke while it was answered" in caplog.text
    assert free(server)


def test_answers_that_come_too_late(llama: Llama) -> None:
    """What ends the thread ends them too."""
    stepper = Stepper(1, 1)
    _, running = llama.begin(Asked(lambda: Prompts([[1]]), {"max_gen_len": 1}), streams=False)
    ended = Ended()
    stepper.end(ended)
    stepper.end(ValueError("another"))
    stepper.submit(running, False)
    stepper._run()
    assert running.call.error is stepper.error is ended
    assert (stepper._running, llama._scheduler.rows) == ({}, [])


def test_the_readmes_curl(server: Served) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall("^curl .*$", readme, flags=re.MULTILINE)
    told = subprocess.run(
        ["bash", "-c", command.replace("http://127.0.0.1:8000", server.url)], capture_output=True, check=True
    )
    assert json.loads(told.stdout)["choices"][0]["message"]["content"]


def test_every_field_is_written_down() -> None:
    page = (ROOT / "docs/SERVING.md").read_text(encoding="utf-8")
    fields = {*bodies.CHAT, *bodies.COMPLETION, *bodies.IGNORED, *bodies.REFUSED}
    assert fields <= set(re.findall(r"`(\w+)`", page))


def test_bodies_that_nobody_has_thought_of(llama: Llama) -> None:
    """A share of what `fuzz_server.py` does."""
    fuzz_server.fuzz(llama, 60, start=7)


def test_a_thread_that_is_gone(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it: what runs fails, and what comes is refused."""
    with served(llama) as server, httpx.Client(base_url=server.url, timeout=10) as http:

        def gone() -> None:
            raise SystemExit("a plug was pulled")

        monkeypatch.setattr(server.stepper, "_step", gone)
        assert http.post("/v1/completions", json={"prompt": STORY}).status_code == 500
        assert http.post("/v1/completions", json={"prompt": STORY}).status_code == 503
        assert http.get("/health").status_code == 503


def test_one_line_for_each_request(http: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Without the prompt."""
    with caplog.at_level(logging.INFO, "llama.server"):
        http.post("/v1/completions", json={"prompt": "my secret diary", "max_tokens": 3, "temperature": 0})
    (line,) = [record.getMessage() for record in caplog.records if record.name == "llama.server"]
    assert line.startswith("POST /v1/completions 200 ")
    assert line.endswith(" generated=3")
    assert "secret" not in line


@contextmanager
def process(*options: str, ranks: int = 1, **more: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of its own, and where it listens."""
    start = [sys.executable] if ranks == 1 else [*TORCHRUN, "--nproc_per_node", str(ranks)]
    words = [*start, "-m", "llama", "serve", "--port", "0", "--device", "cpu", "--dtype", "float32", *options]
    running = subprocess.Popen(
        words, env=environment(), stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent, **more
    )
    assert running.stderr is not None
    try:
        url: Optional[str] = None
        for line in running.stderr:
            if " listens on " in line:
                url = line.split()[-1]
                break
        assert url is not None
        yield running, url
    finally:
        running.kill()
        running.stderr.close()
        running.wait()


Found = dict[str, Any]


@pytest.fixture
def asked(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> Found:
    """What the command asks of `Llama.build` and of the server; neither is run."""
    found: Found = {}
    monkeypatch.delenv("LLAMA_API_KEY", raising=False)
    monkeypatch.setattr(Llama, "build", lambda **options: found.update(build=options) or llama)
    monkeypatch.setattr(serving, "check_place", lambda *place: found.update(checked=place))

    def serve(model: Llama, settings: Settings, *how: Any) -> None:
        assert model is llama
        found.update(settings=settings, how=how)

    monkeypatch.setattr(serving, "serve", serve)
    return found


def test_the_command(asked: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a key this machine alone is answered, and by names of its own: else pages of other sites, whose names
    lead here, could use it."""
    command("serve")
    assert asked["settings"] == Settings("demo", hosts=["127.0.0.1", "localhost", "[::1]"])
    assert asked["how"] == (*asked["checked"], 30) == ("127.0.0.1", 8000, 30)
    assert asked["build"]["max_batch_size"] == 8
    command("serve", "some/model", host="0.0.0.0", port=65535, max_waiting=0, grace=0, allowed_origins="https://a")
    assert asked["settings"] == Settings("model", max_waiting=0, origins=["https://a"])
    assert asked["how"] == ("0.0.0.0", 65535, 0)
    command("serve", "some/model", api_key="one", served_model_name="other", grace=86400, allowed_origins='["a", "b"]')
    assert asked["settings"] == Settings("other", "one", origins=["a", "b"])
    assert asked["how"][-1] == 86400
    monkeypatch.setenv("LLAMA_API_KEY", "two")
    command("serve")
    assert asked["settings"] == Settings("demo", "two")
    command("serve", api_key="one", host="::1", port=0)
    assert asked["settings"].key == "one"
    monkeypatch.setattr(Launch, "read", lambda: SimpleNamespace(rank=1))
    command("serve", port=1)
    assert asked["checked"] == ("::1", 0)  # the first process alone listens


def test_a_server_without_its_packages(asked: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama.server.serving", None)
    monkeypatch.delattr("llama.server.serving")
    with pytest.raises(ValueError, match=r"a server needs starlette, uvicorn and prometheus-client: pip install 'lla"):
        command("serve")
    assert asked == {}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"port": -1}, "port=-1 must be a whole number from 0 to 65535"),
        ({"port": 65536}, "port=65536 must be"),
        ({"max_waiting": -1}, "max_waiting=-1 must be a whole number of 0 or more"),
        ({"grace": -0.1}, "grace=-0.1 must be a number of seconds, from 0 to 86400"),
        ({"grace": 86400.5}, "grace=86400.5 must be"),
        ({"grace": None}, "grace=None must be"),
    ],
)
def test_what_the_command_refuses(options: dict[str, Any], told: str, asked: Found) -> None:
    with pytest.raises(ValueError, match=told):
        command("serve", **options)
    assert asked == {}


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
     ("192.168.0.1", False), ("::", False), ("example", False)],
)  # fmt: skip
def test_whom_an_address_lets_in(host: str, local: bool, llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has no key and lets others in is told so."""
    said: list[str] = []
    monkeypatch.setattr(serving, "tell", said.append)
    monkeypatch.setattr(serving, "_run", lambda *_: None)
    assert serving.is_local(host) == local
    serving.serve(llama, Settings("demo"), host)
    assert said == ([] if local else [f"anybody who reaches {host} may use this server: pass an api_key to keep "
                                      "others out"])  # fmt: skip
    serving.serve(llama, Settings("demo", key="one"), host)
    assert len(said) == (not local)


def test_a_port_of_a_server_that_has_just_ended() -> None:
    """Its connections are remembered for a minute; the server's own socket may use it all the same."""
    with socket.create_server(("127.0.0.1", 0)) as ended:
        port = ended.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as asked:
            ended.accept()[0].close()
            assert asked.recv(1) == b""
    serving.check_place("127.0.0.1", port)


def test_a_port_that_is_taken_meanwhile(llama: Llama, capfd: pytest.CaptureFixture[str]) -> None:
    """After it was checked, while the model was loaded. The thread that steps ends too."""
    before = set(threading.enumerate())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1, port {port}; pass another --port or --host"):
            serving.serve(llama, Settings("demo"), "127.0.0.1", port)
    assert "ddress already in use" in capfd.readouterr().err
    assert set(threading.enumerate()) <= before


def test_sigterm_lets_running_answers_finish() -> None:
    """It refuses new ones, and ends with status 0."""
    body = {"prompt": STORY, "max_tokens": 300, "temperature": 0, "stream": True, "logit_bias": {"2": -100}}
    with process() as (running, url), httpx.Client(base_url=url, timeout=60) as http:
        with http.stream("POST", "/v1/completions", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            running.send_signal(signal.SIGTERM)
            until = time.monotonic() + 30
            while time.monotonic() < until:
                try:
                    httpx.get(f"{url}/health", timeout=5)
                except httpx.TransportError:
                    break
            told = [line for line in lines if line]
        assert told[-1] == "data: [DONE]"
        assert len(told) > 250
        assert running.wait(30) == 0
        assert running.stderr is not None
        line = r"^[0-9-]{10} [0-9:,]{12} POST /v1/completions 200 [0-9.]+s id=\w+ prompt=5 cached=0 generated=300$"
        assert re.search(line, running.stderr.read(), re.MULTILINE)


ENDS = """
import json, os, signal, sys, threading, time
import httpx
from llama import Llama
from llama.server import serving
from llama.server.app import Settings

llama = Llama.build(max_seq_len=128, device="cpu", dtype="float32", quiet=True)
decode = llama._engine.decode

def slow(*arguments):
    time.sleep(0.05)
    return decode(*arguments)

def ask(url):
    body = {"prompt": "a", "max_tokens": 100, "stream": True, "logit_bias": {"2": -100}}
    with httpx.stream("POST", f"{url}/v1/completions", json=body) as reply:
        assert "server" not in reply.headers  # who attacks it is not told what it runs
        lines = reply.iter_lines()
        next(lines)
        os.kill(os.getpid(), signal.SIGTERM)
        print([line for line in lines if line][-1])

def tell(text):
    print(text)
    client.append(threading.Thread(target=ask, args=[text.split()[-1]]))
    client[0].start()

client = []
llama._engine.decode, serving.tell = slow, tell
serving.serve(llama, Settings("demo"), sys.argv[1], 0, grace=0.2)
client[0].join()
print("ended")
"""


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_what_takes_too_long_at_the_end_is_told_so(host: str, forks: Forks) -> None:
    try:
        serving.check_place(host, 0)
    except ValueError:
        pytest.skip("this machine has no such address")
    ended = forks.run(ENDS, host)
    listens, last, end = ended.stdout.splitlines()
    place = f"[{host}]" if ":" in host else host
    assert re.fullmatch(rf"demo listens on http://{re.escape(place)}:[1-9]\d+", listens)
    error = {"message": "the server ends", "type": "server_error", "param": None, "code": "ending"}
    assert json.loads(last.removeprefix("data: ")) == {"error": error}
    assert (end, ended.returncode) == ("ended", 0)


def test_two_processes(llama: Llama) -> None:
    """They answer as one does; one that dies ends both, and the client is told."""
    with process(ranks=2) as (running, url), httpx.Client(base_url=url, timeout=60) as http:
        replies = [
            http.post("/v1/completions", json={"prompt": p, "max_tokens": 9, "temperature": 0}) for p in (STORY, "The")
        ]
        texts = [reply.json()["choices"][0]["text"] for reply in replies]
        ours = llama.text_completion([STORY, "The"], 0, max_gen_len=9, echo=True)
        assert [STORY + texts[0], "The" + texts[1]] == [each["generation"] for each in ours]
        assert torch.tensor(
            http.post("/v1/embeddings", json={"input": "a dog"}).json()["data"][0]["embedding"]
        ).allclose(llama.embed(["a dog"])[0], atol=1e-4)
        body = {"prompt": STORY, "max_tokens": 400, "temperature": 0, "stream": True, "logit_bias": {"2": -100}}
        with http.stream("POST", "/v1/completions", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            kill_a_rank(running.pid, 1)
            told = [line for line in lines if line]
        assert "server_error" in told[-1]
        assert running.wait(60) != 0


def test_a_process_that_dies_while_nothing_runs() -> None:
    """The others had connected with the first request only: at the end they waited for it until torchrun killed
    them."""
    with process(ranks=2) as (running, _):
        kill_a_rank(running.pid, 1)
        assert running.wait(20) != 0


def kill_a_rank(launcher: int, rank: int) -> None:
    """Kill one of the processes that torchrun has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == launcher and f"RANK={rank}\0".encode() in b"\0" + (folder / "environ").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)
                return
        except (OSError, ValueError):
            continue
    raise AssertionError("no such process")
