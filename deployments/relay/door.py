"""Several applications behind one address: `model` in the body says which gets a request.

Bytes go through as they come, over HTTP: nothing of Ray is asked per request or token. What is said
of keys, pages, limits and errors is the applications' own. None is asked for what is another's: one
without replicas would start one.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic_core import from_json

from deployments.api.bodies import parse
from deployments.api.errors import ApiError
from deployments.api.gate import ANTHROPIC, REQUEST_ID_HEADER
from deployments.off_loop import off_loop
from engine.strict import shown

# Of one connection, not of what it carries.
_HOP = {b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
# Of an answer, also what whoever hands it to the client says itself.
_NOT_KEPT = _HOP | {b"date", b"server", REQUEST_ID_HEADER.encode()}
_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_MAX_BYTES = 64 * 2**20
TIMEOUT = httpx.Timeout(10, read=None)  # a stream may pause as long as it likes

_Body = bytes | AsyncIterator[bytes] | None


class Door:
    """
    Args:
        http: with the proxy as its base URL.
        routes: of the applications, by model. A request that names none goes to the first.
    """

    def __init__(self, http: httpx.AsyncClient, routes: Mapping[str, str]) -> None:
        self._http = http
        self._routes = routes
        self._ending: set[asyncio.Task[None]] = set()  # of clients that have gone

    def route(self, model: Any) -> str:
        """Where the model is; raises ApiError if it is nowhere."""
        if model is None:
            return next(iter(self._routes.values()))
        if not isinstance(model, str) or model not in self._routes:
            there = ", ".join(map(repr, self._routes))
            message = f"the model {shown(model)} does not exist; there are: {there}"
            raise ApiError(404, message, "model", "model_not_found")
        return self._routes[model]

    async def models(self, request: Request) -> Response:
        """All of them, for whom the first application tells of its own."""
        answer = await self._send(request, self.route(None))
        if answer.status_code != 200:
            return _passed_on(answer)
        own = from_json(await answer.aread())["data"][0]
        alike = {name: own[name] for name in ("object", "created", "owned_by")}
        others = [{"id": name, **alike} for name in self._routes if name != own["id"]]
        told = JSONResponse({"object": "list", "data": [own, *others]})
        told.raw_headers += [(k, v) for k, v in _kept(answer) if k.startswith(b"access-control-")]
        return told

    async def response(self, request: Request) -> Response:
        """A stored response, from whichever application has it."""
        *others, last = dict.fromkeys(self._routes.values())
        for route in others:
            answer = await self._send(request, route)
            if answer.status_code != 404:
                return _passed_on(answer)
            await answer.aclose()
        return await self.to(request, last)

    async def relay(self, request: Request) -> Response:
        """The answer of the application that has the body's model, at the same path there."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            return await self.to(request, self.route(None), request.stream())
        body = await _read(request)
        return await self.to(request, self.route(await _model_of(body)), body)

    async def to(self, request: Request, route: str, body: _Body = None) -> Response:
        return _passed_on(await self._send(request, route, body))

    async def _send(self, request: Request, route: str, body: _Body = None) -> httpx.Response:
        """What the application answers, its body still to come."""
        below = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        url = httpx.URL(path=route + below, query=request.url.query.encode())
        headers = [(name, value) for name, value in request.headers.raw if name not in _HOP]
        has_body = not {"content-length", "transfer-encoding"}.isdisjoint(request.headers)
        content = body if has_body else None
        asked = self._http.build_request(request.method, url, headers=headers, content=content)
        # Where a request is cancelled again while it ends, httpx leaves its connection open.
        sending = asyncio.create_task(self._http.send(asked, stream=True))
        try:
            return await asyncio.shield(sending)
        except asyncio.CancelledError:
            ending = asyncio.create_task(_end(sending))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
            raise
        except httpx.TransportError as error:
            raise ApiError(
                503, f"{route} does not answer", code="unreachable", headers={"Retry-After": "5"}
            ) from error


async def _read(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BYTES:
            message = f"the body is larger than {_MAX_BYTES} bytes"
            raise ApiError(413, message, code="request_too_large")
    return bytes(body)


async def _model_of(body: bytes) -> Any:
    try:
        content = await off_loop(len(body), parse, body, _MAX_BYTES)
    except ApiError:
        return None  # the application says what is wrong with it
    return content.get("model") if isinstance(content, dict) else None


def _passed_on(answer: httpx.Response) -> Response:
    passed_on = StreamingResponse(_bytes_of(answer), answer.status_code)
    passed_on.raw_headers = _kept(answer)
    return passed_on


def _kept(answer: httpx.Response) -> list[tuple[bytes, bytes]]:
    named = ((name.lower(), value) for name, value in answer.headers.raw)
    return [(name, value) for name, value in named if name not in _NOT_KEPT]


async def _bytes_of(answer: httpx.Response) -> AsyncIterator[bytes]:
    """Closing it, as when the client has gone, tells the application."""
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    finally:
        await answer.aclose()


async def _end(sending: "asyncio.Task[httpx.Response]") -> None:
    sending.cancel()
    with suppress(asyncio.CancelledError, httpx.HTTPError):
        await (await sending).aclose()


def build_door(http: httpx.AsyncClient, routes: Mapping[str, str]) -> FastAPI:
    """A plain ASGI app, testable without Ray."""
    door = Door(http, routes)
    api = FastAPI(title="Manta", docs_url=None, redoc_url=None, openapi_url=None)

    @api.exception_handler(ApiError)
    async def answer(request: Request, error: ApiError) -> JSONResponse:
        own_id = request.headers.get(REQUEST_ID_HEADER, "")
        is_anthropic = f"{request.url.path}/".startswith(ANTHROPIC)
        body = error.anthropic_body(own_id) if is_anthropic else error.body()
        return JSONResponse(body, error.status, error.headers)

    @api.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/v1/models")
    async def list_models(request: Request) -> Response:
        return await door.models(request)

    @api.get("/v1/models/{name:path}")
    async def get_model(name: str, request: Request) -> Response:
        return await door.to(request, door.route(name))

    @api.api_route("/v1/responses/{name:path}", methods=["GET", "DELETE"])
    async def of_a_response(request: Request) -> Response:
        return await door.response(request)

    @api.api_route("/{path:path}", methods=_METHODS)
    async def relay(request: Request) -> Response:
        return await door.relay(request)

    return api
