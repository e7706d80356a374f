"""The examples as people start them: plain python, torchrun, two nodes; and how a failing process ends them all."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT
from forks import Forks, python
from helpers import TORCHRUN, environment, run, text_of
from workers import free_port


@pytest.fixture(scope="module")
def flags(tiny: Path, tokenizer_path: str) -> list[str]:
    return ["--ckpt_dir", str(tiny), "--tokenizer_path", tokenizer_path, "--temperature", "0"]


@pytest.fixture(scope="module")
def alone(flags: list[str], forks: Forks) -> str:
    """The text example on one process, in plain python."""
    return text_of(forks.run(python("example_text_completion.py", *flags, "--max_seq_len", "256")))


def test_plain_python(alone: str) -> None:
    assert alone.count("==================================") == 4
    assert "\n> " in alone
    assert alone.startswith("I believe the meaning of life is\n> ")


def test_torchrun(alone: str, flags: list[str]) -> None:
    command = [*TORCHRUN, "--nproc_per_node", "2", "example_text_completion.py", *flags, "--max_seq_len", "256"]
    assert text_of(run(command)) == alone


def test_two_nodes(alone: str, flags: list[str]) -> None:
    """Two torchrun agents with one process each. Only global rank 0 prints; Meta's code prints once a node."""
    port = str(free_port())
    agents = [
        subprocess.Popen(
            [*TORCHRUN, "--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "1", "--master_addr",
              "127.0.0.1",
             "--master_port", port, "example_text_completion.py", *flags, "--max_seq_len", "256"],
            cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for node in (0, 1)
    ]  # fmt: skip
    results = [subprocess.CompletedProcess(agent.args, 0, *agent.communicate(timeout=120)) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], results[0].stderr
    printed = [result for result in results if result.stdout]
    assert len(printed) == 1
    assert text_of(printed[0]) == alone


def test_chat_example(tiny: Path, tokenizer_path: str, forks: Forks) -> None:
    """Six dialogs with their replies; the last is refused. The tiny vocabulary makes long prompts."""
    flags = [str(tiny), tokenizer_path, "--max_seq_len", "2048", "--max_gen_len", "4"]
    text = text_of(forks.run(python("example_chat_completion.py", *flags)))
    assert text.count("> Assistant: ") == 6
    assert "System: Always answer with Haiku\n" in text
    assert "> Assistant: Error: special tags are not allowed as part of the prompt." in text


FAILING = """
import os, sys
from llama import Llama
llama = Llama.build(sys.argv[1], sys.argv[2], 16, 1, device="cpu")
if os.environ["RANK"] == "1":
    raise RuntimeError("the cat ate rank 1")
llama.generate([[1, 5]], 8)
"""


def test_a_process_that_fails_ends_all(tiny: Path, tokenizer_path: str, tmp_path: Path) -> None:
    """Rank 0 waits in a collective for rank 1, which raised: all end, and rank 1's message is the one to see."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    began = time.monotonic()
    result = run([*TORCHRUN, "--nproc_per_node", "2", str(script), str(tiny), tokenizer_path])
    assert result.returncode != 0
    assert "the cat ate rank 1" in result.stderr
    assert time.monotonic() - began < 60


def test_one_process_speaks_for_all(tiny: Path, tokenizer_path: str, forks: Forks) -> None:
    """A mistake that every process makes is told once."""
    first, second = forks.ranks(python("example_text_completion.py", str(tiny / "nowhere"), tokenizer_path))
    assert (first.returncode, second.returncode) == (1, 1)
    assert first.stderr.count("ValueError: no checkpoint folder at") == 1
    assert second.stderr == ""


def test_a_mistake_is_told_without_noise(tiny: Path, tokenizer_path: str, forks: Forks) -> None:
    result = forks.run(python("example_text_completion.py", str(tiny), tokenizer_path, "--max_seq_len", "4"))
    assert result.returncode == 1
    assert "tokens, but max_seq_len is 4; shorten it, or build with max_seq_len=" in result.stderr.splitlines()[-1]


def test_launch_configurations(tiny: Path, tokenizer_path: str, forks: Forks) -> None:
    """The ones for VS Code, started as the debugger starts them, from another folder; with a checkpoint's path too."""
    configurations = json.loads((ROOT / ".vscode/launch.json").read_text())["configurations"]
    assert len(configurations) == 2
    for configuration in configurations:
        args = [arg.replace("${workspaceFolder}", str(ROOT)) for arg in configuration["args"]]
        program = configuration.get("program", "").replace("${workspaceFolder}", str(ROOT))
        start = ["-m", configuration["module"]] if "module" in configuration else [program]
        more = [] if program else ["--ckpt_dir", str(tiny), "--tokenizer_path", tokenizer_path, "--max_seq_len", "256"]
        assert text_of(forks.run(python(*start, *args, *more), cwd=str(tiny))).count("\n> ") == 4
