"""Names and attributes of a request's span, by OpenTelemetry's conventions."""

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from borg_serve.gate import tracing
from borg_serve.gate.telemetry import Spent

MODEL = "borg-merge-v1"
SPENT = Spent(prompt_tokens=30, identity_tokens=200, cached_tokens=16, output_tokens=11, engine_s=1.5)


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("borg_serve"))
    yield exporter
    provider.shutdown()


def traced(exporter: InMemorySpanExporter, outcome: str, status: int | None, spent: Spent) -> ReadableSpan:
    """Return the span of a request that ended so."""
    with tracing.request("/v1/chat/completions", "one", {}, MODEL) as span:
        tracing.ended(span, outcome, status, spent, MODEL)
    (found,) = exporter.get_finished_spans()
    return found


def test_tracing_span_has_the_conventions_name_and_attributes(exporter: InMemorySpanExporter) -> None:
    span = traced(exporter, "ok", 200, SPENT)
    assert (span.name, span.kind, span.status.status_code) == (f"chat {MODEL}", SpanKind.SERVER, StatusCode.UNSET)
    assert span.attributes == {
        "http.route": "/v1/chat/completions",
        "borg.request_id": "one",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": MODEL,
        "gen_ai.response.model": MODEL,
        "gen_ai.usage.input_tokens": 230,
        "gen_ai.usage.output_tokens": 11,
        "borg.identity_tokens": 200,
        "borg.outcome": "ok",
        "http.response.status_code": 200,
    }


@pytest.mark.parametrize(
    ("outcome", "status", "code"),
    [
        ("invalid", 400, StatusCode.UNSET),
        ("gone", None, StatusCode.UNSET),
        ("gone", 200, StatusCode.UNSET),
        ("busy", 503, StatusCode.ERROR),
        ("error", 500, StatusCode.ERROR),
        ("deadline", 200, StatusCode.ERROR),  # in the middle of a stream
    ],
)
def test_tracing_span_says_what_went_wrong(
    exporter: InMemorySpanExporter, outcome: str, status: int | None, code: StatusCode
) -> None:
    span = traced(exporter, outcome, status, Spent())
    assert span.attributes is not None
    assert span.attributes["error.type"] == span.attributes["borg.outcome"] == outcome
    assert span.attributes.get("http.response.status_code") == status
    assert span.status.status_code == code
    assert not span.attributes.keys() & {"gen_ai.response.model", "gen_ai.usage.output_tokens"}


def test_tracing_span_lies_below_the_clients_and_above_the_wait(exporter: InMemorySpanExporter) -> None:
    sent = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
    with tracing.request("/v1/messages", "one", sent, MODEL), tracing.queue():
        pass
    wait, whole = exporter.get_finished_spans()
    assert wait.name == "borg.queue"
    assert wait.parent is not None
    assert wait.parent.span_id == whole.context.span_id
    assert whole.parent is not None
    assert f"{whole.parent.span_id:016x}" == "00f067aa0ba902b7"


def test_tracing_without_a_recorder_takes_what_it_is_told() -> None:
    with tracing.request("/v1/chat/completions", "one", {}, MODEL) as span:
        tracing.ended(span, "ok", 200, SPENT, MODEL)
        assert not span.is_recording()
