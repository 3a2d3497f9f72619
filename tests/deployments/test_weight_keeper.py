"""What a node keeps of weights, for how long, and that nothing is left of it."""

import asyncio
import fcntl
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from ray import serve
from ray.util.placement_group import PlacementGroup, placement_group

from deployments import app
from deployments.args import AppArgs
from deployments.front.engine_client import EngineClient
from deployments.shards import weight_keeper
from deployments.shards.shard import group_bundles
from deployments.shards.shard_group import ShardGroup
from deployments.shards.weight_keeper import KeptWeights, WeightKeeper
from tests.checkpoints import make_checkpoint
from tests.deployments.conftest import free_port, wait_until

Keeper: Any = WeightKeeper.__ray_metadata__.modified_class  # type: ignore[attr-defined]


class IdleKeeper(Keeper):  # type: ignore[misc]
    def _watch(self) -> None: ...


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_weights_stay_while_used_and_for_a_while(clock: list[float]) -> None:
    keeper = IdleKeeper()
    path = keeper.path("model", keep_s=600)
    Path(path).write_bytes(b"weights")
    assert keeper.path("model", keep_s=600) == path, "one file for one name"
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        for _ in range(3):
            clock[0] += 1000
            keeper._drop_unused(is_scarce=True)
        assert keeper.sizes() == {"model": 7}, "an engine uses them"
    clock[0] += 599
    keeper._drop_unused(is_scarce=False)
    assert keeper.sizes() == {"model": 7}
    clock[0] += 2
    keeper._drop_unused(is_scarce=False)
    assert keeper.sizes() == {}
    assert not Path(path).exists()


def test_what_nobody_uses_goes_where_memory_is_scarce(clock: list[float]) -> None:
    keeper = IdleKeeper()
    keeper.path("model", keep_s=600)
    keeper._drop_unused(is_scarce=True)
    assert "model" in keeper.sizes(), "who asked for it is on the way"
    clock[0] += 60
    keeper._drop_unused(is_scarce=True)
    assert keeper.sizes() == {}


def test_who_gets_no_answer_reads_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's control plane, or a keeper, may not answer for as long as it likes."""
    answers = threading.Event()
    monkeypatch.setattr(weight_keeper, "_keeper", answers.wait)
    monkeypatch.setattr(weight_keeper, "_ANSWER_S", 0.05)
    try:
        assert KeptWeights(600)("model") is None
    finally:
        answers.set()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_next_engine_reads_nothing_and_nothing_is_left(tmp_path: Path) -> None:
    """On a real cluster, with engines and a keeper that are killed."""
    args = args_of(tmp_path)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        bundles = placement_group(group_bundles(args, 0.1))
        ray.get(bundles.ready())
        first, second, without_keeper = asyncio.run(start_thrice(args, bundles))
        assert second < first / 2 < without_keeper
    finally:
        ray.shutdown()
    deadline = time.monotonic() + 20
    while mapped() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not mapped()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_redeployment_and_a_start_from_zero_read_nothing(tmp_path: Path) -> None:
    args, from_zero = args_of(tmp_path), {"num_replicas": 0, "max_replicas": 1}
    port, took = free_port(), []
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        for changes in ({}, {"max_num_seqs": 4}, from_zero | {"downscale_delay_s": 1}):
            serve.run(app(args.model_copy(update=changes)), name="kept", route_prefix="/")
            if from_zero.items() <= changes.items():
                wait_until(lambda: not replicas(), 120, "there are none without requests")
            took.append(weights_s(f"http://127.0.0.1:{port}"))
        assert max(took[1:]) < took[0] / 2, took
    finally:
        serve.shutdown()
        ray.shutdown()


def args_of(tmp_path: Path) -> AppArgs:
    """Of a model that is large enough to be kept."""
    directory = make_checkpoint(
        tmp_path / "model", "llama3", hidden_size=512, intermediate_size=2048, num_hidden_layers=8
    )
    assert next(directory.glob("*.safetensors")).stat().st_size > 100 << 20
    return AppArgs(
        model=str(directory), device="cpu", num_blocks=64, max_model_len=256, keep_weights_s=600
    )


def weights_s(url: str) -> float:
    """How long they took the engine that now runs, or is started for this."""
    text = httpx.get(f"{url}/metrics", timeout=120).text
    found = re.search(r'manta:engine_startup_seconds{phase="weights"} (\S+)', text)
    assert found is not None, text
    return float(found[1])


def replicas() -> dict[Any, int]:
    return serve.status().applications["kept"].deployments["Replica"].replica_states


async def start_thrice(args: AppArgs, bundles: PlacementGroup) -> list[float]:
    """Seconds that weights took an engine, and two after it, of which the last has no keeper."""
    client = EngineClient(args)
    group = ShardGroup(args, client, bundles)
    await group.start()
    took = [client.metrics.startup_s["weights"]]
    os.kill(group.pids[0], signal.SIGKILL)
    while client.metrics.engine_starts < 2:
        await asyncio.sleep(0.05)
    took.append(client.metrics.startup_s["weights"])
    os.kill(keeper_pid(), signal.SIGKILL)
    await asyncio.sleep(1)
    assert client.is_connected and client.metrics.engine_starts == 2, "an engine needs no keeper"
    os.kill(group.pids[0], signal.SIGKILL)
    while client.metrics.engine_starts < 3:
        await asyncio.sleep(0.05)
    took.append(client.metrics.startup_s["weights"])
    group.stop()
    await client.close()
    return took


def keeper_pid() -> int:
    (pid,) = [p.pid for p in psutil.process_iter() if "ray::WeightKeeper" in cmdline(p)]
    return pid


def cmdline(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def mapped() -> list[int]:
    """Processes that have weights of a keeper open or mapped."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = [os.readlink(link) for link in (process / "fd").iterdir()]
            if any("memfd:manta-" in link for link in links):
                found.append(int(process.name))
        except OSError:
            continue
    return found
