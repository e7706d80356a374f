"""Fixtures that need no network, weights or GPU: a SentencePiece model trained here, tiny checkpoints, a pool of
processes.

What needs the project's shared material (Meta's goldens, the real tokenizer, stories260K) looks for it beside the
checkout, or where LLAMA_SHARED points, and is skipped where it is missing.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes run the tests, on models so small that threads only cost

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the Hugging Face Hub; test_hub.py has one of its own

import pytest
import torch
from forks import Forks
from sentencepiece import SentencePieceTrainer
from tqdm import tqdm
from workers import Pool

from llama import ModelArgs, Tokenizer, Transformer
from llama.layers import own_kernels

pytest.register_assert_rewrite("helpers")

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LLAMA_SHARED", ROOT.parent / "shared"))

# How Meta cuts its matrices (None: every shard has the whole). Written down here, apart from the layers that say it
# too.
META_SHARD_DIMS = {
    "tok_embeddings": 1, "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0,
    "norm": None, "attention_norm": None, "ffn_norm": None,
}  # fmt: skip

TEXT = """The little dog found a red ball under the tree and ran back to the house with it.
"Where did you find that?" asked the girl. She laughed, and they played until 1985 or so.
Once upon a time there was a river; nobody knew where it came from, or where it went.
你好,世界。测试一下,看看什么情况。今天天气很好,我们去公园玩。
L'été, les enfants jouent près du café. Ärger über süße Äpfel? ¡Qué día más bonito!
"""


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} of the shared material, which is not at {SHARED} (LLAMA_SHARED names another place)")
    return path


def golden(name: str) -> Any:
    return json.loads(shared(f"golden/{name}.golden.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True, scope="session")
def no_compiled_steps(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the user of this machine has compiled is not what the tests are about. The kernels are compiled here, and
    said to be, and not in the middle of a test; or taken from the folder that KERNELS names."""
    cache = tmp_path_factory.mktemp("cache")
    for made in Path(os.environ.get("KERNELS", cache)).glob("*.kernels"):
        shutil.copy(made, cache)
    os.environ["LLAMA_CACHE"] = str(cache)
    own_kernels.loaded()


def train_tokenizer() -> bytes:
    """A 400-piece model with Llama 2's settings."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 20), model_writer=model, model_type="bpe", vocab_size=400,
        byte_fallback=True, split_digits=True, remove_extra_whitespaces=False, normalization_rule_name="identity",
        allow_whitespace_only_pieces=True, pad_id=-1, character_coverage=0.98, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer())
    return str(path)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: str) -> Tokenizer:
    return Tokenizer(tokenizer_path)


PARAMS: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 32, "norm_eps": 1e-5}


def random_weights(params: dict[str, Any] = PARAMS, vocab_size: int = 400, seed: int = 0) -> dict[str, torch.Tensor]:
    model = Transformer(ModelArgs(**params, vocab_size=vocab_size, max_batch_size=1, max_seq_len=1))
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 1 else p.shape[-1] ** -0.5) + (p.ndim == 1)
        for name, p in model.named_parameters()
    }


def near(weights: dict[str, torch.Tensor], error: float = 0.15) -> dict[str, torch.Tensor]:
    """Weights with an error, so that a model guesses some of what theirs does: this share of their spread."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: w if w.ndim == 1 else w + error * w.std() * torch.randn(w.shape, generator=generator)
        for name, w in weights.items()
    }


def write_checkpoint(
    folder: Path, weights: dict[str, torch.Tensor], shards: int = 1, params: dict[str, Any] = PARAMS
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(shards):
        piece = {}
        for name, weight in weights.items():
            dim = META_SHARD_DIMS[name.split(".")[-2]]
            piece[name] = weight if dim is None else weight.chunk(shards, dim)[i].clone()
        piece["rope.freqs"] = torch.zeros(4)
        torch.save(piece, folder / f"consolidated.{i:02d}.pth")
    (folder / "params.json").write_text(json.dumps({**params, "vocab_size": -1}))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random GQA model of 2 layers in float32."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), random_weights())


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The bars of tqdm that a terminal would show."""
    made: list[Any] = []

    def bar(disable: Optional[bool], **options: Any) -> Any:
        if disable:
            return tqdm(disable=True, **options)
        made.append(tqdm(disable=False, **options))
        return made[-1]

    monkeypatch.setattr("tqdm.tqdm", bar)
    return made


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.close()
