"""The model in the box, and the notebook that looks inside it."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from helpers import run, run_cells, text_of
from workers import Pool

from llama import Llama

DEMO = ROOT / "llama/demo"


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama.build(device="cpu")


def test_it_is_small_and_in_metas_format(llama: Llama) -> None:
    files = [DEMO / name for name in ("consolidated.00.pth", "params.json", "tokenizer.model")]
    assert sum(path.stat().st_size for path in files) <= 5_000_000
    assert llama.model.params.max_seq_len == 512
    assert {p.dtype for p in llama.model.parameters()} == {torch.bfloat16}
    assert (llama.tokenizer.bos_id, llama.tokenizer.eos_id, llama.tokenizer.pad_id) == (1, 2, -1)
    assert llama.tokenizer.decode(llama.tokenizer.encode("狗 and 🐶", bos=True, eos=True)) == "狗 and 🐶"
    assert len(llama.tokenizer.encode("1985", bos=False, eos=False)) >= 4  # digits are split


def test_its_stories_end_by_themselves(llama: Llama) -> None:
    torch.manual_seed(1)
    ids, _ = llama.generate([[1]] * 4, 500, 0.6, 0.9)
    assert sum(len(row) < 500 for row in ids) >= 3
    assert all("time" in llama.tokenizer.decode(row[:20]) or "day" in llama.tokenizer.decode(row[:20]) for row in ids)


def test_its_replies_end_by_themselves(llama: Llama) -> None:
    torch.manual_seed(1)
    questions = ("Tell me a story about a dog.", "what is the recipe of mayonnaise?", "Who is Tom?")
    dialogs: Any = [[{"role": "user", "content": question}] for question in questions]
    replies = llama.chat_completion(dialogs, logprobs=True)
    assert sum(len(reply["tokens"]) < 400 for reply in replies) >= 2
    assert all(len(reply["generation"]["content"]) > 100 for reply in replies)


def test_it_answers_about_the_story_that_was_told(llama: Llama) -> None:
    """It answers from the story, and a thing that is asked for comes up in the next one."""
    story = (
        "Once upon a time, there was a little frog named Rosie. She lived near a pond. One day, Rosie found a red hat. "
        "She put it on and went home. Her mom smiled."
    )
    session = llama.chat(temperature=0, max_gen_len=40)
    session.dialog = [{"role": "user", "content": "Tell me a story."}, {"role": "assistant", "content": story}]
    assert session.ask("What is the frog's name?") == "The frog's name is Rosie."
    assert "hat" in session.ask("What did Rosie find?")
    assert "frog" in llama.chat(temperature=0, max_gen_len=40).ask("Tell me a story about a frog.")


def test_it_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    Llama.build(device="cpu")
    assert "This is the demo model, which tells small children's stories. For Llama 2" in capsys.readouterr().out


def test_examples_without_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    """One as a program, whose exit is clean; test_terminal runs the other one under torchrun too."""
    text = text_of(run([sys.executable, "example_chat_completion.py"]))
    assert "This is the demo model" in text
    assert text.count("\n> ") == 6
    runpy.run_path(str(ROOT / "example_text_completion.py"))["main"](max_gen_len=8)
    assert capsys.readouterr().out.count("\n> ") == 4


def test_the_scripts_that_made_it_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    # Both look for data.py themselves, and hold out the same stories.
    scripts = [runpy.run_path(str(ROOT / path)) for path in ("benchmarks/quality.py", "demo/train.py")]
    assert scripts[0]["read_stories"] is scripts[1]["read_stories"]


def on_a_rank() -> list[str]:
    return [p["generation"] for p in Llama.build(device="cpu").text_completion(["The dog"], 0, max_gen_len=9)]


def test_on_four_processes(pool: Pool) -> None:
    [text], *others = pool.run(on_a_rank)
    assert len(text) > 9
    assert others == [[text]] * 3


def test_tokenizer_in_the_folder_or_above(tmp_path: Path, tiny: Path, tokenizer_path: str) -> None:
    """Meta's layout has one for all models, above their folders."""
    folder = tmp_path / "llama-2-7b"
    shutil.copytree(tiny, folder)
    with pytest.raises(
        ValueError, match="no tokenizer.model or tokenizer.json in .* in the folder above it; pass tokenizer_path"
    ):
        Llama.build(str(folder), max_seq_len=16, device="cpu")
    (tmp_path / "tokenizer.model").write_bytes(Path(tokenizer_path).read_bytes())
    assert Llama.build(str(folder), max_seq_len=16, device="cpu").tokenizer.n_words == 400


def test_it_may_not_go_beyond_its_context() -> None:
    with pytest.warns(UserWarning, match="max_seq_len=600 goes beyond the 512 positions"):
        Llama.build(max_seq_len=600, device="cpu")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # matplotlib's, of torch's
def test_the_notebook() -> None:
    """From top to bottom, offline."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    plt = run_cells("quickstart.ipynb")["plt"]
    assert len(plt.get_fignums()) == 3
    plt.close("all")
    assert (ROOT / "quickstart.ipynb").read_text(encoding="utf-8").count('"image/png"') == 3
