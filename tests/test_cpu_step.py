"""The step of all layers in one operator: the numbers of the same step run op by op."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from conftest import random_weights, write_checkpoint
from helpers import build

from llama import Llama
from llama.decoding import cpu_step, engine
from llama.decoding.engine import Engine
from llama.layers import int8

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux")

# Heads whose size fills no vector, widths that fill no tile, and without quantization rows that fill no vectors.
ODD = {"dim": 96, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "norm_eps": 1e-5}
SHAPES = {None: {**ODD, "dim": 72, "multiple_of": 8}}
KINDS = [None, "w8a8", "w4a8", "int8", "int4"]
ROWS, COLUMNS = 5, 64


@pytest.fixture(autouse=True)
def in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let int8 lie in tiles, small as it is, and the operator run all numbers of rows, on every processor."""
    monkeypatch.setattr(cpu_step, "AMX", False)
    monkeypatch.setattr(int8, "onednn_is_exact", lambda: True)
    monkeypatch.setattr(int8, "onednn_is_fast", lambda: False)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("odd"), random_weights(ODD), params=ODD)


@pytest.fixture
def folder(kind: Optional[str], tmp_path: Path) -> Path:
    """A checkpoint whose matrices this kind takes."""
    params = SHAPES.get(kind, ODD)
    return write_checkpoint(tmp_path, random_weights(params), params=params)


def engines(folder: Path, tokenizer_path: str, kind: Optional[str], dtype: str) -> tuple[Engine, Engine]:
    """The step in one operator, and op by op, each over a model and cache of its own."""
    made = []
    for compile in (None, False):
        options: dict[str, Any] = {"quantize": kind, "dtype": dtype, "compile": compile, "device": "cpu"}
        made.append(Llama.build(str(folder), tokenizer_path, COLUMNS, ROWS, **options)._engine)
        made[-1].refresh()
    assert made[0]._step_of(ROWS) is not None
    assert made[1]._step_of(ROWS) is None
    return made[0], made[1]


def prompts(rows: int) -> list[list[int]]:
    ids = torch.randint(3, 400, (rows, 20), generator=torch.Generator().manual_seed(1)).tolist()
    return [row[: 9 + 2 * i] for i, row in enumerate(ids)]


def read(of: Engine, given: Sequence[list[int]]) -> list[int]:
    """-> the positions of the next tokens"""
    for _ in of.prefill(given, range(len(given))):
        pass
    return [len(ids) for ids in given]


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def stepped(ours: Engine, plain: Engine, steps: int) -> tuple[list[float], torch.Tensor]:
    """How far `ours` is from `plain` in each step's logits, for one row and for several at their own positions, and in
    what they leave in the cache; and its last logits."""
    far = []
    for rows in (1, ROWS):
        positions = read(ours, prompts(rows))
        assert read(plain, prompts(rows)) == positions
        for step in range(steps):
            tokens = torch.arange(7, 7 + rows) + 5 * step
            at = [position + step for position in positions]
            found, expected = ours.decode(tokens, at), plain.decode(tokens, at)
            assert (found.dtype, found.shape) == (torch.float32, expected.shape)
            far.append(apart(found, expected))
        for mine, theirs in zip(ours.model.attentions(), plain.model.attentions()):
            far.append(apart(mine.cache_k.float(), theirs.cache_k.float()))
            far.append(apart(mine.cache_v.float(), theirs.cache_v.float()))
    return far, found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_numbers_are_those_of_the_step_op_by_op(
    folder: Path, tokenizer_path: str, kind: Optional[str], dtype: str
) -> None:
    """Where activations have 8 bits, one that lies between two of them may go to the other."""
    limit = 0.05 if dtype == "bfloat16" or kind in ("w8a8", "w4a8") else 1e-5
    far, _ = stepped(*engines(folder, tokenizer_path, kind, dtype), 4)
    assert all(each < limit for each in far)


@torch.inference_mode()
def test_bfloat16_is_as_near_to_float32_as_op_by_op(odd: Path, tokenizer_path: str) -> None:
    exact = engines(odd, tokenizer_path, None, "float32")[1]
    errors = []
    for of in engines(odd, tokenizer_path, None, "bfloat16"):
        at = read(of, prompts(ROWS))
        assert read(exact, prompts(ROWS)) == at
        tokens = torch.arange(9, 9 + ROWS)
        errors.append(apart(of.decode(tokens, at), exact.decode(tokens, at)))
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_row_has_the_same_bits_in_any_company(folder: Path, tokenizer_path: str, kind: Optional[str]) -> None:
    """Whether it steps alone or with others, with any number of threads, or is verified with what follows it."""
    ours, _ = engines(folder, tokenizer_path, kind, "bfloat16")
    at, tokens = read(ours, prompts(ROWS)), torch.arange(7, 7 + ROWS)
    threads = torch.get_num_threads()
    together = ours.decode(tokens, at).clone()
    try:
        torch.set_num_threads(3)
        assert torch.equal(ours.decode(tokens, at), together)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(ours.decode(tokens[:1], at[:1]), together[:1])
    each = ours.run_each(tokens.tolist()[::-1], at[::-1], range(ROWS)[::-1])
    assert torch.equal(each.flip(0), together)
    following = [ours.decode(tokens + i, [position + i for position in at]).clone() for i in range(3)]
    read(ours, prompts(ROWS))  # what the steps have written is not read by the pass that writes it anew
    verified = ours.verify([[int(t) + i for i in range(3)] for t in tokens], at)
    assert torch.equal(verified, torch.stack(following, dim=1))


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_what_is_not_finite_shows(folder: Path, tokenizer_path: str, kind: Optional[str]) -> None:
    ours, _ = engines(folder, tokenizer_path, kind, "bfloat16")
    weight = ours.model.layers[1].ffn_norm.weight
    for bad in (torch.nan, torch.inf):
        weight.data[3] = bad
        assert not ours.decode(torch.tensor([5]), [0]).isfinite().any()


@torch.inference_mode()
def test_weights_that_were_replaced_and_forms_that_are_unknown(odd: Path, tokenizer_path: str) -> None:
    """What lies elsewhere is looked up anew; what lies in another way, the step op by op reads."""
    ours, plain = engines(odd, tokenizer_path, None, "float32")
    others = random_weights(ODD, seed=3)
    for of in (ours, plain):
        of.model.load_state_dict(others, assign=True)
        of.model.norm.eps = 0.5
        of.refresh()
    assert ours._step_of(1) is not None
    assert apart(ours.decode(torch.tensor([5]), [0]), plain.decode(torch.tensor([5]), [0])) < 1e-5
    for of in (ours, plain):
        wq = of.model.layers[0].attention.wq
        wq.weight.data = wq.weight.data.t().contiguous().t()  # the same numbers, column by column
        of.refresh()
    assert ours._step_of(1) is None
    assert torch.equal(ours.decode(torch.tensor([5]), [0]), plain.decode(torch.tensor([5]), [0]))
    for of in (ours, plain):
        of.model.layers = of.model.layers[:0]
        of.refresh()
    assert torch.equal(ours.decode(torch.tensor([5]), [0]), plain.decode(torch.tensor([5]), [0]))
    plain.model.layers = torch.nn.ModuleList([torch.nn.Identity()])  # not as it was built: nothing is looked for in it
    assert Engine(plain.model, None)._step_of(1) is None
    ours.model.output = torch.nn.Linear(96, 400)  # it knows of no group
    ours.refresh()
    assert ours._step_of(1) is None
    half = Llama.build(str(odd), tokenizer_path, COLUMNS, ROWS, device="cpu", dtype="float16")._engine
    assert half._step_of(1) is None


@torch.inference_mode()
def test_tensors_of_other_shapes_are_not_read(odd: Path, tokenizer_path: str) -> None:
    """The operator would read, or write, behind their ends."""
    ours, _ = engines(odd, tokenizer_path, None, "float32")
    model = ours.model
    layer, attention = model.layers[1], model.layers[1].attention
    owners = (model.tok_embeddings, model.norm, layer.ffn_norm, attention.wq, attention.wo, layer.feed_forward.w1)
    for owner in (*owners, layer.feed_forward.w2, model.output):
        before = owner.weight
        owner.weight = torch.nn.Parameter(before[..., :-8].clone(), requires_grad=False)
        ours.refresh()
        assert ours._step_of(1) is None, owner
        owner.weight = before
    for name, shorter in (("cache_v", slice(0, 1)), ("freqs_cis", (slice(None), slice(0, 8)))):
        of = attention if name == "cache_v" else model
        before = getattr(of, name)
        setattr(of, name, before[shorter].clone())
        ours.refresh()
        assert ours._step_of(1) is None, name
        setattr(of, name, before)
    layer.feed_forward.w1.output_size_per_partition += 1
    ours.refresh()
    assert ours._step_of(1) is None
    layer.feed_forward.w1.output_size_per_partition -= 1
    ours.refresh()
    assert ours._step_of(1) is not None


@torch.inference_mode()
def test_any_default_device(odd: Path, tokenizer_path: str) -> None:
    ours, _ = engines(odd, tokenizer_path, None, "float32")
    expected = ours.decode(torch.tensor([5]), [0]).clone()
    with torch.device("meta"):
        ours.refresh()
        for found in (
            ours.decode(torch.tensor([5], device="cpu"), [0]),
            ours.run_each([5], [0], [0]),
            ours.verify([[5]], [0])[0],
        ):
            assert torch.equal(found, expected)


@torch.inference_mode()
def test_what_does_not_fit_is_refused_before_anything_is_written(odd: Path, tokenizer_path: str) -> None:
    ours, _ = engines(odd, tokenizer_path, None, "float32")
    step = ours._step_of(1)
    assert step is not None
    most = cpu_step.MOST_ROWS
    assert ours._step_of(most + 1) is None
    for tokens, positions, slots in (
        *(([400], [0], [0]), ([-1], [0], [0]), ([5], [COLUMNS], [0]), ([5], [-1], [0]), ([5], [0], [ROWS])),
        (range(most + 1), range(most + 1), [0] * (most + 1)),
    ):
        with pytest.raises(RuntimeError, match="do not fit together"):
            step(torch.tensor(tokens), positions, slots)
    assert not any(attention.cache_k.any() for attention in ours.model.attentions())
    assert step(torch.tensor(range(most)), range(most), [0] * most).isfinite().all()


def test_no_graph_is_made_where_it_would_not_run(
    odd: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bool] = []
    monkeypatch.setattr(engine, "make_graph", lambda *_: made.append(True))
    build(odd, tokenizer_path, compile=True, rows=cpu_step.MOST_ROWS)
    assert not made
    build(odd, tokenizer_path, compile=True, rows=cpu_step.MOST_ROWS + 1)
    assert made
