"""What reaches a terminal, and numbers that callers give: what a model says or a file is called steers nothing."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from llama import Llama
from llama.commands import cli
from llama.system.printable import escaped, harmless, json_line, printable, shortened

STEERS = (
    "\x1b[2J \x07\x08\r\x00\x7f\x9b\x85 \u202e\u2066\u200f\u061c \u200b\u2060\ufeff \u2028\u2029 \ufff9 "
    "\U000e0041 \ud800"
)
PLAIN = "a\tb\n狗 你好 café Ärger 👨‍👩‍👧 می‌خواهم ▁ \N{REPLACEMENT CHARACTER} ~|\\ \xa0"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_steers_is_replaced_and_the_rest_stays() -> None:
    assert set(harmless(STEERS)) == {" ", "[", "2", "J", "\N{REPLACEMENT CHARACTER}"}
    assert harmless(PLAIN) == PLAIN
    assert printable(STEERS, Screen()) == harmless(STEERS)
    assert printable(STEERS, io.StringIO()) == STEERS  # a pipe gets text as it is
    assert escaped("a\x1b]0;x\x07\u202e\n") == r"a\x1b]0;x\x07\u202e\n"
    assert escaped("狗 café \\") == "狗 café \\"
    line = json_line({STEERS: PLAIN})
    assert json.loads(line) == {STEERS: PLAIN}
    assert harmless(line) == line
    assert "狗" in line


def test_any_value_in_an_error() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert [shortened(v) for v in (deep, [10**5000], 10**5000)] == ["a list", "a list", "a 16610-bit number"]
    assert shortened("\x1b" * 99).startswith(r"'\x1b\x1b")
    assert (shortened("x" * 78), shortened("x" * 79)) == (repr("x" * 78), "'" + "x" * 78 + "…")
    assert len(shortened("x" * 79)) == len(shortened("x" * 78)) == 80
    assert (shortened(2**4095, 2000), shortened(2**4096, 2000)) == (str(2**4095), "a 4097-bit number")


def on_a_screen(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a command of the package shows at a terminal."""
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "argv", ["llama", *arguments])
    with contextlib.suppress(SystemExit):
        cli.main()
    monkeypatch.undo()
    return screen.getvalue()


EVIL = "evil\x1b]0;pwned\x07\x9b\u202e\u200b"


@pytest.mark.parametrize("kind", ["folder", "file", "key", "tensor", "shards", "line", "text"])
def test_names_do_not_steer_the_terminal(
    kind: str, tiny: Path, tokenizer_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a folder, a file in it, a key of params.json, a tensor, a key of a line of JSON; and a text's pieces."""
    folder = tmp_path / (EVIL if kind == "folder" else "folder")
    if kind == "file":
        folder.mkdir()
        (folder / EVIL).touch()
    else:
        shutil.copytree(tiny, folder)
    command = ["info", str(folder)]
    if kind == "key":
        (folder / "params.json").write_text(json.dumps({EVIL: 1}))
    if kind in ("tensor", "shards"):
        weights = torch.load(folder / "consolidated.00.pth")
        torch.save({**weights, EVIL: torch.zeros(1)}, folder / "consolidated.00.pth")
        command = ["complete", "x", "--ckpt_dir", str(folder), "--tokenizer_path", tokenizer_path, "--device", "cpu"]
        if kind == "shards":
            torch.save(weights, folder / "consolidated.01.pth")
    if kind == "line":
        (folder / "in.jsonl").write_text(json.dumps({"prompt": "x", EVIL: 1}))
        command = ["complete", "--jsonl", str(folder / "in.jsonl")]
    if kind == "text":
        command = ["tokenize", "a" + EVIL, "--tokenizer_path", tokenizer_path]
    shown = on_a_screen(command, monkeypatch)
    assert harmless(shown) == shown
    assert kind in ("text", "folder") or "x1b]0;pwned" in shown


def test_the_examples_do_not_steer_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a model says. In a pipe its text is what it is, as in Meta's examples."""

    class Fake:
        def text_completion(self, prompts: list[str], **_: Any) -> Any:
            return [{"generation": STEERS} for _ in prompts]

        def chat_completion(self, dialogs: list[Any], **_: Any) -> Any:
            return [{"generation": {"role": "assistant", "content": STEERS}} for _ in dialogs]

    monkeypatch.setattr(Llama, "build", lambda **_: Fake())
    for example in ("text", "chat"):
        main = runpy.run_path(str(ROOT / f"example_{example}_completion.py"))["main"]
        outputs = []
        for out in (Screen(), io.StringIO()):
            monkeypatch.setattr(sys, "stdout", out)
            main()
            outputs.append(out.getvalue())
        monkeypatch.undo()
        monkeypatch.setattr(Llama, "build", lambda **_: Fake())
        assert outputs[0] == harmless(outputs[1])
        assert STEERS in outputs[1]
