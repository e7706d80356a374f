"""What is imported when: `import llama` needs no torch before it is used, and neither does a command before it
works."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from helpers import environment

import llama

PROGRAM = """
import contextlib, io, json, sys
import llama
from llama.commands import cli

done = {}
lines = [["--help"], ["tokenize", "hello"], ["complete", "x", "--temprature", "0"], ["complete", "x", "--top_p", "2"]]
lines += [["chat", "--url", "127.0.0.1:1"], ["complete", "x", "--url", "127.0.0.1:1"]]  # where nobody answers
lines += [[*words, "no/such/folder"] for words in (
    ["complete", "x", "--ckpt_dir"], ["chat"], ["serve"], ["score", "x", "--draft"], ["info"], ["bench"],
    ["perplexity", "--file", __import__("os").__file__, "--method", "joined-64"], ["eval", "--tasks", "x"],
    ["convert", "--dst", "x", "--to", "hf"],
)]
for words in [*lines, *([name, "--help"] for name in cli.COMMANDS)]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(ValueError):
        cli.run(words)
    done[" ".join(words)] = [name for name in ("torch", "numpy", "fairscale", "tqdm", "jinja2") if name in sys.modules]
from llama import Llama

later = "torch._dynamo torch._inductor sympy jinja2 triton prompt_toolkit starlette transformers"
later += " huggingface_hub llguidance"
done["from llama import Llama"] = [name for name in later.split() if name in sys.modules]
print(json.dumps(done))
"""


def test_what_is_imported_when_it_is_needed() -> None:
    """Torch takes a second and a half; torch's compiler, which `torch.nn.attention.bias` brings, another."""
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment(), capture_output=True, text=True, check=True
    ).stdout
    assert {words: found for words, found in json.loads(told).items() if found} == {}


def test_names_that_are_imported_when_they_are_used() -> None:
    for name in llama.__all__:
        assert getattr(llama, name).__name__ == name or name == "Dialog"
        assert name in dir(llama)
    assert llama.model.Transformer is llama.Transformer  # modules too, as after an import of all
    for name in ("nothing", "__wrapped__"):
        with pytest.raises(AttributeError, match=f"module 'llama' has no attribute '{name}'"):
            getattr(llama, name)
