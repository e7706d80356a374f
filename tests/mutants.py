"""Mutated code: which single changes of llama/ does no test notice? Each survivor shows a missing test, or code that
does nothing.

    python tests/mutants.py --mutants 150 --seed 1
    python tests/mutants.py --runs /tmp/runs --mutants 12 drafting rounding sampling

Without names, of all files. Copies of the checkout are changed, not the checkout: one for each process. First every
test runs once, on code whose statements say that they ran. Then, on each mutant, the tests run that ran the changed
statement: of each function of a test the quickest case first, until one fails, which notices it, as does whatever takes
long. --runs keeps what the tests ran in a file, and asks again only test files that have changed. The mutants come in
the order of the draw, so that the first n are a draw too. The numbers in SPEED are left as they are.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import inspect
import json
import mmap
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple, Optional

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = os.environ.get("LLAMA_SHARED", str(ROOT.parent / "shared"))
OPTIONS = ["-q", "-n0", "-p", "no:cacheprovider"]
BROKEN = 70  # how a process of ours ends that could not run any test
SECONDS = 60  # of a mutant's tests, as they took unchanged: those after it are left out
# Sizes of what is read, multiplied or measured at a time; what was measured of others' memory; and limits far above
# what real files and calls need. Another value makes it slower or less certain, but changes no result.
SPEED = {
    "BLOCKS", "BLOCK_BYTES", "BLOCK_ROWS", "CHUNK", "CODE_BYTES", "COPIED", "COPY_BYTES", "END_BYTES", "FORCED",
    "JSON_BYTES", "KEPT", "KERNEL_BYTES", "LATE", "LEAST_COLUMNS", "LOGITS_BYTES", "LONGEST_REST", "MANY_QUERIES",
    "MODEL_BYTES", "MOST", "MOST_BYTES", "MOST_CHARACTERS", "MOST_IDS", "MOST_LINE", "MOST_MEMORY", "MOST_STACK",
    "NCCL_BYTES", "ONE", "ON_GPU", "PASS", "PERIOD", "PIECE", "PIECE_NUMBERS", "PLAIN", "PROGRAMS", "READ_BYTES",
    "REPEATS", "RETRY", "SAMPLED", "SEVERAL", "SHORTEST_REST", "SIDE", "STAGED_BYTES", "SUM_BYTES", "TOKENS",
    "TRIES", "UNPACKED", "WARPS", "WIDENED", "WORKSPACE_BYTES", "WORTH",
}  # fmt: skip
OTHER: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub,
    ast.Sub: ast.Add,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "all": "any", "any": "all"}
UNSEEN = ("annotation", "returns", "decorator_list")  # fields that change no result
SILENT = ast.JoinedStr, ast.Raise  # what words say
DEFS = ast.FunctionDef, ast.AsyncFunctionDef
Change = tuple[ast.AST, ast.AST, Callable[[], None]]  # a node, what is to stand in its place, and what puts it there


class Run(NamedTuple):
    """A test, before anything is changed."""

    test: str  # pytest's name of it
    seconds: float
    statements: dict[str, list[int]]  # of each file of llama/, those that ran


class Mutant(NamedTuple):
    told: str
    path: str  # from the checkout
    text: str  # the changed file
    function: Optional[int]  # in which of the file's functions the change is, see `functions`; None: outside
    tests: list[str]  # that may notice it
    seconds: float  # of these, before anything is changed


def sources() -> dict[str, Path]:
    """The files of llama/ by their names; where two have one name, with that of the folder."""
    paths = sorted((ROOT / "llama").glob("**/[a-z]*.py"))
    stems = Counter(path.stem for path in paths)
    return {path.stem if stems[path.stem] == 1 else f"{path.parent.name}/{path.stem}": path for path in paths}


def missing() -> list[str]:
    """What SPEED names that is not there."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "llama").glob("**/*.py"))
    return sorted(name for name in SPEED if not re.search(rf"^(\w+, )?{name}\b.* = ", code, re.MULTILINE))


def without(items: list[Any], i: int) -> list[Any]:
    return items[:i] + items[i + 1 :]


def others(node: ast.AST, in_function: bool) -> Iterator[ast.AST]:
    """What may stand in a node's place."""

    def new(**fields: Any) -> ast.AST:
        return type(node)(**{**vars(node), **fields})

    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield new(ops=[*node.ops[:i], OTHER[type(op)](), *node.ops[i + 1 :]])
    elif isinstance(node, (ast.BoolOp, ast.BinOp)) and type(node.op) in OTHER:
        yield new(op=OTHER[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield new(value=not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield from (new(value=node.value + 1), new(value=node.value - 1))
    elif isinstance(node, ast.Name) and node.id in NAMES:
        yield new(id=NAMES[node.id])
    elif isinstance(node, ast.Call):
        yield from (new(keywords=without(node.keywords, i)) for i in range(len(node.keywords)))
    elif in_function and (
        isinstance(node, (ast.Assign, ast.AugAssign))
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
    ):
        yield ast.Pass()


def changes(node: ast.AST, in_function: bool = False) -> Iterator[Change]:
    """Every single change of what lies in a node."""
    for field, value in ast.iter_fields(node):
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if field in UNSEEN or not isinstance(child, ast.AST) or isinstance(child, SILENT):
                continue
            if isinstance(child, ast.Assign) and any(
                getattr(part, "id", None) in SPEED for part in ast.walk(child.targets[0])
            ):
                continue
            inside = in_function or isinstance(node, ast.FunctionDef)
            for other in others(child, inside):
                put = partial(setattr, node, field) if i is None else partial(value.__setitem__, i)
                yield child, other, partial(put, other)
            yield from changes(child, inside)


def functions(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """The functions of a module and of its classes, without those in functions."""
    for node in body:
        if isinstance(node, DEFS):
            yield node
        else:
            yield from functions([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])


def codes(module: CodeType) -> Iterator[CodeType]:
    """The code of the same functions, in the same order."""
    for code in module.co_consts:
        if isinstance(code, CodeType) and not code.co_flags & inspect.CO_NEWLOCALS:  # of a class
            yield from codes(code)
        elif isinstance(code, CodeType) and not code.co_name.startswith("<"):
            yield code


def statements(node: ast.AST) -> Iterator[tuple[list[ast.stmt], ast.stmt]]:
    """The statements within the functions of a module, each with the list that it stands in. Their order numbers
    them. Functions with a decorator of Triton's are read as text by Triton, and are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, DEFS) and any("jit" in ast.unparse(name) for name in child.decorator_list):
            continue
        yield from statements(child)
    if isinstance(node, DEFS):
        lists = [node.body]
        while lists:
            body = lists.pop()
            for statement in body:
                yield body, statement
                if not isinstance(statement, (*DEFS, ast.ClassDef)):
                    parts = [statement, *getattr(statement, "handlers", []), *getattr(statement, "cases", [])]
                    found = (getattr(part, name, []) for part in parts for name in ("body", "orelse", "finalbody"))
                    lists += filter(None, found)


def marked(text: str, first: int) -> tuple[str, int]:
    """A file whose statements write a 1 to the byte of their number, counted from `first`. -> it, how many there are"""
    tree = ast.parse(text)
    found = list(statements(tree))
    for number, (body, statement) in enumerate(found, first):
        if not (statement is body[0] and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
            body.insert(body.index(statement), ast.parse(f"__ran__[{number}] = 1").body[0])
    head = next((i for i, node in enumerate(tree.body) if not is_head(node)), len(tree.body))
    tree.body.insert(head, ast.parse("from llama.ran import __ran__").body[0])
    return ast.unparse(ast.fix_missing_locations(tree)), len(found)


def is_head(node: ast.stmt) -> bool:
    """Whether nothing may stand before it."""
    return isinstance(node, ast.Expr) or (isinstance(node, ast.ImportFrom) and node.module == "__future__")


MAP = """import mmap, os
descriptor = os.open({path!r}, os.O_RDWR)
__ran__ = mmap.mmap(descriptor, 0)
os.close(descriptor)
"""


class Recorder:
    """A plugin of pytest: which statements each test runs, in whatever process."""

    def __init__(self, path: Path, names: list[tuple[str, int]]) -> None:
        """names: the file of each statement, and its number there."""
        with path.open("r+b") as file:
            self.ran = mmap.mmap(file.fileno(), 0)
        self.names = names
        self.runs: list[Run] = []
        self.failed: list[str] = []

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.ran[:] = bytes(len(self.ran))
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        ran: dict[str, list[int]] = defaultdict(list)
        for (name, number), hit in zip(self.names, self.ran[:]):
            if hit:
                ran[name].append(number)
        self.runs.append(Run(item.nodeid, seconds, ran))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed += [report.nodeid] * report.failed


class Folder:
    """A copy of the checkout, where one process runs tests."""

    def __init__(self, root: Path, number: int) -> None:
        self.path = root / str(number)
        shutil.copytree(ROOT, self.path, ignore=shutil.ignore_patterns(".git", ".scratch", "__pycache__"))
        self.moment = time.time_ns() // 10**9

    def write(self, path: str, text: str) -> None:
        """Each file of another second than the ones before it: Python keeps what it compiled by the second."""
        self.moment += 1
        (self.path / path).write_text(text, encoding="utf-8")
        os.utime(self.path / path, (self.moment, self.moment))

    def enter(self, kernels: str) -> None:
        """Make this process one that runs its tests."""
        os.chdir(self.path)
        sys.path[:0] = [str(self.path), str(self.path / "tests")]
        self.temporary = self.path.with_suffix(".tmp")
        self.temporary.mkdir(exist_ok=True)
        tempfile.tempdir = None  # what was looked up before
        os.environ.update(
            PYTHONPATH=str(self.path), OMP_NUM_THREADS="1", LLAMA_SHARED=SHARED, KERNELS=kernels,
            TMPDIR=str(self.temporary),
        )  # fmt: skip


def quiet(path: Path) -> None:
    """What this process prints goes to a file from now on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def record(folder: Folder, kernels: str, tests: Any, found: Any) -> None:
    """A process: run test files, and put for each (its name, runs, failed tests) into `found`."""
    quiet(folder.path.with_suffix(".recorded"))
    names: list[tuple[str, int]] = []
    for name, path in sources().items():
        relative = str(path.relative_to(ROOT))
        text, count = marked(path.read_text(encoding="utf-8"), len(names))
        names += [(name, i) for i in range(count)]
        folder.write(relative, text)
    hits = folder.path.with_suffix(".ran")
    hits.write_bytes(bytes(len(names)))
    folder.write("llama/ran.py", MAP.format(path=str(hits)))
    folder.enter(kernels)
    import torch  # noqa: F401, once, for all the children

    while (test := tests.get()) is not None:
        recorder = Recorder(hits, names)
        child = get_context("fork").Process(target=record_one, args=(recorder, test, hits.with_suffix(".json")))
        child.start()
        child.join()
        found.put((test, *json.loads(hits.with_suffix(".json").read_text())))
    for path in sources().values():
        folder.write(str(path.relative_to(ROOT)), ast.unparse(ast.parse(path.read_text(encoding="utf-8"))))
    (folder.path / "llama/ran.py").unlink()


def record_one(recorder: Recorder, test: str, out: Path) -> None:
    pytest.main([*OPTIONS, f"tests/{test}"], plugins=[recorder])
    out.write_text(json.dumps([recorder.runs, recorder.failed]))


class Noticed:
    """A plugin of pytest: the first test that fails."""

    first = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.first:
            self.first = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.first:
            self.first = report.nodeid


def limited(run: Callable[[], str], folder: Folder, seconds: float) -> str:
    """What comes of the tests that `run` runs in a fork of this process; it returns the one that failed, or ""."""
    out = folder.path.with_suffix(".noticed")
    out.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        os.setsid()
        quiet(folder.path.with_suffix(".out"))
        try:
            out.write_text(run())
        except BaseException:
            traceback.print_exc()
            os._exit(BROKEN)
        os._exit(0)
    limit = time.monotonic() + seconds
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < limit:
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and what its tests have started
    if not ended[0]:
        os.waitpid(child, 0)
        return "took too long"
    if os.waitstatus_to_exitcode(ended[1]) == BROKEN:
        return f"not run: {folder.path.with_suffix('.out').read_text().splitlines()[-1]}"
    failed = out.read_text() if out.exists() else "the process ended"
    return f"noticed: {failed}" if failed else "survived"


def run_afresh(tests: list[str]) -> str:
    """In a process that has not imported the package."""
    noticed = Noticed()
    status = pytest.main([*OPTIONS, "-x", *tests], plugins=[noticed])
    return noticed.first or (f"pytest ends with {status}" if status else "")  # if the package cannot be imported


def run_changed(session: pytest.Session, items: list[pytest.Item], changed: list[FunctionType], code: CodeType) -> str:
    """In a process that has collected the tests: functions of the package get another code."""
    noticed = Noticed()
    session.config.pluginmanager.register(noticed)
    for function in changed:
        function.__code__ = code
    for item, following in zip(items, [*items[1:], None]):
        try:
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        except BaseException:
            return item.nodeid
        if noticed.first:
            break
    return noticed.first


class Server:
    """A plugin of pytest: instead of the tests that were collected, run those of each mutant, in a fork."""

    def __init__(self, folder: Folder, mutants: Any, results: Any, afresh: Any) -> None:
        """afresh: a pipe to a process that has not imported the package, see `spare`."""
        self.folder = folder
        self.mutants = mutants
        self.results = results
        self.afresh = afresh

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        alive = defaultdict(list)  # the functions of the package, by their code
        for thing in gc.get_objects():
            if type(thing) is FunctionType and thing.__code__.co_filename.startswith(str(self.folder.path)):
                alive[thing.__code__].append(thing)
        gc.freeze()
        while (asked := self.mutants.get()) is not None:
            number, mutant = asked
            path = str(self.folder.path / mutant.path)
            plain = Path(path).read_text(encoding="utf-8")
            self.folder.write(mutant.path, mutant.text)
            seconds = 60 + 4 * mutant.seconds
            old, new = (
                None if mutant.function is None else list(codes(compile(text, path, "exec")))[mutant.function]
                for text in (plain, mutant.text)
            )  # fmt: skip
            if not mutant.tests:
                result = "survived: no test runs it"
            elif old and new and old in alive and old.co_freevars == new.co_freevars:
                chosen = [items[test] for test in mutant.tests]
                result = limited(partial(run_changed, session, chosen, alive[old], new), self.folder, seconds)
            else:
                self.afresh.send((mutant.tests, seconds))
                result = self.afresh.recv()
            self.results.put((number, result))
            self.folder.write(mutant.path, plain)
            shutil.rmtree(self.folder.temporary, ignore_errors=True)
            self.folder.temporary.mkdir(exist_ok=True)
        return True


def spare(pipe: Any, folder: Folder, kernels: str) -> None:
    """A process: run tests in forks that import the package anew, but not torch."""
    folder.enter(kernels)
    import torch  # noqa: F401

    while True:
        tests, seconds = pipe.recv()
        pipe.send(limited(partial(run_afresh, tests), folder, seconds))


def serve(folder: Folder, kernels: str, mutants: Any, results: Any) -> None:
    """A process: run the tests of mutants."""
    quiet(folder.path.with_suffix(".served"))
    try:
        context = get_context("fork")
        here, there = context.Pipe()
        afresh = context.Process(target=spare, args=(there, folder, kernels))
        afresh.start()
        folder.enter(kernels)
        pytest.main([*OPTIONS, "tests"], plugins=[Server(folder, mutants, results, here)])
        afresh.kill()
    finally:
        results.put((None, "ended"))


def what_runs(kept: Optional[str], folders: list[Folder], kernels: str) -> list[Run]:
    """Every test that passes, and what it runs. kept: a file; what it says of a test file holds as long as this and
    the files of llama/ that it runs are the same."""
    texts = {path.name: path.read_bytes() for path in sorted((ROOT / "tests").glob("test_*.py"))}
    known: dict[str, Any] = json.loads(Path(kept).read_text()) if kept and Path(kept).exists() else {}
    digests = {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
    digests |= {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sources().items()}
    known = {test: entry for test, entry in known.items() if entry[0].items() <= digests.items()}
    context = get_context("fork")
    asked, found = context.Queue(), context.Queue()
    missed = [test for test in texts if test not in known]
    for test in [*missed, *(None for _ in folders)]:
        asked.put(test)
    processes = [context.Process(target=record, args=(folder, kernels, asked, found)) for folder in folders]
    for process in processes:
        process.start()
    for _ in missed:
        test, runs, failed = found.get()
        files = {test, *(name for _, _, ran in runs for name in ran)}
        known[test] = [{name: digests[name] for name in files}, [run for run in runs if run[0] not in failed]]
        print(f"{test}: {len(runs)} tests" + "".join(f"; {name} fails" for name in failed), flush=True)
        if kept:
            Path(kept).write_text(json.dumps(known))
    for process in processes:
        process.join()
    return [Run(*run) for _, runs in known.values() for run in runs]


def drawn(args: argparse.Namespace, runs: list[Run]) -> Iterator[Mutant]:
    paths = sources()
    names = args.names or list(paths)
    texts = {name: paths[name].read_text(encoding="utf-8") for name in names}
    places = [(name, i) for name, source in texts.items() for i, _ in enumerate(changes(ast.parse(source)))]
    ran: dict[tuple[str, Optional[int]], list[Run]] = defaultdict(list)  # by file and statement, and by file alone
    for run in runs:
        for name, numbers in run.statements.items():
            for number in (*numbers, None):
                ran[name, number].append(run)
    for name, i in random.Random(args.seed).sample(places, min(args.mutants, len(places)))[args.skip :]:
        tree = ast.parse(texts[name])
        node, other, change = list(changes(tree))[i]
        told = f"{name}.py:{getattr(node, 'lineno', 0)} {ast.unparse(node)} -> {ast.unparse(other)}"
        around = list(parents(tree, node))
        numbers = {id(statement): number for number, (_, statement) in enumerate(statements(tree))}
        statement = next((numbers[id(part)] for part in around if id(part) in numbers), None)
        which = next((n for n, function in enumerate(functions(tree.body)) if within(function, around)), None)
        names_of_code = [code.co_name for code in codes(compile(texts[name], name, "exec"))]
        assert [getattr(function, "name", "") for function in functions(tree.body)] == names_of_code
        if not args.unchanged:
            change()
        tests, seconds = in_order(ran[name, statement])
        yield Mutant(told, str(paths[name].relative_to(ROOT)), ast.unparse(tree), which, tests, seconds)


def parents(tree: ast.AST, node: ast.AST) -> Iterator[ast.AST]:
    """A node and those around it, the innermost first."""
    above = {id(child): part for part in ast.walk(tree) for child in ast.iter_child_nodes(part)}
    while node is not tree:
        yield node
        node = above[id(node)]


def within(function: ast.AST, around: list[ast.AST]) -> bool:
    """Whether a change is in a function's body, and not in what is evaluated where it is defined."""
    return function in around and around[around.index(function) - 1] in function.body  # type: ignore[attr-defined]


def in_order(runs: list[Run]) -> tuple[list[str], float]:
    """The quickest case of each test first, then the second of each; what would take longer than SECONDS in all is
    left out. -> their names, their seconds"""
    turns = Counter[str]()
    keys = {}
    for run in sorted(runs, key=lambda run: run.seconds):
        function = run.test.partition("[")[0]
        keys[run.test] = turns[function], run.seconds
        turns[function] += 1
    chosen, seconds = [], 0.0
    for run in sorted(runs, key=lambda run: keys[run.test]):
        if seconds + run.seconds <= SECONDS or not chosen:
            chosen.append(run.test)
            seconds += run.seconds
    return chosen, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of files of llama/, without .py")
    parser.add_argument("--mutants", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--skip", type=int, default=0, help="so many of the draw, which were run before")
    parser.add_argument("--unchanged", action="store_true", help="change nothing: all must survive")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--runs", metavar="FILE", help="keeps what the tests run")
    args = parser.parse_args()
    if wrong := missing():
        sys.exit("what SPEED names is not there: " + ", ".join(wrong))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        folders = [Folder(Path(root), i) for i in range(args.processes)]
        kernels = f"{root}/kernels"  # compiled once for all
        code = "from llama.layers import own_kernels; own_kernels.loaded()"
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "LLAMA_CACHE": kernels}, cwd=ROOT, check=True)
        runs = what_runs(args.runs, folders, kernels)
        print(f"{len(runs)} tests ran in {time.monotonic() - began:.0f} s", flush=True)
        context = get_context("fork")
        asked, results = context.Queue(), context.Queue()
        for folder in folders:
            context.Process(target=serve, args=(folder, kernels, asked, results)).start()
        told = []
        for mutant in drawn(args, runs):
            asked.put((len(told), mutant))
            told.append(mutant.told)
        for _ in folders:
            asked.put(None)
        outcomes, survivors, running = Counter[str](), [], len(folders)
        while running:
            number, result = results.get()
            if number is None:
                running -= 1
                continue
            print(f"{time.monotonic() - began:.0f} {told[number]}: {result}", flush=True)
            outcomes[result.partition(":")[0]] += 1
            survivors += [told[number]] * result.startswith("survived")
    print(json.dumps({"mutants": len(told), "seed": args.seed, **outcomes, "survivors": survivors}))
    sys.exit(bool(survivors or outcomes["not run"]))


if __name__ == "__main__":
    main()
