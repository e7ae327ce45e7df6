"""The charts of a run: what they show, and that every one can be drawn."""

from pathlib import Path
from typing import Any

import pytest

from loadtests.generator.records import Outcome, Record
from loadtests.report.charts import Chart, Series, course, distributions, draw
from loadtests.report.slo import Slo
from loadtests.report.summary import document
from tests.loads import many, record, run


def shown(records: list[Record], **more: Any) -> dict[str, Any]:
    slo = Path("slo.yaml"), Slo(ttft_p50_ms=90, ttft_p99_ms=110)
    return document(run(), records, slo, None, **more)


def test_distributions_are_of_every_request_that_ended_well() -> None:
    found = {chart.title: chart for chart in distributions(shown([*many(30), record(30, outcome=Outcome.BROKEN)]))}
    assert list(found) == [
        "TTFT, share of requests",
        "E2E, share of requests",
        "TPOT, share of requests",
        "ITL, share of gaps",
    ]
    ttft = found["TTFT, share of requests"]
    assert [one.label for one in ttft.series] == ["from schedule", "from sending"]
    values = sorted(one.ttft_ms(True) or 0.0 for one in many(30))
    assert [x for x, _ in ttft.series[0].points] == pytest.approx([values[0], *values])
    assert [y for _, y in ttft.series[0].points] == pytest.approx([step / 30 for step in range(31)])
    assert {title: chart.mark for title, chart in found.items() if chart.mark} == {ttft.title: (110, "ttft p99")}


def test_distributions_of_many_requests_are_thinned_and_keep_their_ends() -> None:
    (points,) = [chart.series[0].points for chart in distributions(shown(many(2000))) if chart.title.startswith("TPOT")]
    values = [one.tpot_ms() or 0.0 for one in many(2000)]
    assert len(points) == 401
    assert (*points[0], *points[-1]) == pytest.approx((min(values), 0, max(values), 1))


def test_course_is_what_the_clients_and_the_server_counted() -> None:
    names = ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:num_requests_running")
    samples = [(float(n), dict(zip(names, (100.0 * n, 90.0 * n, 2.0), strict=True))) for n in range(3)]
    found = {one.label: one.points for chart in course(shown(many(3), samples=samples)) for one in chart.series}
    assert found["arrivals"] == [(0, 1), (1, 1), (2, 1)]
    assert [tokens for _, tokens in found["output tokens"]] == pytest.approx([3, 3, 3])
    assert found["running"] == [(0, 2), (1, 2), (2, 2)]
    assert found["prompt tokens from cache"] == [(0, None), (1, 0.9), (2, 0.9)]
    assert found["KV cache in use"] == [(0, None), (1, None), (2, None)]


@pytest.mark.parametrize("kind", ["line", "steps", "bars"])
def test_charts_are_drawn_with_their_words(kind: Any) -> None:
    series = [Series("one & two", [(1.0, 0.2), (20.0, None), (3000.0, 1.0)], kind), Series("three", [(5.0, 0.5)])]
    text = draw(Chart("a title", "ms", "share", series, log_x=kind == "steps", mark=(100.0, "p99")))
    for words in ("<svg", "a title", "one &amp; two", "three", "p99"):
        assert words in text
    assert "nothing was measured" not in text


def test_chart_without_a_point_says_so() -> None:
    assert "nothing was measured" in draw(Chart("t", "x", "y", [Series("a", [(0.0, None)])]))
