"""What a replica tells the routers: its load, and the blocks that its engine has cached."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from deployments.cached_blocks import CachedBlocks
from deployments.front.engine_client import EngineClient
from deployments.routing.balancer import ReplicaReport

_PERIOD_S = 1.0

logger = logging.getLogger("ray.serve")


class ReplicaReports:
    """Made one after another; the routers that see prompts get each of them."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._sequence = 0
        self._told: CachedBlocks | None = None  # whose blocks the routers know,
        self._told_sequence = 0  # as of this report

    def load(self) -> ReplicaReport | None:
        """Without blocks, for routers that see no prompts; None while there is no engine."""
        stats, limits = self._client.stats, self._client.limits
        if not stats or limits is None:
            return None
        self._sequence += 1
        return ReplicaReport(
            sequence=self._sequence,
            block_size=limits.block_size,
            num_blocks=limits.num_blocks,
            running=stats["running"],
            waiting=stats["waiting"],
            uncomputed_tokens=stats["uncomputed_tokens"],
            tokens_per_s=stats["tokens_per_s"],
        )

    def changes(self) -> ReplicaReport | None:
        """With what has changed since the last one; with all blocks where nobody knows those."""
        report = self.load()
        if report is None:
            return None
        follows, self._told_sequence = self._told_sequence, report.sequence
        blocks = self._client.cached_blocks
        come, gone = blocks.take_changes()
        if blocks is not self._told:
            self._told = blocks
            return replace(report, come=blocks.names())
        return replace(report, follows=follows, come=come, gone=gone)

    async def send_forever(self, send: Callable[[ReplicaReport], Awaitable[list[Any]]]) -> None:
        while True:
            try:
                await self.send(send)
            except Exception as error:  # no router runs, perhaps
                self._told = None
                logger.debug("no report to the routers: %r", error)
            await asyncio.sleep(_PERIOD_S)

    async def send(self, send: Callable[[ReplicaReport], Awaitable[list[Any]]]) -> None:
        """
        Args:
            send: to every router; returns for each whether it has understood the report.
        """
        if report := self.changes():
            answers = await send(report)
            if any(answer is False for answer in answers):
                self._told = None  # somebody is new, or has missed one
