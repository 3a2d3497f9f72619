"""A Serve replica: the HTTP ingress and the front of one engine."""

import asyncio
import gc
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.util.placement_group import get_current_placement_group

from deployments.api import build_api
from deployments.args import AppArgs
from deployments.autoscaling import engine_load
from deployments.front.front import Front
from deployments.observe.ray_metrics import RayMetrics
from deployments.observe.replica_watch import ReplicaWatch
from deployments.routing.balancer import ReplicaReport, pack_hashes
from deployments.shards.shard_group import ShardGroup


@serve.deployment
@serve.ingress()
class Replica:
    """Sits in bundle 0 of its placement group, with rank 0 of its engine."""

    async def __init__(self, args: AppArgs) -> None:  # type: ignore[misc]
        bundles = get_current_placement_group()
        assert bundles is not None, "the app builder gives every replica a placement group"
        self._args = args
        self._front = await asyncio.to_thread(Front, args)
        self._shards = ShardGroup(args, self._front.client, bundles)
        self._num_reports = 0
        if args.num_replicas > 1 or args.max_replicas is not None:
            self._front.watch = ReplicaWatch().pictures
        await asyncio.gather(self._shards.start(), asyncio.to_thread(self._front.warm_up))
        self._metrics = asyncio.create_task(
            RayMetrics(self._front.client.metrics).publish_forever()
        )
        gc.freeze()  # or each of its passes stops all streams to look through what has been loaded

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._front, self._args, tells_request_ids=False)

    async def stats(self) -> dict[str, Any]:
        """The engine's numbers and this front's, for callers with a handle."""
        client = self._front.client
        return {"live": client.num_live, **client.stats}

    async def watch(self) -> dict[str, Any]:
        """This replica for whoever watches them all; see `EngineClient.watch`."""
        return {"replica": serve.get_replica_context().replica_tag, **self._front.client.watch()}

    def record_routing_stats(self) -> dict[str, Any]:
        """Called by Serve every routing stats period; routers see the result."""
        client = self._front.client
        if not client.stats or client.limits is None:
            return {}
        self._num_reports += 1
        report = ReplicaReport(
            sequence=self._num_reports,
            block_size=client.limits.block_size,
            running=client.stats["running"],
            waiting=client.stats["waiting"],
            uncomputed_tokens=client.stats["uncomputed_tokens"],
            tokens_per_s=client.stats["tokens_per_s"],
            hashes=pack_hashes(client.cached_blocks),
        )
        return {"manta": asdict(report)}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve when the number of replicas follows their load."""
        return engine_load(self._front.client.stats)

    async def drain(self) -> None:
        """Called before the server stops; returns when the last request has been answered."""
        await self._front.drain()

    async def shard_pids(self) -> list[int]:
        """Process ids by rank, for tests and tools that break things on purpose."""
        return self._shards.pids

    async def check_health(self) -> None:
        """Called by Serve, which replaces the replica when this keeps raising."""
        self._shards.check()

    async def __del__(self) -> None:
        self._metrics.cancel()
        self._shards.stop()
        await self._front.client.close()
