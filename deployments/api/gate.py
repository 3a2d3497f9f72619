"""The gate before the API: request ids, keys, body sizes; and it tells afterwards what happened."""

import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api import scope
from deployments.api.errors import ApiError, error_response
from deployments.api.keys import KeyRing
from deployments.api.request_log import RequestLog
from deployments.api.scope import RequestScope
from deployments.api.tracing import Tracing
from deployments.args import ServiceArgs
from deployments.front.front import Front

REQUEST_ID_HEADER = "x-request-id"
_MAX_ID_LENGTH = 128
# Of a body that is too large so much is read and dropped, so that clients get to read the answer.
_MAX_DRAINED_BYTES = 64 * 2**20

# What is read by load balancers, Prometheus and people with a browser; no model runs for it.
OPEN_PATHS = frozenset({"/", "/health", "/metrics", "/version", "/docs", "/openapi.json"})
_OPEN_FILES = "/playground/"  # of the page, which asks for a key itself


class Gate:
    """ASGI middleware around everything; adds nothing per streamed token but a call."""

    def __init__(
        self, app: ASGIApp, front: Front, service: ServiceArgs, keys: KeyRing, tells_ids: bool
    ) -> None:
        self._app = app
        self._service = service
        self._keys = keys
        isolates = service.isolate_cache_by_key
        self._isolates_cache = keys.has_several_names if isolates is None else isolates
        self._tells_ids = tells_ids
        self._front = front
        self._metrics = front.client.metrics
        self._log = RequestLog(front.model_name, service.request_log)
        self._tracing = Tracing.from_environment(front.model_name)

    async def __call__(self, http: Scope, receive: Receive, send: Send) -> None:
        if http["type"] != "http":
            await self._app(http, receive, send)
            return
        if _route_path(http) != "/":  # a slash at the end changes nothing
            http["path"] = http["path"].rstrip("/")
        headers = Headers(scope=http)
        current = RequestScope(
            self._service, _request_id(headers), http["method"], http["path"], headers
        )
        scope.enter(current)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                current.status = message["status"]
                if self._tells_ids:
                    MutableHeaders(scope=message)[REQUEST_ID_HEADER] = current.request_id
            await send(message)

        self._front.num_open += 1
        try:
            await self._pass(http, receive, send_with_id, current)
        finally:
            self._front.num_open -= 1
            current.handler = str(getattr(http.get("route"), "path", "none"))
            self._metrics.http[current.method, current.handler, current.status_class] += 1
            if current.error:
                self._metrics.errors[current.error] += 1
            self._log.write(current)
            self._tracing.write(current)

    async def _pass(self, http: Scope, receive: Receive, send: Send, current: RequestScope) -> None:
        """Whatever goes wrong before an answer has begun becomes one in OpenAI's shape."""
        try:
            self._admit(http, current)
            if http["method"] in ("POST", "PUT", "PATCH"):
                current.body = await self._read_body(current.headers, receive)
                _check_media_type(current.headers)
                receive = _replay(current.body, receive)
            await self._app(http, receive, send)
        except Exception as error:
            answer = error_response(error)
            if current.status == 0:
                await answer(http, receive, send)

    def _admit(self, http: Scope, current: RequestScope) -> None:
        """Raises ApiError unless the path is open or the key is ours, and whenever draining."""
        path = _route_path(http)
        if path in OPEN_PATHS or path.startswith(_OPEN_FILES):
            return
        self._front.check_open()
        name = self._keys.find(current.headers.get("authorization"))
        if name is None:
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        current.tenant = name
        if self._isolates_cache:
            current.cache_owner = name

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes:
        """Raises ApiError for one that is too large; it is never all in memory."""
        limit = self._service.max_request_bytes
        announced = headers.get("content-length", "")
        is_too_large = announced.isdigit() and int(announced) > limit
        chunks: list[bytes] = []
        size, more = 0, True
        while more and size <= _MAX_DRAINED_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
            is_too_large = is_too_large or size > limit
            if is_too_large:
                chunks.clear()
            else:
                chunks.append(message.get("body", b""))
        if is_too_large:
            raise ApiError(
                413,
                f"the body is larger than {limit} bytes (max_request_bytes)",
                code="request_too_large",
            )
        return b"".join(chunks)


def _check_media_type(headers: Headers) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", ""):
        message = f"the body must be JSON, sent with content-type: application/json (got {kind!r})"
        raise ApiError(415, message, code="unsupported_media_type")


def _request_id(headers: Headers) -> str:
    """The client's own, if it is fit to be logged and sent back; else a new one."""
    given = headers.get(REQUEST_ID_HEADER, "")
    if 0 < len(given) <= _MAX_ID_LENGTH and given.isascii() and given.isprintable():
        return given
    return f"req_{secrets.token_hex(16)}"


def _route_path(http: MutableMapping[str, Any]) -> str:
    """The path below where the app is mounted."""
    root: str = http.get("root_path", "")
    path: str = http["path"]
    below = path.removeprefix(root) if root and path.startswith(root) else path
    return below.rstrip("/") or "/"


def _replay(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    """Gives the body that has been read, then whatever comes: the client's hanging up."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
