"""The lines for CUDA, on the emulation of `emulated_cuda`: recorded steps against plain ones, in all that the library
does."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import events
import pytest
import torch
from conftest import near, random_weights, write_checkpoint
from emulated_cuda import Machine, StandIns, emulated
from workers import Pool

from llama import Llama, runtime
from llama.decoding import compiled
from llama.layers import kernels
from llama.model import precompute_freqs_cis

TEXTS = ["Once upon a time", "The dog", ("A little girl named Lily went to the park and saw a "
                                        "big"), "One day, Tom and his",
         "There was a cat", "In the forest", "Mom said", "It was raining and the children"]  # fmt: skip
FORTY = [f"{TEXTS[i % 8]} {'and then ' * (i % 5)}" for i in range(40)]


@pytest.fixture
def machine() -> Iterator[Machine]:
    with emulated(devices=2) as machine:
        yield machine
        assert not machine.violations


def build(folder: Path, tokenizer_path: str, rows: int = 4, device: str = "emulated", **options: Any) -> Llama:
    llama = Llama.build(str(folder), tokenizer_path, 112, rows, device=device, **options)
    llama.tokenizer.eos_id = 17  # random weights choose it now and then
    return llama


def many(llama: Llama) -> list[str]:
    """More texts than there are slots."""
    return FORTY[: 5 + 3 * llama.model.params.max_batch_size]


def left_early(llama: Llama, texts: list[str]) -> Any:
    stream, seen = llama.stream_text(texts, 0.8, 0.9, 50), []
    for _, chunk in zip(range(25), stream):
        seen.append((chunk["index"], chunk["text"]))
    stream.close()  # type: ignore[attr-defined]
    return seen, llama.text_completion(texts[:2], 0.8, 0.9, 20)


def conversation(llama: Llama, _: list[str]) -> Any:
    chat = llama.chat(system="Be short.")
    return [chat.ask(text, max_gen_len=8, temperature=t) for text, t in (("A dog.", 0), ("Then?", 0.8), ("Why?", 0))]


def replaced(llama: Llama, texts: list[str]) -> Any:
    before = llama.text_completion(texts[:1], 0, 1, 10)
    layer = llama.model.layers[1].attention_norm
    kept = layer.weight
    layer.weight = torch.nn.Parameter(kept * 0.3, requires_grad=False)
    during = llama.text_completion(texts[:1], 0, 1, 10)
    layer.weight = kept
    rotations = llama.model.freqs_cis
    llama.model.freqs_cis = torch.conj_physical(rotations)
    turned = llama.text_completion(texts[:1], 0, 1, 10)
    llama.model.freqs_cis = precompute_freqs_cis(llama.model.params.head_size, len(rotations), 30.0)  # on the CPU
    slower = llama.text_completion(texts[:1], 0, 1, 10)
    llama.model.freqs_cis = rotations
    return before, during, turned, slower


def hooked(llama: Llama, texts: list[str]) -> Any:
    calls: list[int] = []
    handle = llama.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    during = llama.text_completion(texts[:1], 0, 1, 10)
    table = llama.model.freqs_cis
    llama.model.freqs_cis = precompute_freqs_cis(llama.model.params.head_size, len(table), 30.0)  # on the CPU
    slower = llama.text_completion(texts[:1], 0, 1, 10)
    llama.model.freqs_cis = table
    handle.remove()
    return len(calls) > 15, during, slower, llama.text_completion(texts[:1], 0, 1, 10)


def between(llama: Llama, texts: list[str]) -> Any:
    """Steps of somebody else's own between two generations, with ids on the CPU: after Meta's build they are on the
    GPU."""
    ids = torch.tensor([llama.tokenizer.encode(texts[0], bos=True, eos=False)])
    llama.model(ids[:, :-1], 0)
    logits = llama.model(ids[:, -1:], torch.tensor([ids.shape[1] - 1]), slots=torch.tensor([0]))
    return logits.argmax(-1).tolist(), llama.text_completion(texts[:1], 0, 1, 10)


def interrupted(llama: Llama, texts: list[str]) -> Any:
    """A stream between whose steps other calls use the cache, and draw."""
    seen: list[Any] = []
    for i, chunk in enumerate(llama.stream_text(texts, 0.8, 0.9, 15, repetition_penalty=1.1)):
        seen.append((chunk["index"], chunk["text"]))
        if i % 7 == 5:
            seen.append(llama.text_completion(texts[:1], 0.7, 1, 3))
    return seen


# What both paths run. Each starts from the same state of torch's generator.
SCENARIOS: dict[str, Callable[[Llama, list[str]], Any]] = {
    "greedy": lambda m, t: [m.text_completion(t, 0, 1, 30, logprobs=True) for _ in range(2)],
    "short": lambda m, t: [m.text_completion(t, 0, 1, 12, logprobs=True)],
    "sampled": lambda m, t: m.text_completion(t, 0.8, 0.9, 30, logprobs=True),
    "echo": lambda m, t: m.text_completion(t, 0, 1, 12, logprobs=True, echo=True),
    "to the end": lambda m, t: m.text_completion(t[:1], 0, 1),
    "sampled to the end": lambda m, t: m.text_completion(t[-1:], 0.7, 1),
    "options": lambda m, t: m.text_completion(
        t, 0.9, 0.95, 25, top_k=20, min_p=0.02, repetition_penalty=1.2, logit_bias={5: -2.0, 100: 1.0}
    ),
    "other options": lambda m, t: m.text_completion(t, 0.7, 0.8, 15, top_k=30, min_p=0.01, logit_bias={7: -3.0}),
    "penalty": lambda m, t: m.text_completion(t, 0, 1, 25, repetition_penalty=1.3),
    "seeds": lambda m, t: m.text_completion(t, 0.9, 0.95, 20, seed=list(range(len(t)))),
    "one seed": lambda m, t: m.text_completion(t, 0.9, 0.95, 20, seed=11),
    "alternatives": lambda m, t: m.text_completion(t, 0, 1, 10, logprobs=3),
    "many": lambda m, t: m.text_completion(many(m), 0, 1, 12),
    "many sampled": lambda m, t: m.text_completion(many(m), 0.9, 0.9, 12),
    "many, penalty": lambda m, t: m.text_completion(many(m), 0.9, 0.9, 12, repetition_penalty=1.3, logprobs=True),
    "many with stops": lambda m, t: m.text_completion(many(m), 0.9, 0.9, 20, stop=["e", "the"]),
    "many with seeds": lambda m, t: m.text_completion(many(m), 0.9, 0.9, 12, seed=list(range(len(many(m))))),
    "left early": left_early,
    "interrupted": interrupted,
    "chat": conversation,
    "drafts": lambda m, t: m.text_completion(t[:1], 0, 1, 60, draft=True, logprobs=True),
    "score": lambda m, t: m.score(["The dog ran home. " * 3, "A cat.", TEXTS[2] * 8]),
    "embed": lambda m, t: m.embed(t).float().cpu().flatten().tolist(),
    "replaced": replaced,
    "hooked": hooked,
    "between": between,
}


def ran(llama: Llama, scenario: str, rows: int) -> tuple[Any, int]:
    """What it gave, and the generator's state afterwards."""
    torch.manual_seed(7)
    value = SCENARIOS[scenario](llama, [TEXTS[i % 8] for i in range(min(rows, 8))])
    return value, hash(bytes(torch.get_rng_state().numpy()))


def assert_same(found: Any, expected: Any, tolerance: float) -> None:
    if isinstance(expected, float):
        assert found == pytest.approx(expected, abs=tolerance, rel=tolerance)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_same(found[name], expected[name], tolerance)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected):
            assert_same(ours, theirs, tolerance)
    else:
        assert found == expected


@pytest.mark.parametrize("rows", [1, 4, 32])
def test_scenarios(
    rows: int,
    tiny: Path,
    tokenizer_path: str,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Recorded steps give the ids, log-probabilities and generator states that the CPU gives op by op."""
    monkeypatch.setattr(compiled, "LEAST_COLUMNS", 32)
    graph = build(tiny, tokenizer_path, rows)
    host = build(tiny, tokenizer_path, rows, "cpu", compile=False)
    assert isinstance(graph._engine.graph, compiled.Recorded)
    for scenario in SCENARIOS:
        found, state = ran(graph, scenario, rows)
        expected, its_state = ran(host, scenario, rows)
        assert_same(found, expected, 1e-3)
        assert state == its_state, scenario
    assert machine.captured
    assert machine.replays > 300
    assert "The decode step is not" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "dtype", "quantize"), [(4, "bfloat16", None), (1, "float16", "int8"), (4, "bfloat16", "int4")]
)
def test_scenarios_of_kernels(
    rows: int,
    dtype: str,
    quantize: Optional[str],
    tiny: Path,
    tokenizer_path: str,
    machine: Machine,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same of steps that are made of kernels, for which the plain forms stand in, beside steps op by op on the
    GPU."""
    graph = build(tiny, tokenizer_path, rows, dtype=dtype, quantize=quantize)
    plain = build(tiny, tokenizer_path, rows, dtype=dtype, quantize=quantize, compile=False)
    for scenario in ("greedy", "options", "many with seeds", "drafts", "between", "interrupted"):
        found, state = ran(graph, scenario, rows)
        expected, its_state = ran(plain, scenario, rows)
        assert_same(found, expected, 0.1)
        assert state == its_state, scenario
    assert isinstance(graph._engine.graph, compiled.Recorded)
    assert graph._engine.graph._ways[0].kind == "made of Triton's kernels"
    assert "not" not in capsys.readouterr().out


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 0.0, "logprobs": True},
    {"temperature": 0.8, "logprobs": 3, "top_k": 20, "min_p": 0.02},
    {"temperature": 0.9, "repetition_penalty": 1.2, "logit_bias": {5: -2.0}},
    {"temperature": 0.9, "seed": [1, 2, 3, 4]},
    {"temperature": 0.0, "echo": True, "logprobs": True},
]


@pytest.mark.parametrize(
    ("options", "form"),
    [(options, ("float32", None)) for options in OPTIONS]
    + [(OPTIONS[3], ("bfloat16", form)) for form in (None, "int4")],
    ids=str,
)
def test_a_step_waits_for_nothing_but_its_ids(
    options: dict[str, Any], form: tuple[str, Optional[str]], tiny: Path, tokenizer_path: str, machine: Machine
) -> None:
    """The host reads each step's ids when the next step is queued already, and waits nowhere else, nor before the
    first."""
    llama = build(tiny, tokenizer_path, dtype=form[0], quantize=form[1])
    llama.tokenizer.eos_id = -1
    for _ in range(2):  # the first records, and proves what it recorded
        llama.forget()
        machine.waits.clear()
        llama.text_completion(TEXTS[:4], max_gen_len=30, **options)
    waits = {line: n for line, n in machine.waits.items() if not line.startswith("event at engine.py")}
    assert waits == {}
    assert sum(machine.waits.values()) <= 30 + 1  # the prompts' own log-probabilities are one more
    assert not machine.violations
    assert not llama._engine.joins_passes  # forced ids are steps, which are recorded


def test_ids_are_fetched_behind_what_is_queued(tiny: Path, tokenizer_path: str, machine: Machine) -> None:
    """In one wait for all of them, which comes last."""
    engine, queued = build(tiny, tokenizer_path)._engine, []
    numbers = [runtime.to_device(row, engine.device) for row in ([1, 2], [3, 4, 5])]
    machine.waits.clear()
    assert engine.fetch(numbers, lambda: queued.append(sum(machine.waits.values()))) == [[1, 2], [3, 4, 5]]
    assert queued == [0]
    assert sum(machine.waits.values()) == 1
    assert engine.fetch(numbers) == [[1, 2], [3, 4, 5]]


def test_a_step_that_was_queued_ahead_is_not_run_again(
    tiny: Path, tokenizer_path: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = build(tiny, tokenizer_path)
    llama.tokenizer.eos_id = -1
    decode, runs = llama._engine.decode, []
    monkeypatch.setattr(llama._engine, "decode", lambda *step: runs.append(step) or decode(*step))
    llama.generate([[1, 5, 6], [1, 7]], 20, 0)
    assert 19 <= len(runs) <= 20  # the first ids come from the prompts; one step may be queued in vain


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_launches(quantize: Optional[str], tiny: Path, tokenizer_path: str, machine: Machine) -> None:
    """Nine launches a layer, of which attention takes two; around them the embedding, a norm, the output and its
    float32."""
    llama = build(tiny, tokenizer_path, dtype="bfloat16", quantize=quantize)
    graph = llama._engine.graph
    assert isinstance(graph, compiled.Recorded)
    tokens, positions = (runtime.to_device([5, 6], llama._engine.device) for _ in range(2))
    columns, counts = torch.arange(112, device="emulated"), []
    for way in graph._ways[:2]:
        for _ in range(2):  # kernels prove themselves in the first
            machine.launches.clear()
            with torch.inference_mode():
                way.step(tokens, positions, columns, compiled.rotations(llama.model))
        counts.append(machine.launches.total())
    assert counts[0] == 9 * llama.model.n_layers + 4
    assert counts[1] > 25 * llama.model.n_layers


def test_a_wrong_kernel_is_not_used(
    tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that a GPU computes wrongly, and one that its compiler refuses."""

    class Broken(StandIns):
        def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("PassManager::run failed\nand a long story")

        def add_norm(self, x: torch.Tensor, delta: Any, weight: torch.Tensor, eps: float) -> Any:
            h, normed = kernels.add_norm(x, delta, weight, eps)
            return h, normed * 1.1

    with emulated(triton=Broken()):
        llama = build(tiny, tokenizer_path, rows=32, dtype="bfloat16")
        plain = build(tiny, tokenizer_path, rows=32, dtype="bfloat16", compile=False)
        texts = [TEXTS[i % 8] for i in range(20)]
        assert_same(llama.text_completion(texts, 0, 1, 6), plain.text_completion(texts, 0, 1, 6), 0.1)
    out = capsys.readouterr().out
    assert "The kernel add_norm is not used here, torch's own run in its place: it gives other numbers\n" in out
    assert (
        "The kernel silu_mul is not used here, torch's own run in its place: RuntimeError: PassManager::run failed\n"
        in out
    )
    assert "The decode step is not" not in out


def test_a_compared_step_leaves_what_the_replay_wrote(
    tiny: Path, tokenizer_path: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain step rounds otherwise. If its keys stayed, the first call would give other ids than later ones."""
    plain, compared = compiled.Recorded._plain, []

    def rounded(self: compiled.Recorded, recording: Any, rows: int) -> Any:
        result = plain(self, recording, rows)
        for attention in self.model.attentions():
            attention.cache_k[torch.arange(rows, device=self.device), recording.positions[:rows]] += 1e-4
        compared.append(rows)
        return result

    def keys() -> list[list[float]]:
        llama = build(tiny, tokenizer_path)
        llama.text_completion(TEXTS[:2], 0, 1, 12)
        return [attention.cache_k[:2, :40].tolist() for attention in llama.model.attentions()]

    expected = keys()
    monkeypatch.setattr(compiled.Recorded, "_plain", rounded)
    assert keys() == expected
    assert compared


def test_requests_that_come_and_go(
    tiny: Path,
    tokenizer_path: str,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """While the next step is queued ahead, and recordings of several sizes take turns."""
    monkeypatch.setattr(compiled, "LEAST_COLUMNS", 32)
    alone = events.Alone(build(tiny, tokenizer_path, 1, "cpu", compile=False))
    assert events.run(build(tiny, tokenizer_path), alone, 700, 1)["texts"] > 100
    assert machine.replays > 200
    assert "The decode step is not" not in capsys.readouterr().out


@pytest.mark.parametrize("draft", ["near", "same"])
def test_a_draft_model(draft: str, tiny: Path, tokenizer_path: str, machine: Machine, tmp_path: Path) -> None:
    """Both models' steps are recorded; the ids are those of a build on a CPU, where nothing is, and nobody guesses."""
    folder = write_checkpoint(tmp_path / "near", near(random_weights())) if draft == "near" else tiny
    guessing = build(tiny, tokenizer_path, dtype="float32", draft=str(folder))
    right = events.insist(guessing)
    alone = events.Alone(build(tiny, tokenizer_path, 1, "cpu", dtype="float32"), guessed=True)
    assert events.run(guessing, alone, 80, 3)["texts"] > 5
    model = guessing._scheduler.draft_model
    assert model is not None
    assert isinstance(model.engine.graph, compiled.Recorded)
    assert any(recording.graph is not None for recording in model.engine.graph._recordings.values())
    assert sum(right) > (1.5 if draft == "same" else 0.05) * len(right)


def test_options_are_not_recorded(tiny: Path, tokenizer_path: str, machine: Machine) -> None:
    """Each temperature, top_p and top_k made a graph of its own, each of which warmed up on a stream of its own."""
    llama = build(tiny, tokenizer_path)
    streams = machine.streams
    for i in range(20):
        llama.text_completion(TEXTS[:4], 0.1 * i, 1 - i / 100, 20, top_k=i, seed=i)
    assert machine.captured == 1
    assert machine.streams == streams


def test_a_prompt_that_joins_does_not_stop_the_graph(
    tiny: Path, tokenizer_path: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that ran while a prompt was read decoded op by op, over copies of their cache."""
    llama = build(tiny, tokenizer_path)
    llama.text_completion(FORTY[:8], 0, 1, 10)
    widths: list[int] = []
    run = llama.model.hidden_states
    monkeypatch.setattr(
        llama.model, "hidden_states", lambda ids, *a, **k: widths.append(ids.shape[1]) or run(ids, *a, **k)
    )
    llama.text_completion(FORTY, 0, 1, 10, stop=["e"])
    assert 1 not in widths


def test_every_device_and_thread(tiny: Path, tokenizer_path: str, machine: Machine) -> None:
    """Streams, events and captures belonged to the thread's current device, whatever the model's was: a worker thread,
    or a model on the second GPU, recorded nothing and read memory that nobody had written."""
    models = [build(tiny, tokenizer_path, device=f"emulated:{index}") for index in (0, 1)]
    expected = build(tiny, tokenizer_path, device="cpu", compile=False).text_completion(
        TEXTS[:4], 0, 1, 20, logprobs=True
    )
    torch.cuda.set_device(0)
    for llama in (*models, *models):
        assert_same(llama.text_completion(TEXTS[:4], 0, 1, 20, logprobs=True), expected, 1e-3)
    found: list[Any] = []

    def work() -> None:
        for llama in models:
            found.append(llama.text_completion(TEXTS[:3], 0, 1, 20, logprobs=True))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert_same(found, [expected[:3]] * 2, 1e-3)
    assert torch.cuda.current_device() == 0


def test_a_graph_that_reads_freed_memory_is_found_out(
    tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fault that every recorded step had, put in again: the columns that a step looks at were kept by nobody. Its
    first replays differ from the plain step, which then runs."""
    expected = build(tiny, tokenizer_path, device="cpu", compile=False).text_completion(TEXTS[:2], 0, 1, 20)
    record = compiled.Recorded._record

    def forget(self: Any, recording: Any, way: Any) -> None:
        recording.columns = recording.columns.clone()
        record(self, recording, way)
        recording.columns = torch.arange(len(recording.columns), device=self.device)

    monkeypatch.setattr(compiled.Recorded, "_record", forget)
    with emulated() as machine:
        llama = build(tiny, tokenizer_path)
        assert llama.text_completion(TEXTS[:2], 0, 1, 20) == expected
        assert any("replay reads freed memory" in line for line in machine.violations)
    assert "The decode step is not recorded, and runs as it is: it gives other numbers" in capsys.readouterr().out


def test_a_capture_on_another_device_is_found_out(
    tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = build(tiny, tokenizer_path, device="cpu", compile=False).text_completion(TEXTS[:2], 0, 1, 20)
    with emulated(devices=2) as machine:
        llama = build(tiny, tokenizer_path, device="emulated:1")
        torch.cuda.set_device(0)
        graph = llama._engine.graph
        assert isinstance(graph, compiled.Recorded)
        graph._stream = torch.cuda.Stream(0)  # type: ignore[no-untyped-call]
        assert llama.text_completion(TEXTS[:2], 0, 1, 20) == expected
        assert machine.captured
    assert "The decode step is not recorded, and runs as it is: it gives other numbers" in capsys.readouterr().out


def test_draws_of_steps_ahead_are_given_back_to_the_gpu_of_the_model(tiny: Path, tokenizer_path: str) -> None:
    def seeded(llama: Llama) -> Any:
        torch.manual_seed(3)
        return left_early(llama, TEXTS[:4])

    expected = seeded(build(tiny, tokenizer_path, device="cpu", compile=False))
    generators = torch.Generator(), torch.default_generator
    with emulated(devices=2), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "default_generators", generators)
        assert seeded(build(tiny, tokenizer_path, device="emulated:1")) == expected


def test_a_model_that_is_let_go_leaves_its_memory(tiny: Path, tokenizer_path: str, machine: Machine) -> None:
    """A reference cycle kept it until the next collection, and a second build then found the memory taken."""
    gc.collect()
    gc.disable()
    try:
        llama = build(tiny, tokenizer_path)
        llama.text_completion(TEXTS[:2], 0.8, 0.9, 10)
        model = weakref.ref(llama.model)
        del llama
        assert model() is None
    finally:
        gc.enable()
    assert torch.cuda.memory_allocated() == 0


ON_TWO = ("short", "many with seeds")


def on_two(folder: str, tokenizer_path: str, options: dict[str, Any]) -> tuple[Any, int, int]:
    with emulated(devices=4) as machine:
        llama = Llama.build(folder, tokenizer_path, 112, 4, 2, device="emulated", **options)
        llama.tokenizer.eos_id = 17
        assert isinstance(llama._engine.graph, compiled.Recorded)
        graph = llama._engine.graph
        assert any(release() == graph.clear for release in runtime._first)  # before the process group goes
        results = [ran(llama, name, 4)[0] for name in ON_TWO]
        return results, machine.captured, sum(machine.violations.values())


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16", "quantize": "int4"}], ids=str)
def test_collectives_are_captured(options: dict[str, Any], tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    """Two processes: all-reduces and gathers are in the graph, also between kernels."""
    with emulated():
        host = build(tiny, tokenizer_path, device="cpu" if not options else "emulated", compile=False, **options)
        expected = [ran(host, name, 4)[0] for name in ON_TWO]
    for found, captured, violations in pool.run(on_two, str(tiny), tokenizer_path, options):
        assert captured
        assert not violations
        if not options:
            assert_same(found, expected, 1e-3)
        else:  # sums in another order may decide otherwise between equals, from where on texts differ
            same = [a["tokens"][:5] == b["tokens"][:5] for a, b in zip(found[0][0], expected[0][0])]
            assert sum(same) >= 3


def test_a_rank_that_cannot_record(
    tiny: Path, tokenizer_path: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another process fails, what this one has recorded already is not replayed, and the next way is proven
    anew."""
    expected = build(tiny, tokenizer_path, device="cpu", compile=False).text_completion(TEXTS[:2], 0, 1, 20)
    for failing in range(4):
        votes = iter([i != failing for i in range(100)])
        monkeypatch.setattr(compiled, "all_agree", lambda flag, group, votes=votes: next(votes) and flag)
        llama = build(tiny, tokenizer_path)
        assert llama.text_completion(TEXTS[:2], 0, 1, 20) == expected


def test_a_capture_that_fails_half_way(tiny: Path, tokenizer_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A part that waits for the device spoils the capture. The thread comes back to its own stream, and the step
    runs."""
    expected = build(tiny, tokenizer_path, device="cpu", compile=False).text_completion(TEXTS[:2], 0, 1, 20)
    with emulated() as machine:
        llama = build(tiny, tokenizer_path)
        step = llama.model.step

        def waiting(*arguments: Any) -> torch.Tensor:
            logits = step(*arguments)
            logits.sum().item()
            return logits

        graph = llama._engine.graph
        assert isinstance(graph, compiled.Recorded)
        graph._ways[0] = compiled._Way("recorded", waiting, True)
        before = torch.cuda.current_stream()
        assert llama.text_completion(TEXTS[:2], 0, 1, 20) == expected
        assert torch.cuda.current_stream() is before
        assert machine.violations
    assert "The decode step is not recorded, and runs as it is: CUDA error" in capsys.readouterr().out


def test_attention_proves_itself_over_the_whole_cache(
    tiny: Path, tokenizer_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel that is wrong from the second block of keys on is right at the positions where it is used first."""

    class Broken(StandIns):
        def attend(
            self, q: torch.Tensor, cache_k: torch.Tensor, cache_v: torch.Tensor, positions: torch.Tensor
        ) -> torch.Tensor:
            return kernels.attend(q, cache_k, cache_v, positions.clamp(max=63))

    with emulated(triton=Broken()):
        llama = build(tiny, tokenizer_path, dtype="bfloat16")
        llama.text_completion(TEXTS[:2], 0, 1, 5)
    out = capsys.readouterr().out
    assert "The kernel attend is not used here, torch's own run in its place: it gives other numbers\n" in out
    assert "The decode step is not made of Triton's kernels" in out


def test_draws_ahead_belong_to_nobody_else(tiny: Path, tokenizer_path: str, machine: Machine) -> None:
    """A stream that stays open has drawn for a step that it may never report; the next call draws as if it had not."""
    results = []
    for device in ("emulated", "cpu"):
        llama = build(tiny, tokenizer_path, device=device, compile=None if device == "emulated" else False)
        torch.manual_seed(3)
        stream = llama.stream_text(TEXTS[:2], 0.9, 1, 20)
        seen = [next(stream)["text"] for _ in range(4)]
        between = llama.text_completion(TEXTS[2:4], 0.9, 1, 10)
        stream.close()  # type: ignore[attr-defined]
        results.append((seen, between, llama.text_completion(TEXTS[2:4], 0.9, 1, 10)))
    assert results[0] == results[1]
