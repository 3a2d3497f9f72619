"""The engine behind a front: starts its shards, watches them, and starts them anew when one fails.

Requests belong to the front, so losing all shards loses none of them: the next engine that connects
is handed every live request with the tokens it has had (see `EngineClient`).
"""

import asyncio
import logging
import os
import signal
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from deployments.args import DeploymentArgs
from deployments.front.engine_client import EngineClient, EngineUnavailableError
from deployments.shards.shard import STACKS_SIGNAL, EngineShard, shard_resources

_FIRST = asyncio.FIRST_COMPLETED
logger = logging.getLogger("ray.serve")

# How often the watchdog looks at the heartbeat, in seconds.
_WATCH_S = 0.5
# Restarts are counted over this many seconds.
_RESTART_WINDOW_S = 600.0
# How long writing down stacks may take.
_STACKS_S = 0.5
# Characters of a directory for a socket: the whole path may have 107.
_DEEPEST = 75
# How long Ray may take to say what a shard died of when others are seen to end.
_LAST_WORDS_S = 5.0


def _session_directory() -> Path | None:
    """Ray's on this node, which goes with the cluster; None where it is too deep for a socket."""
    context = ray.get_runtime_context()
    path = Path(context.get_temp_dir(), context.get_session_name())
    return path if len(str(path)) <= _DEEPEST and path.is_dir() else None


class ShardGroup:
    """One shard per tensor-parallel rank; rank r sits in bundle r of the placement group."""

    def __init__(self, args: DeploymentArgs, client: EngineClient, bundles: PlacementGroup) -> None:
        self._args = args
        self._client = client
        self._bundles = bundles
        self._shards: list[Any] = []
        self._processes: list[tuple[str, int]] = []
        self._placed_s = 0.0  # how long it took until the shards' processes were there
        self._restarts: deque[float] = deque()
        self._supervisor: asyncio.Task[None] | None = None
        self.failure: str | None = None  # set once it will not be restarted any more

    async def start(self) -> None:
        """Returns once an engine serves; raises EngineUnavailableError when none will."""
        self._supervisor = asyncio.create_task(self.supervise())
        ready = asyncio.create_task(self._client.wait_connected())
        await asyncio.wait({ready, self._supervisor}, return_when=_FIRST)
        ready.cancel()
        self.check()

    def check(self) -> None:
        """Raises EngineUnavailableError once the engine is given up."""
        if self.failure is not None:
            raise EngineUnavailableError(self.failure)

    def stop(self) -> None:
        """Restart nothing any more; the shards end when the client closes its connection."""
        if self._supervisor is not None:
            self._supervisor.cancel()

    @property
    def pids(self) -> list[int]:
        """The shards' processes, by rank; empty while they start."""
        return [pid for _, pid in self._processes]

    async def supervise(self) -> None:
        """Keep an engine connected to the client until it has failed too often.

        What it died of a request does not count: that one has an end.
        """
        while True:
            num_blamed = self._client.num_blamed
            cause = await self._run()
            self._client.disconnect()
            self._kill()
            if self._client.num_blamed == num_blamed and not self._may_restart():
                self.failure = f"the engine failed too often, lastly: {cause}"
                logger.error(self.failure)
                self._client.fail(EngineUnavailableError(self.failure))
                return
            logger.warning(
                "The engine failed and is restarted, %d live requests will go on: %s",
                self._client.num_live,
                cause,
            )

    def _may_restart(self) -> bool:
        """An engine that never served is not tried again: it would fail in the same way."""
        now = time.monotonic()
        while self._restarts and now - self._restarts[0] > _RESTART_WINDOW_S:
            self._restarts.popleft()
        self._restarts.append(now)
        return self._client.limits is not None and len(self._restarts) <= self._args.max_restarts

    async def _run(self) -> str:
        """Start all shards and wait until one ends or the engine falls silent; returns why.

        Whatever is raised meanwhile is the end of this engine, and of nothing else.
        """
        ends: list[asyncio.Future[None]] = []
        told: asyncio.Task[None] | None = None
        timeout_s = self._args.startup_timeout_s
        too_late = f"not ready within startup_timeout_s={timeout_s:g}"
        deadline = time.monotonic() + timeout_s
        startup = asyncio.timeout(timeout_s)
        try:
            async with startup:
                ends = await self._start()
            told = asyncio.create_task(self._tell_startup())
            while True:
                done, _ = await asyncio.wait(ends, timeout=_WATCH_S, return_when=_FIRST)
                has_begun = told.done()
                if done or (has_begun and not self._client.is_connected):
                    return await _cause(ends)
                if self._client.is_silent:
                    await self._show_stacks()
                    return f"no heartbeat for {self._client.heartbeat.timeout_s:.0f} s"
                if not has_begun and time.monotonic() > deadline:
                    await self._show_stacks()
                    return too_late
        except Exception as error:
            return too_late if startup.expired() else _describe(error)
        finally:
            for task in (*ends, told):
                if task is not None:
                    task.cancel()

    async def _start(self) -> "list[asyncio.Future[None]]":
        """Returns one future per shard, done when the shard is."""
        config = self._args.engine_config
        if self._client.weights is not None:
            others = {"weights": self._client.weights, "load_format": "safetensors"}
            config = config.model_copy(update=others)
        size, keep_s = self._args.num_ranks, self._args.keep_weights_s
        began = time.monotonic()
        address = await self._client.listen(_session_directory())
        self._shards = [self._new_shard(rank) for rank in range(size)]
        self._processes = await asyncio.gather(*(s.process.remote() for s in self._shards))
        self._placed_s = time.monotonic() - began
        leader, *followers = self._shards
        group_address = await leader.open_group.remote(size)
        calls = [leader.lead.remote(config, address, keep_s)]
        for rank, follower in enumerate(followers, start=1):
            calls.append(follower.follow.remote(config, rank, group_address, keep_s))
        return [asyncio.ensure_future(_completion(call)) for call in calls]

    def _new_shard(self, rank: int) -> Any:
        resources = shard_resources(self._args)
        return EngineShard.options(  # type: ignore[attr-defined]
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._bundles, placement_group_bundle_index=rank
            ),
        ).remote()

    async def _tell_startup(self) -> None:
        """Once the engine has come up."""
        await self._client.wait_connected()
        phases = self._client.metrics.startup_s
        phases["process"] = self._placed_s
        told = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in phases.items())
        logger.info("The engine has come up: %s", told)

    async def _show_stacks(self) -> None:
        """Have every shard say in its log what it is doing; who is stopped does not."""
        with suppress(Exception):
            self._signal(STACKS_SIGNAL)
            logger.warning("The shards' logs say where they are: look for 'Current thread'.")
            await asyncio.sleep(_STACKS_S)

    def _signal(self, number: int) -> None:
        for node, pid in self._processes:
            if node == ray.get_runtime_context().get_node_id():
                with suppress(OSError):
                    os.kill(pid, number)
            else:
                there = NodeAffinitySchedulingStrategy(node, soft=False)
                _signal_process.options(scheduling_strategy=there).remote(pid, number)

    def _kill(self) -> None:
        """End all shards at once, also those that are stopped or stuck and hear nothing."""
        try:
            self._signal(signal.SIGKILL)
            for shard in self._shards:
                ray.kill(shard)
        except Exception:
            logger.exception("Shards of an engine that failed may still be there")
        self._shards, self._processes = [], []


async def _cause(ends: "list[asyncio.Future[None]]") -> str:
    """Of the end of shards. When one fails, others may be seen to end before it, and in order."""
    waiting_until = time.monotonic() + _LAST_WORDS_S
    while True:
        done = [end for end in ends if end.done()]
        failed = [end for end in done if end.cancelled() or end.exception() is not None]
        wait_s = waiting_until - time.monotonic()
        if failed or len(done) == len(ends) or wait_s <= 0:
            break
        await asyncio.wait(set(ends) - set(done), timeout=wait_s, return_when=_FIRST)
    error = failed[0].exception() if failed and not failed[0].cancelled() else None
    return _describe(error)


def _describe(error: BaseException | None) -> str:
    """The engine's own words where there are any: Ray wraps them in a remote traceback."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {cause}" if cause else "a shard has ended"


async def _completion(call: Any) -> None:
    await call


@ray.remote(num_cpus=0, max_retries=0)
def _signal_process(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
