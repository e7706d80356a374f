"""The faults of meaning that `llama verify` looks for, how each is mended for a while, and what is told of a search."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import Llama, ModelArgs, Transformer
from llama.rotary import RotaryScaling
from llama.verification import faults, repairs
from llama.verification.faults import Gain, Reading, Search
from llama.verification.repairs import Repair
from llama.verification.results import FAIL, NOT_APPLICABLE, PASS
from llama.verification.texts import PROSE, STORIES


def made(**params: Any) -> Transformer:
    few = {"dim": 16, "n_layers": 2, "n_heads": 4, "multiple_of": 4, "vocab_size": 8, "max_batch_size": 1}
    return Transformer(ModelArgs(**{**few, "max_seq_len": 4, **params}))


def of(model: Transformer, check: str) -> dict[str, int]:
    """The faults of a kind, and the first layer that each changes."""
    return {repair.fault: repair.first for repair in repairs.repairs(model) if repair.check == check}


def test_orders_of_q_and_k() -> None:
    """q and k together, each alone, and together in each layer; k with the number of query heads if it has fewer."""
    hf, meta = "in Hugging Face's order of rows (a converter left them so)", "put in Meta's order of rows twice"
    everywhere = [
        f"q and k are {hf}",
        f"q is {hf}",
        f"k is {hf}",
        f"q and k were {meta}",
        f"q was {meta}",
        f"k was {meta}",
    ]
    one = of(made(n_layers=1), repairs.ORDER_QK)
    assert one == {f"{fault}, in all layers": 0 for fault in everywhere}
    found = of(made(n_kv_heads=2), repairs.ORDER_QK)
    own = "k was put in order with the 4 query heads in place of its own 2, in all layers"
    each = {f"q and k {what}, in layer {i}": i for i in (0, 1) for what in (f"are {hf}", f"were {meta}")}
    assert found == {**one, own: 0, **each}
    for heads, size, fits in ((2, 4, True), (1, 4, False), (2, 6, False)):  # features a head of k has if shared by 4
        assert (
            own.replace("own 2", f"own {heads}") in of(made(n_kv_heads=heads, head_dim=size), repairs.ORDER_QK)
        ) == fits


def test_orders_of_features() -> None:
    """The halves of each head are the even and the odd features, in any number of dimensions."""
    x = torch.arange(24).view(2, 12)
    assert repairs.to_hf_order(x, 6)[0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert repairs.to_hf_order(x, 4)[0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11]
    for size in (2, 4, 6, 12):
        for shape in (x, x.view(2, 1, 12)):
            assert torch.equal(repairs.to_meta_order(repairs.to_hf_order(shape, size), size), shape)


def test_positions_epsilons_and_heads() -> None:
    model = made()
    assert of(model, repairs.THETA) == {
        **{f"rope_theta is 10000, and the model's is {theta}": 0 for theta in ("1e+06", "500000", "100000")},
        **{f"positions are not scaled, and the model's are (rope_scaling: linear, factor {n})": 0 for n in (2, 4, 8)},
    }
    scaled = made(rope_scaling=RotaryScaling("linear", 3.0, 4096))
    assert of(scaled, repairs.THETA) == {"positions are scaled (linear, factor 3), and the model's are not": 0}
    (unscale,) = (repair for repair in repairs.repairs(scaled) if repair.check == repairs.THETA)
    with ExitStack() as stack:
        unscale.change(scaled, stack)
        assert torch.equal(scaled.freqs_cis, model.freqs_cis)
    assert of(model, repairs.EPS) == {"norm_eps is 1e-05, and the model's is 1e-06": 0}
    assert of(model, repairs.HEADS) == {f"n_heads is 4, and the model's is {n}": 0 for n in (2, 8)}
    assert of(made(n_kv_heads=1), repairs.HEADS) == {"n_heads is 4, and the model's is 8": 0}  # half a head is none
    assert of(made(head_dim=2), repairs.HEADS) == {"n_heads is 4, and the model's is 2": 0}  # nor one of one feature


def test_a_model_with_other_heads_is_one_that_was_built_so() -> None:
    """Until it is left, and with a cache that fits."""
    model, other = made(n_kv_heads=2), made(n_heads=8, n_kv_heads=4, head_dim=2)
    other.load_state_dict(model.state_dict())
    ids = torch.tensor([[1, 2, 3]])
    before = model(ids, 0)
    (repair,) = (r for r in repairs.repairs(model) if r.fault == "n_heads is 4, and the model's is 8")
    with ExitStack() as stack:
        repair.change(model, stack)
        torch.testing.assert_close(model(ids, 0), other(ids, 0))
        assert model.layers[0].attention.cache_k.shape == other.layers[0].attention.cache_k.shape
    assert torch.equal(model(ids, 0), before)


def test_exchanged_parts_and_layers() -> None:
    """q with k only where they have one shape."""
    pairs = ["w1 and w3", "wq and wk", "wk and wv", "attention_norm and ffn_norm"]
    one = {f"{pair} are exchanged in all layers": 0 for pair in pairs}
    assert of(made(n_layers=1), repairs.PARTS) == one
    assert of(made(n_layers=1), repairs.LAYERS) == {}
    each = {f"{pair} are exchanged in layer {i}": i for pair in pairs for i in (0, 1)}
    assert of(made(), repairs.PARTS) == {**one, **each}
    assert not any("wq" in fault for fault in of(made(n_kv_heads=2), repairs.PARTS))
    assert of(made(), repairs.LAYERS) == {"layers 0 and 1 are exchanged": 0}
    assert of(made(n_layers=3), repairs.LAYERS) == {
        "the layers are in the reverse order": 0, "layer 0 is the last one, and the others begin with 1": 0,
        "the last layer comes first": 0, "layers 0 and 1 are exchanged": 0, "layers 0 and 2 are exchanged": 0,
        "layers 1 and 2 are exchanged": 1,
    }  # fmt: skip
    assert len(of(made(n_layers=8), repairs.LAYERS)) == 3 + 28
    assert len(of(made(n_layers=9), repairs.LAYERS)) < 3 + 36


def test_which_of_many_layers_may_be_exchanged() -> None:
    """Neighbours, and what makes the norms smoother: the best first, and no more than twice as many as layers."""
    model = made(n_layers=12)
    neighbours = [(i, i + 1) for i in range(11)]

    def norms(*means: float) -> list[tuple[int, int]]:
        for layer, mean in zip(model.layers, means):
            torch.nn.init.constant_(layer.attention_norm.weight, mean)
        return repairs._pairs(model)

    assert norms(*[1.0] * 12) == norms(*range(12)) == neighbours
    assert norms(0, 1, 9, 3, 4, 5, 6, 7, 8, 2, 10, 11)[:12] == [*neighbours, (2, 9)]
    wild = norms(0, 9, 2, 11, 4, 7, 6, 5, 8, 1, 10, 3)
    assert len(set(wild)) == len(wild) == 11 + 24
    torch.nn.init.constant_(model.layers[0].ffn_norm.weight, 9.0)  # both norms count, each by its own steps
    torch.nn.init.constant_(model.layers[5].ffn_norm.weight, 9.0)
    assert norms(*[1.0] * 12)[11] == (1, 5)


def test_arrangements_of_layers() -> None:
    model = made(n_layers=11)
    for i, layer in enumerate(model.layers):
        layer.number = i
    orders = []
    for repair in repairs.repairs(model):
        if repair.check == repairs.LAYERS and "exchanged" not in repair.fault:
            with ExitStack() as stack:
                repair.change(model, stack)
                orders.append([layer.number for layer in model.layers])
    by_text, back = [0, 1, 10, *range(2, 10)], [0, 1, *range(3, 11), 2]
    assert orders == [[*range(10, -1, -1)], by_text, back, [*range(1, 11), 0], [10, *range(10)]]
    assert [layer.number for layer in model.layers] == list(range(11))


# The search


@pytest.fixture(scope="module")
def demo() -> Llama:
    return Llama.build(max_seq_len=64, max_batch_size=3, device="cpu", dtype="float32")


def losses(llama: Llama, text: str, length: int) -> torch.Tensor:
    ids = llama.tokenizer.encode(text, bos=True, eos=False)[:length]
    logprobs = llama.model(torch.tensor([ids]), 0)[0].log_softmax(-1)
    return -logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_what_is_read(demo: Llama) -> None:
    """The losses of each token but the first, also of texts of several lengths; what changes later layers alone is read
    from there."""
    texts = ["Once upon a time", STORIES[1]]
    with torch.device("meta"):  # what the caller makes tensors on by default is no matter
        reading = Reading(demo, texts, 40)
    torch.testing.assert_close(
        reading.before, torch.cat([losses(demo, text, 40) for text in texts]), atol=1e-4, rtol=1e-4
    )
    kept = len(reading.states)
    with ExitStack() as stack:
        repairs._exchange((2,), "feed_forward", "w1", "w3", demo.model, stack)
        expected = torch.cat([losses(demo, text, 40) for text in texts])
        torch.testing.assert_close(reading.losses(2), expected, atol=1e-4, rtol=1e-4)
        repair = Repair("", "", 2, lambda *_: None)
        gains = (reading.before - expected).double()
        assert reading.gain(repair).mean == pytest.approx(gains.mean().item(), abs=1e-4)
        error = gains.std().item() / math.sqrt(len(gains))
        assert reading.gain(repair).certainty == pytest.approx(gains.mean().item() / error, rel=1e-3)
        demo_norm = demo.model.norm
        repairs.put(stack, demo_norm, weight=torch.nn.Parameter(demo_norm.weight * math.nan))
        assert reading.gain(repair) == (-math.inf, -math.inf)
    assert len(reading.states) == kept
    assert reading.gain(Repair("", "", len(demo.model.layers), lambda *_: None)) == (0.0, 0.0)


def test_which_texts_are_read(demo: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kind that is likelier: as many as the cache has rows, and one if the machine is slow."""
    monkeypatch.setattr(faults, "PASS_SECONDS", 1e9)
    kind, (few, whole) = faults.read_likeliest(demo)
    assert kind == "children's stories"
    assert (few.tokens.shape, whole.tokens.shape) == ((1, 64), (3, 64))
    assert faults.read_likeliest(demo, PROSE[:1])[0] == "the given text"
    monkeypatch.setattr(faults, "PASS_SECONDS", 0.0)
    assert faults.read_likeliest(demo)[1][1].tokens.shape == (1, 64)
    for seconds, rows in ((8.0, 2), (7.9, 1), (99.0, 3)):  # if reading 64 tokens takes a second
        clock = iter(range(9))
        monkeypatch.setattr(faults, "PASS_SECONDS", seconds)
        monkeypatch.setattr(faults, "time", SimpleNamespace(monotonic=lambda clock=clock: next(clock)))
        assert faults.read_likeliest(demo, STORIES)[1][1].tokens.shape == (rows, 64)
    monkeypatch.setattr(faults, "time", time)
    monkeypatch.setattr(demo.model.params, "max_seq_len", 32)
    assert [reading.tokens.shape[1] for reading in faults.read_likeliest(demo)[1]] == [32, 32]
    monkeypatch.setattr(faults, "FEW", 16)
    monkeypatch.setattr(faults, "LENGTH", 24)
    assert [reading.tokens.shape[1] for reading in faults.read_likeliest(demo)[1]] == [16, 24]


def searched(gains: dict[str, tuple[float, float]], seconds: float = 60.0, check: str = repairs.PARTS) -> Search:
    """A search among repairs that have these gains, until they are in the model."""
    kept: list[str] = []

    def gain(repair: Repair) -> Gain:
        return Gain(0.0, 0.0) if repair.fault in kept else Gain(*gains[repair.fault])

    reading: Any = SimpleNamespace(gain=gain, model=None, before=torch.ones(3), read_anew=lambda: None)
    candidates = [Repair(check, fault, 0, lambda *_, fault=fault: kept.append(fault)) for fault in gains]
    return faults.search([reading, reading], candidates, seconds)


def test_what_counts_as_found(bars: list[Any]) -> None:
    """What is surely likelier, by enough; the most helpful first; one fault a round, and no more than there are
    rounds."""
    sure, enough = faults.SURE, faults.LEAST_GAIN
    found = searched({"a": (0.1, sure + 1), "b": (0.3, sure + 1), "c": (9.0, sure), "d": (enough, sure + 1)})
    assert [repair.fault for repair, _ in found.found] == ["b", "a"]
    assert (found.untried, found.loss, found.tokens) == (0, 1.0, 3)
    assert [(bar.n, bar.total, bar.desc, bar.unit) for bar in bars] == [(4, 4, "Repairs", "repair")] * 3
    assert [repair.fault for repair, _ in searched({"e": (1e-9, sure + 1)}, check=repairs.EPS).found] == ["e"]
    many = searched({f"{i}": (1.0 + i, sure + 1) for i in range(9)})
    assert [repair.fault for repair, _ in many.found] == ["8", "7", "6", "5"][: faults.ROUNDS]
    assert searched({"a": (1.0, 9.0), "b": (1.0, 9.0)}, seconds=-1.0).untried == 2


def results(llama: Llama, found: Any, gains: Any, untried: int, loss: float, monkeypatch: pytest.MonkeyPatch) -> Any:
    outcome = Search(found, gains, untried, loss, 77)
    reading = SimpleNamespace(before=torch.full((3,), 2.0))
    monkeypatch.setattr(faults, "read_likeliest", lambda *_: ("verse", [reading]))
    monkeypatch.setattr(faults, "search", lambda *_: outcome)
    return {result.name: result for result in faults.check_meaning(llama, 1.0)}


def test_what_is_told_of_a_search(demo: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    theta, eps, parts = (Repair(check, f"{check} is wrong", 0, lambda *_: None) for check in (
        repairs.THETA, repairs.EPS, repairs.PARTS))  # fmt: skip
    worse, same = Gain(-1.0, faults.WORSE - 1), Gain(0.0, faults.WORSE)
    rows = results(demo, [(theta, Gain(0.5, 9.0))], {parts: worse, eps: Gain(-1, -9)}, 0, 1.5, monkeypatch)
    chance = math.log(demo.model.vocab_size)
    told = f"2.00 nats a token of verse (77 tokens; chance is {chance:.2f})"
    assert (rows["likely text"].verdict, rows["likely text"].told) == (FAIL, f"{told}; 1.50 with what is named below")
    assert rows[repairs.THETA].told == "rope_theta is wrong: mended, a token is 0.5 nats likelier (9 standard errors)"
    assert rows[repairs.THETA].means == repairs.MEANS[repairs.THETA]
    assert rows[repairs.PARTS].verdict == rows[repairs.EPS].verdict == PASS
    assert rows[repairs.PARTS].told == "1 other form tried: 1 less likely, none clearly likelier"
    assert rows[repairs.EPS].told == "1e-05; the text is clearly less likely with another"
    assert rows[repairs.HEADS].told == "there is no other that fits the shapes"
    rows = results(demo, [], {parts: same, eps: Gain(-1, -faults.SURE)}, 3, 1.5, monkeypatch)
    assert (rows["likely text"].verdict, rows["likely text"].told) == (PASS, told)
    assert rows[repairs.HEADS][1:3] == (NOT_APPLICABLE, "--seconds were over before its turn")
    assert rows[repairs.PARTS][1:3] == (
        NOT_APPLICABLE, "1 other form tried: 0 less likely, none clearly likelier (--seconds were over before 3 of "
        "all); the text cannot tell them apart",
    )  # fmt: skip
    assert rows[repairs.EPS][1:3] == (
        NOT_APPLICABLE, "1e-05 is one of the usual ones, and no text tells here which of them is the model's",
    )  # fmt: skip
    limit = chance - faults.LIKELY
    for loss, verdict in ((limit, NOT_APPLICABLE), (limit - 0.01, PASS)):
        rows = results(demo, [], {parts: worse}, 0, loss, monkeypatch)
        assert rows["likely text"].verdict == rows[repairs.PARTS].verdict == verdict
        assert set(rows) == {"likely text", *faults.CHECKS}
    monkeypatch.setattr(demo.model.params, "norm_eps", 1e-4)
    rows = results(demo, [], {}, 0, 1.5, monkeypatch)
    assert rows[repairs.EPS][1:3] == (FAIL, "norm_eps is 0.0001; Llama's releases have 1e-05 or 1e-06")
