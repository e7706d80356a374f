"""The command completion, in the shells that are here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from llama.commands import cli

BASH = """
source "$1"
while read -r line; do
    COMP_WORDS=($line); COMP_WORDS=("${COMP_WORDS[@]/EMPTY/}"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
    _llama
    echo "${COMPREPLY[*]}"
done
"""


def script(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    cli.run(["completion", shell])
    path = folder / f"llama.{shell}"
    path.write_text(capsys.readouterr().out)
    return path


def test_bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script("bash", tmp_path, capsys)
    (tmp_path / "a folder").mkdir()
    expected = {
        "llama co": "complete convert completion",
        "llama chat --dt": "--dtype",
        "llama chat --dtype EMPTY": "bf16 fp16 fp32 auto",
        "llama chat --dtype = f": "fp16 fp32",  # bash makes three words of --dtype=f
        "llama chat --dtype =": "bf16 fp16 fp32 auto",
        "llama convert --to h": "hf",
        "llama completion f": "fish",
        "llama info a": "a folder",
        "llama complete --file ll": "llama.bash",
        "llama complete --seed EMPTY": "",
        "llama complete --echo --sto": "--stop",
        "llama nothing --": "",
    }
    told = subprocess.run(
        ["bash", "-c", BASH, "bash", path],
        input="\n".join(expected) + "\n",
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stderr == ""
    assert dict(zip(expected, told.stdout.split("\n"))) == expected


def test_fish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script("fish", tmp_path, capsys)
    lines = ["llama co", "llama chat --dt", "llama chat --dtype ", "llama completion z"]
    asked = f"source {path}; " + "; ".join(f"complete -C '{line}'; echo ." for line in lines)
    told = subprocess.run(["fish", "-c", asked], capture_output=True, text=True, check=True).stdout.split(".\n")
    words = [[line.split("\t")[0] for line in part.splitlines()] for part in told[: len(lines)]]
    assert [sorted(each) for each in words] == [
        ["complete", "completion", "convert"], ["--dtype"], ["auto", "bf16", "fp16", "fp32"], ["zsh"],
    ]  # fmt: skip


def test_zsh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only its grammar: zsh completes in a terminal alone."""
    path = script("zsh", tmp_path, capsys)
    assert subprocess.run(["zsh", "-n", path], capture_output=True, text=True, check=True).stderr == ""
    assert "'--to[hf, meta or gguf; for transformers, Meta, llama.cpp]:to:(hf meta gguf)'" in path.read_text()


def test_another_shell() -> None:
    with pytest.raises(ValueError, match="there is none for 'tcsh'; the shells are bash, zsh, fish"):
        cli.run(["completion", "tcsh"])
