"""What all replicas of an application look like, asked by the one that a page talks to."""

import time
from typing import Any

from deployments.peers import Peers

# Pages that watch at the same time share an answer that is not older than this, in seconds.
_FRESH_S = 0.25


class ReplicaWatch:
    """Calls `watch` on every replica, this one included, through Serve."""

    def __init__(self) -> None:
        self._replicas = Peers()
        self._asked_at = -_FRESH_S
        self._pictures: list[dict[str, Any]] = []

    async def pictures(self) -> list[dict[str, Any]]:
        """One per replica that answers in time, ordered by name."""
        now = time.monotonic()
        if now - self._asked_at < _FRESH_S:
            return self._pictures
        self._asked_at = now
        answers = await self._replicas.ask("watch")
        found = [answer for answer in answers if isinstance(answer, dict)]
        self._pictures = sorted(found, key=lambda picture: str(picture["replica"]))
        return self._pictures
