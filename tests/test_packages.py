"""The folder of compiled steps, and the process that compiles: what is not believed, what fails there, and what is
left."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PARAMS
from helpers import PROMPTS, build

from llama import ModelArgs, Transformer, runtime
from llama.decoding import compiled, compiler, engine, packages
from llama.layers import cpp
from llama.system import sealed

unix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no owners and modes")
OTHER = 65534


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As `packages.make_folder` makes it; and no package is left out because there is another form of the step."""
    monkeypatch.setattr(engine, "make_step", lambda *_: None)
    folder = tmp_path / "above" / "cache"
    monkeypatch.setenv("LLAMA_CACHE", str(folder))
    packages.make_folder(folder)
    return folder


@pytest.fixture
def expected(tiny: Path, tokenizer_path: str) -> Any:
    return build(tiny, tokenizer_path, compile=False, rows=1).generate(PROMPTS[:1], 5, 0)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, bytes]]:
    """What would have been loaded, in place of loading it: the shared object of these tests is a text."""
    seen: list[tuple[Path, bytes]] = []

    def runner(path: str, _: int) -> None:
        seen.append((Path(path), Path(path).read_bytes()))
        # Without it a step that calls an operator of ours (bfloat16 without AMX) was loaded, and failed at each call.
        assert Path(path).with_suffix(".json").read_bytes() == b"the operators that it calls"
        assert stat.S_IMODE(os.stat(path).st_mode) & 0o077 == 0
        assert stat.S_IMODE(os.stat(Path(path).parent).st_mode) == 0o700
        raise RuntimeError("it was loaded")

    monkeypatch.setattr(torch._C._aoti, "AOTIModelContainerRunnerCpu", runner)
    return seen


def archive(folder: Path) -> Path:
    """What AOTInductor would have made."""
    with zipfile.ZipFile(folder / "made", "w") as file:
        file.writestr("step/data/step.wrapper.so", "a shared object")
        file.writestr("step/data/step.wrapper_metadata.json", "something else")
        file.writestr("step/data/step.wrapper.json", "the operators that it calls")
    return folder / "made"


@pytest.fixture
def package(cache: Path, tmp_path: Path, tiny: Path, tokenizer_path: str) -> Path:
    """A package in the folder that `build` will look for."""
    model = build(tiny, tokenizer_path, compile=False, rows=1).model
    path = cache / f"{compiled.code_key(model)}-one.pt2"
    with packages.workspace(cache) as work:
        packages.keep(archive(tmp_path), path, work)
    assert not work.exists()
    return path


def instead(make: Callable[[Path, Path], object]) -> Callable[[Path], None]:
    """make(where the package has gone, where it was)"""

    def change(path: Path) -> None:
        moved = path.rename(path.parents[2] / "moved")
        make(moved, path)

    return change


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def of_another_name(path: Path) -> None:
    other = path.with_name("0" * 32 + "-one.pt2")
    with packages.workspace(path.parent) as work:
        packages.keep(archive(path.parents[2]), other, work)
    other.replace(path)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "one flipped bit": (flip, "checksum"),
    "cut short": (cut, "checksum"),
    "empty": (lambda path: path.write_bytes(b""), "checksum"),
    "no checksum": (lambda path: path.write_bytes(path.read_bytes()[:-64]), "checksum"),
    "of another name": (of_another_name, "checksum"),
    "folder": (instead(lambda _, path: path.mkdir()), "directory"),
    "pipe": (instead(lambda _, path: os.mkfifo(path)), "not a plain file"),
    "symbolic link": (instead(lambda moved, path: path.symlink_to(moved)), "symbolic link"),
    "dangling link": (instead(lambda _, path: path.symlink_to("/nowhere")), "symbolic link"),
    "hard link": (instead(lambda moved, path: os.link(moved, path)), "one name"),
    "others can write": (lambda path: path.chmod(0o602), "others can write"),
    "a group of another can write": (lambda path: (path.chmod(0o620), os.chown(path, -1, OTHER)), "others can write"),
    "of another user": (lambda path: os.chown(path, OTHER, -1), "belongs to user"),
    "folder that others can write to": (lambda path: path.parent.chmod(0o707), "others can write"),
    "sticky folder": (lambda path: path.parent.chmod(0o1777), "others can write"),
    "folder of another user": (lambda path: os.chown(path.parent, OTHER, -1), "belongs to user"),
    "open folder above": (lambda path: path.parents[1].chmod(0o707), "others can write"),
    "folder above of another user": (lambda path: os.chown(path.parents[1], OTHER, -1), "belongs to user"),
}


@unix
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_believed_is_not_loaded(
    damage: str,
    package: Path,
    loaded: list[Any],
    tiny: Path,
    tokenizer_path: str,
    expected: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A package is machine code. A plain build ran whatever lay there, from whomever; a flipped bit could end the
    process."""
    change, words = DAMAGES[damage]
    if "another" in damage and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    build(tiny, tokenizer_path, rows=1)
    assert "runs as it is: it was loaded" in capsys.readouterr().out  # so nothing but the damage is in the way
    assert loaded.pop()[1] == b"a shared object"
    change(package)
    llama = build(tiny, tokenizer_path, rows=1)
    assert not loaded
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "not compiled" in line)
    assert words in line
    assert llama.generate(PROMPTS[:1], 5, 0) == expected


@unix
def test_what_belongs_to_root_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    sealed.check_folder(Path("/usr"))


@unix
@pytest.mark.parametrize(
    ("mode", "group", "others"),
    [
        (0o600, (6, "us", ["you"]), False),
        (0o620, (5, "me", []), False),
        (0o620, (6, "me", []), True),
        (0o620, (5, "us", []), True),
        (0o620, (5, "me", ["you"]), True),
        (0o620, None, True),
        (0o622, (5, "me", []), True),
        (0o602, (5, "me", []), True),
    ],
)
def test_a_group_of_this_user_alone_may_write(
    mode: int, group: Any, others: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many systems make one for each user. group: its number, name and further members, if it is known."""

    def found(number: int) -> Any:
        if group is None:
            raise KeyError(number)
        return SimpleNamespace(gr_gid=group[0], gr_name=group[1], gr_mem=group[2])

    monkeypatch.setattr(sealed.pwd, "getpwuid", lambda _: SimpleNamespace(pw_gid=5, pw_name="me"))
    monkeypatch.setattr(sealed.grp, "getgrgid", found)
    status: Any = SimpleNamespace(st_mode=mode, st_gid=0)
    assert sealed._others_write(status) == others


@unix
def test_what_is_loaded_is_what_was_checked(package: Path, loaded: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is swapped between the two counts for nothing; and the umask opens nothing to others."""
    write = sealed.write
    monkeypatch.setattr(sealed, "write", lambda path, data: package.write_bytes(b"another") and write(path, data))
    before = os.umask(0)
    try:
        with pytest.raises(RuntimeError, match="it was loaded"):
            packages.load(package)
        packages.make_folder(package.parents[1] / "new" / "folder")
    finally:
        os.umask(before)
    ((path, data),) = loaded
    assert data == b"a shared object"
    assert not path.parent.exists()
    assert stat.S_IMODE((package.parents[1] / "new").stat().st_mode) == 0o700


# It "compiles" what its source says, unless that is an error. What it reads, writes and waits for is its caller's.
COMPILER = """#!/bin/sh
cat
for word; do
    case "$word" in *.cpp) source=$word;; esac
    last=$word
done
if LC_ALL=C grep -a error "$source" >&2; then exit 1; fi
if grep nothing "$source"; then exit 2; fi
cp "$source" "$last"
[ "$(dirname "$last")" = "$TMPDIR" ]
"""


@unix
def test_operators_are_compiled_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And again when the source, a header beside it, the compiler or the kept file has changed."""
    source, compiler, loaded = tmp_path / "a.cpp", tmp_path / "compiler", []
    cache /= "new"
    monkeypatch.setenv("LLAMA_CACHE", str(cache))
    compiler.write_text(COMPILER)
    compiler.chmod(0o700)
    monkeypatch.setattr(runtime, "cpp_compiler", lambda: str(compiler))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: loaded.append(Path(path).read_text()))

    def told(text: str, what: str = "parts") -> list[str]:
        """What is printed while operators are brought in."""
        source.write_text(text, encoding="latin-1")
        cpp.load(source, what)
        assert loaded.pop() == text
        return capsys.readouterr().out.splitlines()

    once = "Compiling the parts, once for this machine …"
    assert [told("one"), told("one"), told("two"), told("one")] == [[once], [], [once], []]
    flip(next(path for path in cache.glob("*.kernels") if b"one" in path.read_bytes()))
    first, second = told("one")
    assert first.startswith("The parts are compiled anew: ")
    assert first.endswith(".kernels is damaged: its checksum is wrong; delete it")
    assert second == once
    (tmp_path / "a.h").write_text("more")
    assert [told("one"), told("one"), told("three", "")] == [[once], [], []]
    monkeypatch.setattr(runtime, "cpp_compiler", lambda: None)
    with pytest.raises(RuntimeError, match=r"^it needs a C\+\+ compiler, on Linux; install g\+\+, or "):
        told("one")
    monkeypatch.setattr(runtime, "cpp_compiler", lambda: str(compiler))
    for text, why in (("a\nan error: \xe9\nanother error", "an error: \ufffd"), ("nothing", "it ended with 2")):
        with pytest.raises(RuntimeError, match=f"^{compiler}: {why}$"):
            told(text)
    assert not [path for path in cache.iterdir() if path.is_dir()]


@unix
def test_a_read_only_folder_serves(package: Path, loaded: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != package.parent)  # root may write everywhere
    with pytest.raises(RuntimeError, match="it was loaded"):
        packages.load(package)
    assert package.parent not in loaded[0][0].parents


@unix
def test_what_a_killed_process_left_is_removed(cache: Path) -> None:
    """But not while a process may still be at it."""
    left = cache / "tmp-left"
    left.mkdir()
    with sealed._in_use(cache):
        assert not left.exists()
        left.mkdir()
        with packages.workspace(cache) as work:
            assert left.exists()
            assert work.parent == cache
    assert list(cache.iterdir()) != []
    with packages.workspace(cache):
        assert not left.exists()


FAILURES = {
    "raise ValueError('bad\\n\\n')": "ValueError: bad",
    "print('No space left on device'); sys.exit(1)": "No space left on device",
    "sys.exit(3)": "status 3",
    "import os; os.kill(os.getpid(), 9)": "SIGKILL; perhaps there was too little memory",
    "import os; os.abort()": "SIGABRT",
    "open(sys.argv[2] + '/step.pt2', 'w'); print(b'\\xff' * 99)": "not a zip file",
    "open(sys.argv[2] + '/step.pt2', 'wb').write(b'PK')": "not a zip file",
    (
        "import os; sys.exit(os.environ['TMPDIR'] == sys.argv[2] and os.environ.get('TORCHELASTIC_RUN_ID', 'good'))"
    ): "good",
}


@unix
@pytest.mark.parametrize("code", FAILURES)
def test_a_compiler_that_fails_ends_no_caller(
    code: str,
    cache: Path,
    tiny: Path,
    tokenizer_path: str,
    expected: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compiler, "BOOT", "import sys; " + code)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    llama = build(tiny, tokenizer_path, compile=True, rows=1)
    out = capsys.readouterr().out
    assert out.count("Compiling the decode step") == 1
    (line,) = (line for line in out.splitlines() if "not compiled" in line)
    assert "The decode step is not compiled, and runs as it is: " in line
    assert FAILURES[code].lower() in line.lower()
    assert llama.generate(PROMPTS[:1], 5, 0) == expected
    assert not [path for path in cache.iterdir() if path.is_dir()]


@unix
def test_a_damaged_package_is_made_anew(
    package: Path, tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it is asked for."""
    flip(package)
    monkeypatch.setattr(compiler, "BOOT", "print('so it was tried'); raise SystemExit(1)")
    build(tiny, tokenizer_path, compile=True, rows=1)
    out = capsys.readouterr().out
    assert re.search("^A compiled step is made anew: .*checksum", out, re.MULTILINE)
    assert "runs as it is: so it was tried" in out


def test_the_line_that_says_most() -> None:
    of_gcc = ValueError("C++ compile error\n\nCommand:\ng++ x.cpp\nx.cpp:1: fatal error: no room\nmore")
    assert compiler._reason(of_gcc) == "x.cpp:1: fatal error: no room"
    assert compiler._reason(ValueError("\nwhy\nwhere")) == "why"
    assert compiler._reason(ValueError()) == "ValueError"


@pytest.mark.parametrize("executable", ["", None, "/usr/bin/uwsgi"])
def test_an_embedded_python_compiles_nothing(
    executable: Any,
    tiny: Path,
    tokenizer_path: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What would be started is not Python, and might be anything."""
    monkeypatch.setattr(sys, "executable", executable)
    assert build(tiny, tokenizer_path, compile=True, rows=1)._engine.graph is None
    assert f"runs as it is: sys.executable is {executable!r}" in capsys.readouterr().out


def no_room(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


@unix
@pytest.mark.parametrize(
    "writer", [(sealed, "write"), (os, "replace"), (Path, "write_text"), (Path, "mkdir"), (os, "open")]
)
def test_a_full_disk(
    writer: Any,
    cache: Path,
    tiny: Path,
    tokenizer_path: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """torch's writer of archives ended the process with SIGABRT."""
    make = f"import zipfile; zipfile.ZipFile(sys.argv[2] + '/{compiler.MADE}', 'w').writestr('step.so', 'x')"
    llama = build(tiny, tokenizer_path, compile=False, rows=1)
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "BOOT", "import sys; " + make)
        patch.setattr(*writer, no_room)
        assert compiled.make_graph(llama.model, True) is None
    assert "runs as it is: [Errno 28] No space left on device" in capsys.readouterr().out
    assert not [path for path in cache.iterdir() if path.is_dir() or path.suffix == ".pt2"]


# The process as it is, but for the compilation: that stands still, with a C++ compiler that stands still.
STILL = """
import os, pathlib, runpy, subprocess, sys, threading
watch = runpy.run_path(sys.argv[1], run_name="compiler")["_watch"]
threading.Thread(target=watch, args=(os.getppid(), pathlib.Path(sys.argv[2]))).start()
cc = subprocess.Popen(["sleep", "60"])
print(cc.pid, flush=True)
cc.wait()
"""
CALLER = """
import importlib.util, os, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("compiler", sys.argv[1])
compiler = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compiler)
compiler.BOOT = sys.argv[3]
with compiler.started({}, Path(sys.argv[2]), dict(os.environ)) as process:
    print(process.pid, process.stdout.readline(), flush=True)
    process.wait()
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at Linux's list of processes")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_one_that_waits_for_it(number: int, tmp_path: Path) -> None:
    """A C++ compiler would go on for a minute, for nobody."""
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-S", "-c", CALLER, compiler.__file__, str(tmp_path / "work" / "one"), STILL]
    caller = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert caller.stdout is not None
    with caller.stdout as lines:
        pids = [int(pid) for pid in lines.readline().split()]
        assert len(pids) == 2
        assert all(map(is_alive, pids))
        while caller.poll() is None:  # a signal that comes just before it waits is noticed behind that only
            caller.send_signal(number)
            time.sleep(0.2)
    deadline = time.monotonic() + 20
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, pids))
    assert number == signal.SIGINT or not (tmp_path / "work").exists()  # after SIGINT it is the caller's to remove


def test_a_package_is_of_all_that_it_depends_on(
    tiny: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(tiny, tokenizer_path, compile=False, rows=1).model
    names = {compiled.code_key(model)}
    changes: list[tuple[Any, str, Any]] = [
        (torch, "__version__", "2.99.0"),
        (torch.version, "git_version", "0"),
        (torch, "get_num_threads", lambda: 77),
        (runtime, "processor", lambda: "with another ability"),
        *((compiled, "SOURCES", compiled.SOURCES[:i]) for i in range(len(compiled.SOURCES))),
    ]
    assert {"compiled.py", "compiler.py", "model.py", "parallel.py", "products.py"} <= {
        Path(name).name for name in compiled.SOURCES
    }
    for change in changes:
        with monkeypatch.context() as patch:
            patch.setattr(*change)
            names.add(compiled.code_key(model))
    assert len(names) == 1 + len(changes)


@pytest.mark.parametrize(("rows", "bounds"), [(4, [(2, 4), (2, 128)]), (2, [(2, 128)])])
def test_sizes_that_a_package_is_for(rows: int, bounds: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and columns, from what `Packaged` may ask for first to the largest; a size that stands alone is no
    variable."""
    made: list[Any] = []
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda program, **_: made.append(program))
    monkeypatch.setattr(torch._inductor.config.aot_inductor, "precompile_headers", False, raising=False)
    args = ModelArgs(**{**PARAMS, "n_layers": 1}, vocab_size=9, max_seq_len=128, max_batch_size=rows)
    request = {"args": asdict(args), **compiled.described(Transformer(args)), "several": True}
    compiler.make({**request, "threads": torch.get_num_threads()}, Path("nowhere"))
    assert sorted((int(sizes.lower), int(sizes.upper)) for sizes in made[0].range_constraints.values()) == bounds


def test_a_processor_that_torch_does_not_describe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code for this machine's AVX512 may be none for another's; older versions of torch tell no more than that name."""
    found = []
    for flags in ("fpu avx512f", "fpu avx512f avx512_fp16"):
        text = f"processor\t: 0\nflags\t\t: {flags}\nbugs\t: none\n\n" * 2
        with monkeypatch.context() as patch:
            patch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
            patch.setattr(Path, "exists", lambda _: True)
            patch.setattr(Path, "read_text", lambda _, text=text: text)
            found.append(runtime.processor())
    assert found[0] != found[1]


def test_environment_of_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It joins no process group, and its files are where nobody else can put some: torch's folder in /tmp has a known
    name."""
    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
    ):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    found = runtime.compiler_environment(tmp_path)
    assert not [name for name in found if "RANK" in name or "WORLD" in name or name.startswith(("MASTER", "TORCHEL"))]
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["TMPDIR"] == found["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)


def test_cache_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path, tokenizer_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path))
    assert runtime.cache_folder() == tmp_path
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAMA_CACHE", "here")
    assert runtime.cache_folder() == tmp_path / "here"
    monkeypatch.setenv("LLAMA_CACHE", "~no such user/x")
    with pytest.raises(ValueError, match="home that is not known"):
        runtime.cache_folder()
    llama = build(tiny, tokenizer_path, compile=True, rows=1)
    assert llama._engine.graph is None
    assert not compiled.is_marked(llama.model)
    assert "~no such user/x is below a home that is not known" in capsys.readouterr().out
    monkeypatch.delenv("LLAMA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert runtime.cache_folder() == tmp_path / "llama"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert runtime.cache_folder() == Path.home() / ".cache/llama"


@unix
def test_inductors_folder_is_as_safe(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile keeps is loaded from there too."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with compiled._compiling():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache / "inductor")
    cache.chmod(0o777)
    with pytest.raises(ValueError, match="others can write to"), compiled._compiling():
        pass
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
