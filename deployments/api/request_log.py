"""One JSON line per request, for whoever collects logs. What was asked stays out unless wanted."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

from deployments.api.scope import RequestScope

LOGGER = "manta.requests"
MAX_BODY_BYTES = 10_000
# Asked for all the time, and of no interest.
_SILENT = frozenset({"/health", "/ready", "/ping", "/metrics"})


class RequestLog:
    def __init__(self, model_name: str, mode: Literal["off", "on", "body"]) -> None:
        self._model_name = model_name
        self._mode = mode
        self._logger = logging.getLogger(LOGGER)
        if mode != "off" and not self._logger.handlers:
            handler = logging.StreamHandler(sys.stdout)
            handler.setFormatter(logging.Formatter("%(message)s"))
            self._logger.addHandler(handler)
            self._logger.setLevel(logging.INFO)
            self._logger.propagate = False

    def write(self, scope: RequestScope) -> None:
        if self._mode == "off" or (scope.handler in _SILENT and scope.status == 200):
            return
        line = summary(scope) | {"model": self._model_name}
        if self._mode == "body":
            line["body"] = scope.body_start.decode("utf-8", "replace")
        self._logger.info(json.dumps(line, ensure_ascii=True))


def summary(scope: RequestScope) -> dict[str, Any]:
    """What happened, without what was said."""
    at = datetime.fromtimestamp(scope.arrived_at, UTC)
    line: dict[str, Any] = {
        "time": at.isoformat(timespec="milliseconds"),
        "request_id": scope.request_id,
        "method": scope.method,
        "path": scope.path,
        "status": scope.status or None,  # null: the client hung up before the answer began
        "duration_ms": round(scope.seconds * 1e3, 1),
    }
    if scope.error:
        line["error"] = scope.error
    if scope.tenant:
        line["key"] = scope.tenant
    if scope.records:
        ttfts = [record.ttft_s for record in scope.records if record.ttft_s is not None]
        counts = [record.counts for record in scope.records]
        kinds = ("prompt", "cached", "output")
        line |= {f"{kind}_tokens": sum(own.get(kind, 0) for own in counts) for kind in kinds}
        line |= {
            "ttft_ms": round(min(ttfts) * 1e3, 1) if ttfts else None,
            "finish_reasons": [record.finish_reason or "abort" for record in scope.records],
        }
    return line
