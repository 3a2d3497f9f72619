"""Several replicas: load spreads, numbers follow it, updates and departures cost no request."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve
from ray.serve.config import AutoscalingConfig

from deployments import app, builder
from deployments.args import AppArgs
from deployments.autoscaling import autoscaling_config
from deployments.relay.application import DoorArgs, door
from tests.deployments.conftest import wait_until

APP = "replicas"


def deploy(model: Path, **args: Any) -> None:
    serve.run(
        app(
            AppArgs(
                model=str(model),
                served_model_name="tiny",
                dtype="float32",
                num_blocks=200,
                num_cpus_per_shard=0.5,
                **args,
            )
        ),
        name=APP,
        route_prefix=f"/{APP}",
    )


def num_running() -> int:
    status = serve.status().applications[APP].deployments["Replica"]
    return int(status.replica_states.get("RUNNING", 0))


@pytest.fixture
def url(cluster: str) -> Iterator[str]:
    yield f"{cluster}/{APP}"
    serve.delete(APP)


async def complete(client: httpx.AsyncClient, url: str, i: int, tokens: int = 100) -> str:
    body = {"prompt": f"request {i}", "max_tokens": tokens, "seed": i, "ignore_eos": True}
    response = await client.post(f"{url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


@asynccontextmanager
async def load(url: str, streams: int) -> AsyncIterator[list[str]]:
    """That many clients, each asking again and again; the answers so far. None may fail."""
    answers: list[str] = []
    stop = asyncio.Event()

    async def ask_forever(i: int) -> None:
        async with httpx.AsyncClient() as client:
            while not stop.is_set():
                answers.append(await complete(client, url, i))

    async with asyncio.TaskGroup() as group:
        for i in range(streams):
            group.create_task(ask_forever(i))
        try:
            yield answers
        finally:
            stop.set()


async def until(condition: Any, what: str) -> None:
    await asyncio.to_thread(wait_until, condition, 90, what)


@pytest.mark.slow
def test_two_replicas_of_two_ranks_give_the_text_of_one(url: str, tiny_model: Path) -> None:
    async def all_texts() -> list[str]:
        async with httpx.AsyncClient() as client:
            return await asyncio.gather(*(complete(client, url, i, 40) for i in range(12)))

    deploy(tiny_model)
    wanted = asyncio.run(all_texts())
    deploy(tiny_model, num_replicas=2, tensor_parallel_size=2)
    assert num_running() == 2
    assert asyncio.run(all_texts()) == wanted


@pytest.mark.slow
def test_a_rolling_update_and_a_scale_down_fail_no_request(url: str, tiny_model: Path) -> None:
    async def run() -> int:
        async with load(url, streams=6) as answers:
            await until(lambda: len(answers) > 6, "the first answers")
            # A change of arguments replaces every replica.
            await asyncio.to_thread(deploy, tiny_model, num_replicas=2, max_num_seqs=16)
            seen = len(answers)
            await until(lambda: len(answers) > seen + 6, "answers after the update")
            await asyncio.to_thread(deploy, tiny_model, num_replicas=1, max_num_seqs=16)
            await until(lambda: num_running() == 1, "one replica is gone")
            seen = len(answers)
            await until(lambda: len(answers) > seen + 6, "answers after scaling down")
        return len(answers)

    deploy(tiny_model, num_replicas=2)
    assert asyncio.run(run()) > 18


@pytest.mark.slow
def test_the_number_of_replicas_follows_the_engines_load(url: str, tiny_model: Path) -> None:
    async def run() -> None:
        # 16 streams on 8 rows: a load of 2, so at least three replicas' worth.
        async with load(url, streams=16):
            await until(lambda: num_running() >= 2, "a second replica under load")
        await until(lambda: num_running() == 1, "back to one when idle")

    deploy(
        tiny_model,
        max_num_seqs=8,
        max_replicas=3,
        upscale_delay_s=0.5,
        downscale_delay_s=1,
        speculation="off",
    )
    assert num_running() == 1
    asyncio.run(run())


def test_the_first_request_starts_a_replica_and_the_last_leaves_none(
    url: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quick(args: AppArgs) -> AutoscalingConfig:
        """Serve's mean is of 30 s else."""
        return autoscaling_config(args).model_copy(update={"look_back_period_s": 12.0})

    monkeypatch.setattr(builder, "autoscaling_config", quick)
    deploy(tiny_model, num_replicas=0, max_replicas=1, upscale_delay_s=0, downscale_delay_s=1)
    assert num_running() == 0
    body = {"prompt": "ab", "max_tokens": 3}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200 and num_running() == 1
    phases = httpx.get(f"{url}/metrics").text
    for phase in ("process", "imports", "kernels", "weights", "cache"):
        assert f'manta:engine_startup_seconds{{phase="{phase}"}}' in phases
    wait_until(lambda: num_running() == 0, 90, "none is left")


def test_a_session_stays_on_its_replica(url: str, tiny_model: Path) -> None:
    """Seen by the prefix cache: the second request of a session finds the first one's blocks."""
    deploy(tiny_model, num_replicas=2)
    with httpx.Client(timeout=60) as client:
        for session in ("ann", "ben", "cy", "di"):
            body = {"prompt": f"{session} " + "x" * 120, "max_tokens": 2}
            cached = [
                client.post(
                    f"{url}/v1/completions", json=body, headers={"x-session-id": session}
                ).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
                for _ in range(4)
            ]
            assert cached[0] == 0
            assert all(count >= 96 for count in cached[1:])


@pytest.mark.slow
def test_one_cluster_serves_several_models(url: str, cluster: str, tiny_model: Path) -> None:
    deploy(tiny_model)
    args = AppArgs(model=str(tiny_model), served_model_name="other", num_blocks=64, max_num_seqs=8)
    serve.run(app(args), name="other", route_prefix="/other")
    try:
        for base, name in ((url, "tiny"), (f"{cluster}/other", "other")):
            models = httpx.get(f"{base}/v1/models").json()["data"]
            assert [model["id"] for model in models] == [name]
        args_of_door = DoorArgs(models={"tiny": "/replicas", "other": "/other"}, proxy=cluster)
        serve.run(door(args_of_door), name="door", route_prefix="/door")
        address = f"{cluster}/door/v1"
        models = httpx.get(f"{address}/models").json()["data"]
        assert {model["id"] for model in models} == {"tiny", "other"}
        for name in ("tiny", "other"):
            body = {"model": name, "prompt": "ab", "max_tokens": 3, "stream": True}
            with httpx.stream("POST", f"{address}/completions", json=body) as answer:
                lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
            assert json.loads(lines[0][6:])["model"] == name and lines[-1] == "data: [DONE]"
        body = {"model": "third", "prompt": "ab"}
        unknown = httpx.post(f"{address}/completions", json=body)
        assert unknown.status_code == 404 and "'other'" in unknown.json()["error"]["message"]
    finally:
        serve.delete("other")
        serve.delete("door")
