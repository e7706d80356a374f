"""The step of all layers in one operator, in several processes that share the model: its numbers, what all processes
agree on, and how it ends if one is gone."""

from __future__ import annotations

import re
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
from test_cpu_step import COLUMNS, KINDS, ROWS, apart, prompts, read, stepped
from workers import Pool

from llama import Llama
from llama.decoding import cpu_step, engine
from llama.decoding.engine import Engine
from llama.layers import int8, own_kernels, parallel, shared_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux")

# Two key/value heads, which four processes have twice. Without quantization rows that fill no vectors.
SMALL = {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 128, "norm_eps": 1e-5}
SHAPES: dict[Optional[str], dict[str, Any]] = {None: {**SMALL, "dim": 72, "multiple_of": 8}}


@contextmanager
def in_tiles() -> Iterator[None]:
    """See test_cpu_step.py; and nothing is left of failed groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_step, "AMX", False)
        patch.setattr(int8, "onednn_is_exact", lambda: True)
        patch.setattr(int8, "onednn_is_fast", lambda: False)
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
    """The distances from the step op by op, and the logits of the last step; see `stepped`."""
    with in_tiles(), torch.inference_mode():
        far, found = stepped(*engines(folder, tokenizer_path, ranks, quantize=kind, dtype=dtype), 3)
    return [far, found.tolist()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_numbers_are_those_of_the_step_op_by_op(
    ranks: int, kind: Optional[str], dtype: str, tmp_path: Path, tokenizer_path: str, pool: Pool
) -> None:
    """All ranks have the same ones, to the bit, and near to those of one process."""
    params = SHAPES.get(kind, SMALL)
    folder = str(write_checkpoint(tmp_path, random_weights(params), params=params))
    (far, logits), *others = pool.run(numbers, folder, tokenizer_path, ranks, kind, dtype)
    limit = 0.05 if dtype == "bfloat16" or kind in ("w8a8", "w4a8") else 1e-5
    assert all(each < limit for each in far)  # not their maximum, which may leave NaN out
    assert all(other[1] == logits for other in others)
    alone = Llama.build(folder, tokenizer_path, COLUMNS, ROWS, device="cpu", quantize=kind, dtype=dtype, compile=False)
    with torch.inference_mode():
        at = [position + 2 for position in read(alone._engine, prompts(ROWS))]
        alone._engine.decode(torch.arange(7, 7 + ROWS), [position - 2 for position in at])
        alone._engine.decode(torch.arange(12, 12 + ROWS), [position - 1 for position in at])
        expected = alone._engine.decode(torch.arange(17, 17 + ROWS), at)
    assert apart(torch.tensor(logits), expected) < (0.05 if limit > 0.01 or kind == "int8" else 1e-5)


@pytest.mark.parametrize(
    ("source", "line", "number"),
    [
        ("cpu_step.h", "constexpr int64_t MOST_ROWS = (.*);", cpu_step.MOST_ROWS),
        ("shared_memory.cpp", r"struct alignas\((.*)\) Line", shared_memory.LINE),
    ],
)
def test_numbers_that_stand_in_two_languages(source: str, line: str, number: int) -> None:
    text = Path(shared_memory.__file__).with_name(source).read_text()
    assert re.findall(line, text) == [str(number)]


def first_logits(folder: str, tokenizer_path: str) -> list[list[float]]:
    with in_tiles(), torch.inference_mode():
        both = engines(folder, tokenizer_path, 2, dtype="bfloat16")
        return [of.decode(torch.tensor([5]), [0])[0, :3].tolist() for of in both]


def test_sums_are_rounded_as_op_by_op(tmp_path: Path, tokenizer_path: str, pool: Pool) -> None:
    """Each rank's part of a sum, then the sum, then the residual: between 256 and 512 bfloat16 has even numbers only.
    The feed-forward layer gives the first three numbers (256 + 1) + 1, 256, and 256 + 1, and each is added to 1."""
    params = {**SMALL, "dim": 32, "n_layers": 1, "multiple_of": 32}
    weights = {name: torch.zeros_like(w) for name, w in random_weights(params).items()}
    ones = ("tok_embeddings.weight", "norm.weight", "layers.0.attention_norm.weight", "layers.0.ffn_norm.weight")
    for name in ones:
        weights[name].fill_(1)
    weights["output.weight"][:3, :3] = torch.eye(3)
    w1, w2, w3 = (weights[f"layers.0.feed_forward.w{i}.weight"] for i in (1, 2, 3))
    second = len(w1) // 2  # the first one of the second rank
    for place, number in ((0, 256), (1, 1), (second, 1)):
        w1[place, 0], w3[place, 0] = 64, number / 64  # silu(64) is 64
    w2[0, [0, 1, second]] = w2[1, [0]] = w2[2, [0, second]] = 1
    for ours, plain in pool.run(first_logits, str(write_checkpoint(tmp_path, weights, params=params)), tokenizer_path):
        assert ours[0] == ours[1] == ours[2] > 0
        assert ours == plain


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint whose step of 30 rows is worth several threads."""
    params = {**SMALL, "dim": 256}
    return str(write_checkpoint(tmp_path_factory.mktemp("wide"), random_weights(params), params=params))


def threads(folder: str, tokenizer_path: str, dtype: str) -> list[bool]:
    """Whether 30 rows that are verified have the same bits with any number of threads, and are near to those op by
    op."""
    with in_tiles(), torch.inference_mode():
        ours, plain = engines(folder, tokenizer_path, 2, dtype=dtype)
        assert read(ours, prompts(1)) == read(plain, prompts(1)) == [9]
        following = [[*range(20, 50)]]
        one, expected = ours.verify(following, [9]), plain.verify(following, [9])
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            several = ours.verify(following, [9])
        finally:
            torch.set_num_threads(before)
    return [torch.equal(several, one), apart(one, expected) < (0.05 if dtype == "bfloat16" else 1e-5)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_number_of_threads(dtype: str, wide: str, tokenizer_path: str, pool: Pool) -> None:
    assert pool.run(threads, wide, tokenizer_path, dtype) == [[True, True]] * 4


def replace_weights(engine: Engine, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    w2 = engine.model.layers[1].feed_forward.w2
    w2.weight.data = change(w2.weight.data)


def agreed(folder: str, tokenizer_path: str, what: str) -> list[bool]:
    """Whether the step is in one operator while rank 2 differs, whether its numbers are right, and whether it is in one
    operator after that."""
    odd, handle = torch.distributed.get_rank() == 2, None
    with in_tiles(), torch.inference_mode():
        with pytest.MonkeyPatch.context() as patch:
            if odd and what == "no kernels":
                patch.setattr(own_kernels, "loaded", lambda: False)
            ours, plain = (build(folder, tokenizer_path, 4, compile=compile) for compile in (None, False))
            if odd and what == "another layout":
                replace_weights(ours, lambda weight: weight.t().contiguous().t())
            elif odd and what == "other numbers":
                replace_weights(ours, lambda weight: weight * 2)
                replace_weights(plain, lambda weight: weight * 2)
            elif odd and what == "a hook":
                handle = ours.model.norm.register_forward_hook(lambda *_: None)
            ours.refresh()
            while_odd = ours._step_of(1) is not None
            near = apart(ours.decode(torch.tensor([5]), [0]), plain.decode(torch.tensor([5]), [0])) < 1e-5
        if odd and what == "another layout":
            replace_weights(ours, torch.Tensor.contiguous)
        elif handle is not None:
            handle.remove()
        ours.refresh()
        return [while_odd, near, ours._step_of(1) is not None]


@pytest.mark.parametrize(
    ("what", "runs"), [("no kernels", False), ("another layout", False), ("a hook", False), ("other numbers", True)]
)
def test_all_ranks_run_the_same_step(what: str, runs: bool, tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    assert pool.run(agreed, str(tiny), tokenizer_path, what) == [[runs, True, True]] * 4


def apart_from_the_others(folder: str, tokenizer_path: str) -> str:
    """What a process sees if one of two runs the step op by op."""
    with in_tiles(), torch.inference_mode():
        ours = build(folder, tokenizer_path, 2, dtype="bfloat16")
        if torch.distributed.get_rank() % 2:
            ours._few_rows = None
        try:
            ours.decode(torch.tensor([5]), [0])
        except RuntimeError as error:
            return str(error).splitlines()[0]
    return "nothing"


def test_a_rank_that_runs_another_step(tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    """It ends, before numbers of another kind are added."""
    for told in pool.run(apart_from_the_others, str(tiny), tokenizer_path):
        assert "met with different messages" in told or ("rank" in told and "has ended" in told)


def left(folder: str, tokenizer_path: str) -> list[Any]:
    """What a step says whose group shares no memory any more; and whether the next one runs, over gloo."""
    with in_tiles(), torch.inference_mode():
        ours = build(folder, tokenizer_path, 4)
        expected = ours.decode(torch.tensor([5]), [0]).clone()
        parallel._leave_rooms()
        with pytest.raises(RuntimeError) as raised:
            ours.decode(torch.tensor([5]), [0])
        ours.refresh()
        assert ours._step_of(1) is None
        found = ours.decode(torch.tensor([5]), [0])
        return [str(raised.value).splitlines()[0], apart(found, expected) < 1e-5]


def test_a_group_that_shares_memory_no_more(tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    told = [["connection closed by peer: this group has ended", True]] * 4
    assert pool.run(left, str(tiny), tokenizer_path) == told


def no_graph(folder: str, tokenizer_path: str) -> list[bool]:
    """Whether a graph is made with compile=True, for as many rows as the step takes, for one more, and where rank 2 has
    no kernels."""
    outcomes, most = [], cpu_step.MOST_ROWS
    with in_tiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "make_graph", lambda *_: True)
        for rows, kernels in ((most, True), (most + 1, True), (most, torch.distributed.get_rank() != 2)):
            if not kernels:
                patch.setattr(own_kernels, "loaded", lambda: False)
            llama = Llama.build(folder, tokenizer_path, COLUMNS, rows, 4, device="cpu", compile=True, quiet=True)
            outcomes.append(bool(llama._engine.graph))
    return outcomes


def test_no_graph_is_made_where_it_would_not_run(tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    assert pool.run(no_graph, str(tiny), tokenizer_path) == [[False, True, True]] * 4


def generated(folder: str, tokenizer_path: str, ranks: Optional[int], compile: Optional[bool]) -> list[Any]:
    """Whether the step is in one operator, and the ids of prompts, one of which repeats itself and gets drafts."""
    with in_tiles():
        options: dict[str, Any] = {"device": "cpu", "compile": compile, "dtype": "float32", "quiet": True}
        llama = Llama.build(folder, tokenizer_path, COLUMNS, ROWS, ranks, **options)
        llama.tokenizer.eos_id = -1
        ids = llama.generate([*prompts(ROWS - 1), [1, *[7, 8, 9] * 5]], 25, 0)[0]
        return [llama._engine._step_of(1) is not None, ids]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ids_and_drafts(ranks: int, tiny: Path, tokenizer_path: str, pool: Pool) -> None:
    _, ids = generated(str(tiny), tokenizer_path, None, False)
    assert pool.run(generated, str(tiny), tokenizer_path, ranks, None) == [[True, ids]] * 4
    assert pool.run(generated, str(tiny), tokenizer_path, ranks, False) == [[False, ids]] * 4


# What is left of the vocabulary of 400 does not divide by three processes, of two threads each.
SCRIPT = """
import os, signal, sys, time, torch
from llama import Llama, runtime
torch.set_num_threads(2)
*places, compile = sys.argv[1:]
llama = Llama.build(*places, 64, 30, device="cpu", compile={"True": None, "False": False}[compile])
engine = llama._engine
engine.refresh()
assert (engine._step_of(30) is not None) == (compile == "True")
torch.inference_mode().__enter__()
for turn in range(3):
    logits = engine.verify([[*range(20 + turn, 49 + turn)]], [1])
assert logits.shape == (1, 29, 400)
torch.save(logits.clone(), f"{places[0]}/{compile}{os.environ['RANK']}.pt")
if os.environ["RANK"] == "1":
    time.sleep(0.3)  # the other ones sleep by now
    END
engine.verify([[*range(20, 49)]], [1])
"""
THREE = {**SMALL, "dim": 192, "n_heads": 6, "n_kv_heads": 3, "multiple_of": 96}


@pytest.fixture(scope="module")
def for_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("three"), random_weights(THREE), params=THREE)


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "process 0 ends because process 1 was killed or crashed; it saw:"),
        ("sys.exit()", "process 0 ends because process 1 has ended: it returned, or called sys.exit"),
        ("raise ValueError('no more')", "process 0 ends because process 1 failed: ValueError: no more"),
    ],
)
def test_a_rank_that_ends(end: str, words: str, for_three: Path, tokenizer_path: str, forks: Forks) -> None:
    """The others end at once, and say why in the words of test_shared_memory.py; no thread keeps them."""
    told = forks.ranks(SCRIPT.replace("END", end), str(for_three), tokenizer_path, "True", count=3)
    assert told[0].returncode == 1, told[0].stderr
    assert words in told[0].stderr
    assert "RuntimeError: connection closed by peer: rank 1 of the group has ended" in told[0].stderr
    assert told[2].returncode == 1


def test_three_processes_of_two_threads(for_three: Path, tokenizer_path: str, forks: Forks) -> None:
    """The logits of the vocabulary's uneven parts."""
    for compile in (True, False):
        told = forks.ranks(SCRIPT.replace("END", "pass"), str(for_three), tokenizer_path, str(compile), count=3)
        assert [ended.returncode for ended in told] == [0, 0, 0], told[0].stderr
    ours, *others = [torch.load(for_three / f"True{rank}.pt") for rank in range(3)]
    assert all(torch.equal(other, ours) for other in others)
    assert apart(ours, torch.load(for_three / "False0.pt")) < 1e-5
