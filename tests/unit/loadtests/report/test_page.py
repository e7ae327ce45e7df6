"""The page of a run: whole, in one file, the verdict first."""

import html.parser
import json
from pathlib import Path
from typing import Any

import pytest

from loadtests.experiments.calibrate import summary as calibrated
from loadtests.generator.records import DEFINITIONS, Outcome
from loadtests.load import verdict
from loadtests.report.page import page
from loadtests.report.slo import Slo
from loadtests.report.summary import document
from tests.loads import many, record, run


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


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return made()


def searched() -> dict[str, object]:
    from loadtests.generator.saturation import Search

    search = Search(1.0)
    search.observe(1.0, 30, 30)
    search.observe(2.0, 10, 30)
    return search.document()


@pytest.fixture(scope="module")
def text(report: dict[str, Any]) -> str:
    return page(json.loads(json.dumps(report)))


def test_page_is_whole_and_loads_nothing(text: str) -> None:
    parser = Loads()
    parser.feed(text)
    assert [target for target in parser.fetched if not target.startswith("#")] == []
    assert parser.open == []
    assert text.count("url(") == text.count("url(#")
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_page_holds_what_a_reader_needs(text: str) -> None:
    assert text.count("<svg") == 8
    assert "nothing was measured" not in text
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
    assert said in page({**report, "void": void, "met": met, "records": [], "course": []})


def test_page_of_a_run_without_any_success_can_be_made() -> None:
    failed = [record(index, outcome=Outcome.REFUSED, t_first_us=None, t_last_us=None, itl_us=[]) for index in range(3)]
    text = page(document(run(), failed, None, None))
    assert "nothing was measured" in text
    assert "undefined" in text
