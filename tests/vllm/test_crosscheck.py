"""The report that puts others' benchmarks beside ours."""

from typing import Any

from loadtests.experiments import crosscheck
from loadtests.experiments.crosscheck import PERCENTS, ROWS, of_guidellm, of_ours, of_vllm
from loadtests.report.summary import document
from loadtests.report.tables import render
from tests.loads import many, run


def bench() -> dict[str, Any]:
    """What vLLM's benchmark saves, as far as it is read."""
    names = [f"p{percent}_{key}_ms" for percent in PERCENTS for key in ("ttft", "tpot", "itl", "e2el")]
    return {"completed": 30, "output_throughput": 6.0, **{name: 50.0 + number for number, name in enumerate(names)}}


def test_crosscheck_puts_figures_side_by_side_and_says_why_they_differ() -> None:
    mine = document(run(), many(30), None, None)
    text = render("crosscheck.md.j2", crosscheck.document(mine, {"vLLM": of_vllm(bench())}, "the command"))
    ttft = mine["figures"]["latency_ms"]["ttft"]["p50"]
    assert f"| TTFT p50, ms | {ttft:.1f} | 50.0 ({50 / ttft:.2f}) |" in text
    assert text.count("| TPOT p") == 3
    for name in ("TTFT", "From when", "TPOT", "ITL", "Success", "Percentiles", "Duration", "Prompts"):
        assert f"- **{name}**" in text.partition("Why they differ:")[2]
    assert "never calibrated" in text


def test_crosscheck_reads_each_tool_into_the_same_rows() -> None:
    percentiles = {f"p{percent}": float(percent) for percent in PERCENTS}
    names = ("time_to_first_token_ms", "time_per_output_token_ms", "inter_token_latency_ms", "request_latency")
    found: dict[str, Any] = {name: {"successful": {"percentiles": percentiles}} for name in names}
    totals = {"request_totals": {"successful": 7}, "output_tokens_per_second": {"successful": {"mean": 18.0}}}
    guide = of_guidellm({**found, **totals})
    assert list(guide) == list(of_vllm(bench())) == list(of_ours(document(run(), many(5), None, None))) == ROWS
    assert (guide["TTFT p95, ms"], guide["E2E p50, ms"]) == (95.0, 50_000.0)
    assert of_vllm(bench())["E2E p50, ms"] == 53.0
