"""Which checks `llama verify` runs on which files, and with what; the checks themselves have tests of their own."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pytest
from conftest import random_weights, write_checkpoint

from llama import Llama
from llama.loading import DEMO
from llama.verification import checkup, itself
from llama.verification.checkup import Asked, files_of, verify
from llama.verification.results import FAIL, NOT_APPLICABLE, PASS, Result, failed, not_applicable, passed
from llama.weights.checkpoint import open_checkpoint


def test_one_row_for_what_a_text_shows_and_what_is_known() -> None:
    """A failure of either is one; what is known of the model counts for more, unless a text alone shows a failure."""
    good, bad, mute = passed("x", "a"), failed("x", "b", "why"), not_applicable("x", "c")
    assert checkup._surer(good, None) == good
    assert checkup._surer(bad, passed("x", "known")) == bad
    assert checkup._surer(good, passed("x", "known")) == passed("x", "known; a")
    assert checkup._surer(mute, passed("x", "known")) == passed("x", "known")
    assert checkup._surer(good, failed("x", "known", "so")) == failed("x", "known", "so")
    assert checkup._surer(bad, failed("x", "known", "so")) == failed("x", "known; b", "so")


def test_files_of_a_folder(tmp_path: Path) -> None:
    """The weights and settings that are loaded, and the tokenizer, beside them or not; if it cannot be opened, what
    looks like weights."""
    folder = shutil.copytree(DEMO, tmp_path / "model", ignore=shutil.ignore_patterns("*.md", "__pycache__"))
    for name in ("other.safetensors", "pytorch_model-1.bin", "notes.txt"):
        (folder / name).touch()
    settings = ["params.json", "tokenizer.model"]
    checkpoint = open_checkpoint(DEMO)
    assert [path.name for path in files_of(folder, checkpoint)] == ["consolidated.00.pth", *settings]
    names = ["consolidated.00.pth", "other.safetensors", "pytorch_model-1.bin"]
    assert [path.name for path in files_of(folder, None)] == [*names, *settings]
    above = (folder / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    assert files_of(folder, None)[-1] == above
    elsewhere = tmp_path / "elsewhere.model"
    shutil.copyfile(above, elsewhere)
    assert files_of(folder, None, str(elsewhere))[-1] == elsewhere
    file = tmp_path / "a.gguf"
    file.touch()
    assert files_of(file, None) == [file]


def told(asked: Asked) -> dict[str, Result]:
    return {result.name: result for result in verify(asked)}


def test_a_folder_without_a_tokenizer_or_files(tmp_path: Path, tokenizer_path: str) -> None:
    folder = write_checkpoint(tmp_path / "model", random_weights(), 2)
    rows = told(Asked(folder, quick=True))
    assert (rows["tokenizer"].verdict, rows["tokenizer"].means) == (FAIL, checkup.NOT_ITS_OWN)
    size = sum(path.stat().st_size for path in folder.glob("*.pth"))
    assert rows["files"].told.startswith(f"Meta format, 2 files of {size:,} bytes in all: names, ")
    rows = told(Asked(folder, tokenizer_path=tokenizer_path, quick=True))
    assert (rows["tokenizer"].verdict, rows["tokenizer"].told.split(";")[0]) == (PASS, "400 pieces")
    demo = told(Asked(DEMO, quick=True))["tokenizer"]
    assert (demo.verdict, demo.told.split(";")[0]) == (PASS, "2048 pieces")
    (folder / "params.json").unlink()
    rows = told(Asked(folder, quick=True))
    assert list(rows) == ["files", "checksums", "all other checks"]
    assert rows["files"].means == checkup.CUT_SHORT
    with pytest.raises(ValueError, match="there is no folder and no file"):
        told(Asked(tmp_path / "none"))


@pytest.mark.parametrize(
    ("asked", "verdicts"),
    [
        ({}, (PASS, PASS)),
        ({"rounded": False}, (NOT_APPLICABLE, PASS)),
        ({"processes": 1}, (PASS, NOT_APPLICABLE)),
    ],
)
def test_what_runs_the_model(asked: dict[str, Any], verdicts: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is built for the checks: with room for a text, or for as many positions as it was made for; for one row
    where windows of a text are read."""
    built: list[dict[str, Any]] = []
    build = Llama.build

    def noted(**options: Any) -> Llama:
        built.append(options)
        return build(**options)

    counts: list[Any] = []
    monkeypatch.setattr(Llama, "build", noted)
    monkeypatch.setattr(
        checkup.faults, "check_meaning", lambda llama, seconds, texts: [passed("seconds", f"{seconds:g}")]
    )
    monkeypatch.setattr(checkup, "check_published", lambda *_: [])
    monkeypatch.setattr(itself, "check_itself", lambda _: [])
    monkeypatch.setattr(itself, "check_quantized", lambda build, kind, *_: passed(kind, ""))
    monkeypatch.setattr(
        itself, "check_processes", lambda count, given, *_: counts.append(given) or passed("several", "")
    )
    monkeypatch.setattr(checkup, "check_perplexities", lambda llama, known, text: [passed("wikitext", text)])
    rows = told(Asked(DEMO, device="cpu", compile=False, seconds=7.0, wikitext="words", **asked))
    int8, several = rows["int8"].verdict, rows.get("several", rows.get("several processes"))
    assert several is not None
    assert (int8, several.verdict) == verdicts
    assert (rows["seconds"].told, rows["wikitext"].told) == ("7", "words")
    first, last = built
    trained = checkup.trained_positions(open_checkpoint(DEMO)) or checkup.POSITIONS
    assert (first["max_seq_len"], first["max_batch_size"], first["compile"]) == (min(trained, 320), 4, False)
    assert last["max_batch_size"] == 1
    assert all(given["max_batch_size"] == 4 and given["ckpt_dir"] == str(DEMO) for given in counts)


@pytest.mark.parametrize(("trained", "room", "window"), [(100, 100, 100), (None, 320, 2048), (5000, 320, 2048)])
def test_room_for_a_text(trained: Optional[int], room: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(self: Asked, rows: int = 4, **_: Any) -> Llama:
        asked.append(self.positions)
        if rows == 1:
            raise ValueError("no room")
        return llama

    llama = Llama.build(max_seq_len=64, device="cpu")
    monkeypatch.setattr(Asked, "build", refuse)
    monkeypatch.setattr(checkup, "trained_positions", lambda _: trained)
    for module, name in ((checkup.faults, "check_meaning"), (checkup, "check_published"), (itself, "check_itself")):
        monkeypatch.setattr(module, name, lambda *_: [])
    rows = told(Asked(DEMO, rounded=False, processes=1, wikitext="words"))
    assert asked == [room, window]
    assert rows["wikitext"] == failed("wikitext", "no room", checkup.CANNOT_RUN)


def test_weights_that_are_rounded_or_compute_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = Llama.build(max_seq_len=64, device="cpu")
    monkeypatch.setattr(Asked, "build", lambda *_, **__: llama)
    for module, name in ((checkup.faults, "check_meaning"), (checkup, "check_published"), (itself, "check_itself")):
        monkeypatch.setattr(module, name, lambda *_: [])
    monkeypatch.setattr(itself, "is_quantized", lambda _: True)
    rows = told(Asked(DEMO, rounded=True, processes=1))
    for kind in ("int8", "int4"):
        assert rows[kind] == not_applicable(kind, "the folder's weights are rounded already")
    one_pass = itself.one_pass
    for wrong in (math.nan, math.inf):
        monkeypatch.setattr(
            itself, "one_pass", lambda *given, wrong=wrong: one_pass(*given).clone().fill_diagonal_(wrong)
        )
        name = "running the model"
        assert list(rows := told(Asked(DEMO)))[-1] == name
        assert rows[name] == failed(name, "its numbers are NaN or infinite after a text", checkup.CANNOT_COMPUTE)


def test_what_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Llama:
        raise ValueError("no room")

    monkeypatch.setattr(Asked, "build", refuse)
    assert told(Asked(DEMO))["loading"] == failed("loading", "no room", checkup.CANNOT_RUN)


@pytest.mark.parametrize(
    ("kind", "parameters", "rounded"), [("cpu", 10**9 - 1, True), ("cpu", 10**9, False), ("cuda", 10**10, True)]
)
def test_large_models_are_not_rounded_on_a_cpu(
    kind: str, parameters: int, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = Llama.build(max_seq_len=64, device="cpu")
    monkeypatch.setattr(Asked, "build", lambda *_, **__: llama)
    monkeypatch.setattr(checkup, "device_kind", lambda _: kind)
    size = SimpleNamespace(numel=lambda: parameters)
    monkeypatch.setattr(llama.model, "parameters", lambda: [size])
    for module, name in ((checkup.faults, "check_meaning"), (checkup, "check_published"), (itself, "check_itself")):
        monkeypatch.setattr(module, name, lambda *_: [])
    monkeypatch.setattr(itself, "check_quantized", lambda build, kind, *_: passed(kind, ""))
    rows = told(Asked(DEMO, processes=1))
    assert rows["int4"].verdict == (PASS if rounded else NOT_APPLICABLE)
