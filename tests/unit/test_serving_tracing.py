"""A span for each request, at a collector that speaks OTLP."""

import json
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from exits import write_exits
from served import MODEL, config_of, served

from ee_tuning.errors import InputError

pytest.importorskip("fastapi", reason="pip install 'ee_tuning[serve]'")
for package in ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"):
    pytest.importorskip(package, reason="pip install 'ee_tuning[otel]'")

from ee_tuning.serving.tracing import open_tracing  # noqa: E402


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """Its URL, and what was posted there."""
    posted: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", posted
    server.shutdown()


def spans_of(posted: list[bytes]) -> list[tuple[Any, dict[str, Any]]]:
    """Each span, and its attributes."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    found = []
    for data in posted:
        for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    told = {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}
                    found.append((span, told))
    return found


def test_a_request_is_a_span_of_its_clients_trace(collector, tmp_path):
    """Spans that begin a trace of their own, lack what a request took, or are lost when the server ends."""
    url, posted = collector
    exits = write_exits(MODEL, tmp_path / "heads", exit_layers=[4, 8], init="copy")
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with served(config_of(exits, tmp_path), otlp_traces_endpoint=url) as server:
        for streams in (False, True):
            body = {"prompt": "def f(", "max_tokens": 5, "n": 2, "exit_layer": 4, "ignore_eos": True, "stream": streams}
            headers = {
                "Content-Type": "application/json",
                "traceparent": f"00-{trace}-{parent}-01",
                "X-Request-Id": "me",
            }
            request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode(), headers)
            urllib.request.urlopen(request, timeout=60).read()
    spans = spans_of(posted)
    assert [span.name for span, _ in spans] == ["llm_request"] * 2
    for span, told in spans:
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (trace, parent)
        assert told["gen_ai.request.id"] == "me" and told["gen_ai.request.n"] == 2
        assert told["gen_ai.usage.prompt_tokens"] == 6 and told["gen_ai.usage.completion_tokens"] == 10
        assert told["ee_tuning.mean_depth"] == 4
        latency = {name: told[f"gen_ai.latency.{name}"] for name in ("time_in_queue", "time_to_first_token", "e2e")}
        assert 0 <= latency["time_in_queue"] <= latency["time_to_first_token"] <= latency["e2e"]
        assert latency["e2e"] <= (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
        assert not span.status.code


@pytest.mark.parametrize(
    ("endpoint", "protocol", "words"),
    [
        ("localhost:4317", "http/protobuf", "must be a URL, got 'localhost:4317'"),
        ("http://127.0.0.1:4318", "smoke", "must be one of http/protobuf, grpc, got 'smoke'"),
    ],
)
def test_a_collector_of_no_use_is_refused(monkeypatch, endpoint, protocol, words):
    """A server that starts, and whose traces nobody ever gets."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
    with pytest.raises(InputError, match=words):
        open_tracing(endpoint, "model")
