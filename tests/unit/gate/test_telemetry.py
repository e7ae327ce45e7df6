"""Metrics of a request at its end: by OpenTelemetry's names, and by key."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics
from prometheus_client import REGISTRY

from borg_serve import metrics
from borg_serve.gate.telemetry import Spent, ending, finished
from tests.unit.deploy.files import ROOT

MODEL = "borg-merge-v1"
COMMON = {"gen_ai_operation_name": "chat", "gen_ai_provider_name": "vllm", "gen_ai_request_model": MODEL}
SPENT = Spent(prompt_tokens=30, identity_tokens=200, cached_tokens=16, output_tokens=11, engine_s=1.5)
REQUESTS = "gen_ai_server_request_duration_seconds"
FIRST = "gen_ai_server_time_to_first_token_seconds"
EACH = "gen_ai_server_time_per_output_token_seconds"
USAGE = "gen_ai_client_token_usage"
OURS = ("borg_", "gen_ai_")
Grown = Callable[..., float]


def samples() -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found = (sample for family in REGISTRY.collect() for sample in family.samples)
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in found}


@pytest.fixture
def grown() -> Grown:
    """How much a sample has grown since the test began: the registry is the process's own."""
    before = samples()

    def growth(name: str, **labels: str) -> float:
        place = (name, frozenset(labels.items()))
        return samples().get(place, 0.0) - before.get(place, 0.0)

    return growth


@pytest.fixture
def changed() -> Callable[[], set[str]]:
    """Our metrics that have changed since the test began."""
    before = samples()

    def names() -> set[str]:
        found = {place[0] for place, value in samples().items() if value != before.get(place, 0.0)}
        return {re.sub("_(bucket|sum|count|created)$", "", name) for name in found if name.startswith(OURS)}

    return names


def test_telemetry_observes_a_request_that_ended_well(grown: Grown) -> None:
    finished("ok", 2.5, 0.5, SPENT, None, MODEL)
    assert grown(f"{REQUESTS}_count", **COMMON, error_type="") == 1
    assert grown(f"{REQUESTS}_sum", **COMMON, error_type="") == 2.5
    assert grown(f"{FIRST}_sum", **COMMON) == 0.5
    assert grown(f"{EACH}_count", **COMMON) == 1
    assert grown(f"{EACH}_sum", **COMMON) == pytest.approx(0.2)
    assert grown(f"{USAGE}_sum", **COMMON, gen_ai_token_type="input") == 30
    assert grown(f"{USAGE}_sum", **COMMON, gen_ai_token_type="output") == 11


def test_telemetry_counts_a_request_by_its_key(grown: Grown) -> None:
    finished("ok", 2.5, 0.5, SPENT, "alice", MODEL)
    finished("busy", 0.01, None, Spent(), "alice", MODEL)
    finished("gone", 1.0, 0.5, Spent(prompt_tokens=7, engine_s=0.5), "alice", MODEL)
    for outcome, count in {"ok": 1, "refused": 1, "aborted": 1, "failed": 0}.items():
        assert grown("borg_key_requests_total", key="alice", outcome=outcome) == count
    for kind, count in {"prompt": 37, "identity": 200, "cached": 16, "output": 11}.items():
        assert grown("borg_key_tokens_total", key="alice", kind=kind) == count
    assert grown("borg_key_engine_seconds_total", key="alice") == 2.0


def test_telemetry_without_keys_has_no_series_by_key(changed: Callable[[], set[str]]) -> None:
    finished("ok", 2.5, 0.5, SPENT, None, MODEL)
    assert changed() == {REQUESTS, FIRST, EACH, USAGE}


@pytest.mark.parametrize("outcome", ["gone", "busy", "error"])
def test_telemetry_of_a_request_that_did_not_end_well_has_its_error_and_no_latency(
    outcome: str, grown: Grown, changed: Callable[[], set[str]]
) -> None:
    finished(outcome, 2.5, 0.5, Spent(prompt_tokens=30, output_tokens=4), None, MODEL)
    assert grown(f"{REQUESTS}_sum", **COMMON, error_type=outcome) == 2.5
    assert grown(f"{USAGE}_sum", **COMMON, gen_ai_token_type="output") == 4
    assert changed() == {REQUESTS, USAGE}


@pytest.mark.parametrize(
    ("first_token_s", "spent", "each_s"),
    [
        (0.5, Spent(output_tokens=0), None),
        (0.5, Spent(output_tokens=1), None),
        (0.5, Spent(output_tokens=2), 2.0),
        (0.5, Spent(output_tokens=5), 0.5),
        (0.5, Spent(output_tokens=10, choices=2), 0.5),
        (0.5, Spent(output_tokens=2, choices=2), None),
        (None, Spent(output_tokens=5), None),
    ],
)
def test_telemetry_takes_the_time_per_output_token_from_the_tokens_after_the_first(
    first_token_s: float | None, spent: Spent, each_s: float | None, grown: Grown
) -> None:
    finished("ok", 2.5, first_token_s, spent, None, MODEL)
    assert grown(f"{EACH}_count", **COMMON) == (each_s is not None)
    assert grown(f"{EACH}_sum", **COMMON) == pytest.approx(each_s or 0.0)
    assert grown(f"{FIRST}_count", **COMMON) == (first_token_s is not None)


def test_telemetry_of_a_refused_request_has_no_tokens(grown: Grown) -> None:
    finished("busy", 0.01, None, Spent(), None, MODEL)
    assert grown(f"{USAGE}_count", **COMMON, gen_ai_token_type="input") == 0


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (metrics.REQUEST_SECONDS, "server_request_duration"),
        (metrics.FIRST_TOKEN_SECONDS, "server_time_to_first_token"),
        (metrics.OUTPUT_TOKEN_SECONDS, "server_time_per_output_token"),
        (metrics.TOKEN_USAGE, "client_token_usage"),
    ],
)
def test_telemetry_has_the_names_of_opentelemetry_s_own_exporter(metric: Any, name: str) -> None:
    """Its instruments, through its exporter for Prometheus, have our metrics' names and labels."""
    required = ["gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model"]
    more = {"server_request_duration": ["error.type"], "client_token_usage": ["gen_ai.token.type"]}.get(name, [])
    reader = PrometheusMetricReader(disable_target_info=True)
    provider = MeterProvider([reader])
    create = getattr(gen_ai_metrics, f"create_gen_ai_{name}")
    create(provider.get_meter("test")).record(1, dict.fromkeys(required + more, "x"))
    theirs = {
        (family.name, *(label for label in family.samples[0].labels if not label.startswith("otel_scope_")))
        for family in REGISTRY.collect()
        if any("otel_scope_name" in sample.labels for sample in family.samples)
    }
    provider.shutdown()
    (ours,) = metric.describe()
    assert {tuple(sorted(found)) for found in theirs} == {tuple(sorted((ours.name, *metric._labelnames, "le")))}


def test_telemetry_classifies_every_outcome() -> None:
    """A new reason of an error is refused until it stands here."""
    known = {
        "ok": {"ok"},
        "aborted": {"gone", "stalled"},
        "failed": {"deadline", "drain", "engine_lost", "error"},
        "refused": {
            "budget",
            "body_size",
            "body_time",
            "busy",
            "content_type",
            "headers",
            "invalid",
            "key",
            "ledger",
            "not_ready",
            "quota",
            "route",
        },
    }
    for expected, outcomes in known.items():
        assert {ending(outcome) for outcome in outcomes} == {expected}
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "borg_serve").rglob("*.py"))
    named = set(re.findall(r'\breason(?:: str)? ?= ?"(\w+)"', source))
    # The sixth of ApiError's arguments, behind its type, its parameter and its code.
    named |= set(re.findall(r'(?:"\w+"|kind), None, "\w+", "(\w+)"', source))
    assert named >= {"invalid", "busy", "deadline"}
    assert named <= set().union(*known.values())
