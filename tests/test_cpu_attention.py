"""Attention of prompts in one operator: that of float64, as near as torch's own comes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import random_weights, write_checkpoint
from torch.autograd import forward_ad

from llama import Llama
from llama.layers import own_kernels
from llama.model import attend

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux")


@pytest.fixture(autouse=True)
def without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the operator run on every processor."""
    monkeypatch.setattr(own_kernels, "AMX", False)
    monkeypatch.setattr(own_kernels, "VECTORS", True)


def sees(queries: int, keys: int) -> torch.Tensor:
    return torch.ones(1, queries, keys, dtype=torch.bool).tril(keys - queries)


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "kv_heads", "size"),
    [(1, 16, 16, 2, 2, 16), (2, 37, 37, 4, 2, 64), (1, 33, 300, 4, 1, 128), (3, 100, 517, 6, 2, 48),
     (1, 256, 512, 1, 1, 32)],
)  # fmt: skip
def test_numbers(batch: int, queries: int, keys: int, heads: int, kv_heads: int, size: int) -> None:
    """Keys and values lie in a cache with more columns, whose other numbers are never read."""
    random = torch.Generator().manual_seed(0)
    q = torch.randn(batch, queries, heads, size, generator=random).bfloat16()
    cache = torch.full((2, batch, kv_heads, keys + 3, size), torch.nan).bfloat16()
    cache[..., :keys, :] = torch.randn(2, batch, kv_heads, keys, size, generator=random).bfloat16()
    k, v = cache[..., :keys, :].transpose(2, 3)
    assert own_kernels.attends(q, k.transpose(1, 2))
    found = attend(q, k, v, None if queries == keys else sees(queries, keys), causal=True)
    given = [x.transpose(1, 2) for x in (q, k, v)]
    masked = {"attn_mask": sees(queries, keys)[:, None], "enable_gqa": True}
    exact, torchs = (
        F.scaled_dot_product_attention(*(x.to(dtype) for x in given), **masked).transpose(1, 2).flatten(2)  # type: ignore[arg-type]
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert found.shape == exact.shape
    error = (torchs - exact).norm()
    assert (found - exact).norm() < 1.1 * error
    # A row has the same bits with other rows and with fewer queries before it.
    for row in range(batch):
        alone = torch.ops.llama_cpu.attend(q[row : row + 1], k[row : row + 1], v[row : row + 1]).flatten(2)
        assert torch.equal(alone[0], found[row])


def test_large_scores_and_what_is_not_finite() -> None:
    """Scores of thousands make weights of 0 and 1; NaN stays in its row, and in those that see it."""
    q, k, v = (torch.randn(1, 40, 2, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    q, k, v = 1000 * q.bfloat16(), k.bfloat16(), v.bfloat16()
    y = torch.ops.llama_cpu.attend(q, k, v)
    scores = torch.einsum("bshd,bthd->bhst", q.double(), k.double()).masked_fill(~sees(40, 40), -torch.inf)
    best = torch.gather(v, 1, scores.argmax(-1).transpose(1, 2)[..., None].expand_as(v))
    assert ((y - best).abs().amax(-1) < 0.02).float().mean() > 0.95
    q[0, 20, 1, 3] = torch.nan
    assert torch.equal(torch.ops.llama_cpu.attend(q, k, v).isnan().any(-1).nonzero(), torch.tensor([[0, 20, 1]]))
    k[0, 30, 0] = torch.nan
    assert torch.ops.llama_cpu.attend(q, k, v)[0, 30:, 0].isnan().all()
    assert torch.ops.llama_cpu.attend(q, k, v)[0, :20].isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(1, 20, 2, 16).bfloat16()
    for q, k, v in (
        (x, x[:, :10], x[:, :10]),
        (x, x, x[:, :10]),
        (x.float(), x.float(), x.float()),
        (x[..., :8], x, x),
    ):
        with pytest.raises(RuntimeError, match="do not fit together"):
            torch.ops.llama_cpu.attend(q, k, v)


def test_gradients_are_left_to_torch() -> None:
    """Those of `torch.autograd.forward_ad`, which need no grad mode, were lost in silence."""
    x = torch.randn(1, 20, 2, 16).bfloat16()
    needs = x.clone().requires_grad_()
    attend(needs, x, x, None, causal=True).sum().backward()
    assert needs.grad is not None
    assert own_kernels.attends(x, x.transpose(1, 2))
    with torch.no_grad(), forward_ad.dual_level():
        assert not own_kernels.attends(x, x.transpose(1, 2))


@torch.inference_mode()
def test_prompts_of_a_model(tmp_path: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read whole, and in two parts of which the second sees a cache: as near to float32 as with torch's attention."""
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-5}
    folder = str(write_checkpoint(tmp_path, random_weights(params), params=params))
    tokens = torch.randint(3, 400, (2, 60), generator=torch.Generator().manual_seed(1))

    def logits(dtype: str, parts: int = 1) -> torch.Tensor:
        model = Llama.build(folder, tokenizer_path, 64, 2, device="cpu", dtype=dtype).model
        step = 60 // parts
        return torch.cat([model(tokens[:, i : i + step], i) for i in range(0, 60, step)], dim=1)

    exact = logits("float32")
    ours = [(logits("bfloat16", parts) - exact).norm() for parts in (1, 2)]
    monkeypatch.setattr(own_kernels, "attends", lambda q, k: False)
    assert max(ours) < 1.1 * (logits("bfloat16") - exact).norm()
