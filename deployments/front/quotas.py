"""What each client may have: so many requests at once, and so many tokens a minute."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pydantic import Field

from engine.strict import StrictModel

_MINUTE_S = 60.0


class Quota(StrictModel):
    """What a line of the keys' file may say."""

    weight: float = Field(1.0, gt=0, lt=1e6)  # among the others, with scheduling_policy=fair
    tokens_per_minute: float | None = Field(None, gt=0)
    max_concurrent: int | None = Field(None, ge=1)


class QuotaError(Exception):
    """The client has had what it may have."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Quotas:
    """Counts by the client's name, for this replica.

    Tokens come out of a bucket that holds a minute's worth. How many an answer takes is known when
    it has ended: what it takes too much of is owed by the requests that follow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: Counter[str] = Counter()
        self._taken: dict[str, tuple[float, float]] = {}  # tokens, at a time

    @contextmanager
    def request(self, name: str, quota: Quota) -> Iterator[None]:
        """Around a request; raises QuotaError for one too many."""
        if quota.max_concurrent is not None and self._open[name] >= quota.max_concurrent:
            raise QuotaError(
                f"{self._open[name]} requests of this key are being answered, of at most "
                f"{quota.max_concurrent} (max_concurrent); try again when one has ended",
                retry_after_s=1,
            )
        limit = quota.tokens_per_minute
        if limit is not None and (excess := self._level(name, limit) - limit) >= 0:
            raise QuotaError(
                f"this key has had its {limit:g} tokens a minute (tokens_per_minute); try again "
                "later",
                retry_after_s=max(math.ceil(excess / limit * _MINUTE_S), 1),
            )
        self._open[name] += 1
        try:
            yield
        finally:
            self._open[name] -= 1
            if not self._open[name]:
                del self._open[name]

    def take(self, name: str, quota: Quota, tokens: int) -> None:
        """An answer has ended that took so many tokens, its prompt's included."""
        if quota.tokens_per_minute is not None:
            taken = self._level(name, quota.tokens_per_minute) + tokens
            self._taken[name] = taken, self._clock()

    def _level(self, name: str, limit: float) -> float:
        """Tokens that are missing from its bucket."""
        taken, at = self._taken.get(name, (0.0, 0.0))
        return max(taken - (self._clock() - at) * limit / _MINUTE_S, 0.0)
