"""An engine's supervision, without shards: whatever their start does, it goes on or says why."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

import pytest

from deployments.args import AppArgs
from deployments.front.engine_client import EngineClient, EngineUnavailableError
from deployments.front.heartbeat import Heartbeat
from deployments.shards.shard import STACKS_SIGNAL
from deployments.shards.shard_group import ShardGroup
from tests.deployments.routing_fleet import Clock
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


async def fail_after_another(_: EngineClient) -> list[asyncio.Future[None]]:
    """A leader that fails lets its followers go before it is seen to have failed itself."""

    async def follower() -> None: ...

    async def leader() -> None:
        await asyncio.sleep(0.1)
        raise KeyError("no such thing")

    return [asyncio.create_task(leader()), asyncio.create_task(follower())]


@pytest.mark.parametrize(
    ("start", "why"),
    [
        (fail_after_another, "KeyError: 'no such thing'"),
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


def test_an_engine_that_hangs_up_long_after_its_start_was_not_late() -> None:
    async def hang_up(client: EngineClient) -> list[asyncio.Future[None]]:
        engine = await FakeEngine.connect(client)

        async def shard() -> None:
            await asyncio.sleep(1)
            await engine.die(client)
            await asyncio.sleep(0.1)
            raise KeyError("no such thing")

        return [asyncio.create_task(shard())]

    async def main() -> None:
        client = EngineClient()
        group = FakeGroup(client, hang_up, startup_timeout_s=0.5, max_restarts=0)
        await group.start()
        while group.failure is None:
            await asyncio.sleep(0.01)
        assert "KeyError: 'no such thing'" in group.failure
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
        while client.metrics.engine_starts < 16:
            await asyncio.sleep(0.01)
        assert group.failure is None
        with pytest.raises(EngineUnavailableError, match="the engine failed too often"):
            await complete(client, [1], max_tokens=1)
        await client.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_shard_that_hangs_shows_its_stacks_before_it_is_killed() -> None:
    class Signalled(FakeGroup):
        signals: ClassVar[list[int]] = []

        def _signal(self, number: int) -> None:
            self.signals.append(number)

    engines: list[FakeEngine] = []

    async def fall_silent(client: EngineClient) -> list[asyncio.Future[None]]:
        engines.append(await FakeEngine.connect(client))
        return [asyncio.get_running_loop().create_future()]

    async def main() -> None:
        client = EngineClient(AppArgs(heartbeat_timeout_s=0.1))
        group = Signalled(client, fall_silent, max_restarts=0)
        with pytest.raises(EngineUnavailableError, match="no heartbeat"):
            await group.start()
            while True:
                group.check()
                await asyncio.sleep(0.05)
        assert group.signals == [STACKS_SIGNAL, signal.SIGKILL]
        await client.close()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_stacks_name_where_every_thread_is() -> None:
    code = """
import signal, sys, threading, time
from deployments.shards.shard import EngineShard
EngineShard.__ray_metadata__.modified_class.__init__(type("Shard", (), {})())
def where_it_hangs():
    print("ready", flush=True)
    time.sleep(60)
threading.Thread(target=where_it_hangs, daemon=True).start()
signal.pause()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as shard:
        assert shard.stdout is not None and shard.stderr is not None
        assert shard.stdout.readline() == "ready\n"
        shard.send_signal(STACKS_SIGNAL)
        for line in shard.stderr:
            if "where_it_hangs" in line:
                break
        else:
            raise AssertionError("its stacks do not say where it hangs")
        shard.kill()


def test_how_long_silence_is_borne_follows_the_steps() -> None:
    clock, stats = Clock(), {"full_steps": 0, "tokens_per_s": 1000.0, "step_tokens": 2048}
    heart = Heartbeat(AppArgs(), lambda: stats, clock)
    assert heart.timeout_s == 120  # its first full step may take long
    stats |= {"full_steps": 3, "tokens_per_s": 20_000.0}
    assert heart.timeout_s == 30
    stats["tokens_per_s"] = 1024.0
    assert heart.timeout_s == 40
    clock.now += 3
    heart.beat()
    clock.now += 59
    assert heart.timeout_s == 60 and not heart.is_silent
    clock.now += 2
    assert heart.is_silent
    stats["tokens_per_s"] = 10.0
    assert heart.timeout_s == 120
    assert Heartbeat(AppArgs(heartbeat_timeout_s=7), lambda: stats).timeout_s == 7
