"""A whole program: its flags, Ctrl-C at any time, and what torchrun is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Optional

import pytest
from forks import Forks, python

from llama.system import peers, program
from llama.system.program import wrong_flag


def main(ckpt_dir: Optional[str] = None, temperature: float = 0.6, top_p: float = 0.9, max_gen_len: int = 64) -> None:
    """Only its arguments count."""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", ""),
        ("llama-2-7b/ 0.5 --max_gen_len 3 --top-p=1", ""),
        ("--ckpt_dir x -t .5", "there is no flag '-t'; there are --ckpt_dir, "),  # it may be two
        ("-m 5 --max_gen_len=-5 --temperature -5", ""),
        ("--nockpt_dir", ""),  # as fire has it: False
        ("--temprature 0", "there is no flag '--temprature' (did you mean --temperature?); there are --ckpt_dir, "),
        ("--temp 0", "there is no flag '--temp' (did you mean --temperature?)"),
        ("--tem 0", "there is no flag '--tem' (did you mean --temperature?); there are --ckpt_dir, "),
        ("--te 0", "there is no flag '--te'; there are --ckpt_dir, "),
        ("--max-genlen=5", "there is no flag '--max-genlen=5' (did you mean --max_gen_len?)"),
        ("--ckpt_dir x 0.5 0.9 9 more", "there is no flag for 'more'; there are --ckpt_dir, "),
        ("-m 5 --max_gen_len 6 x 0.5 0.9 more", "there is no flag for 'more'; there are --ckpt_dir, "),
        ("--top_p=1 x 0.5 9 more and more", "there is no flag for 'more and more'; there are --ckpt_dir, "),
        ("--nope --help", "there is no flag '--nope'; there are"),
        ("--help --nope", ""),  # fire shows it
        ("x -- --trace", ""),  # fire's own
    ],
)
def test_flags(line: str, expected: str) -> None:
    """fire would run `main`, and complain of a flag that it does not know when all is done."""
    told = wrong_flag(main, line.split())
    assert told.startswith(expected)
    assert bool(told) == bool(expected)


@pytest.mark.parametrize("name", ["example_text_completion.py", "example_chat_completion.py"])
def test_the_examples_refuse_before_they_build(name: str, forks: Forks) -> None:
    ended = forks.run("from llama import Llama\nLlama.build = None\n" + python(name, "--temprature", "0"))
    assert ended.returncode == 1
    assert ended.stderr.startswith(
        f"{name}: there is no flag '--temprature' (did you mean --temperature?); there are --"
    )
    assert ended.stderr.count("\n") == 1


INTERRUPT = {
    "load": "import signal\nllama.generation.open_folders = lambda *_: signal.raise_signal(signal.SIGINT)\n",
    "import": """
import signal, sys

class Finder:
    def find_spec(self, name, *_):
        if name == "llama.generation":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Finder())
del sys.modules["llama.generation"], llama.Llama, llama.generation
""",
}


@pytest.mark.parametrize(
    ("when", "line"),
    [
        *(("import", f"example_{what}_completion.py") for what in ("text", "chat")),
        *(("import", f"-m llama {line}") for line in ("score x", "chat", "bench", "serve")),
        *(("load", line) for line in ("example_chat_completion.py", "-m llama chat")),
    ],
)
def test_ctrl_c_in_the_first_seconds(when: str, line: str, forks: Forks) -> None:
    """Once a traceback, or "cannot load module more than once per process", or nothing: imports swallow the
    exception."""
    ended = forks.run("import llama\nllama.Llama\n" + INTERRUPT[when] + python(*line.split()))
    assert ended == (130, "", "")


@pytest.mark.parametrize(
    ("rank", "launched", "line"),
    [
        ("0", True, "me: a problem\n"),
        ("0", False, "me: a problem\n"),
        ("1", True, "me: a problem (on process 1 only)\n"),
        ("1", False, ""),
        ("x", True, "me: a problem\n"),
    ],
)
def test_one_process_tells_a_problem(
    rank: str, launched: bool, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another one only if the first has not ended all by then."""
    variables = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in {**variables, **({"TORCHELASTIC_RUN_ID": "1"} if launched else {})}.items():
        monkeypatch.setenv(name, value)
    slept: list[float] = []
    monkeypatch.setattr(program.time, "sleep", slept.append)
    with pytest.raises(SystemExit, match="1"):
        program.fail("a problem", "me")
    assert tuple(capsys.readouterr()) == ("", line)
    assert slept == [peers.PATIENCE] * (line.endswith("only)\n"))


def test_torchrun_is_told(forks: Forks, tmp_path: Path) -> None:
    """Its own report, which comes last and is long, then ends with the line that says what is wrong."""
    path = tmp_path / "error.json"
    ended = forks.run(
        python("-m", "llama", "score", "x", "--temprature", "0"), env={"TORCHELASTIC_ERROR_FILE": str(path)}
    )
    assert ended.returncode == 1
    told = json.loads(path.read_text())["message"]
    assert ended.stderr == f"llama: {told['message']}\n"
    assert told["message"].startswith("score does not take '--temprature'")
    assert told["extraInfo"]["timestamp"].isdecimal()
