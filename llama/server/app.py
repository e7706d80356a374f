"""The addresses of the server, and what holds for all of them: keys, limits, errors, one line in the log for each
request."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional

import anyio
import numpy as np
import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..completion import joined
from ..generation import Llama
from ..system import openmp
from ..system.files import parse_json
from ..system.printable import escaped, shortened
from ..system.program import nearest
from . import bodies
from .bodies import Wrong
from .metrics import Metrics
from .page import HEADERS, PAGE
from .replies import Reply
from .stepper import Answer, Busy, Ended, Gone, Stepper

log = logging.getLogger("llama.server")
ALIVE = 10.0  # seconds without an event, after which a stream sends a comment, so that nobody in between cuts it
BODY_SECONDS = 30.0  # a body must arrive within this time
REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
OPEN = ("/", "/health")  # addresses that need no key
Handler = Callable[["Server", HTTPRequest], Awaitable[Response]]


@dataclass(frozen=True)
class Settings:
    """How a server is to behave. hosts: names by which it may be called, any if empty. origins: of pages that may use
    it."""

    model: str
    key: Optional[str] = None
    max_waiting: int = 256
    max_body: int = 8 * 2**20  # bytes
    origins: Sequence[str] = ()
    hosts: Sequence[str] = ()
    alive: float = ALIVE


@dataclass
class Server:
    """A model behind HTTP."""

    llama: Llama
    settings: Settings
    stepper: Stepper
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))
    ending: bool = False

    @property
    def app(self) -> Starlette:
        """For uvicorn, or another server of ASGI applications."""
        routes = [
            Route("/v1/chat/completions", self._json(chat), methods=["POST"]),
            Route("/v1/completions", self._json(completions), methods=["POST"]),
            Route("/v1/embeddings", self._json(embeddings), methods=["POST"]),
            Route("/tokenize", self._json(tokenize), methods=["POST"]),
            Route("/detokenize", self._json(detokenize), methods=["POST"]),
            Route("/tokenizer_info", self._plain(tokenizer_info)),
            Route("/v1/models", self._plain(models)),
            Route("/v1/models/{model:path}", self._plain(model)),
            Route("/health", self._plain(health)),
            Route("/metrics", self._plain(metrics)),
            Route("/", self._plain(page)),
        ]
        middleware = [Middleware(_Watch, server=self)]
        if self.settings.origins:
            allowed = {"allow_origins": list(self.settings.origins), "allow_methods": ["*"], "allow_headers": ["*"]}
            middleware.append(Middleware(CORSMiddleware, **allowed))  # type: ignore[arg-type]
        handlers = {HTTPException: no_address}
        return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.stepper.start()
        yield
        self.stepper.end(Ended())

    def _plain(self, handler: Handler) -> Callable[[HTTPRequest], Awaitable[Response]]:
        """A route: a handler whose errors become answers."""

        async def route(request: HTTPRequest) -> Response:
            self._check_caller(request)
            return await handler(self, request)

        return route

    def _json(
        self, handler: Callable[[Server, HTTPRequest, Any], Awaitable[Response]]
    ) -> Callable[..., Awaitable[Response]]:
        """A route whose handler takes a body of JSON."""

        async def route(request: HTTPRequest) -> Response:
            self._check_caller(request)
            return await handler(self, request, await self._body(request))

        return route

    def _check_caller(self, request: HTTPRequest) -> None:
        host = re.sub(r":\d+$", "", request.headers.get("host", "")).lower()
        if self.settings.hosts and host not in self.settings.hosts:  # a page of another site, whose name leads here
            raise Wrong(
                f"this server is called {' or '.join(self.settings.hosts)}, not {shortened(host)}", code="wrong_host"
            )
        if (key := self.settings.key) is not None and request.url.path not in OPEN:
            kind, _, given = request.headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
                raise Wrong(
                    'this server wants its key: "Authorization: Bearer KEY"', code="invalid_api_key", status=401
                )

    async def _body(self, request: HTTPRequest) -> Any:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page of another site may send anything else without asking
            raise Wrong(f"the body must be application/json, not {escaped(kind) or 'without a type'}", status=415)
        data = bytearray()
        try:
            with anyio.fail_after(BODY_SECONDS):
                async for part in request.stream():
                    data += part
                    if len(data) > self.settings.max_body:
                        raise Wrong(f"the body is longer than {self.settings.max_body} bytes", status=413)
        except TimeoutError as error:
            raise Wrong(f"the body did not arrive within {BODY_SECONDS:g} s", status=408) from error
        try:
            return parse_json(bytes(data))
        except ValueError as error:
            raise Wrong(f"the body is no JSON: {escaped(str(error))}") from error

    def check_model(self, given: Any) -> None:
        """Wrong if another model was asked for."""
        if given is not None and given != self.settings.model:
            told = f"there is no model {shortened(given)} here; this is {self.settings.model!r}"
            raise Wrong(told, "model", "model_not_found", status=404)


class _Watch:
    """Numbers each request, writes its line in the log, and turns what goes wrong into answers."""

    def __init__(self, app: Any, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        scope["llama"] = told = {"id": given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)}
        began, status = time.perf_counter(), 0

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", told["id"].encode())]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception as error:
            if status == 0:
                await answer_to(error, told["id"])(scope, receive, sending)
            else:
                log.exception("request %s broke while it was answered", told["id"])
        finally:
            taken = time.perf_counter() - began
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self.server.metrics.requests.labels(path, status).inc()
            self.server.metrics.whole.labels(path).observe(taken)
            more = "".join(f" {name}={value}" for name, value in told.items())
            log.info("%s %s %s %.3fs%s", scope["method"], path, status or "gone", taken, more)


def no_address(request: HTTPRequest, error: Exception) -> Response:
    """What a client is told who asks for an address that is not there, or not for that method."""
    assert isinstance(error, HTTPException)
    path, paths = request.url.path, [route.path for route in request.app.routes]
    methods = sorted((error.headers or {}).get("Allow", "").split(", "))
    told = {
        404: f"there is no address {shortened(path)} here{nearest(path, paths)}",
        405: f"{shortened(path)} is not there for {request.method}; use {' or '.join(methods)}",
    }
    return failure(error.status_code, told.get(error.status_code, str(error.detail)), headers=error.headers)


def answer_to(error: Exception, request_id: str) -> Response:
    """What a client is told of an error. Of our own faults it is told the request's number, under which the log has
    them."""
    if isinstance(error, Wrong):
        return failure(error.status, str(error), error.field, error.code)
    if isinstance(error, Busy):
        return failure(429, str(error), code="queue_full", headers={"retry-after": "1"})
    if isinstance(error, Ended):
        return failure(503, "the server ends", code="ending")
    if isinstance(error, ValueError):
        return failure(400, str(error).replace("max_gen_len", "max_tokens"))
    if isinstance(error, (Gone, ClientDisconnect)):
        return Response(status_code=499)
    log.error("request %s failed", request_id, exc_info=error)
    return failure(500, f"the model failed; the log has the reason under the request id {request_id}")


def kind_of(status: int) -> str:
    """The word that OpenAI's API has for errors of a status."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    return "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")


def failure(
    status: int, message: str, param: Optional[str] = None, code: Optional[str] = None, headers: Any = None
) -> Response:
    """An error in OpenAI's shape."""
    error = {"message": escaped(message), "type": kind_of(status), "param": param, "code": code}
    return JSONResponse({"error": error}, status, headers)


# Completions


async def chat(server: Server, request: HTTPRequest, body: Any) -> Response:
    return await _complete(server, request, body, bodies.read_chat)


async def completions(server: Server, request: HTTPRequest, body: Any) -> Response:
    return await _complete(server, request, body, bodies.read_completion)


async def _complete(
    server: Server, request: HTTPRequest, body: Any, read: Callable[[Llama, Any], bodies.Request]
) -> Response:
    if server.stepper.error is not None:
        raise Ended
    server.stepper.check_room()
    if isinstance(body, dict):
        server.check_model(body.get("model"))
    asked = read(server.llama, body)
    begin = partial(server.llama.begin, asked.asked, streams=asked.stream)
    # A form may take seconds to compile; others are answered meanwhile.
    _, running = await run_in_threadpool(begin) if "constraint" in asked.asked.options else begin()
    reply = Reply(asked, running, server.settings.model)
    answer = server.stepper.submit(running, asked.stream)
    gone = asyncio.ensure_future(_until_gone(request))
    gone.add_done_callback(lambda _: answer.leave())
    if asked.stream:
        return Events(server, reply, answer, gone)
    try:
        for index, whole in joined(await answer.chunks()).items():
            reply.choices[index].add(whole)
    finally:
        gone.cancel()
    _count(server, request.scope["llama"], reply)
    return JSONResponse(reply.whole)


async def _until_gone(request: HTTPRequest) -> None:
    """Wait until the client has left."""
    with suppress(Exception):
        while (await request.receive())["type"] != "http.disconnect":
            pass


def _count(server: Server, told: dict[str, Any], reply: Reply) -> None:
    usage = reply.usage
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    server.metrics.prompt_tokens.inc(usage["prompt_tokens"])
    server.metrics.cached_tokens.inc(cached)
    server.metrics.generated_tokens.inc(usage["completion_tokens"])
    told |= {"prompt": usage["prompt_tokens"], "cached": cached, "generated": usage["completion_tokens"]}


class Events(Response):
    """A stream of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

    media_type = "text/event-stream"

    def __init__(self, server: Server, reply: Reply, answer: Answer, gone: asyncio.Future[None]) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.server, self.reply, self.answer, self.gone = server, reply, answer, gone

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for data in self._events():
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except Gone:
            scope["llama"]["left"] = True
        except Exception as error:
            told = json.loads(bytes(answer_to(error, scope["llama"]["id"]).body))
            await send({"type": "http.response.body", "body": _event(told), "more_body": True})
        finally:
            self.gone.cancel()
            self.answer.leave()
            _count(self.server, scope["llama"], self.reply)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        reply, metrics, last = self.reply, self.server.metrics, time.perf_counter()
        measure = metrics.first.observe
        while True:
            try:
                with anyio.fail_after(self.server.settings.alive):
                    chunks = await self.answer.chunks()
            except TimeoutError:
                yield b": still at work\n\n"
                continue
            if not chunks:
                break
            now = time.perf_counter()
            measure(now - last)
            measure, last = metrics.gap.observe, now
            told = ([reply.choices[chunk["index"]].add(chunk)] for chunk in chunks)
            yield b"".join(_event(reply.event(choices)) for choices in told)
        if reply.request.usage:
            yield _event(reply.event([], usage=True))
        yield b"data: [DONE]\n\n"


def _event(told: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(told, separators=(",", ":")).encode() + b"\n\n"


# The other addresses


async def embeddings(server: Server, request: HTTPRequest, body: Any) -> Response:
    given = bodies.fields(body, ("model", "input", "encoding_format"))
    server.check_model(given.get("model"))
    texts = bodies.several(given.get("input"), "input")
    if not all(isinstance(text, str) for text in texts):
        raise Wrong("input must be a text, or a list of texts", "input")
    form = given.get("encoding_format", "float")
    if form not in ("float", "base64"):
        raise Wrong(f"encoding_format={shortened(form)} must be float or base64", "encoding_format")
    vectors = await run_in_threadpool(_embed, server.llama, texts)
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": row.tolist()
            if form == "float"
            else base64.b64encode(np.asarray(row.cpu(), "<f4").tobytes()).decode(),
        }
        for i, row in enumerate(vectors)
    ]
    read = sum(map(len, bodies.ids_of(server.llama, texts)))
    server.metrics.prompt_tokens.inc(read)
    usage = {"prompt_tokens": read, "total_tokens": read}
    return JSONResponse({"object": "list", "data": data, "model": server.settings.model, "usage": usage})


def _embed(llama: Llama, texts: Sequence[str]) -> torch.Tensor:
    try:
        return llama.embed(texts)
    finally:
        openmp.rest()  # the thread stays, and another one steps


async def tokenize(server: Server, request: HTTPRequest, body: Any) -> Response:
    known = ("model", "prompt", "messages", "add_special_tokens", "add_generation_prompt", "continue_final_message")
    given = bodies.fields(body, known)
    server.check_model(given.get("model"))
    ids = bodies.read_tokens(server.llama, given)
    return JSONResponse({"count": len(ids), "max_model_len": server.llama.model.params.max_seq_len, "tokens": ids})


async def detokenize(server: Server, request: HTTPRequest, body: Any) -> Response:
    given = bodies.fields(body, ("model", "tokens"))
    server.check_model(given.get("model"))
    ids = bodies.check_ids(server.llama, given.get("tokens"))
    return JSONResponse({"prompt": server.llama.tokenizer.decode(ids)})


async def tokenizer_info(server: Server, request: HTTPRequest) -> Response:
    tokenizer = server.llama.tokenizer
    ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    told = {name: tokenizer.piece(i) if i >= 0 else None for name, i in ends.items()}
    sizes = {"vocab_size": tokenizer.n_words, "max_model_len": server.llama.model.params.max_seq_len}
    kind = {"tokenizer_class": "LlamaTokenizer", "chat_template": tokenizer.chat_template}
    return JSONResponse({**kind, **told, **{f"{name}_id": i for name, i in ends.items()}, **sizes})


async def models(server: Server, request: HTTPRequest) -> Response:
    return JSONResponse({"object": "list", "data": [_card(server)]})


async def model(server: Server, request: HTTPRequest) -> Response:
    server.check_model(request.path_params["model"])
    return JSONResponse(_card(server))


def _card(server: Server) -> dict[str, Any]:
    size = server.llama.model.params.max_seq_len
    card = {"id": server.settings.model, "object": "model", "created": server.created}
    return {**card, "owned_by": "llama", "max_model_len": size}


async def health(server: Server, request: HTTPRequest) -> Response:
    well = server.stepper.error is None and not server.ending
    return JSONResponse({"status": "ok" if well else "ending"}, 200 if well else 503)


async def metrics(server: Server, request: HTTPRequest) -> Response:
    stepper = server.stepper
    text = server.metrics.text(stepper.rows - stepper.waiting, stepper.waiting)
    return Response(text, media_type="text/plain; version=0.0.4")


async def page(server: Server, request: HTTPRequest) -> Response:
    return Response(PAGE, headers=HEADERS)
