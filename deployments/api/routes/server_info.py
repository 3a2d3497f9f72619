"""What is asked about the server rather than of its model."""

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from deployments.api.errors import ApiError
from deployments.api.schema import answers
from deployments.api.schema.answers import documented
from deployments.front.engine_client import EngineUnavailableError
from deployments.front.front import Front
from deployments.version import VERSION


def routes(front: Front) -> APIRouter:
    router = APIRouter()

    @router.get("/health", responses=documented(answers.Health))
    async def health() -> dict[str, str]:
        """200 while the engine beats, 503 when it does not."""
        front.check_health()
        return {"status": "ok"}

    @router.get("/ready", responses=documented(answers.Health))
    async def ready() -> dict[str, str]:
        """200 while new requests would be served, 503 while the engine starts, sleeps or ends."""
        front.check_open()
        front.check_ready()
        if not front.client.is_connected:
            raise EngineUnavailableError("the engine is still starting")
        return {"status": "ok"}

    @router.get("/ping", responses=documented(answers.Health))
    async def ping() -> dict[str, str]:
        """As /health, by the name that SageMaker asks for."""
        return await health()

    @router.get("/load", responses=documented(answers.Load))
    async def load() -> dict[str, int]:
        """Requests that this replica has taken and not answered; as in vLLM."""
        return {"server_load": front.client.num_live}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics(http: Request) -> Response:
        """This replica's numbers in Prometheus' text format, or in OpenMetrics' with traces."""
        text, content_type = front.client.metrics.exposition(http.headers.get("accept", ""))
        return Response(text, media_type=content_type)

    @router.get("/version", responses=documented(answers.Version))
    async def get_version() -> dict[str, str]:
        return {"version": VERSION}

    _add_models(router, front)
    return router


def _add_models(router: APIRouter, front: Front) -> None:
    created = int(time.time())

    def model() -> dict[str, Any]:
        limits = front.client.limits
        return {
            "id": front.model_name,
            "object": "model",
            "created": created,
            "owned_by": "manta",
            "root": front.client.weights or front.model,
            "parent": None,
            "max_model_len": limits.max_len if limits else None,
        }

    @router.get("/v1/models", responses=documented(answers.ModelList))
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model()]}

    @router.get("/v1/models/{model_id:path}", responses=documented(answers.Model))
    async def get_model(model_id: str) -> dict[str, Any]:
        if model_id != front.model_name:
            raise ApiError.no_such_model(model_id, front.model_name)
        return model()
