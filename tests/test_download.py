"""download.sh against a local server that behaves as badly as the real ones did to Meta's users.

Nothing here leaves 127.0.0.1. Every run is checked for the two promises that matter most: a file under its own name is
whole and right, and the link, which is a secret, is never shown.
"""

import hashlib
import os
import pty
import random
import re
import select
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "download.sh"
SECRET = "Policy=eyJTdGF0ZW1lbnQi&Signature=s3cr3t~-_&Key-Pair-Id=K15QRJLYKIFSLZ"
SHARDS = {"7B": 1, "7B-chat": 1, "13B": 2, "13B-chat": 2, "70B": 8, "70B-chat": 8}
SHARD_7B = "llama-2-7b/consolidated.00.pth"
UTILITIES = ["awk", "cat", "df", "env", "grep", "head", "mkdir", "mv", "rm", "wc"]
BASH = shutil.which("bash")

pytestmark = [
    pytest.mark.skipif(BASH is None, reason="bash is not installed"),
    pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX system"),
]


def folder(model: str) -> str:
    return "llama-2-" + model.lower()


def checklist(files: dict[str, bytes]) -> bytes:
    return "".join(f"{hashlib.md5(data).hexdigest()}  {name}\n" for name, data in files.items()).encode()


def llama_files() -> dict[str, bytes]:
    """What Meta's server has, with shards of 60 kB."""
    draw = random.Random(2)
    files = {"LICENSE": b"LLAMA 2 COMMUNITY LICENSE\n", "USE_POLICY.md": b"# Use policy\n"}
    files["tokenizer.model"] = draw.randbytes(5000)
    files["tokenizer_checklist.chk"] = checklist({"tokenizer.model": files["tokenizer.model"]})
    for model, shards in SHARDS.items():
        listed = {f"consolidated.{i:02}.pth": draw.randbytes(60_000) for i in range(shards)}
        listed["params.json"] = b'{"dim": 4096}\n'
        files |= {f"{folder(model)}/{name}": data for name, data in listed.items()}
        files[f"{folder(model)}/checklist.chk"] = checklist(listed)
    return files


class Handler(BaseHTTPRequestHandler):
    timeout = 10
    server: "Mirror"

    def do_GET(self) -> None:
        path, _, query = self.path.removeprefix("/").partition("?")
        mirror, range_header = self.server, self.headers.get("Range")
        mirror.requests.append((path, range_header))
        data = mirror.files.get(path)
        if query != mirror.query:
            return self.answer(403, b"<Error>AccessDenied</Error>", "application/xml")
        if path in mirror.statuses or data is None:
            return self.answer(mirror.statuses.get(path, 404), b"<html>no</html>", "text/html")
        if path in mirror.pages:
            return self.answer(
                200, b"\n<!DOCTYPE html>\n<html>Unsupported browser</html>" * 50, "text/html; charset=utf-8"
            )
        if path in mirror.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = int(range_header.removeprefix("bytes=").rstrip("-")) if range_header and mirror.can_resume else 0
        if start >= len(data):
            return self.answer(416, b"", "text/plain", {"Content-Range": f"bytes */{len(data)}"})
        cuts = mirror.cuts.get(path)
        length = cuts.pop(0) if cuts else len(data)
        extra = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self.answer(206 if start else 200, data[start:], "binary/octet-stream", extra, length)
        return None

    def answer(
        self, status: int, body: bytes, kind: str, extra: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(extra or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:length])

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Mirror(ThreadingHTTPServer):
    """Meta's server; the attributes say how it misbehaves."""

    daemon_threads = False  # so that server_close() waits for them

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = llama_files()
        self.requests: list[tuple[str, str | None]] = []
        self.statuses: dict[str, int] = {}
        self.pages: set[str] = set()
        self.corrupt: set[str] = set()
        self.cuts: dict[str, list[int]] = {}  # per answer, after how many bytes the connection breaks
        self.can_resume = True
        self.query = SECRET
        self.errors: list[BaseException | None] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/*?{SECRET}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):  # curl hangs up on an answer that it cannot use
            self.errors.append(error)


class Sandbox:
    """A folder with a space in its name, and a PATH that has the chosen tools and no others."""

    def __init__(self, mirror: Mirror, root: Path, downloader: str = "curl", hasher: str = "md5sum") -> None:
        self.mirror, self.to, self.bin = mirror, root / "my models", root / "bin"
        self.bin.mkdir()
        for tool in [*UTILITIES, "bash", downloader, hasher]:
            self.link(tool)
        self.script("sleep", "#!/bin/sh\n")
        self.env = {"PATH": str(self.bin), "HOME": str(root)}

    def link(self, tool: str) -> None:
        if tool == "md5" and not shutil.which("md5"):  # as on macOS: `md5 -q` prints the bare sum of stdin
            code = "assert sys.argv[1:] == ['-q']; print(hashlib.md5(sys.stdin.buffer.read()).hexdigest())"
            self.script("md5", f"#!{sys.executable}\nimport hashlib, sys; {code}\n")
        elif tool:
            where = shutil.which(tool)
            if where is None:
                pytest.skip(f"{tool} is not installed")
            (self.bin / tool).symlink_to(where)

    def script(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def plant(self, path: str, data: bytes) -> Path:
        (self.to / path).parent.mkdir(parents=True, exist_ok=True)
        (self.to / path).write_bytes(data)
        return self.to / path

    def run(self, *args: str, command: tuple[str, ...] | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*(command or (str(self.bin / "bash"), str(SCRIPT))), *args],
            env=self.env | env, cwd=self.bin.parent, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=60,
            check=False,
        )  # fmt: skip
        self.check(done.stdout + done.stderr)
        return done

    def fetch(self, models: str = "7B", **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return self.run("--url", self.mirror.url, "--models", models, "--to", str(self.to), **kwargs)

    def check(self, output: str) -> None:
        assert "s3cr3t" not in output
        for path, data in self.complete().items():
            assert data == self.mirror.files[path], f"{path} looks complete and is not"

    def complete(self) -> dict[str, bytes]:
        files = (file for file in sorted(self.to.rglob("*")) if file.is_file() and file.suffix != ".part")
        return {str(file.relative_to(self.to)): file.read_bytes() for file in files}

    def parts(self) -> list[str]:
        return [str(file.relative_to(self.to)) for file in self.to.rglob("*.part")]

    def expected(self, *models: str) -> set[str]:
        folders = {folder(model) for model in models}
        return {path for path in self.mirror.files if "/" not in path or path.split("/")[0] in folders}

    def requested(self, path: str) -> list[str | None]:
        return [range_header for name, range_header in self.mirror.requests if name == path]


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    with Mirror() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    assert server.errors == []


@pytest.fixture
def box(mirror: Mirror, tmp_path: Path) -> Sandbox:
    return Sandbox(mirror, tmp_path)


@pytest.fixture(params=["curl", "wget"])
def any_box(request: pytest.FixtureRequest, mirror: Mirror, tmp_path: Path) -> Sandbox:
    return Sandbox(mirror, tmp_path, downloader=request.param)


def succeeded(done: subprocess.CompletedProcess[str]) -> bool:
    assert (done.returncode, done.stderr) == (0, "")
    return True


def failed(done: subprocess.CompletedProcess[str], *words: str) -> bool:
    """It ended with one message, which has these words, and with a status that says so."""
    assert done.returncode == 1
    assert done.stderr.startswith("download.sh: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr
    return True


# What it does when all is well


@pytest.mark.parametrize("hasher", ["md5sum", "md5", "openssl"])
@pytest.mark.parametrize("downloader", ["curl", "wget"])
def test_downloads_models_into_metas_folders(mirror: Mirror, tmp_path: Path, downloader: str, hasher: str) -> None:
    box = Sandbox(mirror, tmp_path, downloader, hasher)
    done = box.fetch("7B-chat,13B")
    assert succeeded(done)
    assert set(box.complete()) == box.expected("7B-chat", "13B")
    assert box.parts() == []
    order = [path for path, _ in mirror.requests]
    assert order == [
        "LICENSE", "USE_POLICY.md", "tokenizer_checklist.chk", "tokenizer.model",
        *(f"llama-2-7b-chat/{name}" for name in ["checklist.chk", "consolidated.00.pth", "params.json"]),
        *(f"llama-2-13b/{name}" for name in ["checklist.chk", "consolidated.00.pth", "consolidated.01.pth",
            "params.json"]),
    ]  # fmt: skip
    for path in order:  # one line a file, and no progress bar where nobody watches
        assert done.stdout.count(path + ": ") == 1
    assert len(done.stdout.splitlines()) == len(order) + 2


def test_all_is_every_model(box: Sandbox) -> None:
    assert succeeded(box.fetch("all"))
    assert set(box.complete()) == set(box.mirror.files)


def test_takes_environment_variables_and_equal_signs(box: Sandbox) -> None:
    assert succeeded(box.run(LLAMA_URL=box.mirror.url, LLAMA_MODELS="7B", LLAMA_DIR=str(box.to)))
    assert set(box.complete()) == box.expected("7B")
    assert succeeded(box.run(f"--url={box.mirror.url}", "--models=13B", f"--to={box.to}", LLAMA_MODELS="no such model"))
    assert set(box.complete()) == box.expected("7B", "13B")


def test_the_default_folder_is_the_current_one(box: Sandbox) -> None:
    assert succeeded(box.run("--url", box.mirror.url, "--models", "7B"))
    assert (box.bin.parent / SHARD_7B).is_file()


def test_a_folder_may_begin_with_a_dash(box: Sandbox) -> None:
    assert succeeded(box.run("--url", box.mirror.url, "--models", "7B", "--to", "-x y"))
    assert (box.bin.parent / "-x y" / SHARD_7B).is_file()


def test_skips_what_already_verifies(any_box: Sandbox) -> None:
    assert succeeded(any_box.fetch())
    any_box.mirror.requests.clear()
    done = any_box.fetch()
    assert succeeded(done)
    assert any_box.mirror.requests == []
    assert f"{SHARD_7B}: already here, checksum right" in done.stdout


def test_only_the_first_star_is_replaced(box: Sandbox) -> None:
    """A signature may hold a * too; a changed one is answered with 403."""
    box.mirror.query += "*"
    assert succeeded(box.run("--url", box.mirror.url + "*", "--models", "7B", "--to", str(box.to)))


def test_the_link_is_not_in_the_list_of_processes(any_box: Sandbox) -> None:
    for tool in ["curl", "wget"]:
        if (any_box.bin / tool).exists():
            real = os.readlink(any_box.bin / tool)
            (any_box.bin / tool).unlink()
            any_box.script(tool, f'#!/bin/sh\nprintf "%s\\n" "$*" >> "$HOME/arguments"\nexec {real} "$@"\n')
    assert succeeded(any_box.run("--models", "7B", "--to", str(any_box.to), LLAMA_URL=any_box.mirror.url))
    arguments = (any_box.bin.parent / "arguments").read_text()
    assert arguments.count("\n") == 7
    assert "s3cr3t" not in arguments


# On a terminal


def converse(box: Sandbox, answers: list[tuple[str, str]], *args: str) -> tuple[int, str]:
    """Runs the script on a pseudo-terminal; each answer is typed once its prompt has been seen."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [box.bin / "bash", SCRIPT, *args],
        env=box.env | {"TERM": "dumb"}, cwd=box.bin.parent, stdin=slave, stdout=slave, stderr=slave,
        start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    seen = ""
    with process:
        try:
            while select.select([master], [], [], 60)[0]:
                try:
                    data = os.read(master, 4096)
                except OSError:  # Linux's way to say that the other side has closed
                    break
                if not data:
                    break
                seen += data.decode()
                if answers and answers[0][0] in seen:
                    os.write(master, answers.pop(0)[1].encode())
        finally:
            os.close(master)
            process.terminate()
    return process.returncode, seen


def test_asks_for_the_url_and_the_models(any_box: Sandbox) -> None:
    answers = [("URL from the e-mail: ", any_box.mirror.url + "\n"), ("for all: ", "7B,7B-chat\n")]
    status, seen = converse(any_box, answers, "--to", str(any_box.to))
    assert (status, answers) == (0, []), seen
    assert set(any_box.complete()) == any_box.expected("7B", "7B-chat")
    assert "100" in seen  # the progress bar


def test_enter_means_every_model(box: Sandbox) -> None:
    box.mirror.statuses["llama-2-13b/checklist.chk"] = 404  # that it gets here is enough
    status, seen = converse(box, [("for all: ", "\n")], "--to", str(box.to), "--url", box.mirror.url)
    assert status == 1
    assert "no llama-2-13b/checklist.chk" in seen
    assert set(box.complete()) == box.expected("7B")


def test_ctrl_d_is_not_every_model(box: Sandbox) -> None:
    status, seen = converse(box, [("for all: ", "\x04")], "--url", box.mirror.url)
    assert status == 1
    assert "stopped" in seen
    assert box.mirror.requests == []


def test_refuses_an_email_address_before_asking_more(box: Sandbox) -> None:
    status, seen = converse(box, [("URL from the e-mail: ", "somebody@example.com\n")])
    assert status == 1
    assert "that is an e-mail address" in seen
    assert "for all" not in seen


def test_says_which_flag_is_missing_where_it_cannot_ask(box: Sandbox) -> None:
    assert failed(box.run(), "--url", "LLAMA_URL")
    assert failed(box.run("--url", box.mirror.url), "--models", "LLAMA_MODELS")


# What it refuses before it asks the server for anything


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://download.llamameta.net/LICENSE?Policy=x", "no *"),
        ("somebody@example.com", "e-mail address"),
        ("mailto:somebody@example.com", "e-mail address"),
        ("'https://download.llamameta.net/*?Policy=x'", "a quote"),
        ('"https://download.llamameta.net/*?Policy=x"', "a quote"),
        ("\u201chttps://download.llamameta.net/*?Policy=x\u201d", "a quote"),
        (r"https://download.llamameta.net/\*\?Policy=x", "a backslash"),
        ("<https://download.llamameta.net/*?Policy=x>", "another character"),
        ("https://download.llamameta.net/*?Policy=x ", "line break"),
        ("https://download.llamameta.net/*?Policy=x\r", "line break"),
        ("https://download.llamameta.net/*?Pol\nicy=x", "line break"),
        ("https://download.llamameta.net/*?Key-Pair-Id=XSelect", "'Select'"),
        ("https://download.llamameta.net/*?Policy=x.", "a full stop"),
        ("https://download.llamameta.net/*?Policy=x)", "a bracket"),
        ("https://urldefense.com/v3/__https://download.llamameta.net/*?Policy=x__;Kg!!Y", "wrapped by urldefense.com"),
        (
            "https://urldefense.proofpoint.com/v2/url?u=https-3A__download.llamameta.net_-2A-3FPolicy",
            "wrapped by urldefense",
        ),
        (
            "https://eur01.safelinks.protection.outlook.com/?url=https%3A%2F%2Fdownload.llamameta.net%2F*",
            "wrapped by eur01",
        ),
        ("https://l.facebook.com/l.php?u=https%3A%2F%2Fdownload.llamameta.net%2F*", "wrapped by l.facebook.com"),
        ("https://example.com/?to=https%3a%2f%2fdownload.llamameta.net/*", "wrapped in another"),
        ("download.llamameta.net/*?Policy=x", "begin with https://"),
        ("ftp://download.llamameta.net/*?Policy=x", "begin with https://"),
    ],
)
def test_refuses_what_is_not_the_link(box: Sandbox, url: str, words: str) -> None:
    done = box.run("--url", url, "--models", "7B", "--to", str(box.to))
    assert failed(done, words)
    assert "Policy=x" not in done.stderr
    assert not box.to.exists()


@pytest.mark.parametrize("models", ["7b", "7B,8B", "llama-2-7b", "7B-chat-hf", "*", "7B;13B", "13B 7"])
def test_refuses_unknown_models(box: Sandbox, models: str) -> None:
    assert failed(box.fetch(models), "unknown model", "7B,13B,70B,7B-chat,13B-chat,70B-chat")
    assert box.mirror.requests == []


def test_refuses_arguments_that_it_does_not_know(box: Sandbox) -> None:
    assert failed(box.run("--modles", "7B"), "unknown argument '--modles'")
    assert failed(box.run("--url"), "--url needs a value")
    assert failed(box.run("--models="), "--models needs a value")
    assert failed(box.fetch(","), "empty")


@pytest.mark.parametrize(("missing", "words"), [("curl", ["curl", "wget"]), ("md5sum", ["md5sum", "md5", "openssl"])])
def test_says_which_tools_it_needs(box: Sandbox, missing: str, words: list[str]) -> None:
    (box.bin / missing).unlink()
    assert failed(box.fetch(), *words, "install")


def test_help(box: Sandbox) -> None:
    done = box.run("--help")
    assert succeeded(done)
    assert set(re.findall(r"--\w+|LLAMA_\w+", done.stdout)) == {
        "--url", "--models", "--to", "LLAMA_URL", "LLAMA_MODELS", "LLAMA_DIR"
    }  # fmt: skip


# When the transfer goes wrong


@pytest.mark.parametrize(
    ("status", "path", "words"),
    [
        (403, "LICENSE", "expired"),
        (403, SHARD_7B, "expired"),
        (404, SHARD_7B, "HTTP 404"),
        (416, SHARD_7B, "HTTP 416"),
        (503, SHARD_7B, "HTTP 503"),
    ],
)
def test_http_errors(any_box: Sandbox, status: int, path: str, words: str) -> None:
    any_box.mirror.statuses[path] = status
    assert failed(any_box.fetch(), words, path)
    assert path not in any_box.complete()
    assert any_box.parts() == []


def test_an_expired_link_keeps_what_has_come(any_box: Sandbox) -> None:
    part = any_box.plant(SHARD_7B + ".part", any_box.mirror.files[SHARD_7B][:1000])
    any_box.mirror.statuses[SHARD_7B] = 403
    assert failed(any_box.fetch(), "HTTP 403", "Ask for a new one")
    assert part.stat().st_size == 1000


@pytest.mark.parametrize("path", ["LICENSE", "tokenizer_checklist.chk", SHARD_7B])
def test_a_web_page_in_place_of_a_file(any_box: Sandbox, path: str) -> None:
    any_box.mirror.pages.add(path)
    assert failed(any_box.fetch(), "web page", path)
    assert path not in any_box.complete()
    assert any_box.parts() == []


def test_a_web_page_in_place_of_the_rest_of_a_file(any_box: Sandbox) -> None:
    part = any_box.plant(SHARD_7B + ".part", any_box.mirror.files[SHARD_7B][:1000])
    any_box.mirror.pages.add(SHARD_7B)
    assert failed(any_box.fetch(), "web page")
    assert part.exists() == (any_box.bin / "curl").exists()  # wget has overwritten it before it can be asked


def test_pages_that_another_downloader_saved_are_replaced(box: Sandbox) -> None:
    """Meta's script saved error pages as LICENSE and checklist.chk, and then could not parse them, run after run."""
    for path in ["LICENSE", "llama-2-7b/checklist.chk", SHARD_7B]:
        box.plant(path, b"<!doctype html><html>Unsupported browser")
    assert succeeded(box.fetch())
    assert set(box.complete()) == box.expected("7B")


def test_a_checklist_without_checksums(box: Sandbox) -> None:
    box.mirror.files["llama-2-7b/checklist.chk"] = b"come back later\n"
    assert failed(box.fetch(), "llama-2-7b/checklist.chk is not that file")
    assert "llama-2-7b/checklist.chk" not in box.complete()
    assert box.parts() == []


@pytest.mark.parametrize("line", ["{} *{}\r\n", "{} {}\n"])
def test_checklists_of_other_systems(box: Sandbox, line: str) -> None:
    """Binary mode's asterisk, capitals, and a carriage return after the name."""
    names = ["consolidated.00.pth", "params.json"]
    sums = {name: hashlib.md5(box.mirror.files[f"llama-2-7b/{name}"]).hexdigest().upper() for name in names}
    box.mirror.files["llama-2-7b/checklist.chk"] = "".join(line.format(sums[name], name) for name in names).encode()
    done = box.fetch()
    assert succeeded(done)
    assert done.stdout.count("checksum right") == 3


@pytest.mark.parametrize("path", ["tokenizer.model", SHARD_7B, "llama-2-7b/params.json"])
def test_a_wrong_checksum(any_box: Sandbox, path: str) -> None:
    any_box.mirror.corrupt.add(path)
    assert failed(any_box.fetch(), f"{path} arrived with a wrong checksum and was deleted")
    assert path not in any_box.complete()
    assert any_box.parts() == []
    any_box.mirror.corrupt.clear()
    assert succeeded(any_box.fetch())


def test_a_hash_tool_that_fails_costs_no_download(box: Sandbox) -> None:
    """`openssl md5` fails where only FIPS algorithms are allowed: that says nothing about the file."""
    part = box.plant(SHARD_7B + ".part", box.mirror.files[SHARD_7B])
    (box.bin / "md5sum").unlink()
    box.script("md5", "#!/bin/sh\nexit 1\n")
    box.plant("tokenizer.model", box.mirror.files["tokenizer.model"])
    assert failed(box.fetch(), "md5 could not compute")
    assert part.exists()
    assert "tokenizer.model" in box.complete()


@pytest.mark.parametrize("full", ["limit", "device"])
def test_a_full_disk(any_box: Sandbox, full: str) -> None:
    inner = (str(any_box.bin / "bash"), str(SCRIPT))
    if full == "limit":  # 16 kB a file, and the signal ignored, so that writing fails as on a full disk
        done = any_box.fetch(command=(inner[0], "-c", 'trap "" XFSZ; ulimit -f 16; exec "$0" "$@"', *inner))
        assert any_box.parts() == [SHARD_7B + ".part"]
    else:
        if not Path("/dev/full").exists():
            pytest.skip("this system has no /dev/full")
        (any_box.to / "llama-2-7b").mkdir(parents=True)
        (any_box.to / f"{SHARD_7B}.part").symlink_to("/dev/full")
        done = any_box.fetch()
    assert failed(done, "could not write", "disk is full", "MB free")
    assert SHARD_7B not in any_box.complete()
    any_box.mirror.requests.clear()
    assert succeeded(any_box.fetch())
    assert any_box.requested(SHARD_7B) == [None if full == "device" else f"bytes={16 * 1024}-"]


@pytest.mark.parametrize("path", ["LICENSE", SHARD_7B])
def test_a_cut_connection(any_box: Sandbox, path: str) -> None:
    """Cut for good after 20 bytes: it tries once more, sees that nothing comes, and keeps what can be resumed."""
    any_box.mirror.cuts[path] = [20, 0]
    assert failed(any_box.fetch(), f"connection broke at 20 bytes of {path}", "resume")
    assert path not in any_box.complete()
    assert any_box.parts() == [path + ".part"]
    assert any_box.requested(path) == [None, "bytes=20-"]
    assert succeeded(any_box.fetch())
    assert any_box.requested(path)[2:] == (["bytes=20-"] if path == SHARD_7B else [None])
    assert set(any_box.complete()) == any_box.expected("7B")
    assert any_box.parts() == []


def test_a_connection_that_breaks_now_and_then(any_box: Sandbox) -> None:
    any_box.mirror.cuts[SHARD_7B] = [10_000, 20_000, 5]
    assert succeeded(any_box.fetch())
    assert any_box.requested(SHARD_7B) == [None, "bytes=10000-", "bytes=30000-", "bytes=30005-"]


def test_no_server(box: Sandbox) -> None:
    url = "http://127.0.0.1:1/*?" + SECRET
    assert failed(box.run("--url", url, "--models", "7B", "--to", str(box.to)), "could not reach the server")


# Resuming


def test_resumes_a_partial_file(any_box: Sandbox) -> None:
    any_box.plant(SHARD_7B + ".part", any_box.mirror.files[SHARD_7B][:40_000])
    assert succeeded(any_box.fetch())
    assert any_box.requested(SHARD_7B) == ["bytes=40000-"]


def test_resumes_a_file_that_another_downloader_left_half_done(any_box: Sandbox) -> None:
    """Meta's script writes under the file's own name, so half a file looks whole there."""
    any_box.plant(SHARD_7B, any_box.mirror.files[SHARD_7B][:40_000])
    assert succeeded(any_box.fetch())
    assert any_box.requested(SHARD_7B) == ["bytes=40000-"]


def test_resumes_a_file_that_was_whole_already(any_box: Sandbox) -> None:
    any_box.plant(SHARD_7B + ".part", any_box.mirror.files[SHARD_7B])
    assert succeeded(any_box.fetch())
    assert any_box.requested(SHARD_7B) == ["bytes=60000-"]  # answered with 416


@pytest.mark.parametrize("size", [1000, 70_000])
def test_a_resumed_file_that_was_wrong_is_fetched_anew(any_box: Sandbox, size: int) -> None:
    any_box.plant(SHARD_7B + ".part", bytes(size))
    assert succeeded(any_box.fetch())
    assert any_box.requested(SHARD_7B) == [f"bytes={size}-", None]


@pytest.mark.parametrize("size", [1000, 60_000])
def test_a_server_that_cannot_resume(any_box: Sandbox, size: int) -> None:
    any_box.mirror.can_resume = False
    any_box.plant(SHARD_7B + ".part", bytes(size))
    assert succeeded(any_box.fetch())
    assert set(any_box.complete()) == any_box.expected("7B")


def test_a_server_that_cannot_resume_and_breaks(any_box: Sandbox) -> None:
    """It must not begin again for ever: the second try brings no more than the first."""
    any_box.mirror.can_resume = False
    any_box.mirror.cuts[SHARD_7B] = [500] * 10
    assert failed(any_box.fetch(), "connection broke")
    assert len(any_box.requested(SHARD_7B)) <= 4


# How it is started


def bashes() -> list[str]:
    """Every bash here; /bin/bash is 3.2 on macOS."""
    found = [BASH, "/bin/bash", "/usr/local/bin/bash", "/opt/homebrew/bin/bash", os.environ.get("BASH_3_2")]
    return sorted({os.path.realpath(path) for path in found if path and Path(path).exists()})


@pytest.mark.parametrize("bash", bashes())
@pytest.mark.parametrize("mode", [[], ["--posix"]])  # `sh download.sh` where sh is bash, as on macOS
def test_every_bash(box: Sandbox, bash: str, mode: list[str]) -> None:
    assert succeeded(box.fetch("7B,13B-chat", command=(bash, *mode, str(SCRIPT))))
    assert set(box.complete()) == box.expected("7B", "13B-chat")


@pytest.mark.parametrize("shell", ["dash", "zsh", "ksh", "busybox"])
def test_another_shell_hands_over_to_bash(box: Sandbox, shell: str) -> None:
    where = shutil.which(shell)
    if where is None:
        pytest.skip(f"{shell} is not installed")
    command = (where, *(["sh"] if shell == "busybox" else []), str(SCRIPT))
    assert succeeded(box.fetch(command=command))
    (box.bin / "bash").unlink()
    done = box.fetch(command=command)
    assert done.returncode == 1
    assert "needs bash" in done.stderr
    assert done.stderr.count("\n") == 1


def test_windows_line_ends(box: Sandbox, tmp_path: Path) -> None:
    assert b"\r" not in SCRIPT.read_bytes()
    damaged = tmp_path / "download.sh"
    damaged.write_bytes(SCRIPT.read_bytes().replace(b"\n", b"\r\n"))
    done = box.fetch(command=(str(box.bin / "bash"), str(damaged)))
    assert done.returncode == 1
    assert "Windows line ends" in done.stderr
    assert done.stderr.count("\n") == 1


NEWER_THAN_BASH_3_2 = {
    "associative arrays, namerefs and other attributes": r"\b(declare|local|typeset|readonly)\s+-\w*[AnguClI]",
    "mapfile, readarray, coproc": r"\b(mapfile|readarray|coproc)\b",
    "change of case": r"\$\{[^}]*(\^|,,|,\})",
    "transformations": r"\$\{\w+(\[[@*]\])?@\w\}",
    "|& and &>>": r"\|&|&>>",
    "fall through in case": r";;?&",
    "negative subscripts": r"\[-\d+\]\}|\$\{\w+:[^}]*:\s*-\d",
    "test -v and -R": r"\[\[? -[vR] ",
    "wait -n, read -i, read -N, read -t with a fraction": r"\bwait -n|\bread\s+-\w*[iN]|\bread\b.*-t\s*\.?\d+\.",
    "brace steps and padding": r"\{\d+\.\.\d+\.\.\d+\}|\{0\d+\.\.",
    "special variables": r"\$\{?(EPOCH|BASHPID|SRANDOM|BASH_ARGV0)",
    "printf of times": r"%\(",
    "shopts": r"\b(globstar|lastpipe|inherit_errexit)\b",
    "$'\\u'": r"\$'[^']*\\[uU]",
    "process substitution, which 3.2 lacks in POSIX mode": r"[<>]\(",
    "here-strings, which need room in the temporary folder": r"<<<",
}


@pytest.mark.parametrize("what", NEWER_THAN_BASH_3_2)
def test_nothing_newer_than_bash_3_2(what: str) -> None:
    """Where no bash 3.2 is at hand to run it: a lint, not a proof."""
    code = re.sub(r"(^|\s)#.*", "", SCRIPT.read_text(), flags=re.MULTILINE)
    assert re.findall(NEWER_THAN_BASH_3_2[what], code) == []


def test_no_array_can_be_empty() -> None:
    """Under `set -u`, bash before 4.4 calls "${empty[@]}" an unbound variable."""
    code = SCRIPT.read_text()
    assert set(re.findall(r"\$\{(\w+)\[@\]", code)) == {"bar"}
    assert re.findall(r"\bbar=\(\s*\)", code) == []


def test_shellcheck() -> None:
    tool = shutil.which("shellcheck")
    if tool is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([tool, str(SCRIPT)], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
