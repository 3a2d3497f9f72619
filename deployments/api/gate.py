"""The gate before the API: request ids, keys, quotas; and it tells afterwards what happened."""

import secrets
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api import scope
from deployments.api.errors import ApiError, error_response
from deployments.api.keys import KeyRing
from deployments.api.origins import check_page, check_upload
from deployments.api.request_log import RequestLog
from deployments.api.requests import handed_tokens
from deployments.api.requests.body_reader import TOO_LARGE, BodyReader, check_media_type
from deployments.api.requests.handed_tokens import TokenSeal
from deployments.api.scope import RequestScope
from deployments.api.tracing import Tracing
from deployments.args import ServiceArgs
from deployments.front.front import Front
from deployments.front.quotas import Quotas

REQUEST_ID_HEADER = "x-request-id"
_MAX_ID_LENGTH = 128
_MAX_HEAD_BYTES = 64 * 1024
_FROM_ROUTERS = handed_tokens.HEADER.encode()

# What is read by load balancers, Prometheus and people with a browser; no model runs for it.
OPEN_PATHS = frozenset(
    {"/", "/health", "/ready", "/ping", "/metrics", "/version", "/docs", "/openapi.json"}
)
_OPEN_FILES = "/playground/"  # of the page, which asks for a key itself
ANTHROPIC = "/v1/messages/"
# What OpenAI's clients ask for and is not here, by the beginning of its path.
ABSENT = {
    **dict.fromkeys(
        ("/v1/files", "/v1/batches"),
        "this server keeps no files; deploy it with files_directory=… to have files and batches",
    ),
    **dict.fromkeys(
        ("/v1/images", "/v1/audio", "/v1/videos", "/v1/moderations", "/v1/realtime"),
        "models here read and write text",
    ),
    **dict.fromkeys(
        ("/v1/assistants", "/v1/threads", "/v1/conversations", "/v1/vector_stores", "/v1/uploads"),
        "use chat completions, responses or messages",
    ),
}


class Gate:
    """ASGI middleware around everything; adds nothing per streamed token but a call."""

    def __init__(
        self,
        app: ASGIApp,
        front: Front,
        service: ServiceArgs,
        keys: KeyRing,
        tells_ids: bool = True,
    ) -> None:
        self._app = app
        self._service = service
        self._keys = keys
        self._tells_ids = tells_ids
        self._front = front
        self._quotas = Quotas()
        self._bodies = BodyReader(service, TokenSeal(front.block_key))
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
        is_anthropic = f"{_route_path(http)}/".startswith(ANTHROPIC)
        current = RequestScope(
            self._service, _request_id(headers), http["method"], http["path"], is_anthropic, headers
        )
        scope.enter(current)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                current.status = message["status"]
                if self._tells_ids:
                    MutableHeaders(scope=message)[REQUEST_ID_HEADER] = current.request_id
                if is_anthropic:
                    MutableHeaders(scope=message)["request-id"] = current.request_id
            await send(message)

        self._front.num_open += 1
        try:
            await self._pass(http, receive, send_with_id, current)
        finally:
            self._front.num_open -= 1
            current.end_reading()
            current.handler = str(getattr(http.get("route"), "path", "none"))
            self._count_tokens(current)
            self._metrics.http[current.method, current.handler, current.status_class] += 1
            if current.error:
                self._metrics.errors[current.error] += 1
            self._log.write(current)
            if trace_id := self._tracing.write(current):
                for record in current.records:
                    self._metrics.note_trace(record, trace_id)

    async def _pass(self, http: Scope, receive: Receive, send: Send, current: RequestScope) -> None:
        """Whatever goes wrong before an answer has begun becomes one in its API's shape."""
        try:
            self._admit(http, current)
            self._check_present(_route_path(http))
            if http["method"] not in ("POST", "PUT", "PATCH"):
                await self._app(http, receive, send)
                return
            with self._quotas.request(current.tenant, current.quota):
                if self._takes_file(http):
                    check_upload(current.headers, self._service.allowed_origins)
                    receive = self._bodies.counted(receive)
                else:
                    receive = await self._bodies.read(current, receive)
                    check_media_type(current.headers)
                await self._app(http, receive, send)
        except Exception as error:
            answer = error_response(error)
            if current.status == 0:
                await answer(http, receive, send)

    def _check_present(self, path: str) -> None:
        """Raises ApiError where somebody may look for what this server does not have."""
        hint = next((hint for name, hint in ABSENT.items() if path.startswith(name)), None)
        has_files = self._service.files_directory is not None
        if hint is not None and not (has_files and path.startswith(("/v1/files", "/v1/batches"))):
            raise ApiError(404, f"there is no {path}: {hint}")

    def _takes_file(self, http: Scope) -> bool:
        """Whether the body is a form with a file, which is read as it comes and never held."""
        return self._service.files_directory is not None and _route_path(http) == "/v1/files"

    def _count_tokens(self, current: RequestScope) -> None:
        for record in current.records:
            num_tokens = record.counts.get("prompt", 0) + record.num_output
            self._quotas.take(current.tenant, current.quota, num_tokens)
        self._metrics.count_key(current.tenant, current.records)

    def _admit(self, http: Scope, current: RequestScope) -> None:
        """Raises ApiError unless the path is open or the key is ours, and whenever draining."""
        _check_head(http)
        if not self._keys:
            check_page(current.headers, self._service.allowed_origins)
        path = _route_path(http)
        if path in OPEN_PATHS or path.startswith(_OPEN_FILES):
            return
        self._front.check_open()
        name = self._keys.find(current.headers)
        if name is None:
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY, or as "
                "x-api-key: KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        current.tenant = name
        current.quota = self._keys.quota(name)
        has_several, isolates = self._keys.has_several_names, self._service.isolate_cache_by_key
        current.flow = name if has_several else current.request_id
        if has_several if isolates is None else isolates:
            current.cache_owner = name


def _check_head(http: Scope) -> None:
    size = len(http["path"]) + len(http["query_string"])
    own = ((name, value) for name, value in http["headers"] if name != _FROM_ROUTERS)
    size += sum(len(name) + len(value) for name, value in own)
    if size > _MAX_HEAD_BYTES:
        message = f"the headers are {size} bytes; at most {_MAX_HEAD_BYTES} are taken"
        raise ApiError(431, message, code=TOO_LARGE)


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
