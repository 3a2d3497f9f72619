"""What an operator has an engine do beside answering, by the names that vLLM has for it.

Each but the last is of the replica that the request reaches, and refused where the server has not
been told to allow it.
"""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from deployments.api.bodies import BodyRoute
from deployments.api.errors import ApiError
from deployments.api.schema import answers
from deployments.api.schema.answers import documented
from deployments.api.scope import scope
from deployments.front.engine_client import Order
from deployments.front.front import Front
from engine.text.request_model import RequestModel


class Sleeping(answers.Answer):
    is_sleeping: bool


class WeightUpdate(RequestModel):
    model_path: str = Field(
        min_length=1, description="A checkpoint of the same model: a directory, hub id or URI."
    )


def routes(front: Front) -> APIRouter:
    router = APIRouter(route_class=BodyRoute)

    @router.post("/start_profile", responses=documented(answers.Obeyed))
    async def start_profile() -> dict[str, str]:
        """Record what this replica's shards do, where the server has a profile_directory."""
        return await _order(front, "start_profile", "started")

    @router.post("/stop_profile", responses=documented(answers.Obeyed))
    async def stop_profile() -> dict[str, str]:
        """End that, and write a trace for each shard into that directory."""
        return await _order(front, "stop_profile", "written")

    @router.post("/sleep", responses=documented(answers.Obeyed))
    async def sleep() -> dict[str, str]:
        """Give back the device's memory, where the server has enable_sleep_mode and is idle."""
        return await _order(front, "sleep", "asleep")

    @router.post("/wake_up", responses=documented(answers.Obeyed))
    async def wake_up() -> dict[str, str]:
        """Take it again; what has been asked meanwhile was refused with 503."""
        return await _order(front, "wake_up", "awake")

    @router.get("/is_sleeping", responses=documented(Sleeping))
    async def is_sleeping() -> dict[str, bool]:
        return {"is_sleeping": front.client.is_sleeping}

    @router.post(
        "/update_weights_from_disk", response_model=None, responses=documented(answers.Obeyed)
    )
    async def update_weights_from_disk(request: WeightUpdate) -> Response:
        """All replicas compute with a checkpoint's, where the server has enable_weight_updates.

        By SGLang's name. Requests on their way go on, with what they have so far computed anew.
        """
        if not scope().service.enable_weight_updates:
            raise ApiError(400, "this server has no enable_weight_updates", "model_path")
        try:
            await front.update_weights(request.model_path)
        except ValueError as error:
            raise ApiError(400, str(error), "model_path") from error
        return JSONResponse({"status": "updated"})

    return router


async def _order(front: Front, what: Order, done: str) -> dict[str, str]:
    failure = await front.client.order(what)
    if failure is not None:
        raise ApiError(400, failure)
    return {"status": done}
