"""batch_invariant=True: a row's ids and log-probabilities do not depend on its neighbours, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import events
import pytest
import torch
from emulated_cuda import StandIns, emulated
from workers import Pool

from llama import Llama
from llama.decoding import invariant as attention
from llama.layers import invariant, kernels
from llama.layers.invariant import Products

LONG = [1, *range(20, 100)]


def build(
    tiny: Path, tokenizer_path: str, rows: int, dtype: str, quantize: Optional[str] = None, device: str = "cpu"
) -> Llama:
    options = {"device": device, "dtype": dtype, "quantize": quantize}
    return Llama.build(str(tiny), tokenizer_path, 128, rows, batch_invariant=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "quantize"),
    [
        ("bfloat16", None),
        ("bfloat16", "int8"),
        ("bfloat16", "int4"),
        ("bfloat16", "w4a8"),
        ("float16", None),
        ("float32", None),
    ],
)
def test_random_mixtures(dtype: str, quantize: Optional[str], tiny: Path, tokenizer_path: str) -> None:
    """`python tests/events.py --exactly` runs a thousand of them."""
    shared, alone = (build(tiny, tokenizer_path, rows, dtype, quantize) for rows in (4, 1))
    assert events.run_exactly(shared, alone, 2, 1)["steps"] > 10


class ByRow(StandIns):
    """Attention that takes one query at a time, as Triton's programs do."""

    def attend(self, q: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        k, v, positions, _, slots = args
        each = range(len(q))
        return torch.cat(
            [kernels.attend(q[i : i + 1].clone(), k, v, positions[i : i + 1], None, slots[i : i + 1]) for i in each]
        )


def test_on_emulated_cuda(tiny: Path, tokenizer_path: str) -> None:
    with emulated(triton=ByRow()) as machine:
        shared, alone = (build(tiny, tokenizer_path, rows, "bfloat16", device="emulated") for rows in (4, 1))
        assert events.run_exactly(shared, alone, 1, 1)["steps"] > 3
        assert shared._engine.graph._ways[0].kind == "recorded"  # type: ignore[union-attr]
        assert not machine.violations


def test_more_prompts_than_a_pass_on_a_gpu_has_tokens(
    tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama.decoding.invariant.ON_GPU", 2)
    prompts = [[1, 5, 6], [1, 7], [1, 8, 9, 10]]
    with emulated(triton=ByRow()):
        llama = build(tiny, tokenizer_path, 3, "bfloat16", device="emulated")
        each = [llama.generate([prompt], 3, 0)[0] for prompt in prompts]
        assert llama.generate(prompts, 3, 0)[0] == [ids for (ids,) in each]


def mixed(folder: str, tokenizer_path: str, dtype: str, quantize: Optional[str]) -> Any:
    """On each of the processes that share the model, which make the same calls."""
    models = [build(Path(folder), tokenizer_path, rows, dtype, quantize) for rows in (4, 1)]
    return events.run_exactly(*models, mixtures=2, seed=5)


@pytest.mark.parametrize(("dtype", "quantize"), [("bfloat16", None), ("bfloat16", "int8"), ("float32", None)])
def test_on_several_processes(dtype: str, quantize: Optional[str], tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    first, *others = pool.run(mixed, str(tiny), tokenizer_path, dtype, quantize)
    assert first["steps"] > 20
    assert others == [first] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(192, 64), (64, 172)])
def test_rows_of_products(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """With terms that cancel, so that the sums are nothing but rounding."""
    x = torch.empty(1, shape[1], dtype=dtype)
    rows, weight = invariant._trial(x, torch.randn(shape).to(dtype), 64)
    products = Products()
    each = torch.cat([products(row[None], weight) for row in rows])
    assert each.abs().max() > 0
    for some in (2, 3, 17, 40, 64):
        assert torch.equal(products(rows[:some], weight), each[:some])
        assert torch.equal(products(rows[-some:], weight), each[-some:])


@pytest.mark.parametrize("quantize", [None, "int8", "int4", "w4a8"])
def test_trials_leave_the_callers_settings_alone(quantize: Optional[str], tiny: Path, tokenizer_path: str) -> None:
    """They draw from generators of their own, and work where the caller's default device is another."""
    llama = Llama.build(str(tiny), tokenizer_path, 8, 1, device="cpu", dtype="bfloat16", quantize=quantize)
    matrix: Any = llama.model.layers[0].feed_forward.w2
    x = torch.randn(3, matrix.in_features).bfloat16()
    state = torch.get_rng_state()
    with torch.device("meta"), torch.inference_mode():
        found = Products()(x, matrix)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(found, matrix(x), atol=0.05, rtol=0.05)


def test_only_sizes_of_blocks_that_give_the_same_bits_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = torch.nn.functional.linear, []

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return torch.cat([plain(row[None], weight) for row in x]) + (len(x) not in (4, 16, 64))

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    products, x, weight = Products(), torch.randn(100, 8), torch.randn(3, 8)
    for rows, sizes in ((1, [4]), (3, [4]), (5, [16]), (100, [64, 16, 16, 4])):
        expected = torch.cat([plain(row[None], weight) for row in x[:rows]])
        for _ in range(2):  # the sizes are proven in the first
            seen.clear()
            assert torch.equal(products(x[:rows], weight), expected)
        assert seen == sizes


def test_rows_that_depend_on_their_place_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, weight: plain(x, weight) + torch.arange(len(x))[:, None]
    )
    with pytest.raises(ValueError, match="cannot be kept here: on cpu products in torch.float32 depend on where a row"):
        Products()(torch.randn(1, 8), torch.randn(3, 8))


def test_silu_of_rows() -> None:
    """torch's SiLU has another exp for the last numbers of a tensor: rows of 172 numbers differed with their number."""
    x = torch.randn(300, 344)
    each = torch.cat([invariant.silu_mul(row[None]) for row in x])
    for some in (2, 7, 191, 300):
        assert torch.equal(invariant.silu_mul(x[:some]), each[:some])
    torch.testing.assert_close(each, kernels.silu_mul(x))


@pytest.mark.parametrize(("width", "copied"), [(16, False), (32, False), (8, True), (24, True)])
def test_keys_lie_alike_in_all_slots(width: int, copied: bool) -> None:
    """Their products round by where rows begin in the processor's vectors of 64 bytes. No copy if they do so alike."""
    cache = torch.randn(2, 127, 3, width)
    for slot in range(2):
        keys = cache[slot, :64].transpose(0, 1)
        made = attention._aligned(keys)
        assert torch.equal(made, keys)
        assert made.is_contiguous() == (made.data_ptr() != keys.data_ptr()) == copied


def test_drafts_and_chats_in_16_bits(tiny: Path, tokenizer_path: str) -> None:
    """Drafts are verified by default, since they change nothing; ids that were generated are gone on from."""
    llama = build(tiny, tokenizer_path, 4, "bfloat16")
    prompt = [1, *[30, 31, 32, 33] * 8]
    drafted, plain = (
        list(llama.steps([prompt], 0, max_gen_len=30, logprobs=True, draft=draft)) for draft in (None, False)
    )
    assert drafted == plain
    whole = [step.token for step in plain if step.token is not None]
    half = prompt + whole[:15]
    on = llama.steps([half], 0, max_gen_len=len(whole) - 15, logprobs=True)
    assert [(s.token, s.logprob) for s in on if s.token is not None] == [
        (s.token, s.logprob) for s in plain if s.token is not None
    ][15:]
    assert on.cached[0] > 30


def test_embeddings(tiny: Path, tokenizer_path: str) -> None:
    """After any number of blocks, none too."""
    ours, plain = (
        build(tiny, tokenizer_path, 2, "float32"),
        Llama.build(str(tiny), tokenizer_path, 128, 2, device="cpu"),
    )
    for layer in (0, 1, 2, -1):
        torch.testing.assert_close(ours.embed(["the dog"], layer=layer), plain.embed(["the dog"], layer=layer))


def test_what_cannot_be_kept_is_refused(tiny: Path, tokenizer_path: str) -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        Llama.build(str(tiny), tokenizer_path, 64, 1, device="cpu", compile=True, batch_invariant=True)
    with pytest.raises(ValueError, match="must be True or False"):
        Llama.build(str(tiny), tokenizer_path, 64, 1, device="cpu", batch_invariant="yes")  # type: ignore[arg-type]
    llama = build(tiny, tokenizer_path, 2, "bfloat16")
    handle = llama.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="as it was built"):
        llama.generate([[1, 5]], 2, 0)
    handle.remove()
    assert llama.generate([[1, 5]], 2, 0)[0]
