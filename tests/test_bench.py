"""The command bench, and the benchmarks: their arithmetic on numbers worked by hand, and the whole of it on a tiny
model."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PARAMS, ROOT
from helpers import NOISE, TORCHRUN, command, run

from llama import Llama, ModelArgs
from llama.commands import bench
from llama.decoding.calls import Call
from llama.layers.rounding import REFINEMENTS, Quantization
from llama.model import feed_forward_width
from llama.weights.checkpoint import quantized_layers

WIDTH = feed_forward_width(4 * 64, 32, None)
LAYER = 64 * (64 + 32 + 32 + 64) + 3 * 64 * WIDTH  # elements of its matrices: wq, wk, wv, wo; w1, w2, w3
STEP_BYTES = 4 * (2 * (LAYER + 2 * 64) + 64 + 400 * 64)  # float32: the layers with their norms, the last norm, the head


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def flags(tiny: Path, tokenizer_path: str) -> list[str]:
    return ["--ckpt_dir", str(tiny), "--tokenizer_path", tokenizer_path]


def check_report(report: dict[str, Any], flags: list[str], processes: int = 1) -> None:
    given = {
        "checkpoint": flags[1],
        "device": "cpu",
        "dtype": "float32",
        "batch_size": 2,
        "prompt_tokens": 12,
        "new_tokens": 5,
    }
    assert {key: report[key] for key in given} == given
    assert report["processes"] == processes
    for key in ("load_s", "prefill_tok_s", "first_token_s", "decode_tok_s", "step_s", "weights_GB_s", "memory_GB_s"):
        assert report[key] > 0, key
    assert report["prefill_tok_s"] == pytest.approx(2 * 12 / report["first_token_s"])
    assert report["decode_tok_s"] == pytest.approx(2 / report["step_s"])
    assert report["weights_GB_s"] == pytest.approx(report["weights_bytes"] / report["step_s"] / 1e9)
    assert report["share_of_memory_rate"] == pytest.approx(report["weights_GB_s"] / report["memory_GB_s"])


SIZES = ["--prompt_tokens", "12", "--new_tokens", "5", "--batch_size", "2", "--json"]


def test_bench_on_one_process(flags: list[str]) -> None:
    result = run([sys.executable, "-W", "error", "-m", "llama", "bench", *flags, *SIZES])
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    check_report(report, flags)
    assert report["weights_bytes"] == STEP_BYTES
    assert result.stderr.startswith("Loaded in ")


def test_bench_under_torchrun(flags: list[str]) -> None:
    """Bytes and rates are one process's: the norms whole, half of every matrix."""
    result = run([*TORCHRUN, "--nproc_per_node", "2", "-m", "llama", "bench", *flags, *SIZES])
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    check_report(report, flags, processes=2)
    norms = 4 * (2 * 2 * 64 + 64)
    assert report["weights_bytes"] == (STEP_BYTES - norms) // 2 + norms
    assert all(
        line.startswith("Loaded in") or any(noise in line for noise in NOISE)
        for line in result.stderr.split("\n")
        if line
    )


def test_bench_in_words(
    flags: list[str], bars: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one run that does not count."""
    monkeypatch.setattr(bench, "READ_BYTES", 2**20)
    command("bench", flags[1], flags[3], prompt_tokens=4, new_tokens=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{flags[1]}: float32 on cpu, 1 process, ")
    assert [line.split()[0] for line in lines[1:7]] == ["load", "prefill", "first", "decode", "weights", "memory"]
    assert (bars[-1].n, bars[-1].desc, bars[-1].unit) == (1 + bench.REPEATS, "Measuring", "run")


REPORT = {
    "checkpoint": "a\nfolder", "quantize": None, "compile": None, "load_s": 1.234, "device": "cpu", "dtype": "bfloat16",
    "processes": 1, "threads": 1, "batch_size": 1, "prompt_tokens": 480, "new_tokens": 64, "prefill_tok_s": 123.45,
    "first_token_s": 0.12345, "decode_tok_s": 45.678, "step_s": 0.0123, "weights_bytes": 2_500_000,
    "weights_GB_s": 12.34,
    "memory_GB_s": 23.46, "share_of_memory_rate": 0.526, "fits_cache": False,
}  # fmt: skip
WORDS = """a
folder: bfloat16 on cpu, 1 process, 1 thread
  load      1.23 s
  prefill   123.5 tok/s (480 tokens)
  first     0.1235 s to the first token
  decode    45.68 tok/s (12.30 ms a step, 64 new tokens)
  weights   2.5 MB a step, 12.3 GB/s
  memory    23.5 GB/s in plain reads: decode takes 53% of that"""
SEVERAL = [
    ("bfloat16 on cpu, 1 process, 1 thread", "bfloat16, int8, compiled on cuda:0, 2 processes"),
    ("(480 tokens)", "(480 tokens in each of 2 prompts)"), ("tok/s (12", "tok/s of 2 prompts together (12"),
    ("a step, 12.3", "a step on each process, 12.3"), ("in plain reads", "in copies on each process"),
]  # fmt: skip


def test_a_report_in_words() -> None:
    """Of one prompt on one process, and of several on several GPUs."""
    assert bench._in_words(REPORT) == WORDS
    changes = {"processes": 2, "batch_size": 2, "device": "cuda:0", "quantize": "int8", "compile": True}
    words = WORDS
    for old, new in SEVERAL:
        words = words.replace(old, new)
    assert bench._in_words({**REPORT, **changes, "threads": 9}) == words
    assert bench._place({**REPORT, "processes": 2, "threads": 3}) == "cpu, 2 processes, 3 threads each"
    *same, note = bench._in_words({**REPORT, "fits_cache": True, "compile": False}).splitlines()
    assert same == WORDS.splitlines()
    assert note.strip() == "(the weights fit this processor's largest cache, so more than 100% is possible)"


def test_medians_of_runs(tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the first run, which nothing was warm for."""
    llama = Llama.build(str(tiny), tokenizer_path, 64, 2, device="cpu", dtype="bfloat16")
    runs = [(9.0, 9.0, []), (1.0, 0.125, []), (4.0, 0.5, []), (2.0, 0.25, [])]
    nbytes = bench.weight_bytes(llama.model)
    for cache, fits in ((nbytes, False), (nbytes + 1, True)):
        clock = iter(runs)
        monkeypatch.setattr(bench, "timed_run", lambda *_, clock=clock: next(clock))
        monkeypatch.setattr(bench, "read_rate", lambda _: 2e9)
        monkeypatch.setattr(bench, "largest_cache", lambda cache=cache: cache)
        assert bench.measure(llama, 12, 5, 2) == {
            "device": "cpu", "dtype": "bfloat16", "processes": 1, "threads": torch.get_num_threads(), "batch_size": 2,
            "prompt_tokens": 12, "new_tokens": 5, "prefill_tok_s": 12.0, "first_token_s": 2.0, "decode_tok_s": 8.0,
            "step_s": 0.25, "weights_bytes": nbytes, "weights_GB_s": nbytes / 0.25 / 1e9, "memory_GB_s": 2.0,
            "share_of_memory_rate": nbytes / 0.25 / 2e9, "fits_cache": fits,
        }  # fmt: skip
        assert next(clock, None) is None


def test_the_largest_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "Path", lambda _: tmp_path)
    assert bench.largest_cache() == 0
    for i, size in enumerate(["48K", "2048K\n", "32M\n", "unknown", "9"]):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(size)
        assert bench.largest_cache() == [48 * 2**10, 2**21, 2**25, 2**25, 2**25][i]
    (tmp_path / "index0" / "size").write_text("1G")
    assert bench.largest_cache() == 2**30


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"new_tokens": 1}, "new_tokens=1 must be a whole number of 2 or more"),
        ({"prompt_tokens": 0}, "prompt_tokens=0 must be a whole number of 1 or more"),
        ({"batch_size": 2.5}, "batch_size=2.5 must be a whole number of 1 or more"),
        ({"quantize": "int3"}, "quantize='int3'"),
        ({"device": "toaster"}, "device='toaster'"),
        ({"ckpt_dir": "nowhere"}, "no checkpoint folder at"),
    ],
)
def test_bench_refuses_before_it_works(options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("it measured"))
    with pytest.raises(ValueError, match=said):
        command("bench", **options)


@pytest.mark.parametrize(
    ("options", "positions"),
    [({}, 512), ({"new_tokens": 12}, 492), ({"new_tokens": 511}, 512), ({"new_tokens": 600}, 601),
     ({"new_tokens": 600, "ckpt_dir": "."}, 1080), ({"prompt_tokens": 7, "new_tokens": 2}, 9)],
)  # fmt: skip
def test_prompts_leave_room_for_what_is_asked_for(
    options: dict[str, Any], positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """480 tokens if not given, or as many as the demo model's context allows, but at least one."""

    class Built(Exception):
        pass

    def build(args: Any, max_seq_len: int, max_batch_size: int) -> None:
        raise Built(max_seq_len)

    monkeypatch.setattr(bench, "build", build)
    with pytest.raises(Built, match=rf"^{positions}$"):
        command("bench", **options)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_device_is_waited_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its work is only queued, so each run is timed to its end; and one run comes before those that count."""
    done: list[str] = []
    clock = iter([5.0, 105.0, *(t for i in range(bench.TRIES) for t in (0.0, 2.0 + i))])
    monkeypatch.setattr(bench, "device_kind", lambda _: kind)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: done.append("wait"))
    monkeypatch.setattr(time, "perf_counter", lambda: done.append("look") or next(clock))
    assert bench._seconds(lambda: done.append("work"), torch.device("cpu")) == 2.0 + bench.TRIES // 2
    once = ["look", "work", "look"] if kind == "cpu" else ["look", "work", "wait", "look"]
    assert done == once * (1 + bench.TRIES)


def test_a_timed_run_is_greedy_and_passes_eos(tiny: Path, tokenizer_path: str) -> None:
    llama = Llama.build(str(tiny), tokenizer_path, 64, 3, device="cpu")
    rows = bench.make_prompts(3, 7, 400)
    expected, _ = llama.generate(rows, 6, temperature=0)
    assert len(expected[0]) == 6
    llama.tokenizer.eos_id = expected[0][1]
    first, step, ids = bench.timed_run(llama, rows, 6)
    assert ids == expected[0]
    assert first > 0
    assert step is not None
    assert bench.timed_run(llama, rows, 1)[1:] == (None, expected[0][:1])


def test_the_times_of_a_run(tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the first ids of all rows, and from there to the last ones, by the steps between."""
    llama = Llama.build(str(tiny), tokenizer_path, 64, 3, device="cpu")
    seen: list[Any] = []
    monkeypatch.setattr(bench, "Call", lambda *given: (seen.append(step) or step for step in Call(*given)))
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: float(len(seen) ** 2)))
    assert bench.timed_run(llama, bench.make_prompts(3, 7, 400), 3)[:2] == (3**2, (9**2 - 3**2) / 2)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 400])
def test_prompts_for_any_vocabulary(size: int) -> None:
    """BOS, and then ids that vary, also from row to row, and have no other meaning."""
    rows = bench.make_prompts(3, 50, size)
    assert [len(row) for row in rows] == [50] * 3
    assert {i for row in rows for i in row} <= set(range(size))
    assert {row[0] for row in rows} == {min(1, size - 1)}
    if size > 4:
        assert min(i for row in rows for i in row[1:]) >= 3
        assert len({tuple(row) for row in rows}) == 3
        assert all(len(set(row)) > 40 for row in rows)


def test_rates_count_what_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that says what it shall."""
    times = iter([1.0, 0.5, 2.0, 0.5, 0.5])
    monkeypatch.setattr(bench, "_seconds", lambda work, device: (work(), next(times))[1])
    assert bench.read_rate(torch.device("cpu"), 2**20) == 2**20 / 0.5
    with pytest.MonkeyPatch.context() as patch:  # elsewhere a copy reads and writes
        patch.setattr(bench, "device_kind", lambda _: "mps")
        patch.setattr(bench, "_seconds", lambda work, device: (work(), 0.5)[1])
        assert bench.read_rate(torch.device("cpu"), 2**20) == 2 * 2**20 / 0.5
    assert bench.matmul_rate(torch.device("cpu"), torch.float32, [(2, 3, 4), (2, 3, 5)]) == 2 * 2 * 3 * 5 / 0.5


def result_of(
    name: str, kind: str, form: str, steps: list[float], firsts: list[float], load: float, nbytes: int
) -> dict[str, Any]:
    runs, again = ([{"first": f, "step": s, "ids": [5, 6, 7]} for f, s in zip(firsts, steps)] for _ in range(2))
    loads = [{"load_s": load, "peak_MB": 100.0, "private_MB": None, "weights_bytes": nbytes}]
    return {
        "name": name,
        "kind": kind,
        "form": form,
        "loads": loads,
        "runs": {"decode": runs, "long": again},
        "notes": [],
    }


def test_tables() -> None:
    from table import agreement, cell, figures, markdown, ratio, ratios_table, results_table, shares_table
    from tasks import FULL, Task

    assert FULL.tasks["decode"].context == 32
    assert cell([3, 1, 2], 1) == "2.0 (1.0–3.0)"
    assert cell([2.04, 2.0], 1) == "2.0"
    assert cell([], 1) == "–"
    assert markdown(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | --: |\n| x | 1 |"
    assert ratio(10, 4, True) == 2.5
    assert ratio(10, 5, False) == 0.5
    assert ratio(None, 5, True) is None

    ours = result_of("ours", "ours", "bf16", [0.1, 0.2, 0.4], [2.0, 4.0, 4.0], 1.0, 200)
    peer = result_of("peer", "peer", "bf16", [0.4, 0.4, 0.4], [4.0, 4.0, 4.0], 0.5, 200)
    small = result_of("small", "peer", "int8", [0.1], [1.0], 0.5, 100)
    small["runs"] = {}
    tasks = {**FULL.tasks, "decode": Task(1, 8, 49), "long": Task(1, 100, 33)}
    columns = [
        c for c in figures(tasks) if c.label in ("decode 1×32", "decode 4×32", "prefill 100", "load, s", "private, MB")
    ]
    table = results_table([ours, peer, small], columns).splitlines()
    assert table[0] == "| system | decode 1×32 | decode 4×32 | prefill 100 | load, s | private, MB |"
    assert table[2] == "| ours | 5.0 (2.5–10.0) | – | 25 (25–50) | 1.00 | – |"
    assert table[4] == "| small | – | – | – | 0.50 | – |"
    ratios = ratios_table([ours, peer, small], columns).splitlines()
    assert ratios[2:] == ["| ours / peer | 2.00 | – | 1.00 | 0.50 | – |"]  # small computes in another form
    shares = shares_table(
        [ours, small], tasks, {"read_rate": 2000.0, "matmul_rate": 1000.0}, layer_flops=8.0
    ).splitlines()
    # 200 bytes in 0.2 s of 2000 a second; 8 x 100 operations in 4 s of 1000 a second.
    assert shares[2] == "| ours | 0.000 | 10.0 | 0.0 | 50% | 0 | 20% |"
    assert shares[3] == "| small | 0.000 | 20.0 | – | – | – | – |"
    peer["runs"]["decode"][0]["ids"] = [5, 6, 8]
    said = "peer: 5 of 6 greedy ids are those of ours, up to each prompt's first difference"
    assert agreement([ours, peer, small]) == [said]


def test_a_peer_that_crashes_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's kernels segfault on some machines: the next spec is tried, and the run goes on."""
    import children

    script = tmp_path / "system.py"
    script.write_text(
        "import json, os, signal, sys\n"
        "spec = json.loads(sys.argv[1])\n"
        "print(json.dumps({'load_s': 1}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    rows, new = json.loads(line)\n"
        "    if new == spec['dies_at']:\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    print(json.dumps({'error': 'cannot'} if new == 7 else {'first': 1, 'step': new, 'ids': []}), flush=True)\n"
    )
    monkeypatch.setattr(children, "SCRIPT", script)
    specs = [{"dies_at": 3, "way": "with"}, {"dies_at": 4, "way": "without"}]
    system = children.System("peer", "peer", "bf16", specs)
    system.start(counted=True)
    system.run("a", [[1]], 3, counted=False)  # crashes, and runs with the other spec
    system.run("b", [[1]], 7, counted=False)
    system.run("a", [[1]], 3, counted=True)
    system.run("b", [[1]], 7, counted=True)  # not asked again
    assert system.alive
    system.run("a", [[1]], 4, counted=True)
    assert not system.alive
    system.run("a", [[1]], 3, counted=True)
    system.kill()
    assert system.runs == {"a": [{"first": 1, "step": 3, "ids": []}]}
    assert system.notes == [
        "a: its process ended by SIGSEGV with; ran without",
        "b: cannot",
        "a: its process ended by SIGSEGV without",
    ]


def test_compare(flags: list[str], tmp_path: Path) -> None:
    """What [test] installs, on a tiny model. All are to compute the same ids: bfloat16 is far from a tie in so few."""
    out = tmp_path / "out.json"
    command = [
        sys.executable,
        "benchmarks/compare.py",
        *flags,
        "--quick",
        "--repeats",
        "2",
        "--against",
        "meta,transformers",
    ]
    env_folder = ["env", f"TMPDIR={tmp_path}", "OMP_NUM_THREADS=1"]
    result = run([*env_folder, *command, "--json", str(out), "--plot", str(tmp_path / "out.png")])
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    assert [(s["name"], s["kind"], s["notes"]) for s in report["systems"]] == [
        ("ours", "ours", []), ("Meta's way", "peer", []), ("transformers", "peer", [])
    ]  # fmt: skip
    for system in report["systems"]:
        assert {name: len(runs) for name, runs in system["runs"].items()} == dict.fromkeys(report["tasks"], 2)
        for name, runs in system["runs"].items():
            assert runs[0]["ids"] == runs[1]["ids"] == report["systems"][0]["runs"][name][0]["ids"], (
                system["name"],
                name,
            )
    assert len(report["limits"]["read_rate"]) == len(report["limits"]["matmul_rate"]) == 2
    assert report["about"]["shape"]["ffn_width"] == WIDTH
    for words in ("| ours / transformers |", "| Meta's way |", "This machine: memory read at"):
        assert words in result.stdout
    assert result.stdout.count(" 19 of 19 greedy ids are those of ours") == 2
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_compiled_systems_are_those_that_compile() -> None:
    from peers import Setting, ours
    from tasks import QUICK

    def names(device: str) -> list[str]:
        setting = Setting(Path("a"), ModelArgs(), Path("b"), torch.device(device), QUICK)
        return [system.name for system in ours(setting, ["none", "int8"], compiled=True)]

    assert names("cpu") == ["ours", "ours int8", "ours, compiled"]
    assert names("cuda") == ["ours", "ours int8", "ours, compiled", "ours int8, compiled"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"quantize": "none,int3"}, "quantize=int3 is not known"),
        ({"against": ("meta", "vllm")}, "against=vllm is not known"),
        ({"shape": "9B"}, "shape='9B' must be one of 1.1B, 134M, 7B, stories"),
        ({"repeats": 0}, "repeats=0"),
    ],
)
def test_compare_refuses_before_it_works(arguments: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import compare

    monkeypatch.setattr(compare, "load", lambda *_: pytest.fail("it loaded"))
    with pytest.raises(ValueError, match=said):
        compare.main(**arguments)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quality_rounds_as_quantize_does(
    kind: str, tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    from quality import rounded

    plain, model = (
        Llama.build(str(tiny), tokenizer_path, 16, 1, device="cpu", quantize=quantize).model
        for quantize in (None, kind)
    )
    layers = quantized_layers(model)
    assert len(layers) == 2 * 7 + 1
    for name, layer in layers.items():
        weight = rounded(plain.get_parameter(f"{name}.weight"), Quantization(layer.kind), REFINEMENTS)
        torch.testing.assert_close(layer(torch.eye(weight.shape[1])), weight.T, atol=1e-5, rtol=1e-5)


def needs(*modules: str) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}, of the extra [bench]")


def test_gguf_names() -> None:
    from ggufs import gguf_name

    assert gguf_name("tok_embeddings.weight") == "token_embd.weight"
    assert gguf_name("layers.3.attention.wk.weight") == "blk.3.attn_k.weight"
    assert gguf_name("layers.11.ffn_norm.weight") == "blk.11.ffn_norm.weight"


def test_gguf_file(tiny: Path, tmp_path: Path) -> None:
    needs("gguf")
    import gguf
    from ggufs import step_bytes, write_gguf

    path = tmp_path / "tiny.gguf"
    write_gguf(tiny, path, torch.float32)
    reader = gguf.GGUFReader(path)
    weights = torch.load(tiny / "consolidated.00.pth")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(weights) - 1  # without rope.freqs
    read = torch.from_numpy(tensors["blk.1.attn_k.weight"].data.copy())
    assert torch.equal(read, weights["layers.1.attention.wk.weight"])
    assert reader.fields["llama.attention.head_count_kv"].contents() == PARAMS["n_kv_heads"]
    assert reader.fields["llama.feed_forward_length"].contents() == WIDTH
    assert step_bytes(path) == STEP_BYTES


def test_llama_cpp_computes_what_we_do(tiny: Path, tokenizer_path: str, tmp_path: Path) -> None:
    """In float32, several sequences at once: the ids of our own greedy generation."""
    needs("gguf", "llama_cpp")
    import children
    from ggufs import write_gguf

    path = tmp_path / "tiny.gguf"
    write_gguf(tiny, path, torch.float32)
    spec = {
        "system": "llama.cpp", "path": str(path), "device": "cpu", "threads": 1, "max_seq_len": 64, "weights_bytes": 0,
        "extra_buffers": False,
    }  # fmt: skip
    system = children.System("llama.cpp", "peer", "bf16", [spec])
    rows = bench.make_prompts(4, 9, 400)
    try:
        system.start(counted=True)
        system.run("a", rows, 12, counted=True)
        system.run("b", rows[:1], 1, counted=True)
    finally:
        system.kill()
    assert system.notes == []
    llama = Llama.build(str(tiny), tokenizer_path, 64, 4, device="cpu")
    assert system.runs["a"][0]["ids"] == bench.timed_run(llama, rows, 12)[2]
    assert system.runs["b"][0]["step"] is None
