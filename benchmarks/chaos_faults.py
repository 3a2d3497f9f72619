"""What benchmarks.chaos breaks, and how."""

import asyncio
import itertools
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from benchmarks.chaos_streams import Report
from deployments.shards.injected_faults import POISON

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

_SHARD = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "error": signal.SIGUSR1}
# In the command lines of those that get SIGKILL.
_REPLICA, _CONTROLLER = "ray::ServeReplica:chaos:Replica", "ray::ServeController"
_PROXIES = "ray::ProxyActor", "/haproxy -"

# Streams break on these, unless their clients go on by themselves.
BREAKING = ("replica", "proxy", "controller", "node")
FAULTS = (*_SHARD, *BREAKING, "poison")


class Breaker:
    """
    Args:
        cluster: where nodes are to be killed, of one for every replica and every such fault.
    """

    def __init__(self, url: str, cluster: "Cluster | None") -> None:
        self._url, self._cluster = url, cluster
        self._replicas = serve.get_app_handle("chaos")
        self._draw = random.Random(0)
        self._how: dict[str, Callable[[], Awaitable[None]]] = {
            **{kind: partial(self._signal_shard, number) for kind, number in _SHARD.items()},
            "replica": partial(self._kill, _REPLICA),
            "proxy": partial(self._kill, *_PROXIES),
            "controller": partial(self._kill, _CONTROLLER),
            "node": self._kill_node,
            "poison": self._poison,
        }

    async def run(self, kinds: list[str], interval_s: float, until: float, report: Report) -> None:
        """Breaks something every `interval_s` or so, each kind in turn."""
        for kind in itertools.cycle(kinds):
            await asyncio.sleep(interval_s * self._draw.uniform(0.8, 1.2))
            if time.monotonic() > until - interval_s:
                return
            began = time.monotonic()
            try:
                await self._how[kind]()
            except (ProcessLookupError, IndexError, RayError, RayServeException) as error:
                print(f"not broken, {kind}: it still starts after the last fault ({error!r})")
                continue
            report.faults.append((began, time.monotonic(), kind))

    async def _signal_shard(self, number: signal.Signals) -> None:
        pids = await self._replicas.shard_pids.remote()
        os.kill(self._draw.choice(pids), number)

    async def _kill(self, *titles: str) -> None:
        os.kill(self._draw.choice(await asyncio.to_thread(_pids, titles)), signal.SIGKILL)

    async def _kill_node(self) -> None:
        """One that holds a replica; another, which is idle, takes its place."""
        assert self._cluster is not None
        used = await asyncio.to_thread(nodes_in_use)
        nodes = [node for node in self._cluster.worker_nodes if node.node_id in used]
        await asyncio.to_thread(
            self._cluster.remove_node, self._draw.choice(nodes), allow_graceful=False
        )

    async def _poison(self) -> None:
        """A request that no engine survives, which must be told so."""
        body: dict[str, Any] = {"prompt": POISON, "max_tokens": 4}
        async with httpx.AsyncClient(timeout=300) as http:
            answer = await http.post(f"{self._url}/v1/completions", json=body)
        code = answer.json()["error"]["code"]
        assert (answer.status_code, code) == (500, "engine_failed"), answer.text


# Room for one replica, of which a shard takes one CPU.
NODE: dict[str, Any] = {"num_cpus": 2}


def nodes_in_use() -> set[str]:
    """Ids of those that hold a replica's placement group."""
    groups = ray.util.placement_group_table().values()
    live = [group for group in groups if group["state"] == "CREATED"]
    return {node for group in live for node in group["bundles_to_node_id"].values()}


def _pids(titles: tuple[str, ...]) -> list[int]:
    """Of processes of this run."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if any(title in line for title in titles):
                found.append(process.pid)
    return found
