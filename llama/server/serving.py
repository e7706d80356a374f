"""A server as a process: how it listens, what signals do to it, and how it ends."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any, Optional

import uvicorn

from ..generation import Llama
from ..layers.parallel import is_first_process
from ..system.peers import tell
from .app import Server, Settings
from .stepper import Ended, Stepper

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


def is_local(host: str) -> bool:
    """Whether nobody but this machine reaches the address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_place(host: str, port: int) -> None:
    """ValueError if nothing can listen there, before a model is loaded for it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server's own socket
            probe.bind(address)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host}, port {port}: {error.strerror}; pass another --port or --host"
        ) from error


class _Uvicorn(uvicorn.Server):
    """Lets what runs at SIGTERM go on for `grace` seconds; then tells the clients that the server ends."""

    def __init__(self, config: uvicorn.Config, server: Server, grace: float) -> None:
        super().__init__(config)
        self.server, self.grace = server, grace

    async def startup(self, sockets: Optional[list[socket.socket]] = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            tell(f"{self.server.settings.model} listens on http://{host}:{port}")
            self._watching = asyncio.ensure_future(self._end_with_stepper())

    async def _end_with_stepper(self) -> None:
        """End when nothing can run any more."""
        while self.server.stepper.error is None:
            await asyncio.sleep(0.2)
        self.should_exit = True

    async def shutdown(self, sockets: Optional[list[socket.socket]] = None) -> None:
        """Refuse new requests, and wait for those that run."""
        self.server.ending = True
        ending = asyncio.get_running_loop().call_later(self.grace, self.server.stepper.end, Ended())
        await super().shutdown(sockets)
        ending.cancel()


@contextmanager
def _signals_end_nothing() -> Iterator[None]:
    """A block in which SIGTERM does not kill this process: uvicorn, once it has ended, sends it again."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def serve(llama: Llama, settings: Settings, host: str = "127.0.0.1", port: int = 8000, grace: float = 30.0) -> None:
    """Answer requests until SIGTERM or Ctrl-C, on all processes. What runs then may go on for `grace` seconds."""
    if is_first_process() and not is_local(host) and settings.key is None:
        tell(f"anybody who reaches {host} may use this server: pass an api_key to keep others out")
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("llama.server").setLevel(logging.INFO)
    with _signals_end_nothing():
        llama.lead(lambda: _run(llama, settings, host, port, grace))


def _run(llama: Llama, settings: Settings, host: str, port: int, grace: float) -> None:
    stepper = Stepper(
        llama.model.params.max_batch_size * max(1, llama.led_copies), settings.max_waiting, not llama.led_copies
    )
    server = Server(llama, settings, stepper)
    how: dict[str, Any] = {"access_log": False, "log_level": "warning", "server_header": False, "proxy_headers": False}
    config = uvicorn.Config(server.app, host, port, timeout_graceful_shutdown=int(grace) + 5, **how)
    running = _Uvicorn(config, server, grace)
    try:
        running.run()
    except SystemExit as error:  # uvicorn has told why
        raise ValueError(f"cannot listen on {host}, port {port}; pass another --port or --host") from error
    finally:
        stepper.join()
    if stepper.failed is not None:
        raise stepper.failed
