"""Several applications behind one address: `model` in the body says which gets a request.

Bytes go through as they come, over HTTP: nothing of Ray is asked per request or token. What is said
of keys, limits and errors is the applications' own.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from deployments.api.bodies import parse
from deployments.api.errors import ApiError
from deployments.off_loop import off_loop
from engine.strict import shown

# Of one connection, not of what it carries.
_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
_HOP |= {"host", "content-length"}
_MAX_BYTES = 64 * 2**20
TIMEOUT = httpx.Timeout(10, read=None)  # a stream may pause as long as it likes


class Door:
    """
    Args:
        http: with the proxy as its base URL.
        routes: of the applications. A request that names no model goes to the first.
    """

    def __init__(self, http: httpx.AsyncClient, routes: list[str]) -> None:
        self._http = http
        self._routes = routes
        self._route_of: dict[str, str] = {}  # by model

    async def models(self, headers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """What the applications say of their models, by name, to whoever has this key."""
        answers = await asyncio.gather(
            *(self._http.get(f"{route}/v1/models", headers=headers) for route in self._routes),
            return_exceptions=True,
        )
        found: dict[str, dict[str, Any]] = {}
        for route, answer in zip(self._routes, answers, strict=True):
            if isinstance(answer, httpx.Response) and answer.status_code in (200, 404):
                self._route_of = {m: r for m, r in self._route_of.items() if r != route}
                for model in answer.json()["data"] if answer.status_code == 200 else ():
                    found[model["id"]] = model
                    self._route_of[model["id"]] = route
        return found

    async def route(self, model: Any, headers: Mapping[str, str]) -> str:
        """Where the model is; raises ApiError if it is nowhere."""
        if model is None:
            return self._routes[0]
        name = str(model)
        if name not in self._route_of:
            await self.models(headers)
        if name not in self._route_of:
            there = ", ".join(map(repr, self._route_of)) or "none that answers"
            message = f"the model {shown(model)} does not exist; there are: {there}"
            raise ApiError(404, message, "model", "model_not_found")
        return self._route_of[name]

    async def relay(self, request: Request, path: str) -> Response:
        """The answer of the application that has the body's model, at the same path there."""
        body = await _read(request)
        headers = _passed_on(request.headers)
        route = await self.route(await _model_of(body), headers)
        url = httpx.URL(f"{route}/{path}", query=request.url.query.encode())
        asked = self._http.build_request(request.method, url, headers=headers, content=body)
        try:
            answer = await self._http.send(asked, stream=True)
        except httpx.TransportError as error:
            raise ApiError(
                503, f"{route} does not answer", code="unreachable", headers={"Retry-After": "5"}
            ) from error
        return StreamingResponse(
            _bytes_of(answer), answer.status_code, headers=_passed_on(answer.headers)
        )


async def _read(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BYTES:
            message = f"the body is larger than {_MAX_BYTES} bytes"
            raise ApiError(413, message, code="request_too_large")
    return bytes(body)


async def _bytes_of(answer: httpx.Response) -> AsyncIterator[bytes]:
    """Closing it, as when the client has gone, tells the application."""
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    finally:
        await answer.aclose()


async def _model_of(body: bytes) -> Any:
    try:
        content = await off_loop(len(body), parse, body, _MAX_BYTES)
    except ApiError:
        return None  # the application says what is wrong with it
    return content.get("model") if isinstance(content, dict) else None


def _passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in _HOP}


def build_door(http: httpx.AsyncClient, routes: list[str]) -> FastAPI:
    """A plain ASGI app, testable without Ray."""
    door, api = Door(http, routes), FastAPI(title="Manta", docs_url=None, redoc_url=None)

    @api.exception_handler(ApiError)
    async def answer(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @api.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        found = await door.models(_passed_on(request.headers))
        return {"object": "list", "data": list(found.values())}

    @api.get("/v1/models/{name:path}")
    async def get_model(name: str, request: Request) -> Any:
        headers = _passed_on(request.headers)
        found = await door.models(headers)
        return found.get(name) or await door.route(name, headers)

    @api.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.post("/{path:path}")
    async def relay(path: str, request: Request) -> Response:
        return await door.relay(request, path)

    return api
