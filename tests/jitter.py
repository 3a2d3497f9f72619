"""A plugin that makes the front fall behind at random: `pytest -p tests.jitter`.

Tokens of several steps then come in one event, or each in its own, as on a machine that is busy.
No test may depend on which.
"""

import asyncio
import random

from deployments.front.arrivals import Arrivals
from engine.schedule.step import TokenDelta

_random = random.Random(0)
_take = Arrivals.take


async def _take_late(self: Arrivals) -> dict[int, TokenDelta]:
    await asyncio.sleep(_random.choice((*[0] * 8, 0.01, 0.2)))
    return await _take(self)


Arrivals.take = _take_late  # type: ignore[method-assign]
