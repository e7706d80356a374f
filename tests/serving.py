"""A server within this process, for tests and scripts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from llama import Llama
from llama.server.app import Server, Settings
from llama.server.stepper import Stepper


class Served:
    """A server that runs in a thread. url: without a path."""

    def __init__(self, llama: Llama, **settings: Any) -> None:
        given = Settings(**{"model": "demo", **settings})
        self.stepper = Stepper(llama.model.params.max_batch_size, given.max_waiting)
        self.server = Server(llama, given, self.stepper)
        config = uvicorn.Config(
            self.server.app, port=0, access_log=False, log_level="warning", timeout_graceful_shutdown=5
        )
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._uvicorn.run)

    @property
    def url(self) -> str:
        port: int = self._uvicorn.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def start(self) -> None:
        self._thread.start()
        while not self._uvicorn.started:
            self._thread.join(0.005)
            assert self._thread.is_alive()

    def end(self) -> None:
        self._uvicorn.should_exit = True
        self._thread.join()
        self.stepper.join()


@contextmanager
def served(llama: Llama, **settings: Any) -> Iterator[Served]:
    it = Served(llama, **settings)
    it.start()
    try:
        yield it
    finally:
        it.end()
