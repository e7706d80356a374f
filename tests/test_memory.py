"""What a model needs, what is free, and what is said where it does not fit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from conftest import PARAMS, ROOT
from emulated_cuda import emulated
from helpers import command, environment
from workers import Pool

from llama import Llama, ModelArgs, Transformer, memory
from llama.layers.rounding import Quantization
from llama.memory import Placement

GB = 10**9
SEVENTY = ModelArgs(8192, 80, 64, 8, 32000, 4096, 1.3, max_batch_size=4, max_seq_len=4096)


def held(params: dict[str, object], processes: int) -> tuple[int, int]:
    """Bytes of weights and of cache that this rank really has."""
    from fairscale.nn.model_parallel import initialize as mpu

    from llama import runtime

    if mpu.model_parallel_is_initialized():
        runtime.start("cpu", processes)
    model = Transformer(ModelArgs(**params))  # type: ignore[arg-type]
    cache = sum(buffer.nbytes for buffer in model.buffers())
    return sum(p.nbytes for p in model.parameters()), cache


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("change", [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1, "head_dim": 24}, {"ffn_dim": 200}])
def test_the_estimate_is_what_a_model_has(change: dict[str, int], processes: int, pool: Pool) -> None:
    params = {**PARAMS, "vocab_size": 400, "max_batch_size": 3, "max_seq_len": 32, **change}
    need = memory.estimate(Placement(ModelArgs(**params), torch.float32, processes))
    for weights, cache in pool.run(held, params, processes):
        assert (need.weights, need.cache) == (weights, cache)


def test_the_estimate_of_metas_models() -> None:
    """13.5 GB of bfloat16, and half a MiB of cache for each token; 70B on 16 processes has two copies of each kv
    head."""
    seven = memory.estimate(Placement(ModelArgs(vocab_size=32000, max_batch_size=1, max_seq_len=2048), torch.bfloat16))
    assert seven.weights == 2 * 6_738_415_616
    assert seven.cache == 2**30
    eight, sixteen = (memory.estimate(Placement(SEVENTY, torch.bfloat16, n)) for n in (8, 16))
    assert sixteen.cache == eight.cache
    assert eight.weights / 2 < sixteen.weights < 0.52 * eight.weights


PREFILL = """
import sys, torch
from llama import ModelArgs, Transformer, memory
args = ModelArgs(512, 1, 8, 2, 64, 32, max_batch_size=4, max_seq_len=4096)
model = Transformer(args).to(getattr(torch, sys.argv[1])).requires_grad_(False)
def kb(key): return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1])
with torch.inference_mode():
    model.hidden_states(torch.zeros(1, 8, dtype=torch.long), 0)
    model.layers[0].attention.cache_k.fill_(1), model.layers[0].attention.cache_v.fill_(1)
    before = kb("VmRSS")
    model.hidden_states(torch.zeros(4, 4096, dtype=torch.long), 0)
need = memory.estimate(memory.Placement(args, getattr(torch, sys.argv[1])))
print((kb("VmHWM") - before) * 1024, need.temporary)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_temporary_is_what_a_prefill_takes(dtype: str) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc/self/status")
    words = [sys.executable, "-c", PREFILL, dtype]
    result = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    taken, estimated = map(int, result.stdout.split())
    assert 0.6 * taken < estimated < 1.7 * taken


@pytest.mark.parametrize(
    ("dtype", "processes", "each"),
    [(torch.bfloat16, 1, 2 * 48 + 96), (torch.float32, 1, 4 * (32 + 60)), (torch.bfloat16, 2, 2 * (24 + 8 + 8) + 48)],
)
def test_the_temporary_by_hand(dtype: torch.dtype, processes: int, each: int) -> None:
    """Of one token: the stream, its norm and a sum (3 x 8), q and the result (2 x 8), k and v (2 x 4), and q in
    float32, turned (3 x 8); or, where that is more, four streams and three times the feed-forward's width."""
    args = ModelArgs(8, 1, 2, 1, 400, max_batch_size=2, max_seq_len=3, ffn_dim=20)
    assert memory.estimate(Placement(args, dtype, processes)).temporary == 2 * 3 * each


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_free_host_memory(tmp_path: Path) -> None:
    assert memory._free_host_bytes(tmp_path) is None
    meminfo = {"proc/meminfo": "MemTotal: 32000000 kB\nMemFree: 1000000 kB\nMemAvailable:   20000000 kB\n"}
    assert memory._free_host_bytes(write(tmp_path / "plain", meminfo)) == 20_480_000_000
    two = {
        **meminfo,
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/memory.max": f"{9 * GB}\n",
        "sys/fs/cgroup/a/memory.current": f"{8 * GB}\n",
        "sys/fs/cgroup/a/memory.stat": f"anon 1\ninactive_file {2 * GB}\nactive_file {GB}\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/memory.current": "1\n",
        "sys/fs/cgroup/a/b/memory.stat": "anon 1\n",
    }
    assert memory._free_host_bytes(write(tmp_path / "two", two)) == 4 * GB
    one = {
        **meminfo,
        "proc/self/cgroup": "5:cpu:/x\n4:memory:/not/seen/from/inside\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{5 * GB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GB}\n",
        "sys/fs/cgroup/memory/memory.stat": f"cache 9\ntotal_inactive_file {GB}\ntotal_active_file 0\n",
    }
    assert memory._free_host_bytes(write(tmp_path / "one", one)) == 3 * GB
    over = {**two, "sys/fs/cgroup/a/memory.max": "9\n"}
    assert memory._free_host_bytes(write(tmp_path / "over", over)) == 0
    here = memory.free_bytes(torch.device("cpu"))
    assert here is None or here > 0


def test_free_memory_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 9 * GB)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2 * GB)
    assert memory.free_bytes(torch.device("mps")) == 7 * GB


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def advice(free: float, *placement: Any) -> str:
    return memory.way_out(Placement(*placement), int(free))


def test_what_would_make_it_fit() -> None:
    """Each single change that is named fits, and the next larger does not."""
    seven = ModelArgs(vocab_size=32000, max_batch_size=32, max_seq_len=4096)
    assert advice(24e9, seven, torch.bfloat16, 1, GPU) == (
        "max_batch_size=4 or max_seq_len=610 or 4 processes, 1 on each GPU would fit"
    )
    small = ModelArgs(vocab_size=32000, max_batch_size=1, max_seq_len=2048)
    assert advice(16e9, small, torch.float32) == (
        "dtype='bfloat16' or 2 processes, 1 on each machine or quantize='int8' would fit"
    )
    assert advice(4e9, small, torch.bfloat16, 1, torch.device("mps")) == "no single change would make it fit here"
    assert "16 processes, 2 on each machine" in advice(24e9, SEVENTY, torch.bfloat16, 2, CPU, 2)


def test_int4_is_named_only_where_loading_takes_it() -> None:
    """16 processes could cut wo's rows of 4096 into whole groups, but not w2's of 11008."""
    int4, int8 = Quantization("int4"), Quantization("int8")
    seven = ModelArgs(4096, 32, 32, 32, 32000, 256, max_batch_size=1, max_seq_len=64)
    assert (seven.ffn_width, int4.shares(4096, 16), int4.shares(11008, 16)) == (11008, True, False)

    def placed(n: int, quantization: Optional[Quantization]) -> tuple[Any, ...]:
        return seven, torch.bfloat16, n, CPU, 1, quantization

    eight, sixteen = (memory.estimate(Placement(*placed(n, int4))).resident for n in (8, 16))
    assert "8 processes, 1 on each" in advice(eight, *placed(1, int4))
    assert "processes" not in advice(sixteen, *placed(1, int4))
    room = memory.estimate(Placement(*placed(16, int8))).resident
    assert "16 processes, 1 on each" in advice(room, *placed(1, int8))
    assert "quantize" not in advice(sixteen, *placed(16, None))
    assert "quantize='int4'" in advice(eight, *placed(8, None))


def test_the_largest_that_fits() -> None:
    """Of every size, from none to all."""
    for most in range(6):
        placement = Placement(replace(SEVENTY, max_batch_size=most + 1), torch.bfloat16)
        for fitting in range(most + 1):
            found = memory._largest_that_fits(
                "max_batch_size", placement, lambda p, n=fitting: p.args.max_batch_size <= n
            )  # type: ignore[misc]
            assert found == [f"max_batch_size={fitting}"] * (fitting > 0)


@pytest.mark.parametrize(
    ("nbytes", "told"),
    [(0, "0.0 KB"), (99_999, "100.0 KB"), (100_000, "0.1 MB"), (99_999_999, "100.0 MB"), (1e8, "0.1 GB")],
)
def test_gigabytes(nbytes: float, told: str) -> None:
    assert memory.gigabytes(nbytes) == told


def test_a_cache_that_does_not_fit_is_refused(tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to end in exit -9, without a word."""
    began = Llama.build(str(tiny), tokenizer_path, 16, 1, device="cpu")
    with pytest.raises(
        ValueError, match=r"not enough memory: .* 51200.0 GB of cache and .* but this machine has .* too little"
    ):
        Llama.build(str(tiny), tokenizer_path, 10**8, 1000, device="cpu")
    need = memory.estimate(Placement(began.model.params, torch.float32)).resident
    monkeypatch.setattr(memory, "free_bytes", lambda device: need)
    Llama.build(str(tiny), tokenizer_path, 16, 1, device="cpu")
    monkeypatch.setattr(memory, "free_bytes", lambda device: need - 1)
    with pytest.raises(
        ValueError,
        match=r"max_seq_len=15 or dtype='bfloat16' or 2 processes, 1 on each machine or quantize='int8' would",
    ):
        Llama.build(str(tiny), tokenizer_path, 16, 1, device="cpu")
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)  # a system that does not tell
    Llama.build(str(tiny), tokenizer_path, 16, 1, device="cpu")


def share_a_machine(folder: str, tokenizer_path: str) -> None:
    args = ModelArgs(**PARAMS, vocab_size=400, max_batch_size=1, max_seq_len=16)
    need = memory.estimate(Placement(args, torch.float32, 4)).resident
    free_bytes = memory.free_bytes
    memory.free_bytes = lambda device: 4 * need - 1
    try:
        Llama.build(folder, tokenizer_path, 16, 1, 4, device="cpu")
    finally:
        memory.free_bytes = free_bytes


def test_processes_of_one_machine_share_its_memory(tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    for _, error in pool.try_run(share_a_machine, str(tiny), tokenizer_path):
        assert "for each of 4 processes, but this machine has" in error


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried\nlines"), RuntimeError("x: can't allocate memory: you tried")],
)
def test_running_out_later_is_explained(
    error: RuntimeError, tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = Llama.build(str(tiny), tokenizer_path, 16, 4, device="cpu")

    def fail(*_: object, **__: object) -> torch.Tensor:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(llama.model, "hidden_states", fail)
        patch.setattr(memory, "free_bytes", lambda device: 0)
        with pytest.raises(
            type(error), match="cpu is out of memory: .* of cache and .* dtype='bfloat16' or .* fit"
        ) as caught:
            llama.generate([[1]], 2)
    assert caught.value.__cause__ is error
    assert llama.generate([[1]], 2)
    with pytest.raises(RuntimeError, match="^something else$"), memory.explained(Placement(SEVENTY, torch.float32)):
        raise RuntimeError("something else")


def test_a_second_build_is_not_refused_for_the_first_ones_memory(tiny: Path, tokenizer_path: str) -> None:
    """torch keeps what a deleted model had, and the next model takes it from there. CUDA calls it used."""
    args = ModelArgs(**PARAMS, vocab_size=400, max_batch_size=1, max_seq_len=16)
    need = memory.estimate(Placement(args, torch.float32, device=GPU))
    tensors = need.weights + need.cache
    with emulated(total=need.overhead + tensors * 3 // 2) as machine:
        llama = Llama.build(str(tiny), tokenizer_path, 16, 1, device="emulated")
        assert machine.devices[0].allocated >= tensors
        with pytest.raises(ValueError, match="not enough memory"):
            Llama.build(str(tiny), tokenizer_path, 16, 1, device="emulated")
        del llama
        assert memory.free_bytes(torch.device("emulated")) == machine.total
        Llama.build(str(tiny), tokenizer_path, 16, 1, device="emulated")


def test_what_a_gpu_takes_besides() -> None:
    """Workspaces and code on every GPU, logits of recorded steps by their rows, NCCL's buffers with several
    processes."""
    one, two = (memory.estimate(Placement(SEVENTY, torch.bfloat16, n, GPU)) for n in (1, 2))
    on_cpu = memory.estimate(Placement(SEVENTY, torch.bfloat16))
    assert 0.2 * GB < one.overhead < 0.4 * GB
    assert two.overhead - one.overhead == memory.NCCL_BYTES
    assert one.resident == one.weights + one.cache + one.overhead
    wide = memory.estimate(Placement(replace(SEVENTY, max_batch_size=64), torch.bfloat16, device=GPU))
    assert wide.overhead - one.overhead == 60 * 32000 * 4 * memory.GRAPH_LOGITS
    assert str(one).endswith("of cache and 0.3 GB for CUDA's libraries and recorded steps")
    assert "CUDA" not in str(on_cpu)


def test_what_a_cpus_process_takes_besides() -> None:
    """Code and buffers once, also with a draft model; a copy of the largest matrix, which oneDNN rearranges to multiply
    many rows, or two float32 results of the tokens that int8 layers multiply at a time. All of that was missing."""
    one, two = (Placement(SEVENTY, torch.bfloat16, n) for n in (1, 2))
    matrix = 2 * 8192 * 2 * SEVENTY.ffn_width
    assert memory.estimate(one).overhead == memory.CODE_BYTES + matrix
    assert memory.estimate(two).overhead == memory.CODE_BYTES + matrix // 2
    assert memory.estimate(replace(one, draft=one)).overhead == memory.CODE_BYTES + matrix
    rounded = memory.estimate(replace(one, quantization=Quantization("int8")))
    assert rounded.overhead == memory.CODE_BYTES
    results = 2 * 4 * memory.INT8_ROWS * 2 * SEVENTY.ffn_width
    assert rounded.temporary == memory.estimate(one).temporary + results
    assert memory.estimate(Placement(SEVENTY, torch.bfloat16, device=torch.device("mps"))).overhead == 0


def test_info_counts_each_process_itself(
    tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process of `info` ends, so only the others' imports are missing from what is free."""
    args = ModelArgs(**PARAMS, vocab_size=400, max_batch_size=4, max_seq_len=64)
    need, own = memory.estimate(Placement(args, torch.float32, 2)), 240 * 10**6
    monkeypatch.setattr(memory, "own_bytes", lambda: own)
    for missing, told in ((0, "it fits"), (1, "it does not fit")):
        free = 2 * need.resident + own - missing
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        command("info", str(tiny), tokenizer_path=tokenizer_path, processes=2, max_seq_len=64, device="cpu")
        shown = capsys.readouterr().out
        assert told in shown
        total = round((own + need.resident + need.temporary) / 1e6)
        assert f"while prompts are read; with 240 MB for Python and torch, {total} MB in all" in shown
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    command("info", str(tiny), tokenizer_path=tokenizer_path, max_seq_len=64, device="cpu")
    assert "cpu does not tell" in capsys.readouterr().out
    if Path("/proc/self/statm").exists():
        monkeypatch.undo()
        assert 50e6 < memory.own_bytes() < 50e9


def test_what_does_not_fit_a_gpu(tiny: Path, tokenizer_path: str) -> None:
    with (
        emulated(total=10**8),
        pytest.raises(ValueError, match="for CUDA's libraries .*, but emulated:0 has 0.1 GB free"),
    ):
        Llama.build(str(tiny), tokenizer_path, 16, 1, device="emulated")
