"""What is importable, what is installed, and whether imports go down only. `test_docs` reads the pages."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mutants
import pytest
from conftest import ROOT

import llama
from llama import Llama, ModelArgs, Tokenizer

ARCHITECTURE = (ROOT / "docs/ARCHITECTURE.md").read_text(encoding="utf-8")


def test_metas_names_are_where_meta_has_them() -> None:
    from llama import Dialog, Transformer, chat, generation, model, tokenizer

    assert {"Dialog", "Llama", "ModelArgs", "Tokenizer", "Transformer"} <= set(llama.__all__)
    assert generation.Llama is Llama
    assert model.Transformer is Transformer
    assert generation.Dialog is Dialog is chat.Dialog
    for name in (
        "Role Message CompletionPrediction ChatPrediction Dialog B_INST E_INST B_SYS E_SYS SPECIAL_TAGS UNSAFE_ERROR "
        "Llama sample_top_p"
    ).split():
        assert hasattr(generation, name)
    for name in (
        "ModelArgs RMSNorm precompute_freqs_cis reshape_for_broadcast apply_rotary_emb repeat_kv Attention FeedForward "
        "TransformerBlock Transformer"
    ).split():
        assert hasattr(model, name)
    assert tokenizer.Tokenizer is Tokenizer
    assert tokenizer.logger


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (Llama.build, "ckpt_dir tokenizer_path max_seq_len max_batch_size model_parallel_size=None seed=1"),
        (Llama.generate, "self prompt_tokens max_gen_len temperature=0.6 top_p=0.9 logprobs=False echo=False"),
        (Llama.text_completion, "self prompts temperature=0.6 top_p=0.9 max_gen_len=None logprobs=False echo=False"),
        (Llama.chat_completion, "self dialogs temperature=0.6 top_p=0.9 max_gen_len=None logprobs=False"),
        (Tokenizer.__init__, "self model_path"),
        (Tokenizer.encode, "self s bos eos"),
        (Tokenizer.decode, "self t"),
        (llama.Transformer.forward, "self tokens start_pos"),
        (llama.model.precompute_freqs_cis, "dim end theta=10000.0"),
        (llama.model.RMSNorm.__init__, "self dim eps=1e-06"),
        (llama.model.FeedForward.__init__, "self dim hidden_dim multiple_of ffn_dim_multiplier"),
        (llama.generation.sample_top_p, "probs p"),
    ],
)
def test_metas_signatures(function: Any, expected: str) -> None:
    """Positions, names and defaults; what is ours comes after, by keyword only. build's two limits have defaults
    here."""
    parameters = list(inspect.signature(function).parameters.values())
    for parameter, word in zip(parameters, expected.split()):
        name, _, default = word.partition("=")
        assert parameter.name == name
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        assert not default or repr(parameter.default) == default
    for parameter in parameters[len(expected.split()) :]:
        assert parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD)
        assert parameter.default is not parameter.empty or parameter.kind is parameter.VAR_KEYWORD


def test_model_args() -> None:
    fields = [(f.name, f.default) for f in dataclasses.fields(ModelArgs) if f.repr]
    assert fields == [
        ("dim", 4096), ("n_layers", 32), ("n_heads", 32), ("n_kv_heads", None), ("vocab_size", -1),
        ("multiple_of", 256),
        ("ffn_dim_multiplier", None), ("norm_eps", 1e-5), ("max_batch_size", 32), ("max_seq_len", 2048),
    ]  # fmt: skip


def test_distributions_are_whole(tmp_path: Path) -> None:
    """The sdist once lacked the requirements.txt that setup.py reads: a wheel is built from the sdist here."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__"))
    build = [
        sys.executable,
        "-c",
        "from setuptools import build_meta as b; import sys; getattr(b, sys.argv[1])(sys.argv[2])",
    ]
    subprocess.run([*build, "build_sdist", str(tmp_path)], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        assert not any("test" in name for name in tar.getnames())  # setuptools puts tests/test*.py into it by itself
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    subprocess.run([*build, "build_wheel", str(tmp_path)], cwd=unpacked, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        metadata = z.read(next(n for n in names if n.endswith("METADATA"))).decode()
    demo = {f"llama/demo/{name}" for name in ("consolidated.00.pth", "params.json", "tokenizer.model", "README.md")}
    assert {"llama/generation.py", "llama/py.typed", "llama/page.html", *demo} <= set(names)
    assert not any(n.startswith(("tests", "benchmarks", "demo")) or n.endswith("train.py") for n in names)
    assert "Requires-Dist: fairscale>=0.4.13" in metadata
    assert "License-Expression: MIT" in metadata
    assert "License-File: LICENSE" in metadata
    assert f"Version: {llama.__version__}" in metadata
    for minor in range(10, 15):
        assert f"Classifier: Programming Language :: Python :: 3.{minor}" in metadata
    assert "Author: the authors of this repository" in metadata


MAP = re.findall(r"^ {4}([\w/]+)\.py ", ARCHITECTURE, flags=re.MULTILINE)  # modules, the highest floor first


def test_the_map_is_complete() -> None:
    files = {path.relative_to(ROOT / "llama").with_suffix("").as_posix() for path in ROOT.glob("llama/**/*.py")}
    wings = {name for name in files if name.endswith("/__init__")}  # they say what lives there, and are empty otherwise
    assert set(MAP) == files - wings - {"__main__"}
    assert len(MAP) == len(set(MAP))
    for name in wings:
        assert len(ast.parse((ROOT / f"llama/{name}.py").read_text()).body) == 1
    for path in [*ROOT.glob("llama/**/*.h"), *ROOT.glob("llama/**/*.cpp")]:
        assert re.search(rf"^ +(\w+/)+{path.name} ", ARCHITECTURE, flags=re.MULTILINE), path
    for path in ROOT.glob("*.py"):
        assert path.name in ARCHITECTURE or path.name == "setup.py", path


def test_mutants_names_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leaves as it is must be there."""
    assert mutants.missing() == []
    monkeypatch.setattr(mutants, "SPEED", {"TRIES", "TRI"})
    assert mutants.missing() == ["TRI"]
    monkeypatch.setattr(sys, "argv", ["mutants.py"])
    with pytest.raises(SystemExit, match="what SPEED names is not there: TRI"):
        mutants.main()


def imported(name: str) -> Iterator[str]:
    """The modules of the package that one imports, those for types only among them."""
    for node in ast.walk(ast.parse((ROOT / f"llama/{name}.py").read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        parts = (
            [*name.split("/")[: -node.level], *filter(None, [node.module])]
            if node.level
            else (node.module or "").split(".")
        )
        base = "/".join(parts).replace(".", "/").removeprefix("llama").removeprefix("/")
        for alias in node.names:
            yield from {f"{base}/{alias.name}".removeprefix("/"), base} & set(MAP)


@pytest.mark.parametrize("name", MAP)
def test_imports_go_down_the_map(name: str) -> None:
    """So a newcomer reads the list from either end, and there is no circle."""
    below = MAP[MAP.index(name) + 1 :]
    assert {other for other in imported(name) if other not in below} <= {name}  # one starts itself in another process
