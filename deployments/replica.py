"""A Serve replica: HTTP ingress, front, and the engine shard that it starts and watches."""

import asyncio
import logging
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deployments.api import build_api
from deployments.args import AppArgs
from deployments.engine_client import EngineUnavailableError
from deployments.front import Front
from deployments.shard import EngineShard, shard_bundle

logger = logging.getLogger("ray.serve")


@serve.deployment
@serve.ingress()
class Replica:
    """Bundle 0 of its placement group is its own, bundle 1 + rank that rank's shard's."""

    async def __init__(self, args: AppArgs) -> None:  # type: ignore[misc]
        self._args = args
        self._front = await asyncio.to_thread(Front, args)
        await self._front.client.start()
        self._shard = self._start_shard()
        self._watch = asyncio.create_task(self._watch_shard())
        ready = asyncio.create_task(self._front.client.wait_connected())
        await asyncio.wait({ready, self._watch}, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            ready.cancel()
            raise RuntimeError("the engine did not start") from self._watch.result()

    def _start_shard(self) -> Any:
        group = get_current_placement_group()
        assert group is not None, "the app builder gives every replica a placement group"
        bundle = shard_bundle(self._args)
        return EngineShard.options(  # type: ignore[attr-defined]
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=1
            ),
        ).remote()

    async def _watch_shard(self) -> BaseException | None:
        """Waits for the shard's end, then fails what depended on it. Returns the cause."""
        cause: BaseException | None = None
        try:
            await self._shard.run.remote(self._args.engine_config, self._front.client.address)
        except ray.exceptions.RayError as error:
            cause = error
        logger.error("The engine has stopped: %s", cause)
        self._front.client.fail_all(EngineUnavailableError("the engine has stopped"))
        return cause

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._front)

    async def check_health(self) -> None:
        """Called by Serve, which replaces the replica when this keeps raising."""
        if self._watch.done():
            raise EngineUnavailableError("the engine has stopped")
        self._front.check_health()

    async def __del__(self) -> None:
        await self._front.client.close()
