"""Processes that were given different things, or that leave, fail or stop: each says what is wrong, and none waits for
ever."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pytest
import torch.distributed as dist
from conftest import PARAMS, random_weights, write_checkpoint
from forks import Forks, python
from workers import Pool

from llama import Llama
from llama.layers import agreement
from llama.system import peers
from llama.weights import fingerprint

ODD = 2  # the rank that is given something else


def told(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except ValueError as error:
        return f"ValueError: {error}"


def build_alike_but(usual: dict[str, Any], odd: dict[str, Any]) -> Any:
    options = {**usual, **(odd if dist.get_rank() == ODD else {})}
    return told(lambda: repr(Llama.build(max_batch_size=options.pop("max_batch_size", 1), device="cpu", **options)))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: str) -> dict[str, Path]:
    """Folders that are not the tiny model: of another seed; with one number changed; of another shape; another
    tokenizer."""
    root = tmp_path_factory.mktemp("others")
    changed = random_weights()
    changed["layers.1.attention.wv.weight"][3, 5] += 1
    tokenizer = root / "tokenizer.model"
    tokenizer.write_bytes(Path(tokenizer_path).read_bytes().replace("\u2581the".encode(), "\u2581teh".encode()))
    narrow = {**PARAMS, "dim": 32}
    return {
        "seed": write_checkpoint(root / "seed", random_weights(seed=1)),
        "number": write_checkpoint(root / "number", changed),
        "shape": write_checkpoint(root / "shape", random_weights(narrow), params=narrow),
        "theta": write_checkpoint(root / "theta", random_weights(), params={**PARAMS, "rope_theta": 5e5}),
        "tokenizer": tokenizer,
    }


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"max_seq_len": 64}, "different arguments: max_seq_len is 32 on process 0, but 64 on process 2"),
        ({"max_batch_size": 2}, "max_batch_size is 1 on process 0, but 2 on process 2"),
        ({"seed": 5}, "seed is 1 on process 0, but 5 on process 2"),
        ({"dtype": "bfloat16"}, "dtype is torch.float32 on process 0, but torch.bfloat16 on process 2"),
        ({"quantize": "int8"}, "quantize is None on process 0, but Quantization(kind='int8'"),
        ({"compile": True}, "compile is None on process 0, but True on process 2"),
        ({"model_parallel_size": 1}, "model_parallel_size is 4 on process 0, but 1 on process 2"),
        ({"ckpt_dir": "seed"}, "consolidated.00.pth is '"),
        ({"ckpt_dir": "number"}, "consolidated.00.pth is '"),
        ({"ckpt_dir": "shape"}, "dim is 64 on process 0, but 32 on process 2"),
        ({"ckpt_dir": "theta"}, "rope_theta is 10000.0 on process 0, but 500000.0 on process 2"),
        ({"tokenizer_path": "tokenizer"}, "tokenizer.model is '"),
        ({"max_seq_len": 0}, "max_seq_len=0 must be a whole number of 1 or more, and below 2**31 (on process 2)"),
        ({"seed": "x"}, "seed='x' must be a whole number of 64 bits (on process 2)"),
        ({"ckpt_dir": "/nowhere"}, "no checkpoint folder at /nowhere"),
        ({"model_parallel_size": 3}, "model_parallel_size=3 does not fit 4 processes"),
    ],
)
def test_builds_that_differ(
    odd: dict[str, Any], message: str, tiny: Path, tokenizer_path: str, others: dict[str, Path], pool: Pool
) -> None:
    """What differed died later, answered wrongly (other weights of the same shape), or hung (other groups)."""
    odd = {name: str(others[value]) if value in others else value for name, value in odd.items()}
    usual = {"ckpt_dir": str(tiny), "tokenizer_path": tokenizer_path, "max_seq_len": 32}
    first, *rest = pool.run(build_alike_but, usual, odd)
    assert set(rest) == {first}
    assert message in first
    assert "process 2" in first


def test_fingerprints(tmp_path: Path) -> None:
    """A number anywhere in a small file; at the ends of a large one, in the blocks beside these, and wherever a
    fine-tune changes all."""
    path = tmp_path / "weights"
    ends, block = fingerprint.END_BYTES, fingerprint.BLOCK_BYTES
    small, size = 2 * ends + fingerprint.BLOCKS * block, 4 * 2**20
    places = [*((at, 1) for at in (0, ends - 1, ends, ends + block - 1)), (size // 3, size // 50)]
    places += [(size - at, 1) for at in (ends + block, ends + 1, ends, 1)]
    for length, changed in ((small, [(at, 1) for at in range(0, small, 5000)]), (size, places)):
        seen = set()
        for at, width in [(0, 0), *changed]:
            data = bytearray(length)
            data[at : at + width] = b"\1" * width
            path.write_bytes(data)
            seen.add(fingerprint.fingerprint(path))
        assert len(seen) == 1 + len(changed)
        assert all(re.fullmatch(f"{length} bytes with digest [0-9a-f]{{12}}", text) for text in seen)
    assert fingerprint.fingerprints([path], "the draft model's ") == {
        "the draft model's weights": fingerprint.fingerprint(path)
    }


def call_alike_but(folder: str, tokenizer_path: str, calls: tuple[str, str]) -> Any:
    """calls: methods with their arguments, of the odd rank and of the others."""
    llama = Llama.build(folder, tokenizer_path, 32, 2, device="cpu")
    outcome = told(lambda: eval(calls[dist.get_rank() != ODD], {**globals(), "llama": llama}))
    return outcome, llama.generate([[1, 5, 6]], 3, 0)[0]


def leave_early(llama: Llama) -> list[dict[str, Any]]:
    next(llama.stream_text(["Once upon"], temperature=0, max_gen_len=9))
    return llama.text_completion(["He"], max_gen_len=2, temperature=0)


def call_beside(llama: Llama, leaves: bool) -> list[dict[str, Any]]:
    """A call beside a stream that is open, or was left."""
    stream: Any = llama.stream_text(["Once upon"], temperature=0, max_gen_len=9)
    with closing(stream):
        next(stream)
        if leaves:
            stream.close()
        return llama.text_completion(["He"], max_gen_len=2, temperature=0)


FORMS = "stop=('a',), stop_ids={8: 1, 7: 2}.keys()"
DIFFER = "process 0 calls text_completion (<string>, line 1), but process 2 calls "
COMPLETE = "llama.text_completion(['Once'], max_gen_len=3, temperature=0, {})"


@pytest.mark.parametrize(
    ("odd", "usual", "message"),
    [
        (COMPLETE.format("logit_bias={5: 1.0, 6: 2.0}"), COMPLETE.format("logit_bias={6: 2, 5: 1}"), None),
        (COMPLETE.format("stop=['a', 'b']"), COMPLETE.format("stop=('b', 'a')"), None),
        (COMPLETE.format("stop='a', stop_ids=[7, 8]"), COMPLETE.format(FORMS), None),
        (COMPLETE.format("top_k=2"), COMPLETE.format(""), "top_k is 0 on process 0, but 2 on process 2;"),
        (COMPLETE.format("stop='a'"), COMPLETE.format("stop='b'"), ("stop is ['b'] on process 0, but ['a'] on process "
                                                                   "2;")),
        (COMPLETE, COMPLETE.replace("Once", "One"), "prompts is [[1,"),
        ("llama.embed(['Once'])", COMPLETE.format(""), DIFFER + "embed ("),
        ("llama.score(['Once'])", COMPLETE.format(""), DIFFER + "score ("),
        (
            "leave_early(llama)", "[*llama.stream_text(['Once upon'], temperature=0, max_gen_len=9)]",
            ("process 0 goes on with a stream (<string>, line 1), but process 2 calls text_completion (test_peers.py, "
            "line "),
        ),
        ("call_beside(llama, True)", "call_beside(llama, False)", "streams under way is [[1, "),
    ],
)  # fmt: skip
def test_calls_that_differ(
    odd: str, usual: str, message: Optional[str], tiny: Path, tokenizer_path: str, pool: Pool
) -> None:
    """They hung, or ended in an abort of gloo where one had left a stream; and the error did not say what differs. The
    same options in another form are no difference. A call after it works."""
    calls = odd.replace(", {})", ")"), usual.replace(", {})", ")")
    outcomes = pool.run(call_alike_but, str(tiny), tokenizer_path, calls)
    first = outcomes[0][0]
    assert [ids for _, ids in outcomes] == [outcomes[0][1]] * 4
    if message is None:
        assert [outcome for outcome, _ in outcomes] == [first] * 4
        assert first[0]["generation"] is not None
    else:
        assert {outcome for outcome, _ in outcomes} == {first}
        assert message in first


@pytest.mark.parametrize(
    ("same", "rest", "shown"),
    [
        (0, 60, "{}" + "." * 59),  # as long as is shown
        (24, 36, "=" * 24 + "{}" + "." * 35),
        (25, 35, "=" * 25 + "{}" + "." * 34),
        (24, 37, "=" * 24 + "{}" + "." * 34 + "…"),
        (25, 36, "…" + "=" * 12 + "{}" + "." * 35),
        (25, 60, "…" + "=" * 12 + "{}" + "." * 46 + "…"),
    ],
)
def test_what_is_shown_of_values_that_differ(same: int, rest: int, shown: str) -> None:
    """What is around the difference, of long ones."""
    first, other = ({"a": "=" * same + mark + "." * (rest - 1), "b": "1"} for mark in "12")
    assert agreement._difference({0: (first, "calls f (x)"), 3: (other, "calls f (y)")}) == (
        f"the 2 processes were given different arguments: a is {shown.format(1)} on process 0, but {shown.format(2)} "
        "on process 3; give all of them the same"
    )


@pytest.mark.parametrize(("count", "more"), [(4, ""), (5, ", and 1 more difference"), (6, ", and 2 more differences")])
def test_four_differences_are_shown(count: int, more: str) -> None:
    values = [{str(i): mark for i in range(count)} for mark in "xyx"]
    told = agreement._difference({rank: (given, "calls f (x)") for rank, given in enumerate(values)})
    shown = "; ".join(f"{i} is x on process 0, but y on process 1" for i in range(4))
    assert told == f"the 3 processes were given different arguments: {shown}{more}; give all of them the same"


@pytest.mark.parametrize("odd", [({"a": "1", "b": "2"}, "calls f (x"), ({"a": "2"}, "calls g (x")])
def test_which_calls_differ(odd: tuple[dict[str, str], str]) -> None:
    """By their names or those of their arguments, and not by their lines."""
    told = agreement._difference({0: ({"a": "1"}, "calls f (x"), 1: ({"a": "1"}, "calls f (y"), 2: odd})
    assert told == (
        f"process 0 calls f (x, but process 2 {odd[1]}; all processes must make the same calls, and leave a stream at "
        "the same step"
    )


START = """
import os, signal, sys, threading, time
import torch.distributed as dist
from llama import Llama
from llama.system import peers
peers.BEAT, peers.GRACE, peers.PATIENCE = .2, .1, 1.5
rank = int(os.environ["RANK"])
"""
BUILD = START + 'llama = Llama.build(sys.argv[1], sys.argv[2], 64, 2, device="cpu")\n'
GO_ON = "\nllama.generate([[1, 5]], 8, 0)\n"


@pytest.mark.parametrize(
    ("what_1_does", "what_1_says", "why_0_ends"),
    [
        (
            "raise RuntimeError('Connection reset by peer (my own http client)')",
            "RuntimeError: Connection reset by peer (my own http client)",
            "process 1 failed: RuntimeError: Connection reset by peer (my own http client)",
        ),
        (
            "raise KeyboardInterrupt",
            "process 1 was interrupted in script.py, line",
            "process 1 failed: KeyboardInterrupt",
        ),
        ("sys.exit('no more')", "no more", "process 1 has ended: it returned, or called sys.exit or runtime.shutdown"),
        ("sys.exit(0)", "", "process 1 has ended: it returned, or called sys.exit or runtime.shutdown"),
        ("os._exit(7)", "", "process 1 was killed or crashed"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "", "process 1 was killed or crashed"),
    ],
)
def test_who_ends_is_named(
    what_1_does: str, what_1_says: str, why_0_ends: str, tiny: Path, tokenizer_path: str, forks: Forks
) -> None:
    """A user's own error was hidden if it spoke of a connection, and its peers blamed a failure whatever had
    happened."""
    script = BUILD + f"if rank == 1: {what_1_does}" + GO_ON
    first, second = forks.ranks(script, str(tiny), tokenizer_path, seconds=30)
    assert first.returncode == 1
    lines = first.stderr.splitlines()
    assert lines[0] == f"process 0 ends because {why_0_ends}; it saw:"
    assert "RuntimeError: " in lines[1]
    assert len(lines) == 2
    assert what_1_says in second.stderr
    assert bool(second.stderr) == bool(what_1_says)


class Notes(dict[str, str]):
    """A store of torch's that is in this process."""

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    set, get = dict.__setitem__, dict.__getitem__


def test_the_lowest_that_lives_speaks_of_the_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once of each: of one that has not come, of one that gives no signs any more, and not of one that has told its
    end."""
    lines, now = [], [0.0]
    monkeypatch.setattr(peers, "tell", lines.append)
    monkeypatch.setattr(peers, "time", SimpleNamespace(monotonic=lambda: now[0]))
    watches: list[Any] = [peers.Watch(rank, 4, store=Notes()) for rank in range(4)]
    for watch in watches:
        watch.store = watches[0].store

    def spoken(seconds: float, *alive: int) -> list[str]:
        """What is said while these processes live."""
        lines.clear()
        for _ in range(int(seconds)):
            now[0] += 1
            for rank in alive:
                watches[rank].sign.beat += 1
                watches[rank]._write()
            for rank in alive:
                watches[rank]._speak_of_silent()
        return lines.copy()

    watches[1].sign.at = "my.py, line 3"
    late = "process 0 waits for process 3, which has not come to Llama.build for 30 s"
    assert spoken(peers.COMING, 0, 1, 2) == []
    assert spoken(10, 0, 1, 2) == [late]
    watches[2].sign.end = peers.ENDED
    cut = "which has given no sign of life for 5 s: it is stopped or cut off"
    assert spoken(1, 0, 1, 2) == []
    assert spoken(10, 0) == [f"process 0 waits for process 1, {cut}, in my.py, line 3"]
    assert spoken(10, 0, 1) == []
    assert spoken(10, 1) == [f"process 1 waits for process 0, {cut}"]
    waiting: Any = peers.Watch(0, 2, store=Notes(), late_in="a 1")  # which has said that it waits for all
    watches[:] = [waiting]
    assert spoken(2 * peers.COMING, 0) == []


def test_the_ends_of_others_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until all have told theirs, or for a while."""
    now, store = [0.0], Notes({"0": json.dumps({"end": "failed: x"}), "1": "{}", "2": "{}"})

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if now[0] > 2:
            store["3"] = json.dumps({"end": peers.ENDED})

    monkeypatch.setattr(peers, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    waiting: Any = peers.Watch(1, 4, store=store)  # type: ignore[arg-type]
    waiting.wait_for_ends()
    assert peers.PATIENCE <= now[0] < peers.PATIENCE + 0.1
    now[0], store["2"] = 1.0, json.dumps({"end": peers.LOST})
    del store["3"]
    waiting.seen.clear()
    waiting.wait_for_ends()
    assert 2 < now[0] < 2.1
    waiting.store = Gone()
    waiting._look_for_launcher = lambda: Gone().set()
    waiting.wait_for_ends()
    assert 2 < now[0] < 2.1


@pytest.mark.parametrize(
    ("rank", "size", "launcher", "lingers"),
    [(0, 2, None, True), (0, 1, None, False), (1, 2, None, False), (0, 2, 7, False)],
)
def test_who_lingers(
    rank: int, size: int, launcher: Optional[int], lingers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that keeps the store, if anybody reads there."""
    slept: list[float] = []
    monkeypatch.setattr(peers, "time", SimpleNamespace(sleep=slept.append))
    peers.Watch(rank, size, launcher).linger()
    assert slept == [2 * peers.BEAT] * lingers


class Gone(Notes):
    """One whose process has ended."""

    def set(self, *_: str) -> None:
        raise RuntimeError("no such store")


@pytest.mark.parametrize(
    ("how_0_ends", "launcher", "kind", "is_left"),
    [
        ("", None, Notes, False),
        (peers.ENDED, None, Notes, False),
        (peers.LOST, None, Notes, False),
        ("failed: x", None, Notes, True),
        ("failed: x", os.getppid(), Notes, False),
        ("", None, Gone, True),
    ],
)
def test_a_store_that_ends_with_process_0_is_left(
    how_0_ends: str, launcher: Optional[int], kind: type[Notes], is_left: bool
) -> None:
    """torchrun keeps its own."""
    store: Any = kind({"0": json.dumps({"end": how_0_ends})})
    watch = peers.Watch(1, 2, launcher=launcher, store=store)
    rounds = iter([False, True])
    watch.stopped = SimpleNamespace(wait=lambda _: next(rounds))  # type: ignore[assignment]
    watch._run()
    assert (watch.store is None) == is_left
    assert watch.sign.beat == 1
    assert ("1" in store) == (kind is Notes)


@pytest.mark.parametrize(
    ("script", "line"),
    [
        (
            BUILD + "peers.SILENT = .6\n"
            "tell = peers.tell\n"
            "def tell_and_wake(line): tell(line); os.kill(other, signal.SIGCONT)\n"
            "peers.tell = tell_and_wake\n"
            "pids = [None, None]; dist.all_gather_object(pids, os.getpid()); other = pids[1 - rank]\n"
            "time.sleep(.2)\n"
            "if rank == 1: os.kill(os.getpid(), signal.SIGSTOP)" + GO_ON,
            (
                "process 0 waits for process 1, which has given no sign of life for 0.6 s: it is stopped or cut off, "
                "in "
                "script.py"
            ),
        ),
        (
            BUILD + "peers.LATE = .5\nif rank == 1: time.sleep(1.2)" + GO_ON,
            "process 0 has waited 0.5 s in generate (script.py, line 11) for process 1, which is in script.py, line 10",
        ),
        (
            START + "peers.COMING = .6\nif rank == 1: time.sleep(1.6)\n" + BUILD.removeprefix(START) + GO_ON,
            "process 0 of 2 has waited 0.6 s for the others to come to Llama.build (127.0.0.1:",
        ),
    ],
    ids=["stopped", "late", "coming"],
)
def test_who_is_waited_for_is_named(script: str, line: str, tiny: Path, tokenizer_path: str, forks: Forks) -> None:
    """A stopped process, or one that is busy elsewhere, let the others wait in silence. All go on when it comes."""
    first, second = forks.ranks(script, str(tiny), tokenizer_path, seconds=30)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert len(first.stderr.splitlines()) == 1
    assert first.stderr.startswith(line)
    assert second.stderr == ""


def test_a_process_ends_with_its_launcher(tiny: Path, tokenizer_path: str, forks: Forks) -> None:
    """Where torchrun's agent was killed, what it had started computed for ever."""
    script = (
        BUILD.replace("rank =", "os.environ['TORCHELASTIC_RUN_ID'] = 'none'; rank =")
        + "print('built', flush=True); time.sleep(60)"
    )
    launcher = f"""
import os, signal, time
reading, writing = os.pipe()
if os.fork():
    os.close(writing)
    print("all", os.read(reading, 1))  # the end of the pipe: no process has it open any more
else:
    if os.fork():
        while "built" not in open("/proc/self/fd/1").read(): time.sleep(.01)
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        exec({script!r})
"""
    ended = forks.ranks(launcher, str(tiny), tokenizer_path, count=1, seconds=30)[0]
    assert ended.returncode == 0
    assert ended.stderr == "process 0 ends because torchrun, which started it, is gone\n"
    assert ended.stdout.endswith("all b''\n")


def test_groups_of_the_callers_own(tiny: Path, tokenizer_path: str, forks: Forks) -> None:
    """Two processes of a launcher, each a group of its own; then one group that the caller made, with builds that
    differ."""
    script = START + (
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "print(Llama.build(sys.argv[1], sys.argv[2], 8, 1, device='cpu').generate([[1, 5]], 2, 0)[0])\n"
        "dist.destroy_process_group()\ndist.init_process_group('gloo')\n"
        "Llama.build(sys.argv[1], sys.argv[2], 8 + rank, 1, device='cpu')"
    )
    first, second = forks.ranks(script, str(tiny), tokenizer_path, seconds=30)
    assert first.stdout.splitlines()[1:] == second.stdout.splitlines()[1:]
    assert first.stderr.splitlines()[-1].endswith(
        "max_seq_len is 8 on process 0, but 9 on process 1; give all of them the same"
    )
    assert second.stderr == ""


def test_a_port_that_is_taken(forks: Forks) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        script = "from llama import Llama\nLlama.build()"
        ended = forks.ranks(script, count=1, env={"MASTER_PORT": str(port)}, seconds=30)[0]
    assert (
        f"ValueError: process 0 cannot meet the others at MASTER_ADDR:MASTER_PORT = 127.0.0.1:{port}"
        in ended.stderr.splitlines()[-1]
    )


def shell_cases() -> list[tuple[list[str], dict[str, Any]]]:
    model = ["--ckpt_dir", "TINY", "--tokenizer_path", "TOKENIZER"]
    commands = [
        ["example_text_completion.py", *model, "--max_seq_len", "256", "--max_gen_len", "2"],
        ["-m", "llama", "complete", "Once upon", *model, "--max_gen_len", "20"],
        ["-m", "llama", "chat", *model],
        ["-m", "llama", "tokenize", "Once", "--tokenizer_path", "TOKENIZER"],
        ["-m", "llama", "info", "TINY", "--tokenizer_path", "TOKENIZER"],
    ]
    return [(command, how) for command in commands for how in ({"reader": False}, {"closed": [0, 1]}, {"closed": [2]})]


@pytest.mark.parametrize(("command", "how"), shell_cases())
def test_streams_as_the_shell_leaves_them(
    command: list[str], how: dict[str, Any], tiny: Path, tokenizer_path: str, forks: Forks
) -> None:
    """`| head`, `<&-`, `>&-` and `2>&-` ended in tracebacks, and what was meant for a closed stderr went to stdout."""
    arguments = [{"TINY": str(tiny), "TOKENIZER": tokenizer_path}.get(word, word) for word in command]
    ended = forks.run(python(*arguments), **how, seconds=30)
    assert "Error" not in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.returncode == 0
    if how == {"closed": [2]} and "llama" in command:
        assert "Loaded" not in ended.stdout


@pytest.mark.parametrize("program", ["example", "complete", "script"])
def test_nobody_reads_what_several_processes_write(program: str, tiny: Path, tokenizer_path: str, forks: Forks) -> None:
    """`torchrun … | head`: all end, and none speaks of a failure."""
    model = ["--ckpt_dir", str(tiny), "--tokenizer_path", tokenizer_path]
    script = {
        "example": python("example_text_completion.py", *model, "--max_seq_len", "256", "--max_gen_len", "2"),
        "complete": python("-m", "llama", "complete", "Once upon", *model, "--max_gen_len", "20"),
        "script": BUILD + "print('words', flush=True)" + GO_ON,
    }[program]
    ended = forks.ranks(script, str(tiny), tokenizer_path, reader=False, seconds=30)
    for process in ended:
        assert process.returncode == 0
        assert [line for line in process.stderr.splitlines() if not line.startswith("Loaded")] == []
