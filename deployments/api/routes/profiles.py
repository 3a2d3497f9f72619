"""POST /start_profile and /stop_profile, as vLLM has them."""

from fastapi import APIRouter

from deployments.api.bodies import BodyRoute
from deployments.api.errors import ApiError
from deployments.api.schema import answers
from deployments.api.schema.answers import documented
from deployments.front.front import Front


def routes(front: Front) -> APIRouter:
    router = APIRouter(route_class=BodyRoute)

    @router.post("/start_profile", responses=documented(answers.Profiled))
    async def start_profile() -> dict[str, str]:
        """Record what this replica's shards do, where the server has a profile_directory."""
        await _profile(front, starts=True)
        return {"status": "started"}

    @router.post("/stop_profile", responses=documented(answers.Profiled))
    async def stop_profile() -> dict[str, str]:
        """End that, and write a trace for each shard into that directory."""
        await _profile(front, starts=False)
        return {"status": "written"}

    return router


async def _profile(front: Front, starts: bool) -> None:
    failure = await front.client.profile(starts)
    if failure is not None:
        raise ApiError(400, failure)
