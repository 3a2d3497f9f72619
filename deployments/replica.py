"""A Serve replica: the HTTP ingress and the front of one engine."""

import asyncio
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.util.placement_group import get_current_placement_group

from deployments.api import build_api
from deployments.args import AppArgs
from deployments.front import Front
from deployments.shard_group import ShardGroup


@serve.deployment
@serve.ingress()
class Replica:
    """Sits in bundle 0 of its placement group, its engine's shards in the others."""

    async def __init__(self, args: AppArgs) -> None:  # type: ignore[misc]
        bundles = get_current_placement_group()
        assert bundles is not None, "the app builder gives every replica a placement group"
        self._front = await asyncio.to_thread(Front, args)
        await self._front.client.start()
        self._shards = ShardGroup(args, self._front.client, bundles)
        await self._shards.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._front)

    async def stats(self) -> dict[str, Any]:
        """The engine's numbers and this front's, for callers with a handle."""
        client = self._front.client
        return {"live": client.num_live, **client.stats}

    async def check_health(self) -> None:
        """Called by Serve, which replaces the replica when this keeps raising."""
        self._shards.check()

    async def __del__(self) -> None:
        self._shards.stop()
        await self._front.client.close()
