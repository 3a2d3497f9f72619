"""The API without Ray: a real front, and a real engine on a thread of this process."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import openai

from deployments.api import build_api
from deployments.args import AppArgs
from deployments.front.front import Front
from deployments.shards.engine_loop import EngineLoop
from engine.engine import Engine

T = TypeVar("T")


@dataclass
class InProcessApi:
    """Its event loop runs while `run` waits for something."""

    front: Front
    engine: Engine
    http: httpx.AsyncClient
    openai: openai.AsyncOpenAI
    _runner: asyncio.Runner

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(asyncio.wait_for(coroutine, 60))

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.run(self.http.post(path, json=body))

    def assert_idle(self) -> None:
        """Nothing is live, and every block is free, as soon as what is under way has ended."""

        async def drain() -> None:
            while self.front.client.num_live or self.engine.has_work:
                await asyncio.sleep(0.01)

        self.run(drain())
        pool = self.engine.scheduler.pool
        assert pool.num_free == pool.num_blocks


@contextmanager
def serve_in_process(model: str, **args: Any) -> Iterator[InProcessApi]:
    defaults = dict(dtype="float32", device="cpu", num_threads=1, num_blocks=200, block_size=16)
    arguments = AppArgs(model=model, **defaults | args)
    with asyncio.Runner() as runner:
        front = Front(arguments)
        address = runner.run(front.client.listen())
        engine = Engine(arguments.engine_config)
        loop = threading.Thread(target=_serve, args=(engine, address))
        loop.start()
        try:
            runner.run(asyncio.wait_for(front.client.wait_connected(), 60))
            http = httpx.AsyncClient(
                transport=httpx.ASGITransport(build_api(front, arguments)),
                base_url="http://test",
                timeout=60,
            )
            client = openai.AsyncOpenAI(
                base_url="http://test/v1", api_key="none", http_client=http, max_retries=0
            )
            yield InProcessApi(front, engine, http, client, runner)
        finally:
            runner.run(_close(front))
            loop.join(30)
            assert not loop.is_alive(), "the engine goes with its front"


async def _close(front: Front) -> None:
    await front.client.close()
    ending = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.wait_for(asyncio.gather(*ending), 10)


def _serve(engine: Engine, address: str) -> None:
    EngineLoop(engine, address).run()
