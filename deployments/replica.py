"""A Serve replica: the HTTP ingress and the front of one engine."""

import asyncio
import gc
from contextlib import AsyncExitStack
from dataclasses import asdict
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.util.placement_group import get_current_placement_group

from deployments.application import build_application
from deployments.args import AppArgs
from deployments.autoscaling import engine_load
from deployments.front.engine_client import EngineUnavailableError
from deployments.front.front import Front
from deployments.observe.ray_metrics import RayMetrics
from deployments.observe.replica_watch import ReplicaWatch
from deployments.peers import Peers, own_name
from deployments.replica_reports import ReplicaReports
from deployments.shards.shard_group import ShardGroup

# How often a replica that starts asks for others, which Serve may not have told it of yet.
_ASKED, _ASK_S = 10, 0.2


@serve.deployment
@serve.ingress()
class Replica:
    """Sits in bundle 0 of its placement group, with rank 0 of its engine."""

    async def __init__(  # type: ignore[misc]
        self, args: AppArgs, ingress_router: str | None = None
    ) -> None:
        """
        Args:
            ingress_router: the deployment that routes by prompts, if one does.
        """
        self._opened = AsyncExitStack()  # Serve may stop a replica that has not started yet
        bundles = get_current_placement_group()
        assert bundles is not None, "the app builder gives every replica a placement group"
        self._args = args
        self._front = await asyncio.to_thread(Front, args)
        self._opened.push_async_callback(self._front.client.close)
        self._shards = ShardGroup(args, self._front.client, bundles)
        self._opened.callback(self._shards.stop)
        self._peers = Peers()
        self._reports = ReplicaReports(self._front.client)
        if args.may_have_several_replicas:
            self._front.watch = ReplicaWatch().pictures
            self._front.update_weights = self._update_all_weights
            if args.enable_weight_updates:
                await self._learn_weights()
        await asyncio.gather(self._shards.start(), asyncio.to_thread(self._front.tokenizer.warm_up))
        metrics = RayMetrics(self._front.client.metrics)
        tasks = [asyncio.create_task(metrics.publish_forever())]
        if ingress_router is not None:
            send = partial(Peers(ingress_router).ask, "take_report", own_name())
            tasks.append(asyncio.create_task(self._reports.send_forever(send)))
        for task in tasks:
            self._opened.callback(task.cancel)
        gc.freeze()  # or each of its passes stops all streams to look through what has been loaded

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_application(self._front, self._args, tells_request_ids=False)

    async def stats(self) -> dict[str, Any]:
        """The engine's numbers and this front's, for callers with a handle."""
        client = self._front.client
        return {"live": client.num_live, **client.stats}

    async def watch(self) -> dict[str, Any]:
        """This replica for whoever watches them all; see `EngineClient.watch`."""
        return {"replica": serve.get_replica_context().replica_tag, **self._front.client.watch()}

    async def weights(self, model: str, given: str | None) -> str | None:
        """The checkpoint that an update has brought a replica deployed with these, if one has.

        In a rolling update others may be deployed with another model, or to have other weights.
        """
        is_alike = (model, given) == (self._args.model, self._args.weights)
        return self._front.client.weights if is_alike else None

    async def _learn_weights(self) -> None:
        """Those of the replicas that there are, which may have been given others."""
        for _ in range(_ASKED):
            if answers := await self._peers.ask("weights", self._args.model, self._args.weights):
                for path in answers:
                    if isinstance(path, str):
                        self._front.client.weights = path
                return
            await asyncio.sleep(_ASK_S)

    async def update_weights(self, path: str) -> None:
        """See `Front.update_own_weights`."""
        await self._front.update_own_weights(path)

    async def _update_all_weights(self, path: str) -> None:
        """On every replica. Raises what one raises that cannot; the others have them then."""
        timeout_s = self._args.startup_timeout_s
        answers = await self._peers.ask("update_weights", path, timeout_s=timeout_s)
        if not answers:
            raise EngineUnavailableError("Serve has not told yet which replicas there are")
        failures = [answer for answer in answers if isinstance(answer, Exception)]
        if failures:
            cause = getattr(failures[0], "cause", None) or failures[0]
            gone = isinstance(cause, EngineUnavailableError)
            kind = EngineUnavailableError if gone else ValueError
            raise kind(f"{len(failures)} of {len(answers)} replicas cannot: {cause}")

    def record_routing_stats(self) -> dict[str, Any]:
        """Called by Serve every routing stats period; routers that see no prompts see it."""
        report = self._reports.load()
        return {"manta": asdict(report)} if report else {}

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
        await self._opened.aclose()
