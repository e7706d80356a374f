"""What people type: the chat at a terminal and in a pipe, completions, lists of prompts, pieces, scores."""

from __future__ import annotations

import errno
import io
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional, cast

import pytest
from conftest import ROOT, shared
from helpers import TORCHRUN, command, environment
from terminals import PROGRAM, Terminal
from workers import Pool

from llama import Llama
from llama.chat import UNSAFE_ERROR
from llama.commands import console, conversation, jobs, keyboard
from llama.commands.conversation import COMMANDS, Conversation


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama.build(device="cpu")


def talk(llama: Llama, *lines: str, **options: Any) -> Conversation:
    conversation = Conversation(llama.chat(**{"temperature": 0, "max_gen_len": 8, **options}))
    waiting = iter(lines)
    conversation.run(lambda *_: next(waiting, None))
    return conversation


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


# The chat's commands


def test_replies_are_all_that_stdout_has(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = talk(llama, "Who are you?", "", "/stats", "/?", "/plain")
    out, err = capsys.readouterr()
    assert out == 2 * (conversation.session.turns[0]["assistant"] + "\n")  # once more by /plain
    assert "tok/s" not in err
    assert "stopped at max_gen_len=8\n" in err
    assert re.search(r"last reply  8 tokens, [\d.]+ a second; the first after [\d.]+ s", err)
    used = sum(len(turn["ids"]) for turn in conversation.session.turns)
    assert f"context     {used} of 512 tokens ({used / 512:.0%}), 1 turn\n" in err
    assert all(f"\n{name}" in "\n" + err for name in COMMANDS)


@pytest.mark.parametrize(
    ("parts", "told", "end"),
    [
        ([("", [5]), (" a", [6, 7]), ("b", [])], "3 tokens, 0.5 a second; the first after 2.000 s", None),
        ([("ab", [5])], "1 tokens, 0.0 a second; the first after 2.000 s", "length"),
        ([("ab", [5, 6])], "2 tokens, 0.2 a second; the first after 2.000 s", "context"),
    ],
)
def test_the_speed_of_a_reply(
    parts: list[tuple[str, list[int]]],
    told: str,
    end: Optional[str],
    llama: Llama,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Counted from the first chunk on; and why it ended, if that was a limit."""
    clock = iter((10.0, 12.0, 16.0))  # when it was asked for, had its first chunk, and ended
    monkeypatch.setattr(conversation, "time", SimpleNamespace(perf_counter=clock.__next__))
    talk = Conversation(llama.chat(max_gen_len=8))
    chunks = [{"text": text, "tokens": ids, "finish_reason": None} for text, ids in parts]
    chunks[-1]["finish_reason"] = end
    talk.show(cast(Any, (chunk for chunk in chunks)))
    talk.do_stats("")
    out, err = capsys.readouterr()
    assert out == "ab\n"
    assert f"last reply  {told}\ncontext     0 of " in err
    assert ("stopped at max_gen_len=8" in err) == (end == "length")
    assert ("/drop forgets the oldest turn" in err) == (end == "context")


def test_undo_retry_clear(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = talk(
        llama, "/undo", "/retry", "Who are you?", "Why?", "/undo", "/set temperature 5", "/set seed 1", "/retry"
    )
    said = capsys.readouterr()
    assert "nothing to take back" in said.err
    assert "nothing was said that could be tried again" in said.err
    assert "took back: Why?" in said.err
    [turn] = conversation.session.turns
    assert turn["user"] == "Who are you?"
    first, _, again = said.out.splitlines()[0], *said.out.splitlines()[1:3]
    assert turn["assistant"] != first
    assert again in turn["assistant"]
    assert talk(llama, "Hi", "/clear").session.turns == []


def test_a_retry_that_is_stopped_at_once_loses_nothing(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = talk(llama, "Hi")
    [turn] = conversation.session.turns

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(llama, "continue_ids", interrupted)
    with pytest.raises(KeyboardInterrupt):
        conversation.obey("/retry")
    assert conversation.session.turns == [turn]


def test_system(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = talk(
        llama, "/system Be kind,\nand brief.", "Hi", "/system no", "/clear", "/system -", "/system", "/system [INST]"
    )
    err = capsys.readouterr().err
    assert "system message: Be kind,\nand brief." in err
    assert "/clear before changing it" in err
    assert err.count("no system message") == 2
    assert UNSAFE_ERROR in err
    assert conversation.session.system is None


def test_save_and_load(llama: Llama, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A load that went over a list of turns and then cleared it found nothing there."""
    path = tmp_path / "a talk.json"
    before = talk(llama, "/system Be kind", "Hi", "Why?", f"/save {path}")
    after = talk(llama, "Something else", f"/load {path}", f"/save {tmp_path}/no/such", "/load nowhere", "/save")
    assert after.session.dialog == before.session.dialog == json.loads(path.read_text())
    assert len(after.session.turns) == 2
    assert after.session.system == "Be kind"
    err = capsys.readouterr().err
    assert f"{path} is read: 2 turns" in err
    assert "No such file" in err
    assert "no saved session at nowhere" in err
    assert "it needs the name of a file" in err


def test_edit(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    """In a pipe the next line is the new text; what came after the message is forgotten."""
    conversation = talk(
        llama, "/edit", "one", "two", "three", "/edit 2", "another", "/edit 9", "/edit x", "/edit", " ", "/edit"
    )
    assert [turn["user"] for turn in conversation.session.turns] == ["one", "another"]
    err = capsys.readouterr().err
    assert "nothing was said yet" in err
    assert "there are 2 messages of yours to change" in err
    assert "/edit x: it takes which message to change, from the end: 1 is the last" in err
    assert err.count("it stays as it was") == 2


def test_an_edit_without_a_reply_loses_nothing(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    """But /drop makes room for a message that is too long for the turns before it."""
    story = "the little dog ran " * 20
    conversation = talk(llama, story, story, "Why?", "/edit 2", "a [INST] b", "/edit", "x " * 600, max_gen_len=1)
    assert [turn["user"] for turn in conversation.session.turns] == [story, story, "Why?"]
    lines = iter(["/edit", story * 5, "/drop"])
    conversation.run(lambda *_: next(lines, None))
    assert conversation.session.turns[-1]["user"] == story * 5
    assert "Why?" not in [turn["user"] for turn in conversation.session.turns]
    assert "/drop sends the message again" in capsys.readouterr().err


def test_forks(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = talk(
        llama, "one", "/fork", "two", "/set seed 7", "/fork a name", "/undo", "/switch main", "three", "/switch",
        "/fork main",
        "/switch nowhere", "/fork", "/switch", max_gen_len=2,
    )  # fmt: skip
    assert {name: [turn["user"] for turn in fork.turns] for name, fork in conversation.forks.items()} == {
        "main": ["one", "three"], "2": ["one", "two"], "a name": ["one"], "3": ["one", "three"],
    }  # fmt: skip
    assert [fork.options.get("seed") for fork in conversation.forks.values()] == [None, 7, 7, None]
    assert conversation.session is conversation.forks["3"]
    err = capsys.readouterr().err
    assert "this is 2 now; /switch main goes back to where it came from\n" in err
    assert "> main  2 turns: three\n  2  2 turns: two\n  a name  1 turn: one\n" in err
    assert "there is a fork main already" in err
    assert "there is no fork nowhere; there are main, 2, a name\n" in err


def test_a_saved_talk_is_what_other_tools_read(
    llama: Llama, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, line = tmp_path / "talk.json", tmp_path / "line.jsonl"
    before = talk(llama, "/save x", "/system Be kind", 'Say "\x9b"\n🌍', f"/save {path}").session.dialog
    assert "nothing was said yet" in capsys.readouterr().err
    messages = json.loads(path.read_text())
    assert messages == before
    assert path.read_text().count("\n") == 5  # a message is a line
    line.write_text(json.dumps({"messages": messages[:-1]}))
    assert jobs.read_jobs(line, {}, 1)[0].prompt == messages[:-1]
    for text in (json.dumps({"messages": messages, "model": "x"}), json.dumps(messages, indent=4)):
        path.write_text(text)
        assert talk(llama, "gone", f"/load {path}", max_gen_len=1).session.dialog == messages
    for bad in (
        "[]",
        json.dumps(messages[:-1]),
        '[{"role": "user"}]',
        '{"messages": 5}',
        '[{"role": "tool", "content": ""}]',
    ):
        path.write_text(bad)
        assert talk(llama, f"/load {path}").session.turns == []
    assert capsys.readouterr().err.count("is not a saved session") == 5


def test_what_it_does_not_know(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = talk(llama, "/recall it", "/", "a [INST] b", " /etc is a folder", max_gen_len=2)
    err = capsys.readouterr().err
    assert "unknown command /recall; /help lists them" in err
    assert "unknown command /;" in err
    assert UNSAFE_ERROR in err
    assert [turn["user"] for turn in conversation.session.turns] == [" /etc is a folder"]


def test_set(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = talk(
        llama, "/set top_k 5", "/set top_p x", "/set temperature -1", "/set max_gen_len 1.5", "/set stop",
        "/set speed 3",
        '/set stop ["a b", "["]', "/set max_gen_len none",
    )  # fmt: skip
    err = capsys.readouterr().err
    assert "top_p is a number, not x" in err
    assert "temperature=-1 must be" in err
    assert "max_gen_len=1.5 must be" in err
    assert '/set stop needs a value (or the word "none" for the default)' in err
    assert "unknown option speed (did you mean seed?); there are temperature, " in err
    options = conversation.session.options
    assert (options["top_k"], options["temperature"], options["max_gen_len"], options["stop"]) == (
        5,
        0,
        None,
        ["a b", "["],
    )


def test_a_reply_goes_on(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = talk(llama, "/continue", "Who are you?", "/continue", "/continue Once upon", "/undo", max_gen_len=4)
    out, err = capsys.readouterr()
    assert "there is no reply that could go on" in err
    assert out.count("\n") == 3
    assert "took back: Who are you?" in err
    assert conversation.session.turns == []
    first, turn = talk(llama, "Hi", "Who are you?", "/continue Once upon", max_gen_len=4).session.turns
    replies = capsys.readouterr().out.splitlines()
    assert (first["user"], first["assistant"]) == ("Hi", replies[0])
    assert (turn["user"], turn["assistant"]) == ("Who are you?", "Once upon" + replies[2])


def test_what_cannot_be_said_or_loaded_ends_nothing(
    llama: Llama, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of these ended the program with a traceback."""
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "large.json").write_text('{"system": null, "turns": [{"user": "a", "assistant": "b", "ids": [1e400]}]}')
    lines = [
        "\ud800",
        "/system \udcff",
        f"/load {tmp_path}/deep.json",
        f"/load {tmp_path}/large.json",
        f"/load {tmp_path}",
    ]
    conversation = talk(llama, "Hi", *lines, "/save /dev/null", "/set stop " + "[" * 100_000, "Why?", max_gen_len=2)
    assert [turn["user"] for turn in conversation.session.turns] == ["Hi", "Why?"]
    err = capsys.readouterr().err
    assert "'\\ud800' has characters that UTF-8 cannot encode" in err
    assert err.count("is not a saved session") == 2
    assert "/dev/null is no file that could be written over" in err


@pytest.mark.parametrize("value", ["[", "[]]", "[x]", "[INST]", '{"a": 1}', "a", "[" * 100_000])
def test_what_is_no_list_of_texts_is_a_text(value: str) -> None:
    assert console.texts(value) == value
    assert console.texts('["a", "[b"]') == ["a", "[b"]


@pytest.mark.parametrize("value", ["[1, 2]", '["a", 2]', '["a"', "['a']", '[ "a", b]'])
def test_what_was_meant_as_a_list_of_texts(value: str) -> None:
    """It was once taken as a text, which stopped nothing."""
    with pytest.raises(
        ValueError, match=r'is no JSON list of texts; write \["a", "b"\], and one text that begins like'
    ):
        console.texts(value)


def test_a_warning_is_one_line() -> None:
    usual = warnings.formatwarning
    with console.warnings_in_a_line():
        assert warnings.formatwarning("odd \x1b", UserWarning, "model.py", 3) == "llama: odd \\x1b\n"
        assert "model.py:3: SyntaxWarning: odd" in warnings.formatwarning("odd", SyntaxWarning, "model.py", 3)
    assert warnings.formatwarning is usual


def test_a_full_context_offers_a_way_out(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    story = "the little dog ran " * 20
    conversation = talk(llama, *[story] * 6, max_gen_len=1)
    count = len(conversation.session.turns)
    assert 1 < count < 6
    err = capsys.readouterr().err
    assert "/drop sends the message again and forgets the oldest turn, or start with a larger --max_seq_len" in err
    lines = iter(["/drop", "/drop 0", "/drop 2", "x " * 600, "/drop"])
    conversation.run(lambda _: next(lines, None))
    err = capsys.readouterr().err
    assert f"forgot 1 of {count} turns" in err
    assert "it takes how many turns to forget" in err
    assert f"forgot 2 of {count} turns" in err  # the refused message went in again
    assert "too long for max_seq_len=512; shorten it" in err
    assert len(conversation.session.turns) == count - 3
    lines = iter([story] * 6)
    conversation.run(lambda _: next(lines, None))
    assert conversation.refused == story
    conversation.session.drop(2)
    lines = iter(["/drop"])
    conversation.run(lambda _: next(lines, None))
    assert f"forgot 0 of {count - 2} turns" in capsys.readouterr().err  # there is room for it by now
    assert [turn["user"] for turn in conversation.session.turns] == [story] * (count - 1)


def test_a_message_that_did_not_fit_is_of_its_conversation(llama: Llama, tmp_path: Path) -> None:
    """In another one /drop does not send it again."""
    path, story = tmp_path / "talk.json", "the little dog ran " * 20
    talk(llama, "Hi", f"/save {path}", max_gen_len=1)
    for line in ("/clear", "/fork", f"/load {path}"):
        conversation = talk(llama, *[story] * 6, max_gen_len=1)
        assert conversation.refused == story
        conversation.obey(line)
        assert conversation.refused is None


def test_ctrl_c_in_a_pipe_ends_it(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal it stops the reply alone: see below."""

    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llama.commands.conversation.say", interrupted)
    with pytest.raises(SystemExit, match="130"):
        talk(llama, "Hi", "Why?")


# The chat at a terminal and in a pipe


def converse(screen: Terminal, text: str, folder: Path) -> None:
    screen.wait_for("/help lists the commands")

    def say(keys: str, answer: str) -> None:
        screen.wait_for(">")
        screen.type(keys)
        screen.wait_for(answer)

    say("/set max_gen_len 4\r", "max_gen_len=4")
    say("the little\\\rdog\x1b\rran\r", "stopped at max_gen_len=4")  # a backslash and Enter, Esc and Enter, Enter
    say("/undo\r", "took back: the little\ndog\nran")
    say("/recall\r", "unknown command /recall")
    say("/set max_gen_len none\r", "max_gen_len=None")
    say("the river\r", text[:8])
    screen.type("\x03")
    screen.wait_for("stopped; the reply is kept as far as it came")
    say("thrown away\x03", ">")
    screen.type("/set max_gen_len 3\r")
    screen.wait_for("max_gen_len=3")
    say(f"/save {folder}/talk.json\r", "is written: 1 turn")
    say("and then?\r", "stopped at max_gen_len=3")
    say("\x1b[A\r", "stopped at max_gen_len=3")  # the arrow brings it back
    say("/stats\r", ", 3 turns")
    say("\x04", "")
    assert screen.end() == 0


def test_at_a_terminal(tiny: Path, tokenizer_path: str, tmp_path: Path) -> None:
    pytest.importorskip("prompt_toolkit")
    [predicted] = Llama.build(str(tiny), tokenizer_path, device="cpu").chat_completion(
        [[{"role": "user", "content": "the river"}]], temperature=0, max_gen_len=200
    )
    text = predicted["generation"]["content"].lstrip()
    assert predicted["finish_reason"] == "length"  # it goes on for long enough to be stopped
    arguments = [
        "--ckpt_dir",
        str(tiny),
        "--tokenizer_path",
        tokenizer_path,
        "--temperature",
        "0",
        "--max_seq_len",
        "4096",
    ]
    with Terminal(["chat", *arguments], tmp_path) as screen:
        converse(screen, text, tmp_path)
    asked, reply = json.loads((tmp_path / "talk.json").read_text())
    assert asked == {"role": "user", "content": "the river"}
    assert reply["content"].startswith(text[:8])
    assert len(reply["content"]) < 4000
    [history] = tmp_path.rglob("history")
    assert history.read_text().count("+and then?") == 1  # not twice in a row
    assert history.parent.stat().st_mode & 0o077 == 0


def test_without_prompt_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, b"")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    with pytest.raises(ValueError, match="a chat at the terminal needs prompt_toolkit; pip install"):
        command("chat", "nowhere")


def test_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pipe(monkeypatch, "Who are\\\nyou?\r\n/undo\n/nope\nThe 狗\n/quit\nnot read\n".encode())
    command("chat", temperature=0, max_gen_len=4, device="cpu")
    out, err = capsys.readouterr()
    assert out.count("\n") == 2
    assert "took back: Who are\nyou?\n" in err
    assert "unknown command /nope" in err
    assert "Loaded in" in err
    pipe(monkeypatch, b"\xff\n")
    with pytest.raises(ValueError, match="line 1 of the pipe is not UTF-8"):
        command("chat", device="cpu")
    pipe(monkeypatch, b"")
    with pytest.raises(ValueError, match="top_p=-1 must be"):
        command("chat", top_p=-1, device="cpu")


def test_under_torchrun(llama: Llama, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first process reads; both say the same things, and one is heard. Then, in the same processes, an example."""
    lines = [
        "Who are you?",
        f"/save {tmp_path}/talk.json",
        "/nope",
        "/clear",
        f"/load {tmp_path}/talk.json",
        "Why?",
        "/stats",
    ]
    talk(llama, *lines)
    alone = capsys.readouterr()
    (tmp_path / "run.py").write_text(
        PROGRAM + "import runpy\nrunpy.run_path('example_text_completion.py')['main'](max_gen_len=8, temperature=0)\n"
    )
    result = subprocess.run(
        [*TORCHRUN, "--nproc_per_node", "2", str(tmp_path / "run.py"), "chat", "--temperature", "0", "--max_gen_len",
          "8"],
        input="\n".join(lines) + "\n", env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said, example = result.stdout[: len(alone.out)], result.stdout[len(alone.out) :]
    assert said == alone.out
    assert example.count("\n> ") == 4
    assert result.stderr.count("unknown command /nope") == 1
    assert result.stderr.count("is read: 1 turn") == 1
    assert ", 2 turns" in result.stderr


# Completions


def test_complete(
    llama: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An argument, a file and a pipe are the same prompt; the last line end, which echo puts there, is no part of
    it."""
    prompt = "Once upon a time\nthere"
    (expected,) = llama.text_completion([prompt], temperature=0, max_gen_len=9)
    (tmp_path / "7").write_text(prompt + "\n")
    command("complete", prompt, temperature=0, max_gen_len=9, device="cpu")
    command("complete", file=str(tmp_path / "7"), temperature=0, max_gen_len=9, device="cpu")
    pipe(monkeypatch, prompt.encode() + b"\r\n")
    command("complete", temperature=0, max_gen_len=9, device="cpu", echo=True)
    text = expected["generation"]
    whole = llama.text_completion([prompt], temperature=0, max_gen_len=9, echo=True)[0]["generation"]
    assert capsys.readouterr().out == f"{text}\n{text}\n{whole}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "a", "file": "b"}, "give the prompt or --file, not both"),
        ({"prompt": "a", "jsonl": "b"}, "--jsonl brings its own prompts"),
        ({"prompt": "a", "out": "b"}, "--out b is for --jsonl"),
        ({}, "no prompt; give one in quotes, --file FILE, or a pipe"),
    ],
)
def test_complete_refuses(arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, b"")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(ValueError, match=re.escape(message)):
        command("complete", **arguments)


@pytest.mark.parametrize("words", [["complete", "1985", "--stop", "[x", "--seed", "3"], ["chat"]])
def test_a_reader_that_leaves_early_is_no_error(words: list[str]) -> None:
    """A chat once went on, and told of a broken pipe for each message."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM, *words],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        program.stdout.close()
        assert program.stdin is not None
        program.stdin.write(b"hello\nhello\n")
        program.stdin.close()
        errors = program.stderr.read().decode()
    assert program.returncode == 0, errors
    assert "roken" not in errors


# Lists of prompts

LINES: list[dict[str, Any]] = [
    {"prompt": "Once upon a time", "id": "a"},
    {"prompt": "The dog", "max_gen_len": 3, "stop": ["zzz"]},
    {"messages": [{"role": "user", "content": "你好"}], "id": 7},
    {"messages": [{"role": "user", "content": "[INST]"}]},
    {"prompt": "The cat", "seed": 5},
    {"prompt": "The cat", "seed": 5},
    {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once upon"}],
        "continue_final_message": True, "temperature": 0, "id": "\ud800\x9b",
    },
]  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES[:2])) + "\n\n" + "\n".join(map(json.dumps, LINES[2:])))
    return path


def answer(source: Path, out: Path, **more: Any) -> list[dict[str, Any]]:
    command(
        "complete", jsonl=str(source), out=str(out), **{"max_gen_len": 6, "device": "cpu", "max_batch_size": 2, **more}
    )
    return [json.loads(line) for line in out.read_bytes().splitlines()]


def test_jsonl(source: Path, tmp_path: Path, llama: Llama, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    lines = answer(source, tmp_path / "out.jsonl")
    assert [line.get("id") for line in lines] == ["a", None, 7, None, None, None, "\ud800\x9b"]
    assert lines[0]["generation"] == llama.text_completion(["Once upon a time"], max_gen_len=6, seed=2)[0]["generation"]
    assert lines[1]["generation"] == llama.text_completion(["The dog"], max_gen_len=3, seed=3)[0]["generation"]
    assert lines[2]["generation"]["role"] == "assistant"
    assert lines[3]["generation"]["content"] == UNSAFE_ERROR
    assert lines[4] == lines[5]
    [goes_on] = llama.chat_completion([LINES[6]["messages"]], 0, max_gen_len=6, continue_final_message=True)
    assert lines[6]["generation"] == goes_on["generation"]
    assert {line["finish_reason"] for line in lines} == {"length", "stop"}
    command("complete", jsonl=str(source), max_gen_len=6, device="cpu")
    assert capsysbinary.readouterr().out == (tmp_path / "out.jsonl").read_bytes()


def test_jsonl_goes_on_where_it_was_left(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    answer(source, out)
    whole = out.read_bytes()
    done: list[int] = []
    run: Callable[..., Iterator[Any]] = jobs.run
    monkeypatch.setattr(jobs, "run", lambda llama, left: done.append(len(left)) or run(llama, left))
    ends = [at for at, byte in enumerate(whole) if byte == ord("\n")]
    for size in (0, ends[0] - 1, ends[0], ends[1] + 1, ends[3] + 9, len(whole)):
        out.write_bytes(whole[:size])
        answer(source, out)
        assert out.read_bytes() == whole
    assert done == [7, 7, 7, 5, 3, 0]


def test_jsonl_keeps_what_came_before_ctrl_c(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    answer(source, out)
    whole = out.read_bytes()
    out.unlink()
    run: Callable[..., Iterator[Any]] = jobs.run

    def interrupted(llama: Llama, left: list[jobs.Job]) -> Iterator[Any]:
        for number, line in enumerate(run(llama, left)):
            if number == 3:
                raise KeyboardInterrupt
            yield line

    monkeypatch.setattr(jobs, "run", interrupted)
    with pytest.raises(SystemExit, match="130"):
        answer(source, out)
    monkeypatch.undo()
    assert out.read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])
    answer(source, out)
    assert out.read_bytes() == whole


def job(line: int, **changed: Any) -> jobs.Job:
    plain = {"prompt": "a", "is_chat": False, "is_begun": False, "seed": line, "options": {}, "extra": {}}
    return jobs.Job(line, **{**plain, **changed})


def test_jsonl_on_a_full_disk(source: Path, tmp_path: Path) -> None:
    """The file is named, though closing it fails once more; and the next run goes on."""
    resource = pytest.importorskip("resource")
    out, limits = tmp_path / "out.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))  # which Python sees as an error of the write
    try:
        with pytest.raises(ValueError, match="out.jsonl cannot be written: File too large; the same command goes on"):
            answer(source, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 0 < out.stat().st_size <= 200
    answer(source, out)
    assert len(out.read_bytes().splitlines()) == len(LINES)


def test_dialogs_of_lines_are_checked_without_a_model(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    user, assistant = ({"role": role, "content": "a"} for role in ("user", "assistant"))
    for messages, begun, told in (
        ([assistant], False, "message 0 is from 'assistant'"), ([user], True, "must be from assistant, got user"),
        ([user, assistant], False, "must be from user, got assistant"),
    ):  # fmt: skip
        path.write_text(json.dumps({"messages": messages, "continue_final_message": begun}))
        with pytest.raises(ValueError, match=f"line 1 of .*{told}"):
            jobs.read_jobs(path, {}, 1)


def test_the_seeds_of_lines(tmp_path: Path) -> None:
    """That of the command and the line's number, counting empty lines; or one of its own."""
    path = tmp_path / "in.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n\n{{"prompt": "a"}}\n{{"prompt": "a", "seed": {2**63 - 1}}}\n')
    for seed in (0, 2**62):
        assert [each.seed for each in jobs.read_jobs(path, {}, seed)] == [seed + 1, seed + 3, 2**63 - 1]
    for seed in (-1, 2**62 + 1):
        with pytest.raises(ValueError, match=f"seed={seed} must be a whole number from 0 to 2..62"):
            jobs.read_jobs(path, {}, seed)
    for seed in (-1, 2**63):
        path.write_text(f'{{"prompt": "a", "seed": {seed}}}')
        with pytest.raises(ValueError, match=f"line 1 of .*: seed={seed} must be a whole number from 0 to 2..63 - 1"):
            jobs.read_jobs(path, {}, 1)


def test_jsonl_runs_as_many_jobs_as_there_are_slots() -> None:
    """Whatever their options; the lines come in the input's order all the same."""
    running: list[int] = []
    seen: list[list[int]] = []

    def stream_text(prompts: list[str], seed: list[int], **options: Any) -> Iterator[dict[str, Any]]:
        running.append(seed[0])
        for left in range(seed[0] % 3 + options.get("top_k", 0), -1, -1):
            seen.append(list(running))
            if not left:
                running.remove(seed[0])
            yield {"text": f"{seed[0]}.", "finish_reason": None if left else "length"}

    llama: Any = SimpleNamespace(
        model=SimpleNamespace(params=SimpleNamespace(max_batch_size=2)), stream_text=stream_text
    )
    todo = [job(n, options={"top_k": 5 * (n == 1)}) for n in range(6)]
    lines = list(jobs.run(llama, todo))
    assert [line["generation"] for line in lines] == ["0.", "1." * 7, "2.2.2.", "3.", "4.4.", "5.5.5."]
    assert [line["input"] for line in lines] == [each.digest for each in todo]
    assert max(map(len, seen)) == 2
    assert {2, 3, 4} <= {n for some in seen if 1 in some for n in some}  # came and went beside a long one


def test_jsonl_writes_each_line_at_once(tmp_path: Path, bars: list[Any]) -> None:
    """Else a run that is killed would lose what stands in the buffer. The bar goes on where an earlier run ended."""
    out = tmp_path / "out.jsonl"

    def lines() -> Iterator[dict[str, Any]]:
        for number in range(3):
            assert out.read_bytes().count(b"\n") == number
            yield {"id": number}

    with out.open("wb") as file:
        jobs.write(lines(), 5, 2, file)
    assert [(bar.n, bar.total, bar.unit, bar.leave) for bar in bars] == [(5, 5, "line", True)]
    assert bars[0].initial == 2
    assert out.read_text() == '{"id": 0}\n{"id": 1}\n{"id": 2}\n'


def test_jsonl_takes_up_as_many_lines_as_there_are_jobs(tmp_path: Path) -> None:
    """As many finished lines as there are jobs; one more is another run's."""
    out, line = tmp_path / "out.jsonl", json.dumps({"input": job(1).digest}).encode() + b"\n"
    out.write_bytes(line + b"half")
    assert jobs.finished(out, [job(1)]) == (1, len(line))
    with pytest.raises(ValueError, match="has 1 lines, but there are 0 prompts"):
        jobs.finished(out, [])
    other = {"is_chat": True, "is_begun": True, "seed": 2, "options": {"top_k": 1}, "prompt": "b", "extra": {"id": 1}}
    assert len({job(1).digest, *(job(1, **{name: value}).digest for name, value in other.items())}) == 1 + len(other)


def test_stdout_that_cannot_be_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file its name is told, and that nothing is lost; of stdout what the system says."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jobs, "write", full)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=f"{out} cannot be written: No space left on device; the same command goes on"):
        answer(source, out)
    with pytest.raises(OSError, match="No space left on device"):
        command("complete", jsonl=source, device="cpu")


@pytest.mark.parametrize("stride", [0, 1.5])
def test_a_stride_is_checked_before_a_model_is_loaded(stride: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Llama, "build", lambda **_: pytest.fail("it loaded"))
    with pytest.raises(ValueError, match=f"stride={stride} must be a whole number of 1 or more"):
        command("score", "a", stride=stride)


def test_a_character_that_the_terminal_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with console.pipe_may_close():
        console.say("é!")
    assert written.getvalue() == b"?!"


def test_keys_on_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no termios."""
    monkeypatch.setitem(sys.modules, "termios", None)
    with keyboard.keys_wait():
        pass


def test_the_history_has_a_place_in_a_new_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for _ in range(2):
        path = keyboard.history_file()
        assert path is not None
        assert path.exists()
        assert path.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(Path, "home", lambda: path / "a file")
    assert keyboard.history_file() is None


def test_jsonl_refuses_another_runs_output(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    answer(source, out)
    whole = out.read_bytes()
    with pytest.raises(ValueError, match=r"line 1 of .* answers something else than line 1 of the input"):
        answer(source, out, temperature=0)
    out.write_bytes(whole + whole)
    with pytest.raises(ValueError, match="has 14 lines, but there are 7 prompts"):
        answer(source, out)
    out.write_bytes(b"my thesis\n")
    with pytest.raises(ValueError, match="line 1 of .* was not written by complete; name another file"):
        answer(source, out)
    assert out.read_bytes() == b"my thesis\n"
    with pytest.raises(ValueError, match="is the input itself"):
        answer(source, source)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", 'it must be {"prompt"'),
        ('{"prompt": "a", "messages": []}', 'it must be {"prompt"'),
        ('{"prompt": 5}', "prompt=5 must be a text"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "message 0 is from 'assistant'"),
        ('{"prompt": "a", "max_len": 5}', "unknown max_len (did you mean max_gen_len?); a line may have prompt, "),
        ('{"prompt": "a", "seed": -1}', "seed=-1 must be"),
        ('{"prompt": "a", "top_p": "x"}', "top_p='x' must be"),
        ('{"prompt": "a", "max_gen_len": -5}', "max_gen_len=-5 must be"),
        ('{"prompt": "\\ud800"}', "UTF-8"),
        ('{"prompt": "caf\udce9"}', "it is not UTF-8 at byte 15; save it as UTF-8"),
        ("[" * 100_000, "nested too deep"),
        ('{"prompt": "a", "temperature": 1e400}', "'1e400' is not a finite number"),
        ('{"prompt": "a", "id": NaN}', "'NaN' is not a finite number"),
        ('{"prompt": "a", "temperature": 1' + "0" * 400 + "}", "temperature=1000"),
        ('{"prompt": "a", "seed": 1.5}', "seed=1.5 must be a whole number"),
        ('{"prompt": "a", "stop": 5}', "stop=5 must be texts"),
        ('{"prompt": "a", "\\u001b[2J": 5}', r"unknown \x1b[2J; a line"),
        (
            '{"prompt": "a", "continue_final_message": true}',
            "continue_final_message=True must be true or false, and is for mess",
        ),
        ('{"messages": [], "continue_final_message": 1}', "continue_final_message=1 must be"),
        (
            '{"messages": [{"role": "user", "content": "a"}], "continue_final_message": true}',
            "must be from assistant, got user",
        ),
        (json.dumps({"prompt": "dog " * 600}), "max_seq_len=512; shorten it, or pass --max_seq_len "),
    ],
)
def test_jsonl_names_the_bad_line_before_any_work(line: str, message: str, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a"}\n\n' + line, errors="surrogateescape")
    with pytest.raises(ValueError, match=f"line 3 of .*{re.escape(message)}"):
        answer(source, out)
    assert not out.exists() or not out.read_bytes()


def on_a_rank(source: Path, out: Path) -> None:
    options = {"max_gen_len": 6, "device": "cpu", "dtype": "float32"}  # in 16 bits two ids may be equally likely
    command("complete", jsonl=str(source), out=str(out), model_parallel_size=2, **options)


def test_jsonl_on_many_processes(pool: Pool, source: Path, tmp_path: Path) -> None:
    """Two copies of the model on two processes each; one process writes."""
    out = tmp_path / "many.jsonl"
    pool.run(on_a_rank, source, out)
    alone = answer(source, tmp_path / "one.jsonl", dtype="float32")
    assert [json.loads(line) for line in out.read_bytes().splitlines()] == alone


# Pieces and scores


def test_tokenize(capsys: pytest.CaptureFixture[str]) -> None:
    """The experiment's: pieces that the vocabulary lacks are shown as they stand in the text."""
    path = str(shared("tokenizers/experiment/tokenizer.model"))
    command("tokenize", "测试一下,看看什么情况", tokenizer_path=path)
    *table, ids, decoded = capsys.readouterr().out.splitlines()
    assert [line.split() for line in table[:5]] == [
        ["1", "<s>"],
        ["4", "▁"],
        ["0", "测试"],
        ["11", "一"],
        ["141", "下"],
    ]
    assert ids == "11 ids: 1 4 0 11 141 3 76 76 0 317 310"
    assert decoded == 'they decode to " ⁇ 一下,看看 ⁇ 情况"'


@pytest.mark.parametrize("rank", [1, 3])
def test_only_the_first_process_reads(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.Launch, "read", lambda: SimpleNamespace(rank=rank))
    assert console.given_text(None, "none", "text") == console.given_text(None, None, "text") == ""
    assert console.given_text("a", None, "text") == "a"


def test_tokenize_other_ways(
    llama: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = llama.tokenizer.encode("The dog\n", bos=False, eos=True)
    (tmp_path / "text").write_text("The dog\n\n")
    command("tokenize", file=str(tmp_path / "text"), bos=False, eos=True, json=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown["ids"] == ids
    assert shown["text"] == "The dog\n"
    assert shown["pieces"][-1] == "</s>"
    for given in (",".join(map(str, ids)), ids, tuple(ids), " ".join(map(str, ids))):
        command("tokenize", ids=given)
        assert capsys.readouterr().out.endswith('they decode to "The dog\\n"\n')
    for wrong in ("x", "True", "[True, 5]", "1.5"):  # True was once read as 1
        with pytest.raises(ValueError, match=re.escape(f"ids='{wrong}' must be numbers")):
            command("tokenize", ids=wrong)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        command("tokenize", ids="-1")
    with pytest.raises(ValueError, match="not both"):
        command("tokenize", "a", ids="1")
    pipe(monkeypatch, b"caf\xe9")
    with pytest.raises(ValueError, match="the pipe is not UTF-8 at byte 3"):
        command("tokenize")


def test_score(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    [expected] = llama.score(["Once upon a\ttime"])
    command("score", "Once upon a\ttime", json=True, device="cpu")
    assert json.loads(capsys.readouterr().out) == expected
    command("score", "Once upon a\ttime", device="cpu")
    header, *rows, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["ln", "p", "p", "token"]
    assert [float(row.split()[0]) for row in rows] == pytest.approx(expected["logprobs"][1:], abs=5e-4)
    assert "".join(json.loads(row[18:]) for row in rows) == "Once upon a\ttime"
    assert last == f"perplexity {expected['perplexity']:.4g} over {len(rows)} tokens"
    command("score", "", json=True, device="cpu")
    assert json.loads(capsys.readouterr().out)["perplexity"] is None


def test_what_the_model_says_does_not_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """An escape sequence can retitle the window, or type for the user."""
    for at_a_terminal, shown in ((True, "a\ufffd]0;x\ufffd\n\t狗"), (False, "a\x1b]0;x\x07\n\t狗")):
        out = io.StringIO()
        monkeypatch.setattr(out, "isatty", lambda yes=at_a_terminal: yes)
        monkeypatch.setattr(sys, "stdout", out)
        console.say("a\x1b]0;x\x07\n\t狗")
        assert out.getvalue() == shown


def test_it_reads_no_environment() -> None:
    assert "environ" not in "".join(path.read_text() for path in (ROOT / "llama/commands").glob("*.py"))
