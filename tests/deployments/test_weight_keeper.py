"""What a node keeps of weights, for how long, and that nothing is left of it."""

import fcntl
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from deployments.shards import weight_keeper
from deployments.shards.weight_keeper import WeightKeeper

Keeper = WeightKeeper.__ray_metadata__.modified_class  # type: ignore[attr-defined]


class IdleKeeper(Keeper):  # type: ignore[misc]
    def _watch(self) -> None: ...


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(weight_keeper.time, "monotonic", lambda: now[0])
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
    import ray
    from ray.util.placement_group import placement_group

    from deployments.args import AppArgs
    from deployments.batch.engine_actor import ShardGroup
    from deployments.front.engine_client import EngineClient
    from deployments.shards.shard import EngineShard, group_bundles
    from tests.checkpoints import make_checkpoint

    directory = make_checkpoint(
        tmp_path / "model", "llama3", hidden_size=512, intermediate_size=2048, num_hidden_layers=8
    )
    size = next(directory.glob("*.safetensors")).stat().st_size
    assert size > 100 << 20
    args = AppArgs(model=str(directory), device="cpu", num_blocks=64, max_model_len=256)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        bundles = placement_group(group_bundles(args, 0.1))
        ray.get(bundles.ready())

        async def starts() -> list[dict[str, float]]:
            client = EngineClient(args)
            group = ShardGroup(args, client, bundles)
            await group.start()
            phases = [dict(client.metrics.startup_s)]
            for victim in (group.pids[0], keeper_pid()):
                before = client.metrics.engine_starts
                os.kill(victim, signal.SIGKILL)
                if victim in group.pids:
                    while client.metrics.engine_starts == before:
                        await asyncio.sleep(0.05)
                    phases.append(dict(client.metrics.startup_s))
            assert client.is_connected, "an engine needs no keeper"
            group.stop()
            await client.close()
            return phases

        import asyncio

        assert EngineShard is not None
        first, second = asyncio.run(starts())
        assert second["weights"] < first["weights"]
        deadline = time.monotonic() + 20
        while mapped() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not mapped()
    finally:
        ray.shutdown()


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
