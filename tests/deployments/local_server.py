"""The HTTP interface before a real engine, without Ray: it starts in a second or two.

A real front listens on its Unix socket, a real engine loop connects to it, and uvicorn serves the
ASGI app on a free port. Front and engine have a thread each, so a test can look into both.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai
import uvicorn
from fastapi import FastAPI

from deployments.application import build_application
from deployments.args import AppArgs
from deployments.front.front import Front
from deployments.shards.engine_loop import EngineLoop

_START_TIMEOUT_S = 120


@dataclass(frozen=True)
class LocalServer:
    """A running server; `url` is its base URL, without /v1."""

    url: str
    front: Front
    api: FastAPI
    engine: Any  # engine.engine.Engine

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            **({"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0} | options)
        )

    def async_client(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            **({"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0} | options)
        )

    @contextmanager
    def slowed(self, step_s: float = 0.02) -> Iterator[None]:
        """A request of 1000 tokens is there for as long as a test looks, on any machine."""

        def step() -> Any:
            time.sleep(step_s)
            return type(self.engine).step(self.engine)

        self.engine.step = step
        try:
            yield
        finally:
            del self.engine.step

    def is_idle(self) -> bool:
        """Whether no request is live and no block is held."""
        scheduler = self.engine.scheduler
        held = scheduler.pool.num_blocks - scheduler.pool.num_free
        return not (self.front.client.num_live or scheduler.sequences or held)


@contextmanager
def serve_locally(**args: Any) -> Iterator[LocalServer]:
    """Serves with the given `AppArgs`; the demo model unless `model` says otherwise."""
    server = _Server(AppArgs(**({"num_threads": 1, "device": "cpu"} | args)))
    try:
        yield server.start()
    finally:
        server.stop()


class _Server:
    def __init__(self, args: AppArgs) -> None:
        self._args = args
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._uvicorn: uvicorn.Server | None = None
        self._thread = threading.Thread(target=self._run, name="front", daemon=True)

    def start(self) -> LocalServer:
        self._thread.start()
        assert self._ready.wait(_START_TIMEOUT_S), "the server did not start"
        if self._failure is not None:
            raise self._failure
        return self._local

    def stop(self) -> None:
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive(), "the server did not stop"

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failure = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        front = Front(self._args)
        address = await front.client.listen()
        engine = await asyncio.to_thread(self._start_engine, address)
        await front.client.wait_connected()
        api = build_application(front, self._args)
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            self._local = LocalServer(url, front, api, engine)
            config = uvicorn.Config(api, log_level="warning", timeout_graceful_shutdown=5)
            self._uvicorn = uvicorn.Server(config)
            self._uvicorn.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
            watch = asyncio.create_task(self._announce())
            await self._uvicorn.serve(sockets=[listening])
            await watch
        await front.client.close()
        await asyncio.to_thread(self._engine_thread.join, 10)

    async def _announce(self) -> None:
        assert self._uvicorn is not None
        while not self._uvicorn.started and not self._uvicorn.should_exit:
            await asyncio.sleep(0.01)
        self._ready.set()

    def _start_engine(self, address: str) -> Any:
        """Loads the engine and lets it serve in a thread of its own, until the front hangs up."""
        from engine.engine import Engine

        engine = Engine(self._args.engine_config)
        loop = EngineLoop(engine, address)
        self._engine_thread = threading.Thread(target=loop.run, name="engine", daemon=True)
        self._engine_thread.start()
        return engine
