"""An engine that dies, hangs or raises: streams go on with the same text, and nothing is kept."""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator

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
    async with httpx.AsyncClient() as client:
        tasks = [asyncio.create_task(complete(client, url, i)) for i in range(8)]
        if disturb is not None:
            handle = serve.get_app_handle("recovery")
            while (await handle.stats.remote()).get("output_tokens", 0) < 100:
                await asyncio.sleep(0.02)
            disturb()
        return await asyncio.gather(*tasks)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_streams_survive_the_loss_of_a_shard(server: str, sent: signal.Signals) -> None:
    wanted = asyncio.run(complete_all(server))
    before = shard_processes()
    restart = lambda: os.kill(before[-1].pid, sent)  # noqa: E731
    # A fresh engine counts from 0, so that the wait for 100 tokens means this run's.
    os.kill(before[0].pid, signal.SIGKILL)
    wait_until(lambda: is_fresh(before), what="a new engine after the first kill")
    before = shard_processes()
    assert asyncio.run(complete_all(server, restart)) == wanted
    assert not any(process.is_running() for process in before), "a shard process was left behind"
    stats = serve.get_app_handle("recovery").stats.remote().result()
    assert stats["live"] == 0
    wait_until(is_all_free, what="every block is free")


def is_fresh(before: list[psutil.Process]) -> bool:
    try:
        now = shard_processes()
    except psutil.NoSuchProcess:  # the replica has yet to notice that this one is gone
        return False
    return bool(now) and not set(now) & set(before) and is_all_free()


def is_all_free() -> bool:
    stats = serve.get_app_handle("recovery").stats.remote().result()
    return "num_blocks" in stats and bool(stats["free_blocks"] == stats["num_blocks"])


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
