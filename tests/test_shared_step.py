"""The step of all layers in one operator, in several processes that share the model: its numbers, what all processes
agree on, and how it ends if one is gone."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from conftest import random_weights, write_checkpoint
from forks import Forks
from test_cpu_step import COLUMNS, KINDS, ROWS, apart, prompts, read
from workers import Pool

from llama import Llama
from llama.decoding import cpu_step, engine
from llama.decoding.engine import Engine
from llama.layers import int8, own_kernels, parallel
from llama.layers.int4 import packed_layout

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux")

# Two key/value heads, which four processes have twice. Without quantization rows that fill no vectors.
SMALL = {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 128, "norm_eps": 1e-5}
SHAPES: dict[Optional[str], dict[str, Any]] = {
    None: {**SMALL, "dim": 72, "multiple_of": 8}, "int4": {**SMALL, "dim": 256, "n_kv_heads": 4, "multiple_of": 256}
}  # fmt: skip


@contextmanager
def in_tiles() -> Iterator[None]:
    """See test_cpu_step.py; and nothing is left of failed groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_step, "AMX", False)
        patch.setattr(int8, "onednn_is_exact", lambda: True)
        patch.setattr(int8, "onednn_is_fast", lambda: False)
        patch.setattr(int8, "UNTILED", 0)
        yield
    parallel._forget_groups()


def build(folder: str, tokenizer_path: str, ranks: int, **options: Any) -> Engine:
    llama = Llama.build(folder, tokenizer_path, COLUMNS, ROWS, ranks, device="cpu", quiet=True, **options)
    llama._engine.refresh()
    return llama._engine


def engines(folder: str, tokenizer_path: str, ranks: int, **options: Any) -> tuple[Engine, Engine]:
    """The step in one operator, and op by op."""
    ours, plain = (build(folder, tokenizer_path, ranks, compile=compile, **options) for compile in (None, False))
    assert ours._step_of(ROWS) is not None
    assert plain._step_of(ROWS) is None
    return ours, plain


def numbers(folder: str, tokenizer_path: str, ranks: int, kind: Optional[str], dtype: str) -> list[Any]:
    """The largest distance from the step op by op, in logits and in the cache; and the logits of the last step."""
    far = [0.0]
    with in_tiles(), torch.inference_mode():
        ours, plain = engines(folder, tokenizer_path, ranks, quantize=kind, dtype=dtype)
        for rows in (1, ROWS):
            positions = read(ours, prompts(rows))
            assert read(plain, prompts(rows)) == positions
            for step in range(3):
                tokens = torch.arange(7, 7 + rows) + 5 * step
                at = [position + step for position in positions]
                found, expected = ours.decode(tokens, at), plain.decode(tokens, at)
                assert (found.dtype, found.shape) == (torch.float32, expected.shape)
                far.append(apart(found, expected))
            for mine, theirs in zip(ours.model.attentions(), plain.model.attentions()):
                far += [apart(mine.cache_k.float(), theirs.cache_k.float())]
                far += [apart(mine.cache_v.float(), theirs.cache_v.float())]
    return [max(far), found.tolist()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_numbers_are_those_of_the_step_op_by_op(
    ranks: int, kind: Optional[str], dtype: str, tmp_path: Path, tokenizer_path: str, pool: Pool
) -> None:
    """All ranks have the same ones, to the bit, and near to those of one process."""
    if kind == "int4" and (dtype == "float32" or (packed_layout() or (0,))[0] != 64):
        pytest.skip("torch packs int4 in another way here, or does not")
    params = SHAPES.get(kind, SMALL)
    folder = str(write_checkpoint(tmp_path, random_weights(params), params=params))
    (far, logits), *others = pool.run(numbers, folder, tokenizer_path, ranks, kind, dtype)
    limit = 0.05 if dtype == "bfloat16" or kind in ("w8a8", "w4a8") else 1e-5
    assert far < limit
    assert all(other[1] == logits for other in others)
    alone = Llama.build(folder, tokenizer_path, COLUMNS, ROWS, device="cpu", quantize=kind, dtype=dtype, compile=False)
    with torch.inference_mode():
        at = [position + 2 for position in read(alone._engine, prompts(ROWS))]
        alone._engine.decode(torch.arange(7, 7 + ROWS), [position - 2 for position in at])
        alone._engine.decode(torch.arange(12, 12 + ROWS), [position - 1 for position in at])
        expected = alone._engine.decode(torch.arange(17, 17 + ROWS), at)
    assert apart(torch.tensor(logits), expected) < (0.05 if limit > 0.01 or kind == "int8" else 1e-5)
