"""Bodies as they come: within bounds of size, time and memory."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from deployments.api.errors import ApiError
from deployments.api.request_log import MAX_BODY_BYTES
from deployments.api.requests import handed_tokens
from deployments.api.requests.handed_tokens import TokenSeal
from deployments.api.scope import RequestScope
from deployments.args import ServiceArgs
from deployments.front.places import Places
from engine.strict import shown

TOO_LARGE = "request_too_large"
# Of a body that is too large so much is read and dropped, so that clients get to read the answer.
_MAX_DRAINED_BYTES = 64 * 2**20
# So many of the largest bodies are in memory at once, waiting to become tokens.
_MAX_BODIES = 16
# How long a body may take to come: so many seconds, and one for every so many bytes.
_BODY_S = 30.0
_BODY_BYTES_PER_S = 16 * 1024
_FORM_BYTES = 64 * 1024  # of a form beside its file


class BodyReader:
    """Knows how much of all bodies is in memory."""

    def __init__(self, service: ServiceArgs, seal: TokenSeal) -> None:
        self._max_bytes = service.max_request_bytes
        self._max_file_bytes = service.max_file_bytes
        self._seal = seal
        self._held = Places()  # of bytes

    async def read(self, current: RequestScope, receive: Receive) -> Receive:
        """What gives the body that has come, and then whatever comes: the client's hanging up.

        Raises ApiError for one that is too large, too slow or one too many. It is never all in
        memory then.
        """
        announced = current.headers.get("content-length", "")
        size = int(announced) if announced.isdigit() else 0
        fault = self._fault(current, size, size)
        chunks: list[bytes] = []
        size = held = 0

        def end_reading() -> None:
            nonlocal held
            self._held.give_back(current.flow, held)
            held = 0

        current.end_reading = end_reading
        async for chunk in _chunks(receive):
            size += len(chunk)
            fault = fault or self._fault(current, size, len(chunk))
            if fault is None:
                self._held.take(current.flow, len(chunk))
                held += len(chunk)
                chunks.append(chunk)
            elif size > _MAX_DRAINED_BYTES:
                break
            else:
                chunks.clear()
                end_reading()
        if fault is not None:
            raise fault
        body = b"".join(chunks)
        current.body_start = body[:MAX_BODY_BYTES]
        if handed_tokens.HEADER in current.headers:
            current.handed = self._seal.open(body, current.headers[handed_tokens.HEADER])
        return _replay(body, receive)

    def _fault(self, current: RequestScope, size: int, more: int) -> ApiError | None:
        """Why a body of at least `size` bytes is refused at its next `more` bytes."""
        limit = self._max_bytes
        if size > limit:
            message = f"the body is larger than {limit} bytes (max_request_bytes)"
            return ApiError(413, message, code=TOO_LARGE)
        if not self._held.has_room(current.flow, more, limit * _MAX_BODIES):
            message = (
                f"{self._held.taken} bytes of requests are being read, and there is no room for "
                "more; try again later"
            )
            return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
        return None

    def counted(self, receive: Receive) -> Receive:
        """A form with a file, as it comes; raises ApiError for what is larger than it may be."""
        size, limit = 0, self._max_file_bytes

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit + _FORM_BYTES:
                text = f"the file is larger than {limit} bytes (max_file_bytes)"
                raise ApiError(413, text, code=TOO_LARGE)
            return message

        return counted


async def _chunks(receive: Receive) -> AsyncIterator[bytes]:
    """Of a body, up to its end or the client's; raises ApiError for one that hardly comes."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _BODY_S
    try:
        more = True
        while more:
            async with asyncio.timeout_at(deadline):
                message = await receive()
            chunk = message.get("body", b"")
            deadline += len(chunk) / _BODY_BYTES_PER_S
            more = message.get("more_body", False)
            yield chunk
    except TimeoutError:
        error = "the rest of the body has not come; send it whole, and faster"
        raise ApiError(408, error, code="request_timeout") from None


def check_media_type(headers: Headers) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    if not (kind or has_body or "origin" in headers):
        return  # no JSON because there is nothing, and no page has sent it
    if kind != "application/json":
        message = (
            "the body must be JSON, sent with content-type: application/json "
            f"(got {shown(kind) if kind else 'none'})"
        )
        raise ApiError(415, message, code="unsupported_media_type")


def _replay(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    """Gives the body that has been read, then whatever comes: the client's hanging up."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
