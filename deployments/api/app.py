"""The ASGI application: routes, the document that describes them, and errors in OpenAI's shape."""

from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from deployments.api.errors import error_response
from deployments.api.gate import OPEN_PATHS, Gate
from deployments.api.keys import KeyRing
from deployments.api.origins import allow_origins
from deployments.api.routes import (
    chat,
    classify,
    completions,
    embeddings,
    engine_events,
    messages,
    orders,
    playground,
    responses,
    server_info,
    tokens,
)
from deployments.args import ServiceArgs
from deployments.front.front import Front
from deployments.version import VERSION

# Each has `routes(front)`: an endpoint is a file, and its name here.
ROUTES = (
    *(chat, completions, responses, messages, embeddings, classify),
    *(tokens, server_info, orders, engine_events),
)


def build_api(
    front: Front, service: ServiceArgs | None = None, tells_request_ids: bool = True
) -> FastAPI:
    """A plain ASGI app, testable without Ray. Raises ApiKeysError for keys that cannot be had.

    Args:
        tells_request_ids: False where whoever calls the app does, as Serve.
    """
    service = service or ServiceArgs()
    keys = KeyRing.load(service)
    api = _Api(bool(keys))
    _add_error_handlers(api)
    api.add_middleware(Gate, front=front, service=service, keys=keys, tells_ids=tells_request_ids)
    allow_origins(api, service.allowed_origins)
    for part in ROUTES:
        api.include_router(part.routes(front))
    api.include_router(playground.routes())
    return api


class _Api(FastAPI):
    """FastAPI's document, with what the gate asks for."""

    def __init__(self, needs_key: bool) -> None:
        super().__init__(
            title="Manta",
            version=VERSION,
            docs_url="/docs",
            redoc_url=None,
        )
        self._needs_key = needs_key

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        if self._needs_key:
            document["components"]["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"}
            }
            for path in document["paths"].keys() - OPEN_PATHS:
                for operation in document["paths"][path].values():
                    operation["security"] = [{"bearer": []}]
        return document


def _add_error_handlers(api: FastAPI) -> None:
    """For what FastAPI answers by itself; all other errors reach the gate."""

    @api.exception_handler(RequestValidationError)
    @api.exception_handler(HTTPException)
    async def answer(_: object, error: Exception) -> JSONResponse:
        return error_response(error)
