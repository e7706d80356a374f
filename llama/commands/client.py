"""A server that speaks OpenAI's API, as the commands ask it: streams, and errors in plain words."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, Optional, Union, cast
from urllib.parse import SplitResult, urlsplit

from ..completion import Chunk
from ..options import DEFAULTS, parse_options
from ..system.files import parse_json
from ..system.printable import escaped, shortened

CONNECT_SECONDS = 20.0  # an answer may take as long as it does: Ctrl-C ends the wait
MOST_LINE = 2**24  # bytes of one event
MOST_BYTES = 2**26  # bytes of an answer that is no stream
SENT = ("temperature", "top_p")  # sent even at our defaults, since a server's differ
API_NAMES = {"max_gen_len": "max_tokens"}


class Server:
    """A server at a URL. ValueErrors say in plain words what it refuses, or that it is not there."""

    def __init__(self, url: str, key: Optional[str] = None, model: Optional[str] = None) -> None:
        """model: the first that the server lists if not given. This asks it; `limit` is the tokens that it has room
        for, if it tells."""
        self.parts = parts = _address(url)
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ValueError("the API key has characters that no header can carry")
        self.base = parts.path.rstrip("/").removesuffix("/v1")
        self.key, self.url = key, f"{parts.scheme}://{parts.netloc}{self.base}"
        self.used = 0  # tokens of the last prompt and its answer
        listed = self.ask("GET", "/v1/models").get("data")
        cards = [card for card in listed if isinstance(card, dict)] if isinstance(listed, list) else []
        card = next((card for card in cards if model in (None, card.get("id"))), {"id": model})
        if card["id"] is None:
            raise ValueError(f"{self.url} lists no model; pass --model NAME")
        meta = card.get("meta")  # llama.cpp tells the limit there
        limit = card.get("max_model_len") or (meta.get("n_ctx_train") if isinstance(meta, dict) else None)
        self.name, self.limit = str(card["id"]), number_of(limit) or None

    def check_options(self, options: Mapping[str, Any]) -> None:
        """ValueError for an option that is out of range; the server checks again."""
        parse_options(options, prompts=1, vocab_size=1, max_seq_len=1)

    def ask(self, method: str, path: str, body: Optional[Mapping[str, Any]] = None) -> dict[str, Any]:
        """The object that it answers with."""
        with self._answer(method, path, body) as response:
            try:
                told = parse_json(response.read(MOST_BYTES))
            except ValueError as error:
                raise ValueError(
                    f"{self.url}{path} answers something else than JSON; is it a server of OpenAI's API?"
                ) from error
        return told if isinstance(told, dict) else {}

    def stream(self, path: str, options: Mapping[str, Any], body: Mapping[str, Any]) -> Iterator[Chunk]:
        """The chunks of an answer, as they come. Their `tokens` are as many as the server counts, all in the last one:
        it does not tell the ids. To leave early closes the connection, which tells the server to stop."""
        given = {**{name: DEFAULTS[name] for name in SENT}, **options}
        form = _form(given.pop("constraint", None))
        sent = {
            API_NAMES.get(name, name): v for name, v in given.items() if name in SENT or v not in (None, DEFAULTS[name])
        }
        asked = {"model": self.name, **body, **sent, **form, "stream": True, "stream_options": {"include_usage": True}}
        reason: Any = None
        usage: Mapping[str, Any] = {}
        with self._answer("POST", path, asked) as response:
            for event in self._events(response):
                if (error := event.get("error")) is not None:
                    raise ValueError(f"something went wrong in the server: {_message(error)}")
                usage = event.get("usage") or usage
                for choice in event.get("choices") or ():
                    reason = choice.get("finish_reason") or reason
                    text = choice.get("text") or (choice.get("delta") or {}).get("content")
                    if text:
                        yield Chunk(index=0, text=str(text), tokens=[], finish_reason=None)
        if reason is None:
            raise ValueError("the connection was lost before the answer ended")
        full = reason == "length" and given.get("max_gen_len") is None and self.limit is not None
        self.used, count = number_of(usage.get("total_tokens")), number_of(usage.get("completion_tokens"))
        yield Chunk(index=0, text="", tokens=[0] * count, finish_reason="context" if full else reason)

    def _events(self, response: HTTPResponse) -> Iterator[dict[str, Any]]:
        """The objects of a stream of server-sent events, up to [DONE] or its end."""
        while line := response.readline(MOST_LINE + 1):
            if len(line) > MOST_LINE:
                raise ValueError(f"{self.url} sends a line of more than {MOST_LINE} bytes")
            name, _, data = line.strip().partition(b":")
            if name != b"data" or not data.strip():
                continue
            if data.strip() == b"[DONE]":
                return
            try:
                event = parse_json(data)
            except ValueError as error:
                raise ValueError(f"{self.url} sends something that is no answer: {shortened(data)}") from error
            if isinstance(event, dict):
                yield event

    @contextmanager
    def _answer(self, method: str, path: str, body: Optional[Mapping[str, Any]]) -> Iterator[HTTPResponse]:
        host, port = cast(str, self.parts.hostname), self.parts.port
        connection: Union[HTTPConnection, HTTPSConnection] = HTTPConnection(host, port, timeout=CONNECT_SECONDS)
        if self.parts.scheme == "https":
            connection = HTTPSConnection(host, port, timeout=CONNECT_SECONDS, context=ssl.create_default_context())
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        with closing(connection):
            try:
                connection.connect()
                connection.sock.settimeout(None)
                connection.request(
                    method, self.base + path, None if body is None else json.dumps(body).encode(), headers
                )
                response = connection.getresponse()
            except (OSError, HTTPException) as error:
                raise ValueError(f"{self.url} cannot be reached: {_why(error)}; is the server running?") from error
            if response.status != 200:
                raise ValueError(self._refusal(path, response))
            try:
                with closing(response):
                    yield response
            except (OSError, HTTPException) as error:
                raise ValueError(f"the connection to {self.url} was lost: {_why(error)}") from error

    def _refusal(self, path: str, response: HTTPResponse) -> str:
        status, wait = response.status, response.headers.get("Retry-After")
        try:
            told = _message(json.loads(response.read(2**20)).get("error"))
        except (ValueError, AttributeError, OSError, HTTPException):
            told = f"status {status} {response.reason}"
        if status == 401:
            return (
                f"{self.url} wants an API key; pass --api_key"
                if self.key is None
                else f"{self.url} refuses the API key"
            )
        if status == 404:
            return f"the server does not have this ({path}): {told}"
        if status == 429:
            return f"the server is busy; try again {f'in {escaped(wait)} s' if wait else 'later'}"
        return f"something went wrong in the server: {told}" if status >= 500 else f"the server refused this: {told}"


def _form(constraint: Optional[Mapping[str, Any]]) -> dict[str, Any]:
    """The option `constraint` in the fields of the API, and in our own server's where the API has none."""
    fields: dict[str, Any] = {}
    for kind, value in (constraint or {}).items():
        if kind == "json_object":
            fields["response_format"] = {"type": kind}
        elif kind == "json_schema":
            schema = parse_json(value.encode()) if isinstance(value, str) else value
            fields["response_format"] = {"type": kind, kind: {"name": "answer", "schema": schema}}
        else:
            fields[kind] = value
    return fields


def _address(url: str) -> SplitResult:
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        good = parts.port != 0 and parts.hostname and parts.scheme in ("http", "https")
    except ValueError:  # a port that is no number
        good = False
    if not good or parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"--url {shortened(url)} must be the address of a server, such as http://127.0.0.1:8000")
    return parts


def number_of(value: Any) -> int:
    """A count of tokens; 0 for anything else."""
    return value if isinstance(value, int) and 0 < value < 2**24 else 0


def _message(error: Any) -> str:
    return escaped(str(error.get("message", "")) if isinstance(error, dict) else str(error))


def _why(error: Exception) -> str:
    return escaped(getattr(error, "strerror", None) or str(error) or type(error).__name__)
