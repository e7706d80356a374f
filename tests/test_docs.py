"""Whether README and docs/ tell the truth: their commands run, their links lead somewhere.

In the pages, a block of `sh` or `python` is run here. A block of `bash` needs a network, a server, a GPU or Meta's
weights: its llama commands are only understood, and its extras looked up.
"""

from __future__ import annotations

import re
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from forks import Forks, python

from llama.commands import cli
from llama.commands.arguments import understand
from llama.loading import DEMO

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[Any]:
    """The blocks of a language on all pages."""
    found = [
        (page, text) for page in PAGES for kind, text in FENCE.findall(page.read_text("utf-8")) if kind == language
    ]
    return [pytest.param(text, id=f"{page.stem}-{i}") for i, (page, text) in enumerate(found)]


def lines(language: str) -> list[str]:
    """Each line of these blocks once, without the comment behind it."""
    texts = "".join(block.values[0] for block in blocks(language)).replace("\\\n", "")
    return list(dict.fromkeys(re.sub("  +#.*", "", line) for line in texts.splitlines()))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the pages' commands are run in, with the demo model in the place of Meta's."""
    for name in ("llama-2-7b", "llama-2-7b-chat"):
        (tmp_path / name).symlink_to(DEMO)
    (tmp_path / "tokenizer.model").symlink_to(f"{DEMO}/tokenizer.model")
    for name in ("example_text_completion.py", "example_chat_completion.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "prompt.txt").write_text("Once upon a time")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "A cat", "max_gen_len": 4}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(line: str) -> list[str]:
    """The words behind `llama` of a line that runs one of its commands; else none."""
    found = re.fullmatch(r"(?:python -m )?llama (.*)", line)
    return shlex.split(found[1]) if found else []


@pytest.mark.parametrize("line", lines("sh"))
def test_a_command(line: str, checkout: Path, forks: Forks, monkeypatch: pytest.MonkeyPatch) -> None:
    if line.startswith("pip install"):  # the continuous integration runs it, in a fresh environment
        assert line in (ROOT / ".ci/run").read_text()
    elif found := re.fullmatch(r"torchrun --nproc_per_node (\d) (.*)", line):
        script = python(*shlex.split(found[2]), *["--max_gen_len=2"] * ("example_" in line))
        for done in forks.ranks(script, count=int(found[1]), cwd=str(checkout)):
            assert done.returncode == 0, done.stderr
    elif found := re.fullmatch(r"cat (\S+) \| llama (.*) > (\S+)", line):
        with open(found[1]) as pipe, open(found[3], "w") as out, redirect_stdout(out):
            monkeypatch.setattr(sys, "stdin", pipe)
            cli.run(shlex.split(found[2]))
        assert Path(found[3]).read_text()
    else:
        cli.run(words(line))


@pytest.mark.parametrize("line", [line for line in lines("bash") if words(line)])
def test_a_command_that_is_not_run(line: str) -> None:
    assert callable(understand(cli.COMMANDS, words(line)))


@pytest.mark.parametrize("block", blocks("python"))
def test_python(block: str, checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "page", "exec"), {})
    assert capfd.readouterr().err == ""


def test_the_extras_are_there() -> None:
    setup = (ROOT / "setup.py").read_text("utf-8")
    for page in PAGES:
        for extras in re.findall(r"pip install (?:-e )?'\.\[([\w,]+)\]'", page.read_text("utf-8")):
            assert all(f'"{extra}": ' in setup for extra in extras.split(",")), (page, extras)


def anchors(page: Path) -> set[str]:
    """What a link to a heading of a page says, as GitHub makes it."""
    headings = re.findall("^#+ (.*)$", FENCE.sub("", page.read_text("utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text("utf-8"))):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            other = page.parent / name if name else page
            assert other.exists(), target
            assert not anchor or anchor in anchors(other), target


def test_the_readme_is_short_and_names_every_page_and_command() -> None:
    readme = PAGES[0].read_text("utf-8")
    assert len(readme.split()) <= 900
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in readme
    for name in cli.COMMANDS:
        assert f"| `llama {name}` |" in readme
