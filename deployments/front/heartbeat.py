"""Whether an engine that says nothing is at work or hangs."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from deployments.args import DeploymentArgs

# An engine beats every step, and when idle twice a second. One that is silent for so many times as
# long as its longest step takes hangs; but in no less, and no more, than so many seconds.
_PATIENCE = 20
_LEAST_S, _MOST_S = 30.0, 120.0
# How fast it computes is known after so many steps that were full of tokens.
_KNOWN_STEPS = 3


class Heartbeat:
    """Of one engine after another.

    Args:
        stats: gives the engine's latest numbers.
    """

    def __init__(
        self,
        args: DeploymentArgs,
        stats: Callable[[], Mapping[str, Any]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._given_s = args.heartbeat_timeout_s
        self._stats = stats
        self._clock = clock
        self._longest_s = 0.0
        self.last = clock()

    def start(self) -> None:
        """There is an engine now, or one that has done what takes longer than a step."""
        self.last = self._clock()

    def beat(self) -> None:
        now = self._clock()
        self._longest_s = max(self._longest_s, now - self.last)
        self.last = now

    @property
    def timeout_s(self) -> float:
        """As given, or as the steps so far have it: a full one may be yet to come."""
        stats = self._stats()
        if self._given_s is not None:
            return self._given_s
        if stats.get("full_steps", 0) < _KNOWN_STEPS:
            return _MOST_S
        full_s = stats["step_tokens"] / max(stats["tokens_per_s"], 1.0)
        return min(max(_PATIENCE * max(full_s, self._longest_s), _LEAST_S), _MOST_S)

    @property
    def is_silent(self) -> bool:
        return self._clock() - self.last > self.timeout_s
