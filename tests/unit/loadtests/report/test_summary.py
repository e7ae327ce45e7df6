"""A run's figures, by their definitions."""

import pytest

from loadtests.generator.records import Outcome
from loadtests.report.summary import document, latencies, peak
from tests.loads import record, run


def test_latencies_follow_their_definitions() -> None:
    table = latencies([record(0), record(1, outcome=Outcome.BROKEN, t_end_us=9_000_000)])
    assert table["ttft"]["p50"] == 100.0
    assert table["ttft_from_schedule"]["p50"] == 101.0
    assert table["tpot"]["p50"] == 100.0
    assert table["e2e_from_schedule"]["max"] == 302.0
    assert table["itl"]["count"] == 2
    assert table["lag"]["count"] == 2
    assert table["lag"]["p99"] == 1.0


def test_peak_is_of_the_busiest_process() -> None:
    here = [record(index) for index in range(3)]
    there = [record(index, worker=1) for index in range(2)]
    assert peak(here + there) == {"streams": 3, "events_per_s": 9}


def test_document_leaves_the_warm_up_out() -> None:
    warm = run(phases=[{"phase": -1, "begin_us": 0, "sessions": 1}, {"phase": 0, "begin_us": 5, "sessions": 1}])
    result = document(warm, [record(0, phase=-1), record(0)], None, None)
    assert result["figures"]["requests"] == 1
    assert result["figures"]["output_tokens_per_s"] == pytest.approx(3 / 0.302)
    assert result["met"] is None
