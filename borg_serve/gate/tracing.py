"""OpenTelemetry spans of a request: the whole of it, and its wait for a slot; vLLM's own span is a child.

They are recorded where `engine.otlp_traces_endpoint` makes vLLM set up an exporter, and cost next to nothing elsewhere.
It knows headers and names, and no request's content. `borg_serve.metrics` names the version of OpenTelemetry's names.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from borg_serve.gate.telemetry import OPERATION, PROVIDER, Spent, ending

__all__ = ["ended", "headers", "queue", "request"]

_tracer = trace.get_tracer("borg_serve")
_propagator = TraceContextTextMapPropagator()


@contextmanager
def request(route: str, request_id: str, sent: Mapping[str, str], model: str | None = None) -> Iterator[Span]:
    """Span of one request, below the client's own if its headers `sent` name one (W3C Trace Context).

    `model`: the served name. The body, which may hold another name for it, has not been read yet.
    """
    names = {"gen_ai.operation.name": OPERATION, "gen_ai.provider.name": PROVIDER}
    if model is not None:
        names["gen_ai.request.model"] = model
    with _tracer.start_as_current_span(
        f"{OPERATION} {model}" if model else OPERATION,
        context=_propagator.extract(sent),
        kind=SpanKind.SERVER,
        attributes={"http.route": route, "borg.request_id": request_id, **names},
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        yield span


def ended(span: Span, outcome: str, status: int | None, spent: Spent, model: str) -> None:
    """Say on a request's span how it ended: `status` as sent to the client, `model` the served name."""
    if not span.is_recording():
        return
    counts = {
        "gen_ai.usage.input_tokens": spent.prompt_tokens + spent.identity_tokens,
        "gen_ai.usage.output_tokens": spent.output_tokens,
        "borg.identity_tokens": spent.identity_tokens,
        "http.response.status_code": status,
    }
    span.set_attributes({name: count for name, count in counts.items() if count})
    span.set_attribute("borg.outcome", outcome)
    if spent.output_tokens:
        span.set_attribute("gen_ai.response.model", model)
    if outcome != "ok":
        span.set_attribute("error.type", outcome)
    # A server's span is no error where the client made one, nor where it left.
    if ending(outcome) == "failed" or (status or 0) >= 500:
        span.set_status(StatusCode.ERROR)


def queue() -> AbstractContextManager[Span]:
    """Span of the wait for a slot in the engine."""
    return _tracer.start_as_current_span("borg.queue", record_exception=False, set_status_on_exception=False)


def headers() -> list[tuple[bytes, bytes]]:
    """Headers that tell vLLM the parent of its own span; none if no span is recorded."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return [(name.encode(), value.encode()) for name, value in carrier.items()]
