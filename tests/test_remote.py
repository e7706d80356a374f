"""`chat --url` and `complete --url`, against a stand-in for a server: ours is one of many that they may meet."""

from __future__ import annotations

import io
import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import command
from openai_server import LIMIT, Error, OpenAI

from llama import Llama
from llama.commands import client, conversation, remote


@pytest.fixture(scope="module")
def one() -> Iterator[OpenAI]:
    server = OpenAI()
    yield server
    server.close()


@pytest.fixture
def server(one: OpenAI, monkeypatch: pytest.MonkeyPatch) -> OpenAI:
    one.reset()

    def build(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Llama, "build", build)
    monkeypatch.delenv("LLAMA_API_KEY", raising=False)
    return one


def chat(server: OpenAI, monkeypatch: pytest.MonkeyPatch, *lines: str, **options: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    command("chat", **{"url": server.address, **options})


def test_a_talk(server: OpenAI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers = [["Once ", "upon\na", " time 🦙"], ["No."], ["Yes."], ["!"]]
    lines = [
        "Hi",
        "/stats",
        "Really?",
        "/undo",
        "/set top_k 5",
        "/set seed 3",
        "Really?",
        "/continue",
        "/stats",
        "/help",
    ]
    chat(server, monkeypatch, *lines, system="Be kind.", stop='["x", "y"]', max_gen_len=9)
    out, err = capsys.readouterr()
    assert out == "Once upon\na time 🦙\nNo.\nYes.\n!\n"
    assert f"stand-in at {server.address}\n" in err
    assert f"15 of {LIMIT} tokens (3%), 1 turn" in err
    assert re.search(r"last reply  3 tokens, [\d.]+ a second", err)
    assert f"13 of {LIMIT} tokens" in err
    assert all(f"\n{name}" in err for name in conversation.COMMANDS)
    bodies = [body for path, body in server.asked if path == "/v1/chat/completions"]
    hi = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert bodies[0] == {
        "model": "stand-in", "messages": hi, "temperature": 0.6, "top_p": 0.9, "max_tokens": 9, "stop": ["x", "y"],
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    first = {"role": "assistant", "content": "Once upon\na time 🦙"}
    assert bodies[2]["messages"] == [*hi, first, {"role": "user", "content": "Really?"}]
    assert (bodies[2]["top_k"], bodies[2]["seed"]) == (5, 3)
    assert bodies[3]["messages"][-1] == {"role": "assistant", "content": "Yes."}
    assert (bodies[3]["continue_final_message"], bodies[3]["add_generation_prompt"]) == (True, False)


def test_it_is_kept_and_read_again(
    server: OpenAI, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also what a `ChatSession` saved, whose turns have ids."""
    path = tmp_path / "talk.json"
    chat(server, monkeypatch, "/system Be kind", "Hi", f"/save {path}")
    assert json.loads(path.read_text()) == [
        {"role": "system", "content": "Be kind"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
    ]
    chat(server, monkeypatch, f"/load {path}", "Why?")
    assert [message["role"] for message in server.last["messages"]] == ["system", "user", "assistant", "user"]
    turns = [{"user": "a", "assistant": "b", "ids": [1]}, {"user": "c", "assistant": "d"}]
    path.write_text(json.dumps({"system": None, "turns": turns}))
    bad = {
        "deep": "[" * 9000,
        "list": "[]",
        "number": '{"system": 1, "turns": []}',
        "turn": '{"system": "", "turns": [1]}',
    }
    for name, text in bad.items():
        (tmp_path / name).write_text(text)
    loads = [f"/load {tmp_path / name}" for name in (*bad, "nothing")]
    chat(server, monkeypatch, f"/load {path}", "/drop", *loads, "e", "/clear", "f")
    assert [len(body["messages"]) for _, body in server.asked if body][2:] == [3, 1]
    err = capsys.readouterr().err
    assert "is read: 2 turns" in err
    assert "forgot 1 of 2 turns" in err
    assert err.count("is not a saved session") == 4
    assert "no saved session at" in err


def test_ctrl_c_stops_the_answer(
    server: OpenAI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server hears of it, since the connection closes; what came is kept."""
    server.answers = [["One, ", threading.Event()]]
    talk = remote.RemoteConversation(remote.RemoteChat(client.Server(server.address)))

    def say(text: str) -> None:
        if text == "One, ":
            raise KeyboardInterrupt

    monkeypatch.setattr(conversation, "say", say)
    with pytest.raises(KeyboardInterrupt):
        talk.obey("Count")
    assert server.left.wait(5)
    assert talk.session.turns == [{"user": "Count", "assistant": "One, "}]
    assert "stopped; the reply is kept as far as it came" in capsys.readouterr().err


def test_an_answer_that_is_lost_or_too_long(server: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = client.Server(server.address)
    read = client.HTTPResponse.readline

    def lost(self: Any, size: int) -> bytes:
        line: bytes = read(self, size)
        if b"Hello" in line:
            raise ConnectionResetError(104, "Connection reset by peer")
        return line

    monkeypatch.setattr(client.HTTPResponse, "readline", lost)
    with pytest.raises(ValueError, match=f"the connection to {server.address} was lost: Connection reset by peer"):
        list(ask.stream("/v1/completions", {}, {"prompt": "a"}))
    monkeypatch.undo()
    length = len('data: {"choices": [{"index": 0, "text": "Hello", "finish_reason": null}]}\n')
    for most, right in ((length, True), (length - 1, False)):
        monkeypatch.setattr(client, "MOST_LINE", most)
        server.answers = [["Hello", None]]
        told = "the connection was lost before" if right else f"sends a line of more than {most} bytes"
        with pytest.raises(ValueError, match=told):
            list(ask.stream("/v1/completions", {}, {"prompt": "a"}))


def test_an_error_without_words(server: OpenAI) -> None:
    """As a proxy answers where the server itself is down."""
    for told, words in (
        (b"<html>", "status 502 Bad Gateway"), (b"[]", "status 502 Bad Gateway"), (b'{"error": "down"}', "down"),
        (b'{"error": {"message": "out"}}', "out"), (b'{"error": {}}', ""),
    ):  # fmt: skip
        response: Any = SimpleNamespace(status=502, reason="Bad Gateway", headers={}, read=lambda _, told=told: told)
        ask = client.Server(server.address)
        assert ask._refusal("/a", response) == f"something went wrong in the server: {words}"


def test_https(server: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def connection(host: str, port: int, timeout: float, context: Any) -> Any:
        asked.append((host, port, context.check_hostname))
        raise OSError("no such certificate")

    monkeypatch.setattr(client, "HTTPSConnection", connection)
    with pytest.raises(OSError, match="no such certificate"):
        client.Server("https://here:8443/")
    assert asked == [("here", 8443, True)]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Error(429, "full", {"Retry-After": "3"}), "the server is busy; try again in 3 s"),
        (Error(429, "full"), "the server is busy; try again later"),
        (Error(400, "top_p=\x1b[2J must be less"), r"the server refused this: top_p=\x1b[2J must be less"),
        (Error(502, ""), "something went wrong in the server: status 502 Bad Gateway"),
        (Error(404, "no such model"), "the server does not have this (/v1/chat/completions): no such model"),
        (Error(499, "closed"), "the server refused this: closed"),
        (Error(500, "no memory"), "something went wrong in the server: no memory"),
        (["Half", None], "the connection was lost before the answer ended"),
        (["Half", {"error": {"message": "no memory"}}], "something went wrong in the server: no memory"),
        (["Half", "data: {"], "sends something that is no answer"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_told(
    server: OpenAI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: Any, told: str
) -> None:
    server.answers = [answer]
    chat(server, monkeypatch, "Hi", "/stats", "Again?")
    out, err = capsys.readouterr()
    assert told in err
    half = not isinstance(answer, Error)
    assert out == ("Half\n" if half else "") + "Hello.\n"
    assert len(server.last["messages"]) == (3 if half else 1)
    assert "\x1b[2J" not in err


def test_a_conversation_goes_back_and_forks(server: OpenAI) -> None:
    talk = remote.RemoteChat(client.Server(server.address), "Be kind.", seed=3)
    with pytest.raises(ValueError, match=r"no reply that could go on; send\(\) a message first"):
        talk.continue_reply()
    assert talk.undo() is None
    system = {"role": "system", "content": "Be kind."}
    for word in "abcd":
        list(talk.send(word))
    other = talk.fork()
    assert other.dialog == talk.dialog
    assert talk.undo() == {"user": "d", "assistant": "Hello."}
    talk.drop()
    talk.drop(1)
    assert talk.dialog == [system, {"role": "user", "content": "c"}, {"role": "assistant", "content": "Hello."}]
    list(talk.continue_reply())
    assert talk.turns == [{"user": "c", "assistant": "Hello.Hello."}]
    talk.clear()
    assert (talk.dialog, len(other.turns), other.options) == ([system], 4, {"seed": 3})
    list(other.continue_reply())
    assert server.last["seed"] == 3


def test_the_room_in_words(server: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = client.Server(server.address)
    talk = remote.RemoteConversation(remote.RemoteChat(ask))
    assert (talk.limit, talk.context) == (LIMIT, f"0 of {LIMIT} tokens (0%)")
    list(talk.session.send("a"))
    assert talk.context == f"14 of {LIMIT} tokens (3%)"
    monkeypatch.setattr(ask, "limit", None)
    assert (talk.limit, talk.context) == (0, "14 tokens")


@pytest.mark.parametrize(
    ("models", "asked", "name", "limit"),
    [
        ([{"id": "a", "max_model_len": 9}, {"id": "b", "meta": {"n_ctx_train": 8}}], None, "a", 9),
        ([{"id": "a", "max_model_len": 9}, {"id": "b", "meta": {"n_ctx_train": 8}}], "b", "b", 8),
        ([{"id": "a", "max_model_len": 9}], "c", "c", None),
        ([5, {"id": "a", "max_model_len": 0, "meta": [8]}], None, "a", None),
        ({"id": "a"}, "c", "c", None),
    ],
)
def test_the_model_that_is_asked(server: OpenAI, models: Any, asked: str | None, name: str, limit: int | None) -> None:
    """The first unless one is named; its limit as vLLM and llama.cpp tell it."""
    server.models = models
    found = client.Server(f"{server.address}/v1/", model=asked)
    assert (found.name, found.limit, found.used) == (name, limit, 0)
    assert (found.url, found.base) == (server.address, "")


def test_where_there_is_no_such_server(server: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = OpenAI()
    gone.close()
    with pytest.raises(ValueError, match=r"cannot be reached: Connection refused; is the server running\?"):
        chat(gone, monkeypatch)
    for url in ("ftp://a", "http://", "http://a:b", "http://[", "http://a:0", "http://me@a", "http://a?b", ""):
        with pytest.raises(ValueError, match="must be the address of a server"):
            command("complete", "a", url=url)
    server.pages["/web/v1/models"] = ({"Content-Type": "text/html"}, b"<html>")
    with pytest.raises(
        ValueError, match=r"/web/v1/models answers something else than JSON; is it a server of OpenAI's API\?"
    ):
        command("complete", "a", url=f"{server.address}/web")
    server.models = []
    with pytest.raises(ValueError, match="lists no model; pass --model NAME"):
        command("complete", "a", url=server.address)


def test_a_key(server: OpenAI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    server.key = "s3cret"
    with pytest.raises(ValueError, match="wants an API key; pass --api_key"):
        command("complete", "a", url=server.address)
    with pytest.raises(ValueError, match="refuses the API key"):
        command("complete", "a", url=server.address, api_key="wrong")
    with pytest.raises(ValueError, match="characters that no header can carry"):
        command("complete", "a", url=server.address, api_key="a\nb")
    command("complete", "a", url=server.address.removeprefix("http://") + "/v1/", api_key="s3cret")
    monkeypatch.setenv("LLAMA_API_KEY", "s3cret")
    command("complete", "a", url=server.address)
    assert capsys.readouterr().out == "Hello.\n" * 2


def test_complete(server: OpenAI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All the room there is, as for a model here: the API's own default is 16 tokens."""
    command("complete", "Once upon", url=server.address, echo=True)
    assert server.last == {
        "model": "stand-in", "prompt": "Once upon", "max_tokens": LIMIT - 2, "temperature": 0.6, "top_p": 0.9,
        "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    command(
        "complete", "def f", suffix="return", url=server.address, seed=1, max_gen_len=4, temperature=0, model="other"
    )
    assert {name: server.last[name] for name in ("suffix", "seed", "max_tokens", "temperature", "model")} == {
        "suffix": "return", "seed": 1, "max_tokens": 4, "temperature": 0, "model": "other",
    }  # fmt: skip
    assert capsys.readouterr() == ("Once uponHello.\nHello.\n", "")
    server.answers = [["Hel", {"reason": "length"}], ["lo\n"]]
    for count in (LIMIT - 1, LIMIT):  # of these there is room for one more, and for none
        command("complete", "a " * count, url=server.address)
        assert server.last.get("max_tokens") == (LIMIT - count or None)
    assert capsys.readouterr() == ("Hel\nlo\n", "")
    server.answers = [["Hel", {"reason": "length"}]]
    command("complete", "a", url=server.address, max_gen_len=1)
    assert capsys.readouterr() == ("Hel\n", "")
    server.counts, server.models = False, [{"id": "m", "meta": {"n_ctx_train": 7}}]
    server.answers = [["Hel", {"reason": "length"}]]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe\n")))
    command("complete", url=server.address)
    assert "max_tokens" not in server.last
    assert server.last["prompt"] == "from a pipe"
    assert capsys.readouterr() == (
        "Hel\n",
        "the server ended it at a length of its own; --max_gen_len N asks for another\n",
    )


@pytest.mark.parametrize(
    ("constraint", "fields"),
    [
        (None, {}),
        ({"json_object": True}, {"response_format": {"type": "json_object"}}),
        ({"json_schema": '{"type": "array"}'},
         {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "array"}}}}),
        ({"choice": ["a", "b"]}, {"choice": ["a", "b"]}),
    ],
)  # fmt: skip
def test_a_form(server: OpenAI, constraint: Any, fields: dict[str, Any]) -> None:
    list(client.Server(server.address).stream("/v1/completions", {"constraint": constraint}, {"prompt": "a"}))
    assert {
        name: value for name, value in server.last.items() if name in ("constraint", "response_format", "choice")
    } == fields


def test_chunks(server: OpenAI) -> None:
    """As those of a model here, but that the last one counts the ids, which no server tells."""
    ask = client.Server(server.address)
    text, end = {"index": 0, "tokens": [], "finish_reason": None}, {"index": 0, "text": ""}
    for path in ("/v1/completions", "/v1/chat/completions"):
        server.answers = [["Once ", {"choices": None, "usage": None}, "", "upon"]]
        assert list(ask.stream(path, {}, {"prompt": "a"})) == [
            {**text, "text": "Once "}, {**text, "text": "upon"}, {**end, "tokens": [0] * 3, "finish_reason": "stop"},
        ]  # fmt: skip
        assert ask.used == 15
    for options, reason in (({}, "context"), ({"max_gen_len": 1}, "length")):
        server.answers = [["Hel", {"reason": "length"}]]
        *_, last = ask.stream("/v1/completions", options, {"prompt": "a"})
        assert last == {**end, "tokens": [0], "finish_reason": reason}


@pytest.mark.parametrize(("value", "count"), [(0, 0), (1, 1), (2**24 - 1, 2**24 - 1), (2**24, 0), (-1, 0), (1.5, 0)])
def test_what_counts_as_a_number_of_tokens(value: Any, count: int) -> None:
    assert client.number_of(value) == count


def test_a_full_context_is_told(
    server: OpenAI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers = [["Hel", {"reason": "length"}]] * 2
    chat(server, monkeypatch, "Hi", "/set max_gen_len 5", "Hi")
    err = capsys.readouterr().err
    assert f"the context is full ({LIMIT} tokens): /drop forgets" in err
    assert "stopped at max_gen_len=5" in err


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("chat", {"ckpt_dir": "x"}, "--ckpt_dir is for a model that runs here; leave it out with --url"),
        ("chat", {"max_seq_len": 9}, "--max_seq_len is for"),
        ("complete", {"max_batch_size": 1}, "--max_batch_size is for"),
        ("complete", {"jsonl": "x"}, "--jsonl is for"),
        ("complete", {"device": "None"}, "--device is for"),
        ("chat", {"url": None, "api_key": "x"}, "--api_key is about a server; pass its --url"),
        ("complete", {"url": None, "model": "x"}, "--model is about a server"),
        ("chat", {"top_p": 2}, "top_p=2 must be"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(server: OpenAI, name: str, options: dict[str, Any], told: str) -> None:
    given = {key: value for key, value in {"url": server.address, **options}.items() if value is not None}
    with pytest.raises(ValueError, match=re.escape(told)):
        command(name, **given)
    assert server.asked == []


def test_with_our_own_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At temperature 0 the words are those of a model here."""
    pytest.importorskip("starlette")
    pytest.importorskip("llguidance")
    serving = pytest.importorskip("serving")
    llama = Llama.build(device="cpu", max_seq_len=128)
    session = llama.chat("Be kind.", temperature=0, max_gen_len=8)
    replies = [session.ask("Who are you?"), session.ask("Why?")]
    [text] = llama.text_completion(["Once upon a time"], temperature=0)
    with serving.served(llama, key="s3cret") as it:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Who are you?\nWhy?\n/stats\n")))
        options = {"url": it.url, "api_key": "s3cret", "temperature": 0}
        capsys.readouterr()
        command("chat", system="Be kind.", max_gen_len=8, **options)
        out, err = capsys.readouterr()
        command("complete", "Once upon a time", **options)
        assert capsys.readouterr().out.rstrip() == text["generation"].rstrip()
        command("complete", "Are you a llama?", choice='["yes", "no"]', **options)
        assert capsys.readouterr().out in ("yes\n", "no\n")
        with pytest.raises(ValueError, match="refuses the API key"):
            command("complete", "a", url=it.url, api_key="x")
        with pytest.raises(ValueError, match=r"does not have this \(/v1/\S+\): there is no model 'x' here"):
            command("complete", "a", model="x", **options)
        with pytest.raises(ValueError, match="the server refused this: this model cannot fill in"):
            command("complete", "a", suffix="b", **options)
    assert out == "".join(f"{reply}\n" for reply in replies)
    assert " of 128 tokens" in err


def test_one_process_is_enough(server: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.Launch, "read", lambda: remote.Launch(True, 0, 2, 0, 2))
    with pytest.raises(ValueError, match="one process is enough; run it without torchrun"):
        command("complete", "a", url=server.address)
