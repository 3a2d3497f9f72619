"""OpenTelemetry spans, one per request, when an exporter is configured by the environment."""

import os
from typing import Any

from deployments.api.request_log import summary
from deployments.api.scope import RequestScope

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

# By OpenTelemetry's semantic conventions for generative AI, where they have a name.
_ATTRIBUTES = {
    "request_id": "gen_ai.request.id",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "finish_reasons": "gen_ai.response.finish_reasons",
    "key": "user.name",
    "method": "http.request.method",
    "path": "url.path",
    "status": "http.response.status_code",
}


class Tracing:
    """Writes a span when a request has ended; until then it costs nothing."""

    def __init__(self, tracer: Any, model_name: str) -> None:
        """
        Args:
            tracer: an `opentelemetry.trace.Tracer`; None writes nothing.
        """
        self._tracer = tracer
        self._model_name = model_name

    @classmethod
    def from_environment(cls, model_name: str) -> "Tracing":
        """Exports over OTLP when the usual variables name an endpoint."""
        if not any(os.environ.get(name) for name in ENDPOINT_VARIABLES):
            return cls(None, model_name)
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ImportError(
                f"{ENDPOINT_VARIABLES[-1]} is set, but {error.name} is missing: "
                "pip install 'manta-llm[otel]'"
            ) from error
        name = os.environ.get("OTEL_SERVICE_NAME", "manta")
        provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider.get_tracer("manta"), model_name)

    def write(self, scope: RequestScope) -> str:
        """Returns the trace's id; empty where none is written."""
        if self._tracer is None or not scope.records:
            return ""
        from opentelemetry.trace import SpanKind, StatusCode, format_trace_id
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        start_ns = int(scope.arrived_at * 1e9)
        said = summary(scope)
        span = self._tracer.start_span(
            f"{scope.method} {scope.handler}",
            context=TraceContextTextMapPropagator().extract(scope.headers),
            kind=SpanKind.SERVER,
            start_time=start_ns,
            attributes={"gen_ai.system": "manta", "gen_ai.request.model": self._model_name}
            | {_ATTRIBUTES[k]: v for k, v in said.items() if k in _ATTRIBUTES and v is not None},
        )
        if said["ttft_ms"] is not None:
            span.set_attribute("gen_ai.server.time_to_first_token", said["ttft_ms"] / 1e3)
        for i, record in enumerate(scope.records):
            first = record.first_token_at
            if first is not None:
                at = start_ns + int((first - scope.records[0].arrived_at) * 1e9)
                span.add_event("first token", {"choice": i}, timestamp=at)
        if scope.status >= 500 or any(r.finish_reason == "error" for r in scope.records):
            span.set_status(StatusCode.ERROR)
        span.end(start_ns + int(scope.seconds * 1e9))
        context = span.get_span_context()
        return format_trace_id(context.trace_id) if context.trace_flags.sampled else ""
