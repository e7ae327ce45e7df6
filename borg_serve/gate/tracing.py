"""OpenTelemetry spans of a request: the whole of it, and its wait for a slot; vLLM's own span is a child.

They are recorded where `engine.otlp_traces_endpoint` makes vLLM set up an exporter, and cost next to nothing elsewhere.
It knows headers and names, and no request's content.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

__all__ = ["headers", "queue", "request"]

_tracer = trace.get_tracer("borg_serve")
_propagator = TraceContextTextMapPropagator()


@contextmanager
def request(route: str, request_id: str, sent: Mapping[str, str]) -> Iterator[Span]:
    """Span of one request, below the client's own if its headers `sent` name one (W3C Trace Context)."""
    with _tracer.start_as_current_span(
        "borg.request",
        context=_propagator.extract(sent),
        kind=SpanKind.SERVER,
        attributes={"http.route": route, "borg.request_id": request_id},
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        yield span


def queue() -> AbstractContextManager[Span]:
    """Span of the wait for a slot in the engine."""
    return _tracer.start_as_current_span("borg.queue", record_exception=False, set_status_on_exception=False)


def headers() -> list[tuple[bytes, bytes]]:
    """Headers that tell vLLM the parent of its own span; none if no span is recorded."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return [(name.encode(), value.encode()) for name, value in carrier.items()]
