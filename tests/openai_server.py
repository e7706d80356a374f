"""A stand-in for a server that speaks OpenAI's words: it says what a test tells it to, and keeps what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple, Union

LIMIT = 512
NOTHING: Mapping[str, str] = MappingProxyType({})


class Error(NamedTuple):
    """An answer that is none. Without a message it is no JSON either, as that of a proxy."""

    status: int
    message: str
    headers: Mapping[str, str] = NOTHING


# An answer: its pieces of text, Events that it waits for, chunks that go out as they are, or whole lines of data. After
# None the connection is lost.
Pieces = Sequence[Union[str, threading.Event, dict[str, Any], None]]


class OpenAI:
    """Serves on a port of its own. answers: those to come, in order; then "Hello." comes for ever. asked: (path, body)
    of each request. left: set when a client went away in the middle of an answer. pages: path -> (headers, content)."""

    def __init__(self) -> None:
        self.pages: dict[str, tuple[dict[str, str], bytes]] = {}
        self.reset()
        handler = type("Handler", (_Handler,), {"stand_in": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def reset(self) -> None:
        """As it was at first, but for its pages."""
        self.answers: list[Union[Pieces, Error]] = []
        self.asked: list[tuple[str, Any]] = []
        self.key = ""
        self.counts = True  # answers /tokenize, which is no part of OpenAI's API
        self.models: list[dict[str, Any]] = [{"id": "stand-in", "object": "model", "max_model_len": LIMIT}]
        self.left = threading.Event()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def last(self) -> Any:
        """The body of the newest request for an answer."""
        return next(body for _, body in reversed(self.asked) if body is not None)


class _Handler(BaseHTTPRequestHandler):
    stand_in: OpenAI
    protocol_version = "HTTP/1.0"  # a stream ends with its connection

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        stand_in = self.stand_in
        stand_in.asked.append((self.path, None))
        if self.path in stand_in.pages:
            headers, content = stand_in.pages[self.path]
            return self.reply(200, content, headers)
        if self.refused():
            return None
        return self.reply(200, json.dumps({"object": "list", "data": stand_in.models}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.stand_in.asked.append((self.path, body))
        if self.refused():
            return None
        if self.path == "/tokenize":
            told = {"count": len(body["prompt"].split()), "max_model_len": LIMIT}
            return self.reply(200, json.dumps(told).encode()) if self.stand_in.counts else self.fail(404, "not here")
        answer = self.stand_in.answers.pop(0) if self.stand_in.answers else ["Hello", "."]
        if isinstance(answer, Error):
            self.fail(*answer)
        else:
            self.stream(answer, "chat" in self.path)
        return None

    def refused(self) -> bool:
        key = self.stand_in.key
        if not key or self.headers.get("Authorization") == f"Bearer {key}":
            return False
        self.fail(401, "the API key is missing or wrong")
        return True

    def reply(self, status: int, content: bytes, headers: Mapping[str, str] = NOTHING) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def fail(self, status: int, message: str, headers: Mapping[str, str] = NOTHING) -> None:
        content = json.dumps({"error": {"message": message, "type": "test", "code": None}}) if message else "<html>"
        self.reply(status, content.encode(), headers)

    def stream(self, pieces: Pieces, is_chat: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.wfile.write(b": a comment\r\n\r\n")
            count, reason = 0, "stop"
            for piece in pieces:
                if piece is None:
                    return
                if isinstance(piece, threading.Event):
                    while not piece.wait(0.02):
                        self.wfile.write(b": still there\n\n")
                elif isinstance(piece, dict):
                    reason = piece.get("reason", reason)
                    self.send(piece)
                elif piece.startswith("data: "):
                    self.wfile.write(piece.encode() + b"\n\n")
                else:
                    count += 1
                    told = {"delta": {"content": piece}} if is_chat else {"text": piece}
                    self.send({"choices": [{"index": 0, **told, "finish_reason": None}]})
            told = {"delta": {}} if is_chat else {"text": ""}
            self.send({"choices": [{"index": 0, **told, "finish_reason": reason}]})
            usage = {"prompt_tokens": 12, "completion_tokens": count, "total_tokens": 12 + count}
            self.send({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.stand_in.left.set()

    def send(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n")
