"""Bars and lines for who waits: where they are shown, and where not."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama import Llama
from llama.system import progress


@pytest.mark.parametrize(("shown", "first", "quiet", "disabled"), [
    (True, True, False, None),  # tqdm looks whether stderr is a terminal
    (False, True, False, True), (True, False, False, True), (True, True, True, True),
])  # fmt: skip
def test_who_sees_a_bar(
    shown: bool, first: bool, quiet: bool, disabled: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []
    monkeypatch.setattr("tqdm.tqdm", lambda disable, **_: given.append(disable))
    monkeypatch.setattr(progress, "is_first_process", lambda: first)
    with progress.quietly(quiet):
        progress.bar(shown, total=1)
    assert given == [disabled]


def test_which_bars_stay(bars: list[Any]) -> None:
    """The others come for what takes long."""
    with progress.bar(total=7), progress.bar(total=8, stays=True):
        assert [(bar.total, bar.delay, bar.leave) for bar in bars] == [(7, progress.PATIENCE, False), (8, 0, True)]


def test_a_notebook_shows_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stderr is no terminal; with ipywidgets a bar is one."""
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    given: list[object] = []
    monkeypatch.setattr("tqdm.tqdm", lambda disable, **_: given.append(("text", disable)))
    monkeypatch.setitem(
        sys.modules, "tqdm.auto", SimpleNamespace(tqdm=lambda disable, **_: given.append(("widget", disable)))
    )  # type: ignore[arg-type]
    for spec in (None, "there"):
        monkeypatch.setattr(progress, "find_spec", lambda name, spec=spec: spec)
        progress.bar(total=1)
    assert given == [("text", False), ("widget", False)]


def test_prompts_are_counted_where_some_wait(tiny: Path, tokenizer_path: str, bars: list[Any]) -> None:
    llama = Llama.build(str(tiny), tokenizer_path, 16, 2, device="cpu")
    bars.clear()
    for count in (2, 3):
        llama.text_completion(["a"] * count, max_gen_len=1)
        llama.score(["a"] * count, ["b"] * count)
    assert [(bar.n, bar.total, bar.unit) for bar in bars] == [(3, 3, "prompt")] * 2


def test_a_quiet_build(tiny: Path, tokenizer_path: str, capfd: pytest.CaptureFixture[str]) -> None:
    """It says nothing, and only it: the next one speaks again."""
    Llama.build(quiet=True)
    assert capfd.readouterr() == ("", "")
    Llama.build(str(tiny), tokenizer_path, 16, 1, device="cpu")
    assert capfd.readouterr().out.startswith("Loaded in ")
