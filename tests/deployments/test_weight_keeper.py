"""What a node keeps of weights, for how long, and that nothing is left of it."""

import asyncio
import fcntl
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group

from deployments.args import AppArgs
from deployments.front.engine_client import EngineClient
from deployments.shards.shard import group_bundles
from deployments.shards.shard_group import ShardGroup
from deployments.shards.weight_keeper import WeightKeeper
from tests.checkpoints import make_checkpoint

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


@pytest.mark.ray
@pytest.mark.slow
def test_the_next_engine_reads_nothing_and_nothing_is_left(tmp_path: Path) -> None:
    """On a real cluster, with an engine and a keeper that are killed."""
    directory = make_checkpoint(
        tmp_path / "model", "llama3", hidden_size=512, intermediate_size=2048, num_hidden_layers=8
    )
    assert next(directory.glob("*.safetensors")).stat().st_size > 100 << 20
    args = AppArgs(
        model=str(directory), device="cpu", num_blocks=64, max_model_len=256, keep_weights_s=600
    )
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        bundles = placement_group(group_bundles(args, 0.1))
        ray.get(bundles.ready())
        first, second = asyncio.run(start_twice(args, bundles))
        assert second < first / 2
    finally:
        ray.shutdown()
    deadline = time.monotonic() + 20
    while mapped() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not mapped()


async def start_twice(args: AppArgs, bundles: PlacementGroup) -> list[float]:
    """Seconds that weights took an engine, and the one after it, which loses its keeper."""
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
