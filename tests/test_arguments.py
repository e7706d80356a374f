"""The command line: words become options, texts stay texts, and what is wrong is told before anything is loaded."""

from __future__ import annotations

import json
import re
import shlex
import socket
import sys
from argparse import Namespace
from typing import Any

import pytest

import llama
from llama import Llama
from llama.commands import cli
from llama.commands.arguments import REQUIRED, Command, Option, a_name, a_number, a_path, truth, understand
from llama.commands.help import asked_help
from llama.options import DEFAULTS, TOLD


def read(words: list[str]) -> dict[str, Any]:
    """The options that a command line gives, by name; those without a value are left out."""
    seen: list[Namespace] = []
    understand({name: command._replace(work=seen.append) for name, command in cli.COMMANDS.items()}, words)()
    return {name: value for name, value in vars(seen[0]).items() if value is not None and name != "given"}


@pytest.mark.parametrize(
    "text", ["1e5", "1985", "None", "[x]", "(1, 2)", "{}", "True", "'a'", "a=b", "-5", "- a list", "", "é\n"]
)
def test_text_stays_text(text: str) -> None:
    """As a place, after a name and behind an equals sign. Python literals were once read as such: 1e5 as 100000.0."""
    for name, option in (("complete", "prompt"), ("tokenize", "text"), ("chat", "system"), ("info", "ckpt_dir")):
        assert read([name, f"--{option}", text])[option] == text
        assert read([name, f"--{option}={text}"])[option] == text
        if option != "system":
            assert read([name, text])[option] == text
    assert read(["convert", text, text, "hf"]) == {"src": text, "dst": text, "to": "hf", "shards": 1}
    assert read(["complete", "x", "--stop", text])["stop"] == text


def test_folders_are_called_what_they_are_called(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("1e3", "['x']", "1_0", "[x]"):
        monkeypatch.setattr(sys, "argv", ["llama", "info", folder])
        with pytest.raises(SystemExit, match="1"):
            cli.main()
        assert capsys.readouterr().err.startswith(f"llama: no checkpoint folder at {folder}; ")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--top-p .5 -top_k=3", {"top_p": 0.5, "top_k": 3}),
        ("--min_p -1e-3 --seed -5", {"min_p": -0.001, "seed": -5}),
        ("--temperature 1 --seed=0x10", "'0x10' is not a number"),
        ("--max_gen_len None --max_seq_len 9 --dtype None", {"max_seq_len": 9}),
        ("--seed 1 --seed 2", {"seed": 2}),
        ("--compile --echo", {"compile": True, "echo": True}),
        ("--nocompile --noecho", {"compile": False, "echo": False}),
        ("--no-compile --echo False", {"compile": False, "echo": False}),
        ("--compile=False --echo=1", {"compile": False, "echo": True}),
        ("--compile None --echo", "complete does not take 'None'; put a text with spaces in quotes"),
        ("--compile=None", {}),
        ("--compile=maybe", "'maybe' must be True or False"),
        ('--stop ["a","b"]', {"stop": ["a", "b"]}),
        ("--seed x", "complete: --seed: 'x' is not a number"),
        ("--seed", "complete: --seed needs a value"),
        ("--dtype --seed 3", "complete: --dtype needs a value; for one that looks like an option write --dtype=VALUE"),
        ("--dtype=--seed", {"dtype": "--seed"}),
    ],
)
def test_options(line: str, expected: Any) -> None:
    words = ["complete", "x", *line.split()]
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            read(words)
    else:
        assert read(words) == {**read(["complete", "x"]), **expected}


def test_places() -> None:
    assert read(["tokenize", "--json", "hi"])["text"] == "hi"  # once the value of --json
    assert read(["complete", "--", "--echo"])["prompt"] == "--echo"
    assert read(["convert", "--dst", "b", "a", "meta", "2"]) == {"src": "a", "dst": "b", "to": "meta", "shards": 2}
    assert "prompt" not in read(["complete", "-"])  # stdin
    assert read(["complete", "--file", "-"])["file"] == "-"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "complete a b c",
            "complete does not take 'b c'; put a text with spaces in quotes",
        ),  # once "--jsonl brings its own"
        (
            "complete hi --temprature 0 --max_gen_len 1",
            "complete does not take '--temprature' (did you mean --temperature?); see",
        ),
        ("complete hi --temp 0", "complete does not take '--temp' (did you mean --temperature?)"),  # no abbreviations
        ("complete hi --nocompil", "complete does not take '--nocompil' (did you mean --nocompile?)"),
        ("complete --noecho=True", "complete does not take '--noecho=True' (did you mean --noecho?)"),
        ("complete --top_p:0.5", "complete does not take '--top_p:0.5' (did you mean --top_p?)"),
        (
            "complete -hello",
            "complete does not take '-hello'; see llama complete --help for the options, and write -- before a text",
        ),
        ("complete hi --\x1b[2J", r"complete does not take '--\x1b[2J'; see llama complete --help for the options"),
        ("tokenize a b c", "tokenize does not take 'b c'"),
        ("tokenize a --bso --eos", "tokenize does not take '--bso' (did you mean --bos?)"),
        ("score a b 3 --device cpu", "score does not take 'b 3'"),
        ("chat --device cpu --sytem x", "chat does not take '--sytem' (did you mean --system?)"),
        ("info llama/demo --dtpye bfloat16", "info does not take '--dtpye' (did you mean --dtype?)"),
        ("convert nowhere x hf 1 float32 x int8 more", "convert does not take 'more'"),
        ("convert a", "convert needs --dst and --to (hf, meta, gguf); see llama convert --help"),
        (
            "bench --device cpu --new_tokens 2 --bach_size 2",
            "bench does not take '--bach_size' (did you mean --batch_size?)",
        ),
        ("complet hi", "there is no command 'complet' (did you mean complete?); there are chat, complete, "),
        ("\x1b[2J", r"there is no command '\x1b[2J'; there are chat, "),
        ("--device cpu chat", "a command comes before '--device': chat, complete, "),
        ("complete hi --n 5", "complete does not take '--n'; see"),  # not --noecho
        ("complete hi --max_new_tokens 5", "complete does not take '--max_new_tokens' (did you mean --max_gen_len?)"),
        ("complete hi --max_seqlen 5", "complete does not take '--max_seqlen' (did you mean --max_seq_len?)"),
        ("serve --model x", "serve does not take '--model' (did you mean --ckpt_dir?)"),
        ("complete hi --processes 2", "complete does not take '--processes' (did you mean --model_parallel_size?)"),
        ("convert a b --format hf", "convert does not take '--format' (did you mean --to?)"),
        ("convert a b", "convert needs --to (hf, meta, gguf); see llama convert --help"),
        ("help nope", "there is no command 'nope'; there are chat, "),
        ("--help complet", "there is no command 'complet' (did you mean complete?); there are chat, "),
        ("complete hi —top_p 1", "complete does not take '—top_p 1'; put a text with spaces in quotes, straight ones"),
        (
            "complete “hi you”",
            "complete does not take 'you”'; put a text with spaces in quotes, straight ones, and write",
        ),
        ('complete hi --stop ["a",1]', "complete: --stop: '[\"a\",1]' is no JSON list of texts; write "),
        ("serve --port 99999", "port=99999 must be a whole number from 0 to 65535"),
        ("complete hi --top_p 2", "top_p=2 must be at most 1, which keeps all ids"),
        ("chat --max_gen_len 1.5", "max_gen_len=1.5 must be a whole number of 0 or more"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_loaded(
    line: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, with status 1."""
    monkeypatch.setattr(Llama, "build", lambda **_: pytest.fail("it loaded"))
    monkeypatch.setattr(sys, "argv", ["llama", *line.split(" ")])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"llama: {message}")
    assert told.err.count("\n") == 1


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One screen of 80 columns, with two examples that are understood; `all` tells of all."""
    command = cli.COMMANDS[name]
    monkeypatch.setenv("COLUMNS", "80")
    cli.run([name, "--help", "--nope"] if name == "chat" else [name, "-h"])
    brief = capsys.readouterr().out
    cli.run([name, "--help", "all"])
    whole = capsys.readouterr().out
    assert brief.startswith(f"usage: llama {name} ")
    assert brief.count("\n") <= 40
    assert max(map(len, whole.splitlines())) < 80
    for option, kind in command.options.items():
        default = "" if kind.default in (None, False, REQUIRED) else f" (default {kind.default})"
        lines = rf" --{option}( [A-Z]+)? ([\w, .-]+[;,] )?{re.escape(kind.told + default)}"
        assert re.search(lines, " ".join(whole.split())), option
        assert f"--{option}" in brief
        assert all(choice in whole for choice in kind.choices)
    assert len(command.examples) == 2
    assert all(f"\n  llama {name} {example}\n" in brief for example in command.examples)
    for example in command.examples:
        read([name, *shlex.split(example.split(" >")[0])])


def work(args: Any) -> None:
    """Do the work. It takes a moment.

    This is told below the usage, in a paragraph of its own, which is longer than a line has room for.
    """


MADE_UP = {
    "work": Command(work, ["src", "dst"], {
        "what is done": {
            "src": Option(a_path, REQUIRED, "a file"),
            "dst": Option(str, None, "where it goes, which may be told at some length, over more lines than one"),
            "n": Option(a_number, 5, "how often"),
            "form": Option(a_name, None, "which is as stored", ("a", "b", "c")),
            "fast": Option(truth, False, "skip what takes long"),
        },
        "what few need": {"an_option_with_a_long_name": Option(a_name, "a", "the only one", ("a",), rare=True)},
    }, ["a.txt --n 3", ""]),
}  # fmt: skip
BRIEF = """usage: llama work SRC [DST] [--OPTION VALUE …]
Do the work. It takes a moment.
This is told below the usage, in a paragraph of its own,
which is longer than a line has room for.
what is done:
  --src PATH   a file
  --dst TEXT   where it goes, which may be told at some
               length, over more lines than one
  --n N        how often (default 5)
  --form NAME  a, b or c, which is as stored
  --fast       skip what takes long
and --an_option_with_a_long_name: see llama work --help all
for example:
  llama work a.txt --n 3
  llama work
"""
WHOLE = """what is done:
  --src PATH              a file
  --dst TEXT              where it goes, which may be told
                          at some length, over more lines
                          than one
  --n N                   how often (default 5)
  --form NAME             a, b or c, which is as stored
  --fast                  skip what takes long
what few need:
  --an_option_with_a_long_name NAME
                          the only one (default a)
for example:
"""


def test_the_layout_of_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert asked_help(MADE_UP, ["work", "-h"]) == BRIEF
    lines = BRIEF.splitlines(keepends=True)
    assert asked_help(MADE_UP, ["help", "work", "all"]) == "".join([*lines[:4], WHOLE, *lines[-2:]])
    assert asked_help(MADE_UP, ["help"]) == (
        "usage: llama COMMAND [--OPTION VALUE …]\n\n  work        Do the work\n\n"
        "llama COMMAND --help shows the options of one, and llama --version the version.\n"
    )
    monkeypatch.setattr(work, "__doc__", "a" * 999)  # broken where a line ends
    for columns, widest in ((10, 40), (41, 40), (42, 41), (111, 110), (112, 110)):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert max(map(len, (asked_help(MADE_UP, ["work", "-h"]) or "").splitlines())) == widest


def test_ways_to_ask_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"], ["help"], ["help", "all"]):
        cli.run(words)
        shown = capsys.readouterr().out
        assert all(f"\n  {name} " in shown for name in cli.COMMANDS)
        assert shown.count("\n") <= 24
    for words in (
        ["info", "--help=all"],
        ["help", "info", "all"],
        ["--help", "info", "all"],
        ["info", "x", "--help", "all"],
    ):
        cli.run(words)
        assert "\n  --adapter PATH " in capsys.readouterr().out
    assert read(["complete", "--", "--help"])["prompt"] == "--help"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("--version", "-V", "version"):
        cli.run([word])
        assert re.fullmatch(rf"llama {llama.__version__} \(torch \d\S+, Python 3\S+\)\n", capsys.readouterr().out)


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a model was loaded for it first."""
    pytest.importorskip("uvicorn")
    monkeypatch.setattr(Llama, "build", lambda **_: pytest.fail("it loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=f"cannot listen on 127.0.0.1, port {port}: Address already in use; pass another"
        ):
            cli.run(["serve", "--port", str(port)])
    with pytest.raises(ValueError, match="cannot listen on 1.2.3.4.5, port 0: "):
        cli.run(["serve", "--host", "1.2.3.4.5", "--port", "0"])


def test_options_of_answers_are_those_of_python() -> None:
    given = read(["complete", "x"])
    assert {name: given.get(name) for name in TOLD} == {name: DEFAULTS[name] for name in TOLD}
    assert set(TOLD) == set(DEFAULTS) - {"logprobs", "logit_bias", "stop_ids", "seed", "draft", "n", "constraint"}


def test_a_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["llama", "tokenize", "42,1", "--json"])
    cli.main()
    assert json.loads(capsys.readouterr().out)["text"] == "42,1"
