"""The report: figures, cross-check with the server, the page, the files."""

import csv
import html.parser
import json
from pathlib import Path
from typing import Any

import pytest

from loadtests.calibrate import errors
from loadtests.calibrate import summary as calibrated
from loadtests.load import verdict
from loadtests.page import page
from loadtests.records import DEFINITIONS, Outcome, read, write, write_csv
from loadtests.scrape import agreement, values
from loadtests.slo import Slo
from loadtests.summary import document, latencies, peak
from loadtests.svg import Series, plot, ticks
from loadtests.workload import message
from tests.loads import many, record, run

METRICS = """# TYPE vllm:prompt_tokens counter
vllm:prompt_tokens_total{engine="0"} 1000.0
vllm:prompt_tokens_total{engine="1"} 500.0
vllm:prompt_tokens_created{engine="0"} 1.7e+09
vllm:generation_tokens_total 70.0
borg_heartbeat_tokens_total{kind="prompt"} 20.0
borg_heartbeat_tokens_total{kind="output"} 1.0
other 5
"""


def test_records_come_back_from_their_file(tmp_path: Path) -> None:
    records = [record(0), record(1, outcome=Outcome.BROKEN, t_first_us=None, detail='a "quote"')]
    write(tmp_path / "r.jsonl", records)
    assert read((tmp_path / "r.jsonl").read_text().splitlines()) == records
    write_csv(tmp_path / "r.csv", records)
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    assert rows[1]["outcome"] == "broken stream"
    assert rows[0]["itl_us"] == "100000 100000"


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


def test_metrics_are_summed_over_engines() -> None:
    found = values(METRICS)
    assert found["vllm:prompt_tokens_total"] == 1500.0
    assert "other" not in found


@pytest.mark.parametrize(
    ("prompt", "said"), [(100.0, "agree within 1%"), (100.9, "agree within 1%"), (150.0, "DIFFER"), (60.0, "DIFFER")]
)
def test_agreement_holds_token_totals_against_the_clients(prompt: float, said: str) -> None:
    first = {"vllm:prompt_tokens_total": 0.0, "vllm:generation_tokens_total": 0.0}
    last = {"vllm:prompt_tokens_total": prompt, "vllm:generation_tokens_total": 6.0}
    found = agreement([(0.0, first), (1.0, last)], [record(0), record(1)])
    assert found["verdict"].startswith(said)


def test_agreement_leaves_out_what_the_watchdog_asked() -> None:
    zero: dict[str, float] = dict.fromkeys(values(METRICS), 0.0)
    asked = record(prompt_tokens=1480, output_tokens=69)
    assert agreement([(0.0, zero), (1.0, values(METRICS))], [asked])["verdict"].startswith("agree")
    assert agreement([(0.0, zero), (1.0, values(METRICS))], [record(prompt_tokens=1500, output_tokens=70)])[
        "verdict"
    ].startswith("DIFFER")


def test_agreement_says_when_there_is_nothing_to_compare_or_requests_failed() -> None:
    assert agreement([], [record()])["verdict"].startswith("not checked")
    samples = [(0.0, {"vllm:prompt_tokens_total": 0.0}), (1.0, {"vllm:prompt_tokens_total": 100.0})]
    failed = [record(0), record(1, outcome=Outcome.BROKEN, prompt_tokens=0)]
    assert "1 requests that did not end well" in agreement(samples, failed)["verdict"]


class Loads(html.parser.HTMLParser):
    """What a page would fetch, and whether its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href"}]
        if tag not in {"meta", "link"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in {"src", "href"}]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def samples() -> list[tuple[float, dict[str, float]]]:
    names = ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:num_requests_running")
    return [
        (float(second), dict(zip(names, (100.0 * second, 90.0 * second, 2.0), strict=True))) for second in range(20)
    ]


def made(search: dict[str, object] | None = None) -> dict[str, Any]:
    slo = Path("slo<x>.yaml"), Slo(ttft_p99_ms=110, tpot_p95_ms=500, error_rate=0.0)
    level: dict[str, Any] = {"streams": 8, "events_per_s": 400, "within": True, "at_once": 8}
    percentiles = {"p50": 0.5, "p99": 2.0, "max": 3.0}
    level |= dict.fromkeys(("ttft_error_ms", "itl_error_ms", "lag_ms"), percentiles)
    broken = record(30, outcome=Outcome.BROKEN, detail="<script>alert(1)</script>")
    return document(run(saturation=search), [*many(30), broken], slo, calibrated([level]), samples=samples())


@pytest.fixture
def report() -> dict[str, Any]:
    return made()


def searched() -> dict[str, object]:
    from loadtests.saturation import Search

    search = Search(1.0)
    search.observe(1.0, 30, 30)
    search.observe(2.0, 10, 30)
    return search.document()


def test_page_is_whole_and_loads_nothing(report: dict[str, Any]) -> None:
    text = page(json.loads(json.dumps(report)))
    parser = Loads()
    parser.feed(text)
    assert parser.fetched == []
    assert parser.open == []
    assert "url(" not in text
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_page_holds_what_a_reader_needs(report: dict[str, Any]) -> None:
    text = page(report)
    assert text.count("<svg") == 8
    assert "nothing was measured" not in text.replace("KV", "")
    assert "The SLO is not met." in text
    assert "accurate up to 8 streams" in text
    assert "slo&lt;x&gt;.yaml" in text
    for name in DEFINITIONS:
        assert f"<td>{name}</td>" in text


def test_search_is_judged_by_what_it_found_not_by_the_rates_beyond() -> None:
    report = made(searched())
    assert report["met"]
    assert report["verdicts"] == []
    said = "Highest rate that met the SLO: 1 requests/s; lowest that did not: 2."
    assert said in verdict(report)
    text = page(report)
    assert text.count(said) == 2  # first of all, and above the rates
    assert "30 of 30" in text
    nothing = {**searched(), "meets": None}
    assert made(nothing)["met"] is False


@pytest.mark.parametrize(("void", "met", "said"), [(["why"], True, "Void"), ([], None, "No SLO"), ([], True, "is met")])
def test_page_says_its_verdict_first(report: dict[str, Any], void: list[str], met: bool | None, said: str) -> None:
    assert said in page({**report, "void": void, "met": met})


def test_page_of_a_run_without_any_success_can_be_made() -> None:
    failed = [record(index, outcome=Outcome.REFUSED, t_first_us=None, t_last_us=None, itl_us=[]) for index in range(3)]
    text = page(document(run(), failed, None, None))
    assert "nothing was measured" in text
    assert "undefined" in text


def test_plot_ticks_are_round_and_cover_the_data() -> None:
    assert ticks(0, 97) == [0, 20, 40, 60, 80, 100]
    assert "nothing was measured" in plot("t", "x", "y", [Series("a", [(0.0, None)])])


def test_calibration_holds_the_client_against_what_the_server_wrote() -> None:
    one = record(t_sched_us=0, t_send_us=2000, t_first_us=105_000, itl_us=[21_000, 40_000])
    begin = 1_000_000
    log = {
        message(0, 0, 0, 0, 80): {
            "read_us": begin + 3000,
            "written_us": [begin + 103_000, begin + 123_000, begin + 163_500],
        }
    }
    ttft, itl, lag = errors([one], log, begin)
    assert ttft == [3.0]  # 1 ms until it was read, 2 ms until its first event was
    assert itl == [1.0, 0.5]
    assert lag == [2.0]


def test_calibration_ends_at_the_first_level_that_is_too_inaccurate() -> None:
    levels = [
        {"streams": streams, "events_per_s": 50 * streams, "within": within}
        for streams, within in ((1, True), (8, True), (64, False), (128, True))
    ]
    found = calibrated(levels)
    assert (found["streams_per_worker"], found["events_per_s_per_worker"]) == (8, 400)
    assert calibrated(levels[2:])["streams_per_worker"] == 0
