"""Traces of a request: the client's span above ours, the wait for a slot and vLLM's own span below."""

import httpx
import pytest

from tests.engine.collector import Collector, Span
from tests.engine.test_contract import CHAT
from tests.waiting import wait_until

CLIENT_SPAN = "00f067aa0ba902b7"
WHOLE = "chat borg-merge-v1"
NAMES = {WHOLE, "borg.queue", "llm_request"}


def spans(collector: Collector, trace: str, names: set[str]) -> dict[str, Span]:
    """Return a trace's spans once those with these names have come."""
    wait_until(f"spans {sorted(names)}", lambda: names <= collector.of(trace).keys())
    return collector.of(trace)


@pytest.mark.parametrize("stream", [False, True])
def test_tracing_spans_lie_within_each_other(http: httpx.Client, collector: Collector, stream: bool) -> None:
    trace = f"4bf92f3577b34da6a3ce929d0e0e47{36 + stream:02x}"
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "ignore_eos": True, "stream": stream}
    headers = {"traceparent": f"00-{trace}-{CLIENT_SPAN}-01", "x-request-id": "traced"}
    assert http.post(CHAT, json=body, headers=headers).status_code == 200
    found = spans(collector, trace, NAMES)
    whole = found[WHOLE]
    assert whole.parent == CLIENT_SPAN
    assert found["borg.queue"].parent == found["llm_request"].parent == whole.id
    assert all(whole.start_ns <= span.start_ns <= span.end_ns for span in found.values())
    assert found["borg.queue"].end_ns <= whole.end_ns
    assert {
        "http.route": CHAT,
        "borg.request_id": "traced",
        "borg.outcome": "ok",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "borg-merge-v1",
        "gen_ai.response.model": "borg-merge-v1",
        "gen_ai.usage.output_tokens": 3,
    }.items() <= whole.attributes.items()
    assert whole.attributes["gen_ai.usage.input_tokens"] > whole.attributes["borg.identity_tokens"] > 0
    assert "error.type" not in whole.attributes


def test_tracing_refused_request_has_its_span(http: httpx.Client, collector: Collector) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4799"
    headers = {"traceparent": f"00-{trace}-{CLIENT_SPAN}-01"}
    assert http.post(CHAT, json={"messages": [], "prompt": "Hi"}, headers=headers).status_code == 400
    found = spans(collector, trace, {WHOLE})
    assert found.keys() == {WHOLE}
    assert found[WHOLE].attributes["borg.outcome"] == found[WHOLE].attributes["error.type"] == "invalid"
    assert found[WHOLE].attributes["http.response.status_code"] == 400
