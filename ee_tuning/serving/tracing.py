"""OpenTelemetry traces: a span for each request, with vLLM's names of attributes where the meaning is the same."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ee_tuning import __version__
from ee_tuning.errors import InputError
from ee_tuning.generation.completion import Completion
from ee_tuning.generation.job import Job

_PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
_EXPORTERS = {
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "grpc": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
}
_SECONDS_TO_EXPORT = 5
"""Seconds that a collector without an answer may delay the end of the server."""


@dataclass(frozen=True)
class TracedRequest:
    """The content of a request's span."""

    id: str
    began: int
    """Time of arrival, by `time.time_ns`."""
    headers: Mapping[str, str]
    """HTTP headers; `traceparent` and `tracestate` name the parent span."""
    jobs: list[Job]


class Tracing:
    """Sends spans to a collector, by a thread of the SDK."""

    def __init__(self, exporter: Any, model_name: str):
        """`exporter` is a SpanExporter of the SDK."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        # OTEL_RESOURCE_ATTRIBUTES adds to these.
        service = os.environ.get("OTEL_SERVICE_NAME", "ee_tuning")
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("ee_tuning.serving", __version__)
        self._model_name = model_name

    def end_request(self, request: TracedRequest, completions: list[Completion]) -> None:
        """Creates the span of a finished request. An aborted one lacks completions."""
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        span = self._tracer.start_span(
            "llm_request",
            context=TraceContextTextMapPropagator().extract(dict(request.headers)),
            kind=SpanKind.SERVER,
            start_time=request.began,
            attributes={"gen_ai.response.model": self._model_name, **_asked(request), **_used(request, completions)},
        )
        if len(completions) < sum(job.params.n for job in request.jobs):
            span.set_status(Status(StatusCode.ERROR, "aborted"))
        span.end()

    def close(self) -> None:
        """Sends the remaining spans."""
        self._provider.shutdown()


def open_tracing(endpoint: str, model_name: str) -> Tracing:
    """Opens tracing to the collector at a URL. Raises InputError where the extra `otel` is missing, or the URL is
    invalid.
    """
    protocol = os.environ.get(_PROTOCOL, "http/protobuf")
    if protocol not in _EXPORTERS:
        raise InputError(f"{_PROTOCOL} must be one of {', '.join(_EXPORTERS)}, got {protocol!r}; unset it")
    if not endpoint.startswith(("http://", "https://")):
        raise InputError(
            f"--otlp-traces-endpoint must be a URL, got {endpoint!r}; http://127.0.0.1:4318/v1/traces is a usual one"
        )
    try:
        import_module("opentelemetry.sdk.trace")
        exporter = import_module(_EXPORTERS[protocol]).OTLPSpanExporter
    except ImportError as error:
        package = "'ee_tuning[otel]'" if protocol != "grpc" else "opentelemetry-exporter-otlp-proto-grpc"
        raise InputError(
            f"--otlp-traces-endpoint needs a package that is not installed ({error}); pip install {package}"
        ) from error
    return Tracing(exporter(endpoint=endpoint, timeout=_SECONDS_TO_EXPORT), model_name)


def _asked(request: TracedRequest) -> dict[str, Any]:
    params = request.jobs[0].params
    return {
        "gen_ai.request.id": request.id,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.n": params.n,
    }


def _used(request: TracedRequest, completions: list[Completion]) -> dict[str, Any]:
    """Returns the number of tokens, and the seconds to the first token of all completions, and to the last."""
    told: dict[str, Any] = {
        "gen_ai.usage.prompt_tokens": sum(len(job.prompt_ids) for job in request.jobs),
        "gen_ai.usage.completion_tokens": sum(len(done.token_ids) for done in completions),
    }
    made = [done for done in completions if done.token_ids and not done.error]
    if not made:
        return told
    first = min(made, key=lambda done: done.statistics.seconds_to_first_token).statistics
    to_last, to_first = max(done.seconds for done in made), first.seconds_to_first_token
    return {
        **told,
        "gen_ai.latency.time_in_queue": first.seconds_waiting,
        "gen_ai.latency.time_to_first_token": to_first,
        "gen_ai.latency.time_in_model_prefill": max(0.0, to_first - first.seconds_waiting),
        "gen_ai.latency.time_in_model_decode": max(0.0, to_last - to_first),
        "gen_ai.latency.time_in_model_inference": max(0.0, to_last - first.seconds_waiting),
        "gen_ai.latency.e2e": to_last,
        "ee_tuning.mean_depth": sum(sum(done.exit_layers) for done in made) / sum(len(d.token_ids) for d in made),
    }
