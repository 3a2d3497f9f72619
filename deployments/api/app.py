"""The ASGI application: routes, and every error in OpenAI's shape."""

import time

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from deployments.api import chat, completions, engine_events, playground
from deployments.api.errors import ApiError, error_response, validation_error
from deployments.engine_client import EngineUnavailableError
from deployments.front import Front
from engine.strict import explain


def build_api(front: Front) -> FastAPI:
    """A plain ASGI app, testable without Ray."""
    api = FastAPI(title="Manta", docs_url="/docs", redoc_url=None)
    created = int(time.time())
    _add_error_handlers(api)
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
    @api.exception_handler(ApiError)
    async def api_error(_: object, error: ApiError) -> JSONResponse:
        return error_response(error)

    @api.exception_handler(RequestValidationError)
    async def invalid_body(_: object, error: RequestValidationError) -> JSONResponse:
        return error_response(validation_error(explain(error.errors())))

    @api.exception_handler(EngineUnavailableError)
    async def unavailable(_: object, error: EngineUnavailableError) -> JSONResponse:
        return error_response(ApiError.unavailable(error))

    @api.exception_handler(HTTPException)
    async def http_error(_: object, error: HTTPException) -> JSONResponse:
        return error_response(ApiError(error.status_code, str(error.detail)))

    @api.exception_handler(Exception)
    async def internal(_: object, error: Exception) -> JSONResponse:
        return error_response(ApiError(500, f"internal error: {type(error).__name__}"))
