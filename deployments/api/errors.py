"""Errors as clients expect them: {"error": {message, type, param, code}}, or in Anthropic's way."""

import logging
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from deployments.api.scope import scope
from deployments.front.engine_client import (
    EngineUnavailableError,
    RequestFailedError,
    RequestRefusedError,
    RequestTimeoutError,
)
from deployments.front.quotas import QuotaError
from engine.sampling_params import SamplingParams
from engine.strict import cut, explain, shown

# Seconds after which a client should try again when there is no engine.
RETRY_AFTER_S = 5
# For what goes the same way every time: OpenAI's clients would try again.
_NO_RETRY = {"x-should-retry": "false"}

# Characters. What a message quotes may be as long as a request.
_MAX_MESSAGE = 2000
_MAX_PARAM = 200

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    408: "timeout_error",
}
_ANTHROPIC_TYPES = {
    **{401: "authentication_error", 403: "permission_error", 404: "not_found_error"},
    **{408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error"},
    503: "overloaded_error",
}

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @classmethod
    def of(cls, error: Exception) -> "ApiError":
        """What clients are told of a failure: no more than they can use."""
        match error:
            case ApiError():
                return error
            case RequestValidationError():
                found = error.errors()
                asked = {d["loc"][1]: d["input"] for d in found if d["loc"][0] == "query"}
                return validation_error(explain(found, {"body": error.body, "query": asked}))
            case HTTPException():
                return cls(error.status_code, _said(error), headers=error.headers)
            case RequestRefusedError():
                field = str(error).partition(":")[0]
                return cls(400, str(error), field if field in SamplingParams.model_fields else None)
            case RequestFailedError():
                return cls(500, str(error), code="engine_failed", headers=_NO_RETRY)
            case EngineUnavailableError():
                retry = {"Retry-After": str(RETRY_AFTER_S)}
                return cls(503, str(error), code="engine_unavailable", headers=retry)
            case QuotaError():
                retry = {"Retry-After": str(error.retry_after_s)}
                return cls(429, str(error), code="rate_limit_exceeded", headers=retry)
            case RequestTimeoutError():
                return cls(408, str(error), code="request_timeout", headers=_NO_RETRY)
        return cls(500, f"internal error: {type(error).__name__}")

    def renamed(self, names: Mapping[str, str]) -> "ApiError":
        """The same, with the names (as regular expressions) that the client has for parameters."""
        message, param = self.message, self.param
        for name, own in names.items():
            message = re.sub(rf"(?<!['\w.]){name}(?!['\w])", own, message)
            param = re.sub(rf"^{name}\b", own, param) if param else None
        return ApiError(self.status, message, param, self.code, self.headers)

    @classmethod
    def no_such_model(cls, asked: str, served: str) -> "ApiError":
        message = f"the model {shown(asked)} does not exist; this server has {served!r}"
        return cls(404, message, "model", "model_not_found")

    def body(self) -> dict[str, Any]:
        default = "invalid_request_error" if self.status < 500 else "internal_server_error"
        return {
            "error": {
                "message": self._shown_message,
                "type": _TYPES.get(self.status, default),
                "param": None if self.param is None else _encodable(cut(self.param, _MAX_PARAM)),
                "code": self.code,
            }
        }

    def anthropic_body(self, request_id: str) -> dict[str, Any]:
        default = "invalid_request_error" if self.status < 500 else "api_error"
        kind = _ANTHROPIC_TYPES.get(self.status, default)
        error = {"type": kind, "message": self._shown_message}
        return {"type": "error", "error": error, "request_id": request_id}

    @property
    def _shown_message(self) -> str:
        return _encodable(cut(self.message, _MAX_MESSAGE))


def _said(error: HTTPException) -> str:
    """What it says, and more than the status' name where FastAPI has found no endpoint."""
    current = scope()
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "another method")
        return f"{current.path} does not take {current.method}; send {allowed}"
    if error.status_code == HTTPStatus.NOT_FOUND and error.detail == HTTPStatus.NOT_FOUND.phrase:
        return f"there is no {current.path}; /docs lists what there is"
    return str(error.detail)


def report(error: Exception) -> ApiError:
    """What the client is told; noted for logs and metrics."""
    current = scope()
    told = ApiError.of(error).renamed(current.names)
    current.error = told.code or str(told.status)
    if told.status == 500:
        logger.error("request %s failed", current.request_id, exc_info=error)
    return told


def error_response(error: Exception) -> JSONResponse:
    told, current = report(error), scope()
    body = told.anthropic_body(current.request_id) if current.is_anthropic else told.body()
    return JSONResponse(body, told.status, told.headers)


def validation_error(faults: list[tuple[str, str]]) -> ApiError:
    """400 for (field, sentence) pairs as `engine.strict.explain` gives."""
    faults = [(re.sub(r"^(body|query)(\.|$)", "", field), message) for field, message in faults]
    message = "; ".join(f"{field}: {fault}" if field else fault for field, fault in faults)
    return ApiError(400, message, param=faults[0][0] or None)


def _encodable(text: str) -> str:
    """Lone surrogates, which JSON can hold but UTF-8 cannot, in a form that it can."""
    return text.encode("utf-8", "backslashreplace").decode()
