"""What engine steps bring the requests of one answer, until it is taken.

Where steps come faster than their tokens can be sent, those of several steps are taken, and sent,
at once: so a front that falls behind has less to do.
"""

import asyncio

from engine.schedule.step import TokenDelta


class Arrivals:
    """One waits; all that has come by then is taken at once."""

    def __init__(self) -> None:
        self._deltas: dict[int, TokenDelta] = {}
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, index: int, delta: TokenDelta, wakes: bool = True) -> None:
        """
        Args:
            index: of the request among those that are answered together.
            wakes: whoever waits; otherwise it is there when something else does.
        """
        if self._failure is not None:
            return
        if index in self._deltas:
            self._deltas[index].extend(delta)
        else:
            self._deltas[index] = delta
        if wakes:
            self._wake()

    def fail(self, error: Exception) -> None:
        """There will be no answer: `take` raises this, after what has come before."""
        self._failure = self._failure or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> dict[int, TokenDelta]:
        """At least one delta, by index. Raises what a request has failed with."""
        if not self._deltas and self._failure is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if not self._deltas and self._failure is not None:
            raise self._failure
        deltas, self._deltas = self._deltas, {}
        return deltas
