"""A Hugging Face Hub on this machine, as far as huggingface_hub asks one for models: their files, redirects, and
refusals."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Optional
from urllib.parse import unquote, urlsplit

LARGE = 4096  # bytes from which a file lies elsewhere, as Git LFS has it: the hub answers with a redirect
TOKEN = "hf_of_the_test"


@lru_cache(maxsize=1000)  # each answer needs those of all files
def digest(data: bytes, kind: str = "sha1") -> str:
    return hashlib.new(kind, data).hexdigest()


@dataclass
class Repo:
    """files: revision -> name -> bytes. gated: whether only TOKEN may read them; private: nor know of them."""

    files: dict[str, dict[str, bytes]]
    gated: bool = False
    private: bool = False

    def commit(self, revision: str) -> Optional[str]:
        told = {
            name: sorted((file, digest(data)) for file, data in files.items()) for name, files in self.files.items()
        }
        commits = {name: digest(repr(files).encode()) for name, files in told.items()}
        return commits.get(revision, revision if revision in commits.values() else None)

    def at(self, revision: str) -> Mapping[str, bytes]:
        return next(files for name, files in self.files.items() if revision in (name, self.commit(name)))


@dataclass
class Hub:
    """repos may be changed at any time. cut: name of a file -> how many of its next answers end in the middle. status:
    what is answered in place of everything else, for example 503. asked: "GET /path" of each request."""

    repos: dict[str, Repo] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    status: Optional[int] = None
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def gets(self) -> list[str]:
        """The names of the files that were sent."""
        return sorted(path.rpartition("/")[2] for path in self.asked if path.startswith(("GET /blobs", "GET /files")))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = (
        -1,
        True,
    )  # an answer in one piece: else the client's system waits 40 ms for more

    def log_message(self, *_: Any) -> None:
        pass

    def _note(self, path: str) -> None:
        self.hub.asked.append(f"{self.command} {path}")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self._note(path)
        if self.hub.status is not None:
            return self._send(self.hub.status, b"", {"X-Error-Message": "the hub is being tested"})
        if path.startswith("/blobs/"):  # where redirects lead: another host, which must not see the token
            assert "Authorization" not in self.headers
            repo, revision, name = path.removeprefix("/blobs/").split("!")
            return self._file(self.hub.repos[repo].at(revision), name.lstrip("/"), {})
        api = path.startswith("/api/models/")
        words = path.removeprefix("/api/models").lstrip("/").split("/")
        repo, rest = self.hub.repos.get("/".join(words[:2])), words[2:]
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not allowed):
            return self._send(
                401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."}
            )
        revision = "main"
        if len(rest) > 1:
            revision = rest[1] if rest[0] in ("tree", "resolve") else "/".join(rest[1:])
        if (commit := repo.commit(revision)) is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if api:
            return self._send(
                200, json.dumps(self._told(repo, commit, rest)).encode(), {"Content-Type": "application/json"}
            )
        if repo.gated and not allowed:
            return self._send(403 if "Authorization" in self.headers else 401, b"", {"X-Error-Code": "GatedRepo"})
        return self._resolve("/".join(words[:2]), repo, commit, "/".join(rest[2:]))

    def _told(self, repo: Repo, commit: str, rest: list[str]) -> Any:
        files = []
        for name, data in repo.at(commit).items():
            lfs = {
                "size": len(data),
                "sha256": digest(data, "sha256"),
                "oid": digest(data, "sha256"),
                "pointerSize": 130,
            }
            files.append({"size": len(data)} | ({"lfs": lfs} if len(data) >= LARGE else {}) | {
                "type": "file", "path": name, "oid": digest(data),
            } if rest[:1] == ["tree"] else {
                "rfilename": name, "size": len(data), "blobId": digest(data),
                **({"lfs": lfs} if len(data) >= LARGE else {}),
            })  # fmt: skip
        return files if rest[:1] == ["tree"] else {"id": "a model", "sha": commit, "siblings": files}

    def _resolve(self, repo_id: str, repo: Repo, commit: str, name: str) -> None:
        files = repo.at(commit)
        if name not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = files[name]
        head = {"X-Repo-Commit": commit, "ETag": f'"{digest(data)}"'}
        if len(data) < LARGE:
            self._note(f"/files/{name}")
            return self._file(files, name, head)
        more = {"X-Linked-ETag": f'"{digest(data, "sha256")}"', "X-Linked-Size": str(len(data))}
        elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
        return self._send(302, b"", head | more | {"Location": f"{elsewhere}/blobs/{repo_id}!{commit}!/{name}"})

    def _file(self, files: Mapping[str, bytes], name: str, head: dict[str, str]) -> None:
        data, status = files[name], 200
        if start := int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0]):
            self._note(f"/files/{name}?from={start}")
            head = head | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            data, status = data[start:], 206
        cut = self.command == "GET" and self.hub.cut.get(name, 0) > 0
        if cut:
            self.hub.cut[name] -= 1
        self._send(status, data, head, len(data) // 2 if cut else None)

    def _send(self, status: int, data: bytes, head: dict[str, str], most: Optional[int] = None) -> None:
        self.send_response(status)
        for key, value in head.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:most])
        self.close_connection = self.close_connection or most is not None
