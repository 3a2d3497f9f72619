"""An engine that dies, hangs or raises: streams go on with the same text, and nothing is kept."""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest
from ray import serve

from deployments import app
from deployments.args import AppArgs
from tests.deployments.conftest import wait_until


@pytest.fixture(scope="module")
def server(cluster: str) -> Iterator[str]:
    """Of two ranks; test_chaos.py breaks engines of one."""
    args = AppArgs(
        dtype="float32",
        max_model_len=1024,
        num_blocks=300,
        tensor_parallel_size=2,
        heartbeat_timeout_s=4,
        num_threads=1,
    )
    serve.run(app(args), name="recovery", route_prefix="/recovery")
    yield f"{cluster}/recovery"
    serve.delete("recovery")


def shard_processes() -> list[psutil.Process]:
    """Of this application's replica: the shards that other tests started are not touched."""
    pids = serve.get_app_handle("recovery").shard_pids.remote().result()
    return [psutil.Process(pid) for pid in pids]


async def complete(client: httpx.AsyncClient, url: str, i: int) -> str:
    body = {"prompt": f"{i} one two", "max_tokens": 200, "seed": i, "ignore_eos": True}
    response = await client.post(f"{url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


async def complete_all(url: str, disturb: Callable[[], None] | None = None) -> list[str]:
    """Eight texts; `disturb` is called when a hundred of their tokens are there."""
    begin = await asyncio.to_thread(num_tokens)
    async with httpx.AsyncClient() as client:
        tasks = [asyncio.create_task(complete(client, url, i)) for i in range(8)]
        if disturb is not None:
            while await asyncio.to_thread(num_tokens) < begin + 100:
                await asyncio.sleep(0.02)
            disturb()
        return await asyncio.gather(*tasks)


def num_tokens() -> int:
    """That the engine at hand has brought."""
    return int(stats().get("output_tokens", 0))


def stats() -> dict[str, Any]:
    found: dict[str, Any] = serve.get_app_handle("recovery").stats.remote().result()
    return found


@pytest.fixture(scope="module")
def wanted(server: str) -> list[str]:
    return asyncio.run(complete_all(server))


@pytest.mark.parametrize(
    ("rank", "sent"),
    [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)],
    ids=["leader killed", "follower killed", "follower stopped"],
)
def test_streams_survive_the_loss_of_a_shard(
    server: str, wanted: list[str], rank: int, sent: signal.Signals
) -> None:
    before = shard_processes()
    lose = lambda: os.kill(before[rank].pid, sent)  # noqa: E731
    assert asyncio.run(complete_all(server, lose)) == wanted
    assert not any(process.is_running() for process in before), "a shard process was left behind"
    assert stats()["live"] == 0
    wait_until(is_all_free, what="every block is free")


def is_all_free() -> bool:
    now = stats()
    return "num_blocks" in now and bool(now["free_blocks"] == now["num_blocks"])


def test_health_fails_while_the_engine_hangs_and_recovers_with_it(server: str) -> None:
    assert httpx.get(f"{server}/health").status_code == 200
    os.kill(shard_processes()[0].pid, signal.SIGSTOP)
    wait_until(lambda: httpx.get(f"{server}/health").status_code == 503, what="health fails")
    response = httpx.get(f"{server}/health")
    if response.status_code == 503:
        assert "retry-after" in response.headers
    wait_until(lambda: httpx.get(f"{server}/health").status_code == 200, what="health is back")


def test_a_hung_front_is_replaced_within_half_a_minute(server: str) -> None:
    """Serve takes three answers that do not come in time for a death."""
    details = serve.context._get_global_client().get_serve_details()
    config = details["applications"]["recovery"]["deployments"]["Replica"]["deployment_config"]
    assert 3 * config["health_check_timeout_s"] <= 30
