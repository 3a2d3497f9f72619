"""An engine's supervision, without shards: whatever their start does, it goes on or says why."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from deployments.args import AppArgs
from deployments.front.engine_client import EngineClient, EngineUnavailableError
from deployments.shards.shard_group import ShardGroup
from tests.deployments.test_engine_client import FakeEngine, complete

Start = Callable[[EngineClient], Awaitable[list[asyncio.Future[None]]]]


class FakeGroup(ShardGroup):
    """Starts as it is told to, one time after the other, and then as the last time."""

    def __init__(self, client: EngineClient, *starts: Start, **args: Any) -> None:
        super().__init__(AppArgs(**args), client, bundles=None)  # type: ignore[arg-type]
        self._starts = list(starts)

    async def _start(self) -> "list[asyncio.Future[None]]":
        start = self._starts.pop(0) if len(self._starts) > 1 else self._starts[0]
        return list(await start(self._client))


async def serve(client: EngineClient) -> list[asyncio.Future[None]]:
    """An engine that dies of the first request."""

    async def engine() -> None:
        engine = await FakeEngine.connect(client)
        await engine.receive()
        await engine.die(client)

    return [asyncio.create_task(engine())]


async def hang(client: EngineClient) -> list[asyncio.Future[None]]:
    await asyncio.sleep(3600)
    return []


async def never_connect(client: EngineClient) -> list[asyncio.Future[None]]:
    return [asyncio.get_running_loop().create_future()]


async def get_lost(client: EngineClient) -> list[asyncio.Future[None]]:
    lost = asyncio.get_running_loop().create_future()
    lost.cancel()
    return [lost]


async def fail(client: EngineClient) -> list[asyncio.Future[None]]:
    raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("start", "why"),
    [
        (hang, "not ready within startup_timeout_s=0.1"),
        (never_connect, "not ready within startup_timeout_s=0.1"),
        (get_lost, "a shard has ended"),
        (fail, "KeyError: 'no such thing'"),
    ],
)
def test_a_start_that_fails_says_why_in_time(start: Start, why: str) -> None:
    async def main() -> None:
        client = EngineClient()
        group = FakeGroup(client, start, startup_timeout_s=0.1)
        with pytest.raises(EngineUnavailableError, match=f"the engine failed too often.*{why}"):
            await asyncio.wait_for(group.start(), 20)
        with pytest.raises(EngineUnavailableError, match=why):
            client.check_available()
        await client.close()

    asyncio.run(main())


@pytest.mark.parametrize("start", [hang, never_connect, get_lost, fail])
def test_a_restart_that_fails_is_followed_by_another(start: Start) -> None:
    async def main() -> None:
        client = EngineClient()
        group = FakeGroup(client, serve, start, serve, startup_timeout_s=0.1)
        await group.start()
        request = asyncio.create_task(complete(client, [1], max_tokens=1))
        while client.metrics.engine_starts < 2:
            await asyncio.sleep(0.01)
        assert group.failure is None
        request.cancel()
        group.stop()
        await client.close()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_deaths_that_are_laid_to_a_request_do_not_count() -> None:
    """Each such request costs one restart, not three."""

    async def main() -> None:
        client = EngineClient()
        group = FakeGroup(client, serve, max_restarts=5)
        await group.start()
        for _ in range(5):
            with pytest.raises(Exception, match="the engine has failed 3 times in a row"):
                await complete(client, [1], max_tokens=1)
        assert group.failure is None and client.metrics.engine_starts == 15
        with pytest.raises(EngineUnavailableError, match="the engine failed too often"):
            await complete(client, [1], max_tokens=1)
        await client.close()

    asyncio.run(asyncio.wait_for(main(), 30))
