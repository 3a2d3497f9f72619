"""From the bytes of a body to a request that is checked, at a cost that has a bound.

What JSON costs is not its bytes but its values: 16 MB of text are read in milliseconds, 16 MB of
`[[],[],…]` take a second, in one call that lets nothing else run. So values are counted first.
"""

import math
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from deployments.api.errors import ApiError, validation_error
from deployments.api.scope import scope
from deployments.off_loop import off_loop
from engine.strict import explain

M = TypeVar("M", bound=BaseModel)

# Smaller ones cost so little that a thread would cost more.
_SMALL_BYTES = 32 * 1024
# So many numbers may be there, or one for every so many bytes of the largest body. What else there
# is costs as much as so many numbers: a text, a list, an object; or a part of one: an escape.
_BYTES_PER_NUMBER = 32
_NUMBERS_PER_VALUE = 8
_ESCAPES_PER_NUMBER = 4
_LEAST_NUMBERS = 2**19
# Python and Rust read numbers in a time that is quadratic in their digits.
_TOO_MANY_DIGITS = b"0" * 100
_DIGITS_AS_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read(model: type[M], body: bytes, max_bytes: int) -> M:
    """Raises ApiError for what is no JSON, has too many values, or is no such request.

    Args:
        max_bytes: of the largest body that is allowed.
    """
    content = parse(body, max_bytes)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise validation_error(explain(error.errors(include_url=False), content)) from error


def parse(body: bytes, max_bytes: int, may_be_cut: bool = False) -> Any:
    """The JSON, or what there is of it if it `may_be_cut`. Raises ApiError."""
    check_cost(body, max_bytes)
    try:
        body = body.removeprefix(_BYTE_ORDER_MARK)
        if may_be_cut:  # perhaps within a character
            return from_json(body.decode("utf-8", "ignore"), allow_partial="trailing-strings")
        return from_json(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error


def check_cost(body: bytes, max_bytes: int) -> None:
    """Raises ApiError for more values than the largest body may have."""
    if len(body) <= _SMALL_BYTES:
        return
    limit = max(max_bytes // _BYTES_PER_NUMBER, _LEAST_NUMBERS)
    escapes = body.count(b"\\") // _ESCAPES_PER_NUMBER
    if escapes + _most_it_costs(body) <= limit:
        return
    if escapes <= limit:
        # What is in texts costs nothing: look at what is between them.
        body = body.replace(rb"\\", b"").replace(rb"\"", b"")
        texts = body.count(b'"') // 2 * _NUMBERS_PER_VALUE
        if texts <= limit:
            between = b"".join(body.split(b'"')[::2])
            if escapes + texts + _most_it_costs(between) <= limit:
                return
    raise ApiError(
        400,
        f"the body has too many values: {limit} numbers are read, each of less than "
        f"{len(_TOO_MANY_DIGITS)} digits, or {limit // _NUMBERS_PER_VALUE} texts, lists and "
        f"objects, or {limit * _ESCAPES_PER_NUMBER} escapes in texts",
    )


def _most_it_costs(json: bytes) -> float:
    """What reading it costs at most, in numbers."""
    if _TOO_MANY_DIGITS in json.translate(_DIGITS_AS_ZEROS):
        return math.inf
    values = json.count(b"[") + json.count(b"{") + json.count(b'"') // 2
    return json.count(b",") + values * _NUMBERS_PER_VALUE


class BodyRoute(APIRoute):
    """Reads the body itself, a large one off the event loop, for an endpoint that takes nothing
    else. FastAPI, which knows its model, describes it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        if self.body_field is None:
            return super().get_route_handler()
        model = self.body_field.field_info.annotation
        assert isinstance(model, type) and issubclass(model, BaseModel)

        async def read_and_answer(http: Request) -> Response:
            return await self.endpoint(await _read_body(model, http))

        return read_and_answer


async def _read_body(model: type[M], http: Request) -> M:
    """Keeps nothing of the body, as `http.body()` would."""
    body = b"".join([chunk async for chunk in http.stream() if chunk])
    current = scope()
    if current.handed is not None and current.handed.request_type != model.__name__:
        current.handed = None
    limit = current.service.max_request_bytes
    if len(body) <= _SMALL_BYTES:
        return read(model, body, limit)
    return await off_loop(len(body), read, model, body, limit)
