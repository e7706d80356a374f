"""The mathematics: against transformers on the same weights, and the fast forms against Meta's own."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import PARAMS, random_weights

import llama.model
from llama import ModelArgs, Transformer
from llama.layers.parallel import is_fused, join
from llama.model import (
    RMSNorm,
    apply_rotary_emb,
    attend,
    feed_forward_width,
    precompute_freqs_cis,
    process_counts,
    repeat_kv,
    reshape_for_broadcast,
    rotate,
)


def build(dtype: torch.dtype = torch.float32, **limits: int) -> Transformer:
    model = Transformer(ModelArgs(**{**PARAMS, "vocab_size": 400, "max_batch_size": 4, "max_seq_len": 64, **limits}))
    model.load_state_dict(random_weights())
    return model.to(dtype).requires_grad_(False)


def as_transformers_names(model: Transformer) -> dict[str, torch.Tensor]:
    """Hugging Face's layout. k_proj is permuted with the number of key/value heads, not of query heads."""
    names = {
        "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "tok_embeddings": "embed_tokens",
    }  # fmt: skip
    args, state = model.params, {}
    for name, weight in model.state_dict().items():
        for heads, meta in ((args.n_heads, "attention.wq"), (args.n_kv_heads, "attention.wk")):
            if meta in name:  # adjacent pairs -> halves
                half = args.dim // args.n_heads // 2
                weight = weight.view(heads, half, 2, args.dim).transpose(1, 2).reshape(weight.shape)
        for meta, theirs in names.items():
            name = name.replace(meta, theirs)
        state["lm_head.weight" if name == "output.weight" else f"model.{name}"] = weight
    return state


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_transformers(seed: int) -> None:
    """The same random GQA weights in both. They are drawn at the scale of an untrained Llama: with larger ones the best
    two logits are often so near each other that bfloat16 decides, and each implementation disagrees with its own
    float32."""
    transformers = pytest.importorskip("transformers")
    shape = {"dim": 256, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 32}
    ours = Transformer(ModelArgs(**shape, vocab_size=400, max_batch_size=4, max_seq_len=256)).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in ours.named_parameters():
        if weight.ndim > 1:
            weight.normal_(0, 1 if "tok_embeddings" in name else 0.02, generator=generator)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=400, hidden_size=256, intermediate_size=feed_forward_width(1024, 32, None), num_hidden_layers=2,
            num_attention_heads=8, num_key_value_heads=4, rms_norm_eps=1e-5, max_position_embeddings=256,
        )
    )  # fmt: skip
    theirs.load_state_dict(as_transformers_names(ours))
    tokens = torch.randint(0, 400, (4, 250), generator=generator)
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens, 0), theirs(tokens).logits, atol=1e-4, rtol=0)
        ours.bfloat16(), theirs.bfloat16()
        best = [logits.argmax(-1) for logits in (ours(tokens, 0), theirs(tokens).logits)]
    assert (best[0] == best[1]).float().mean() >= 0.99


def test_every_row_has_its_own_place() -> None:
    """Rows prefilled and continued together, at different places and in other slots, are what each is alone."""
    model = build()
    tokens = torch.randint(0, 400, (3, 20), generator=torch.Generator().manual_seed(2))
    alone = torch.cat([model(row[None], 0) for row in tokens])
    starts = [3, 9, 5]
    for i, start in enumerate(starts):
        model(tokens[i : i + 1, :start], torch.tensor([0]), slots=torch.tensor([3 - i]))
    new = torch.stack([tokens[i, start : start + 4] for i, start in enumerate(starts)])
    slots = torch.tensor([3, 2, 1])
    for span in (None, 13, 40):
        together = model(new, torch.tensor(starts), slots=slots, span=span)
        for i, start in enumerate(starts):
            torch.testing.assert_close(together[i], alone[i, start : start + 4], atol=1e-4, rtol=0)
    one = model(new[:, :1], torch.tensor(starts), slots=slots)
    for i, start in enumerate(starts):
        torch.testing.assert_close(one[i, 0], alone[i, start], atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunks", [(20,), (7, 13), (1, 1, 18), (19, 1)])
def test_chunks_equal_one_pass(chunks: tuple[int, ...]) -> None:
    model = build()
    tokens = torch.randint(0, 400, (2, 20), generator=torch.Generator().manual_seed(3))
    whole = model(tokens, 0)
    at, parts = 0, []
    for n in chunks:
        parts.append(model(tokens[:, at : at + n], at))
        at += n
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("start", "end"), [(0, 5), (0, 20), (5, 6), (5, 9)])
def test_a_longer_span_shows_rows_at_one_position_nothing_more(start: int, end: int) -> None:
    """A single token once saw all columns of the span, and a prompt was refused for having fewer keys than the mask."""
    model = build()
    tokens = torch.randint(0, 400, (2, 24), generator=torch.Generator().manual_seed(4))
    whole = model(tokens, 0)
    torch.testing.assert_close(model(tokens[:, start:end], start, span=22), whole[:, start:end], atol=1e-4, rtol=0)


def test_the_cache_refuses_what_it_has_no_room_for() -> None:
    model = build()
    with pytest.raises(ValueError, match="5 rows up to position 1 do not fit.*max_batch_size=4"):
        model(torch.zeros(5, 1, dtype=torch.long), 0)
    with pytest.raises(ValueError, match="position 65 do not fit"):
        model(torch.zeros(1, 1, dtype=torch.long), 64)
    with pytest.raises(ValueError, match="position 65 do not fit"):
        model(torch.zeros(2, 1, dtype=torch.long), torch.tensor([1, 64]))


def test_positions_are_not_negative() -> None:
    """-1 once wrote the last column of the cache, silently."""
    model = build()
    for start_pos in (-1, torch.tensor([-1])):
        with pytest.raises(ValueError, match="start_pos is -1"):
            model(torch.tensor([[1]]), start_pos)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotate_equals_metas_complex_form(dtype: torch.dtype) -> None:
    freqs_cis = precompute_freqs_cis(16, 32)
    q, k = torch.randn(2, 32, 4, 16).to(dtype), torch.randn(2, 32, 2, 16).to(dtype)
    expected_q, expected_k = apply_rotary_emb(q, k, freqs_cis)
    assert expected_q.dtype == dtype
    table = torch.view_as_real(freqs_cis)[None, :, None]
    torch.testing.assert_close(rotate(q, table), expected_q)
    torch.testing.assert_close(rotate(k, table), expected_k)


def test_rotary_by_hand() -> None:
    """Position 1, pair 0 turns by one radian; adjacent entries are a pair."""
    freqs_cis = precompute_freqs_cis(4, 2, theta=100.0)
    assert freqs_cis.dtype == torch.complex64
    assert freqs_cis.shape == (2, 2)
    torch.testing.assert_close(torch.angle(freqs_cis[1]), torch.tensor([1.0, 0.1]))
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4).expand(1, 2, 1, 4)
    turned, _ = apply_rotary_emb(x, x, freqs_cis)
    expected = torch.tensor(
        [torch.tensor(1.0).cos(), torch.tensor(1.0).sin(), -torch.tensor(0.1).sin(), torch.tensor(0.1).cos()]
    )
    torch.testing.assert_close(turned[0, 1, 0], expected)
    with pytest.raises(ValueError, match="does not fit"):
        reshape_for_broadcast(freqs_cis, torch.zeros(1, 3, 1, 2))


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("queries", [1, 5])
def test_attend_equals_the_naive_form(queries: int, masked: bool, amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the form of processors that multiply tiles."""
    monkeypatch.setattr(llama.model, "AMX", amx)
    q, k, v = torch.randn(2, queries, 8, 16), torch.randn(2, 12, 4, 16), torch.randn(2, 12, 4, 16)
    mask = torch.rand(2, queries, 12) < 0.7
    mask[..., 0] = True
    mask |= torch.tensor(not masked)
    keys, values = repeat_kv(k, 2), repeat_kv(v, 2)
    scores = torch.einsum("bshd,bthd->bhst", q, keys) / 4
    weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    expected = torch.einsum("bhst,bthd->bshd", weights, values).flatten(2)
    found = attend(q, k, v, mask if masked else None, causal=False)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_repeat_kv_repeats_each_head_in_a_row() -> None:
    x = torch.tensor([1.0, 2.0]).view(1, 1, 2, 1)
    assert repeat_kv(x, 2).flatten().tolist() == [1, 1, 2, 2]
    assert repeat_kv(x, 1) is x


def test_rms_norm_casts_before_it_scales() -> None:
    """Meta rounds the normalised value to x's dtype and then multiplies by the weight in that dtype."""
    norm = RMSNorm(8).bfloat16()
    norm.weight.data = torch.linspace(0.5, 1.7, 8).bfloat16()
    x = torch.randn(3, 8).bfloat16() * 5
    x32 = x.float()
    normalised = (x32 / (x32.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16()
    torch.testing.assert_close(norm(x), normalised * norm.weight)


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "width"),
    [(4096, 256, None, 11008), (5120, 256, None, 13824), (8192, 4096, 1.3, 28672)],
)
def test_feed_forward_width_of_metas_models(dim: int, multiple_of: int, multiplier: float | None, width: int) -> None:
    assert feed_forward_width(4 * dim, multiple_of, multiplier) == width


def test_the_rotary_table_keeps_its_precision() -> None:
    """model.to(bfloat16) once would have rounded the angles, or dropped the sines of a complex table."""
    model = build()
    before = model.freqs_cis.clone()
    model.to(torch.bfloat16)
    assert model.layers[0].attention.cache_k.dtype == torch.bfloat16
    assert torch.equal(model.freqs_cis, before)
    with torch.device("meta"):
        empty = Transformer(model.params).freqs_cis
    assert (empty.shape, empty.dtype, empty.is_meta) == (before.shape, torch.complex64, True)


def test_the_cache_is_no_weight() -> None:
    model = build()
    attention = model.layers[0].attention
    assert attention.cache_k.shape == attention.cache_v.shape == (4, 64, 4, 8)
    assert not any("cache" in name or "freqs" in name for name in model.state_dict())
    assert set(model.state_dict()) == set(random_weights())


@torch.inference_mode()
@pytest.mark.parametrize("hooked", [False, True])
def test_the_cache_follows_weights_of_another_dtype(hooked: bool) -> None:
    """What it holds goes on to count."""
    model, other, ids = build(), build(torch.bfloat16), torch.tensor([[5, 6, 7, 8, 9]])
    model(ids[:, :3], 0)
    model.load_state_dict(other.state_dict(), assign=True)
    if hooked:
        model.layers[0].register_forward_hook(lambda *_: None)
    expected = other(ids, 0)
    torch.testing.assert_close(model(ids[:, 3:], 3), expected[:, 3:], atol=0.1, rtol=0)
    torch.testing.assert_close(model(ids, 0), expected, atol=0.1 * hooked, rtol=0)
    assert {attention.cache_v.dtype for attention in model.attentions()} == {torch.bfloat16}


def test_gradients_flow_on_one_process() -> None:
    model = build().requires_grad_(True)
    tokens = torch.randint(0, 400, (2, 9))
    for _ in range(2):  # the second pass must not meet the first one's graph in the cache
        torch.nn.functional.cross_entropy(model(tokens, 0).flatten(0, 1), tokens.flatten()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_prints_as_metas_does() -> None:
    assert repr(ModelArgs()) == (
        "ModelArgs(dim=4096, n_layers=32, n_heads=32, n_kv_heads=None, vocab_size=-1, multiple_of=256, "
        "ffn_dim_multiplier=None, norm_eps=1e-05, max_batch_size=32, max_seq_len=2048)"
    )
    args = ModelArgs(vocab_size=32000, norm_eps=1e-6, max_batch_size=4, max_seq_len=128)
    assert repr(args) == (
        "ModelArgs(dim=4096, n_layers=32, n_heads=32, n_kv_heads=None, vocab_size=32000, multiple_of=256, "
        "ffn_dim_multiplier=None, norm_eps=1e-06, max_batch_size=4, max_seq_len=128)"
    )
    args.n_layers = 16
    with torch.device("meta"):
        text = str(Transformer(args))
    assert (
        text
        == """Transformer(
  (tok_embeddings): ParallelEmbedding()
  (layers): ModuleList(
    (0-15): 16 x TransformerBlock(
      (attention): Attention(
        (wq): ColumnParallelLinear()
        (wk): ColumnParallelLinear()
        (wv): ColumnParallelLinear()
        (wo): RowParallelLinear()
      )
      (feed_forward): FeedForward(
        (w1): ColumnParallelLinear()
        (w2): RowParallelLinear()
        (w3): ColumnParallelLinear()
      )
      (attention_norm): RMSNorm()
      (ffn_norm): RMSNorm()
    )
  )
  (norm): RMSNorm()
  (output): ColumnParallelLinear()
)"""
    )


def test_layers_are_fairscales() -> None:
    from fairscale.nn.model_parallel import layers as fairscale_layers

    model = build()
    assert isinstance(model.tok_embeddings, fairscale_layers.ParallelEmbedding)
    assert isinstance(model.output, fairscale_layers.ColumnParallelLinear)
    assert isinstance(model.layers[0].attention.wo, fairscale_layers.RowParallelLinear)
    theirs = torch.nn.Embedding(400, 64)  # of which fairscale's has every setting
    assert all(getattr(model.tok_embeddings, name) == getattr(theirs, name) for name in theirs.__constants__)


def test_models_of_metas_release_run_on_these_counts() -> None:
    seventy = ModelArgs(8192, 80, 64, 8, 32000, 4096, 1.3)
    assert process_counts(seventy) == [1, 2, 4, 8, 16, 32, 64]  # 8 key/value heads
    assert process_counts(ModelArgs(5120, 40, 40, None, 32000)) == [1, 2, 4, 8]
    assert process_counts(ModelArgs(vocab_size=32000)) == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"n_heads": 64, "n_kv_heads": 64}, "an even head size, not 1"),
        ({"head_dim": 7}, "an even head size, not 7"),
        ({"n_heads": 7}, r"dim \(64\) must be n_heads \(7\)"),
        ({"n_kv_heads": 3}, r"n_heads \(8\) must be a multiple of n_kv_heads \(3\)"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**change)


def test_a_copy_is_a_model_of_its_own() -> None:
    model = build()
    twin = copy.deepcopy(model)
    tokens = torch.randint(0, 400, (1, 5))
    expected = model(tokens, 0)
    twin.layers[0].attention.wq.weight.zero_()
    assert torch.equal(model(tokens, 0), expected)


def test_parts_of_one_matrix() -> None:
    """One below the other, in their order, and nothing else."""
    first, second, third = layers = [torch.nn.Linear(3, rows, bias=False) for rows in (2, 1, 4)]
    weights = [layer.weight.clone() for layer in layers]
    whole = join(layers, "weight")
    assert torch.equal(whole, torch.cat(weights))
    assert [layer.weight.requires_grad for layer in layers] == [True] * 3
    assert is_fused(whole, layers)
    assert is_fused(whole[2:3], [second])
    for others in ([second, first, third], [first, second], [second, third], [first, third, third]):
        assert not is_fused(whole, others)
    assert not is_fused(whole.clone(), layers)
    assert not is_fused(whole, layers, "bias")
    assert not is_fused(whole, [*layers, torch.nn.Identity()])
    third.weight = torch.nn.Parameter(third.weight.detach().clone())
    assert not is_fused(whole, layers)
