"""The decode step as a graph, against the same step run op by op."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from conftest import PARAMS, random_weights, write_checkpoint
from emulated_cuda import emulated
from helpers import COLUMNS, PROMPTS, build
from workers import Pool

from llama import Llama
from llama.decoding import compiled, engine
from llama.decoding.engine import Engine
from llama.layers import parallel

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new cache; and no graph is left out because there is another form of the step."""
    monkeypatch.setattr(engine, "make_step", lambda *_: None)
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that outlives a test: compiling takes half a minute."""
    return tmp_path_factory.mktemp("packages")


SMALL = {**PARAMS, "n_layers": 1}
SCALED = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer: most of the time goes into headers, but not all. Its positions are scaled."""
    return write_checkpoint(
        tmp_path_factory.mktemp("small"), random_weights(SMALL), params={**SMALL, "rope_scaling": SCALED}
    )


@needs_compiler
def test_packaged(
    small: Path,
    tokenizer_path: str,
    packages: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Compiled once, said so, found again without being asked for; the same ids as op by op, over the whole cache; and
    weights, in place or as other parameters, and hooks count from the next call on."""
    monkeypatch.setenv("LLAMA_CACHE", str(packages))
    # Half of the time goes into what is the same for every package: proofs of the compiler, and its optimisations.
    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")
    monkeypatch.setenv("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")
    eager = build(small, tokenizer_path)
    assert eager._engine.graph is None  # nothing is compiled that was not asked for
    assert not list(packages.iterdir())
    capsys.readouterr()
    first = build(small, tokenizer_path, compile=True)
    assert capsys.readouterr().out.count("Compiled in") == 2  # for one row, and for several
    assert not [path for path in packages.iterdir() if path.is_dir()]
    again = build(small, tokenizer_path)
    assert "ompil" not in capsys.readouterr().out
    for llama in (first, again):
        assert isinstance(llama._engine.graph, compiled.Packaged)
    assert build(small, tokenizer_path, compile=False)._engine.graph is None
    run, widths = again.model.hidden_states, set()
    monkeypatch.setattr(
        again.model, "hidden_states", lambda ids, *a, **k: widths.add(ids.shape[1]) or run(ids, *a, **k)
    )
    for prompts in (PROMPTS[:1], PROMPTS):
        ids, scores = again.generate(prompts, COLUMNS - 7, temperature=0, logprobs=True)
        expected, theirs = eager.generate(prompts, COLUMNS - 7, temperature=0, logprobs=True)
        assert ids == expected
        assert len(ids[0]) == COLUMNS - 7
        for ours, other in zip(scores or [], theirs or []):
            assert ours == pytest.approx(other, abs=1e-4)
    assert 1 not in widths  # prompts and drafts only
    torch.manual_seed(5)
    sampled, _ = again.generate(PROMPTS, 40)
    torch.manual_seed(5)
    assert sampled == eager.generate(PROMPTS, 40)[0]
    for assign in (False, True):
        for model in (first.model, eager.model):
            model.load_state_dict(random_weights(SMALL, seed=9 + assign), assign=assign)
        assert first.generate(PROMPTS[:1], 20, 0) == eager.generate(PROMPTS[:1], 20, 0)
    seen: list[int] = []
    handle = first.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    first.generate(PROMPTS[:1], 20, 0)
    handle.remove()
    assert len(seen) == 20
    first.generate(PROMPTS[:1], 20, 0)
    assert len(seen) == 20
    # A cache that autocast left in another dtype was written past its end; a norm's number stands in a package.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first.generate(PROMPTS[:1], 4, 0)
    assert first.generate(PROMPTS[:1], 20, 0) == eager.generate(PROMPTS[:1], 20, 0)
    for model in (first.model, eager.model):
        model.layers[0].ffn_norm.eps = 5.0
    assert first.generate(PROMPTS[:1], 20, 0) == eager.generate(PROMPTS[:1], 20, 0)
    assert first._engine.graph is None
    again.model.layers = again.model.layers[:0]
    assert len(again.generate(PROMPTS[:1], 5, 0)[0][0]) == 5


def count_calls(monkeypatch: pytest.MonkeyPatch, target: Any, name: str) -> list[None]:
    calls: list[None] = []
    function: Callable[..., Any] = getattr(target, name)
    monkeypatch.setattr(target, name, lambda *a, **k: calls.append(None) or function(*a, **k))
    return calls


def test_compile_is_true_false_or_none(tiny: Path, tokenizer_path: str) -> None:
    with pytest.raises(ValueError, match="compile='yes' must be True, False or None"):
        Llama.build(str(tiny), tokenizer_path, compile="yes")  # type: ignore[arg-type]


def record(llama: Llama, backend: Optional[str]) -> compiled.Recorded:
    graph = compiled.Recorded(llama.model, backend)
    llama._engine.graph = graph
    return graph


@pytest.mark.parametrize("backend", [None, "eager"])
def test_recorded(tiny: Path, tokenizer_path: str, backend: Optional[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU records: static buffers, buckets of rows and columns, filled-up rows, rows that end and join,
    sampling."""
    monkeypatch.setattr(compiled, "LEAST_COLUMNS", 16)
    torch._dynamo.reset()
    llama, eager = build(tiny, tokenizer_path), build(tiny, tokenizer_path, compile=False)
    graph = record(llama, backend)
    many = [f"{'once ' * i}a dog" for i in (1, 5, 2, 9, 3, 4, 7)]
    options: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_k": 20, "min_p": 0.01, "seed": 3},
        {"temperature": 0.0, "repetition_penalty": 1.3, "logit_bias": {7: -2.0}},
        {"temperature": 0.7, "seed": [1, 2, 3, 4, 5, 6, 7]},
    ]
    for kwargs in options if backend is None else options[:1]:
        torch.manual_seed(1)
        ours = llama.text_completion(many, max_gen_len=30, logprobs=3, **kwargs)
        torch.manual_seed(1)
        theirs = eager.text_completion(many, max_gen_len=30, logprobs=3, **kwargs)
        for a, b in zip(ours, theirs):
            assert a["tokens"] == b["tokens"]
            assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-4)
    assert graph._recordings.keys() >= {(4, 32), (4, 64)}
    assert llama.generate(PROMPTS[:1], COLUMNS - 7, 0) == eager.generate(PROMPTS[:1], COLUMNS - 7, 0)
    assert {key[1] for key in graph._recordings if key[0] == 1} == {16, 32, 64, 128}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_looking_ahead(tiny: Path, tokenizer_path: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step is queued before this one's ids are read. Rows end at EOS, at their lengths and by stop strings,
    others take their slots; and draws are what they are one step after another, in later calls too."""
    llama, eager = build(tiny, tokenizer_path), build(tiny, tokenizer_path)
    record(llama, None)
    steps = count_calls(monkeypatch, compiled.Recorded, "__call__")
    monkeypatch.setattr(Engine, "looks_ahead", property(lambda engine: engine is llama._engine))
    options: dict[str, Any] = {
        "max_gen_len": 30,
        "logprobs": 2,
        "stop": ["e "],
        "stop_ids": [*range(50, 400, 17)],
        "draft": False,
    }
    for extra in ({}, {"seed": 3}, {"seed": list(range(9))}):
        results = []
        for model in (llama, eager):
            torch.manual_seed(1)
            texts = [f"{'once ' * i}a dog" for i in range(9)]
            results.append([model.text_completion(texts, temperature, **options, **extra) for _ in range(2)])
        for ours, theirs in zip(*([reply for part in parts for reply in part] for parts in results)):
            assert ours["tokens"] == theirs["tokens"]
            assert ours["finish_reason"] == theirs["finish_reason"]
            assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-4)
        assert len({len(reply["tokens"]) for reply in results[0][0]}) > 1
    before = len(steps)
    llama.text_completion(["a dog"], temperature, max_gen_len=20, draft=False)
    assert (
        len(steps) - before == 19
    )  # the prompt gave the first id, and nothing was queued that was known to be in vain


@pytest.mark.parametrize("backend", [None, "eager", "inductor"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_ways_of_a_step(
    device: str, backend: Optional[str], tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fastest first, and each is what is fallen back to; inductor's longer search is for what a GPU runs."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda step, **options: asked.append(options) or step)
    with emulated():
        llama = Llama.build(str(tiny), tokenizer_path, COLUMNS, 1, device=device, compile=False)
        ways = compiled.Recorded(llama.model, backend)._ways
    on_gpu = device == "emulated"
    expected = [("compiled", on_gpu)] * (backend is not None) + [("recorded", True)] * on_gpu + [("plain", False)]
    assert [(way.kind, way.captured) for way in ways] == expected
    options = {"coordinate_descent_tuning": True} if on_gpu and backend == "inductor" else None
    expected_calls = [{"fullgraph": True, "dynamic": False, "backend": backend, "options": options}]
    assert asked == expected_calls * (backend is not None)


def test_what_inductor_has_compiled_it_compiles_again(
    tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, where what it made is kept: without being asked, unless it is asked not to."""
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)

    def kinds(compile: Optional[bool]) -> list[str]:
        graph = Llama.build(str(tiny), tokenizer_path, COLUMNS, 1, device="emulated", compile=compile)._engine.graph
        return [] if graph is None else [way.kind for way in graph._ways]

    with emulated():
        assert kinds(None) == ["recorded", "plain"]
        llama = Llama.build(str(tiny), tokenizer_path, COLUMNS, 1, device="emulated", compile=True)
        llama.generate(PROMPTS[:1], 3, 0)
        assert kinds(None) == ["compiled", "recorded", "plain"]
        assert kinds(False) == []


@pytest.mark.parametrize(("columns", "recorded"), [(3, False), (4, True)])
def test_a_cache_of_few_columns_is_not_recorded(
    columns: int, recorded: bool, tiny: Path, tokenizer_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with emulated():
        for how in ({}, {"batch_invariant": True, "dtype": "bfloat16"}):
            llama = Llama.build(str(tiny), tokenizer_path, columns, 1, device="emulated", **how)  # type: ignore[arg-type]
            assert (llama._engine.graph is not None) == recorded
        assert "The decode step" not in capsys.readouterr().out
        if not recorded:
            Llama.build(str(tiny), tokenizer_path, columns, 1, device="emulated", compile=True)
            assert "is not compiled: there is no form for emulated:0 and max_seq_len=3" in capsys.readouterr().out


def test_which_replays_are_compared(tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the plain step: the first three, and the first with each length of the span in bits."""
    plain, spans = compiled.Recorded._plain, list[int]()

    def watched(self: compiled.Recorded, recording: Any, rows: int) -> Any:
        spans.append(int(recording.positions[0]) + 1)
        return plain(self, recording, rows)

    monkeypatch.setattr(compiled.Recorded, "_plain", watched)
    with emulated():
        llama = Llama.build(str(tiny), tokenizer_path, COLUMNS, 1, device="emulated")
        llama.tokenizer.eos_id = -1
        llama.generate([[1, 5, 6, 7]], 40, 0)
    assert spans == [5, 6, 7, 8, 16, 32]


def test_one_graph_for_each_number_of_rows(tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fullgraph=True means no breaks; and no span, position, slot or ragged batch makes it compile again."""
    monkeypatch.setattr(compiled, "LEAST_COLUMNS", 16)
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        assert torch._dynamo.config.recompile_limit >= 32  # numbers of rows are powers of two
        return graph.forward

    llama = build(tiny, tokenizer_path)
    record(llama, counting)  # type: ignore[arg-type]
    llama.generate(PROMPTS[:1], COLUMNS - 7, 0)
    assert len(graphs) == 1
    llama.generate(PROMPTS[1:2], 100, 0.8)
    assert len(graphs) == 1
    for _ in range(2):
        llama.generate(PROMPTS, 60, 0)
        llama.text_completion(["a dog"] * 9, max_gen_len=10, temperature=0)
    assert 2 <= len(graphs) <= 3  # for 1, 2 and 4 rows
    assert not any(
        "complex" in str(node.meta.get("example_value", "")) for graph in graphs for node in graph.graph.nodes
    )


def test_what_cannot_be_compiled_runs_as_it_is(
    tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no triton here\nand more")

    torch._dynamo.reset()
    llama = build(tiny, tokenizer_path)
    record(llama, fail)  # type: ignore[arg-type]
    made = count_calls(monkeypatch, compiled.Recorded, "_new")
    ids = llama.generate(PROMPTS, 5, 0)
    out = capsys.readouterr().out
    assert out.count("The decode step is not compiled, and runs as it is: ") == 1
    assert "and more" not in out
    assert len(made) == 1  # the buffers stay
    assert ids == build(tiny, tokenizer_path, compile=False).generate(PROMPTS, 5, 0)


def test_recorded_forgets_replaced_weights(tiny: Path, tokenizer_path: str) -> None:
    """A recorded graph knows addresses only."""
    llama = build(tiny, tokenizer_path)
    graph = record(llama, None)
    llama.generate(PROMPTS[:1], 3, 0)
    llama.model.load_state_dict(random_weights(seed=4), assign=True)
    graph_count = len(graph._recordings)
    llama.generate(PROMPTS[:1], 1, 0)
    assert graph_count == 1
    assert not graph._recordings


def on_two(folder: str, tokenizer_path: str) -> list[list[int]]:
    torch._dynamo.reset()
    llama = Llama.build(folder, tokenizer_path, COLUMNS, 4, 2, device="cpu")
    llama = Llama(llama.model, llama.tokenizer)  # compiles nothing itself
    record(llama, "eager")
    return llama.generate(PROMPTS, 30, 0)[0]


def test_all_reduces_are_in_the_graph(tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    """Two processes: fullgraph=True would refuse a collective that breaks the graph."""
    expected = build(tiny, tokenizer_path, compile=False).generate(PROMPTS, 30, 0)[0]
    assert pool.run(on_two, str(tiny), tokenizer_path) == [expected] * 4


def packaged_on_four(folder: str, tokenizer_path: str) -> tuple[str, list[list[int]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "make_step", lambda *_: None)
        llama = Llama.build(folder, tokenizer_path, COLUMNS, 1, device="cpu", compile=True, quiet=True)
        ids = llama.generate(PROMPTS[:1], 30, 0)[0]
    parallel._forget_groups()
    return type(llama._engine.graph).__name__, ids


@needs_compiler
def test_a_package_for_several_processes(small: Path, tokenizer_path: str, pool: Pool) -> None:
    """One process compiles it, for all: their parts of the model have the same shapes."""
    expected = build(small, tokenizer_path, compile=False).generate(PROMPTS[:1], 30, 0)[0]
    outcomes = pool.run(packaged_on_four, str(small), tokenizer_path, seconds=600)
    assert outcomes == [("Packaged", expected)] * 4


def test_fused_projections(tmp_path: Path, tokenizer_path: str) -> None:
    """Where weights were copied they are the rows of shared matrices, under their own names; replaced ones count."""
    folder = write_checkpoint(tmp_path / "half", {n: w.bfloat16() for n, w in random_weights().items()})
    mapped = Llama.build(str(folder), tokenizer_path, device="cpu")
    copied = Llama.build(str(folder), tokenizer_path, device="cpu", dtype="float32")
    assert mapped.model.layers[0].attention.fused is None
    attention = copied.model.layers[0].attention
    assert attention.fused.shape == (64 + 2 * 32, 64)
    assert attention.wk.weight.data_ptr() == attention.fused[64:].data_ptr()
    assert copied.model.state_dict().keys() == mapped.model.state_dict().keys()
    plain = Llama(copied.model.__class__(copied.model.params).requires_grad_(False), copied.tokenizer)
    plain.model.load_state_dict(copied.model.state_dict())
    tokens = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        torch.testing.assert_close(copied.model(tokens, 0), plain.model(tokens, 0))
        for llama in (copied, plain):
            llama.model.load_state_dict(random_weights(seed=8), assign=True)
        torch.testing.assert_close(copied.model(tokens, 0), plain.model(tokens, 0))
        assert attention.wk.weight.data_ptr() == attention.fused[64:].data_ptr()
        copied.model.double()
        assert attention.fused.dtype == torch.float64
        assert attention.wk.weight.data_ptr() == attention.fused[64:].data_ptr()
