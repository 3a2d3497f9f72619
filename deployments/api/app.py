"""The ASGI application: routes, and every error in OpenAI's shape."""

import time

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from deployments.api import chat, completions, engine_events, playground
from deployments.api.errors import error_response
from deployments.api.gate import Gate
from deployments.api.keys import KeyRing
from deployments.args import ServiceArgs
from deployments.front import Front


def build_api(front: Front, service: ServiceArgs | None = None) -> FastAPI:
    """A plain ASGI app, testable without Ray. Raises ApiKeysError for keys that cannot be had."""
    service = service or ServiceArgs()
    api = FastAPI(title="Manta", docs_url="/docs", redoc_url=None)
    created = int(time.time())
    _add_error_handlers(api)
    api.add_middleware(Gate, front=front, service=service, keys=KeyRing.load(service))
    api.include_router(chat.routes(front))
    api.include_router(completions.routes(front))
    api.include_router(engine_events.routes(front))
    api.include_router(playground.routes())

    @api.get("/health")
    async def health() -> dict[str, str]:
        """200 while the engine beats, 503 when it does not."""
        front.check_health()
        return {"status": "ok"}

    @api.get("/v1/models")
    async def models() -> dict[str, object]:
        limits = front.client.limits
        model = {
            "id": front.model_name,
            "object": "model",
            "created": created,
            "owned_by": "manta",
            "max_model_len": limits.max_len if limits else None,
        }
        return {"object": "list", "data": [model]}

    return api


def _add_error_handlers(api: FastAPI) -> None:
    """For what FastAPI answers by itself; all other errors reach the gate."""

    @api.exception_handler(RequestValidationError)
    @api.exception_handler(HTTPException)
    async def answer(_: object, error: Exception) -> JSONResponse:
        return error_response(error)
