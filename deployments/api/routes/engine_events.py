"""GET /engine/events: the engines at work, as server-sent events, for whoever wants to look.

Every event is {"replicas": [{"replica", "connected", "live", "view"}, …]}: `live` is the number of
requests the front holds, `view` an `engine.view.EngineView`, or null until one has come. An engine
draws only while somebody is connected here.
"""

import asyncio
import time
from collections.abc import AsyncGenerator

from fastapi import APIRouter
from fastapi.responses import Response

from deployments.api.streaming import EventStream, event
from deployments.front.front import Front

_INTERVAL_S = 0.1
# A picture that has not changed is sent again after so many: proxies close silent streams.
_SILENT_INTERVALS = 10
# A page comes back when its stream ends; one that never did would keep a replica from retiring.
_LIFETIME_S = 10.0


def routes(front: Front) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/engine/events", response_model=None, include_in_schema=False)
    async def engine_events() -> Response:
        return EventStream(_events(front))

    return router


async def _events(front: Front) -> AsyncGenerator[str]:
    last, silent = "", 0
    end = time.monotonic() + _LIFETIME_S
    while time.monotonic() < end and not front.is_draining:
        news = event({"replicas": await front.watch()})
        silent += 1
        if news != last or silent >= _SILENT_INTERVALS:
            last, silent = news, 0
            yield news
        await asyncio.sleep(_INTERVAL_S)
