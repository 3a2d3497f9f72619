"""Errors as OpenAI's clients expect them: {"error": {message, type, param, code}}."""

from typing import Any

from fastapi.responses import JSONResponse

# Seconds after which a client should try again when there is no engine.
RETRY_AFTER_S = 5

_TYPES = {
    404: "not_found_error",
    405: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @classmethod
    def unavailable(cls, error: Exception) -> "ApiError":
        return cls(503, str(error), code="engine_unavailable")

    def body(self) -> dict[str, Any]:
        default = "invalid_request_error" if self.status < 500 else "internal_server_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, default),
                "param": self.param,
                "code": self.code,
            }
        }


def error_response(error: ApiError) -> JSONResponse:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status in (429, 503) else None
    return JSONResponse(error.body(), error.status, headers)


def validation_error(faults: list[tuple[str, str]]) -> ApiError:
    """A 400 naming every faulty field; `param` is the first."""
    faults = [(field.removeprefix("body").removeprefix("."), message) for field, message in faults]
    message = "; ".join(f"{field}: {fault}" if field else fault for field, fault in faults)
    return ApiError(400, message, param=faults[0][0] or None)
