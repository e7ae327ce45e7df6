"""SLO files and their verdicts."""

from pathlib import Path

import pytest

from borg_serve.errors import ConfigError
from loadtests.generator.records import Outcome
from loadtests.report.slo import Slo, judge, load, percentile
from tests.loads import record

SLOS = sorted(Path("loadtests/slo").glob("*.yaml"))


@pytest.mark.parametrize("file", SLOS, ids=lambda file: str(file.stem))
def test_slo_files_that_ship_can_be_read(file: Path) -> None:
    assert load(file).bounds_ms()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ttft_p99: 5\n", "ttft_p99: unknown key, got 5. Did you mean `ttft_p99_ms`?"),
        ("ttft_p99_ms: fast\n", "ttft_p99_ms: must be a number, got 'fast'"),
        ("ttft_p99_ms: -1\n", "ttft_p99_ms: must be more than 0, got -1"),
        ("error_rate: 2\n", "error_rate: must be at most 1, got 2"),
        ("schedule_corrected: true\n", "sets no bound"),
        ("[1]\n", "must hold bounds"),
        ("error_rate: 0\nerror_rate: 1\n", "error_rate: must be given once, got 'line 1 and line 2'"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_slo_says_what_is_wrong_where(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "slo.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert said in str(caught.value)
    assert str(file) in str(caught.value)


def test_slo_reports_all_mistakes_at_once(tmp_path: Path) -> None:
    file = tmp_path / "slo.yaml"
    file.write_text("ttft_p99: 5\nerror_rate: 2\n")
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert len(caught.value.problems) == 2


def test_percentile_is_a_value_that_was_measured() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, percent) for percent in (50, 95, 99)] == [50.0, 95.0, 99.0]
    assert percentile([3.0, 1.0, 2.0], 99) == 3.0
    assert percentile([], 50) is None


def test_slo_counts_from_the_schedule_unless_told_otherwise() -> None:
    late = [record(t_send_us=51_000, t_first_us=151_000)]
    assert judge(Slo(ttft_p50_ms=120), late, 1.0)[0].measured == 151.0
    assert judge(Slo(ttft_p50_ms=120, schedule_corrected=False), late, 1.0)[0].measured == 100.0


def test_slo_counts_errors_and_undefined_metrics_against_goodput() -> None:
    records = [
        record(0),
        record(1, outcome=Outcome.REFUSED),
        record(2, output_tokens=1),  # its TPOT is undefined
        record(3, t_first_us=900_000),
    ]
    slo = Slo(ttft_p50_ms=50, ttft_p99_ms=200, tpot_p50_ms=150, error_rate=0.25, goodput_min=0.2, good_part_min=0.3)
    verdicts = {verdict.name: verdict for verdict in judge(slo, records, 4.0)}
    assert verdicts["good_part_min"].measured == 0.25
    assert verdicts["goodput_min"].measured == 0.25
    assert verdicts["goodput_min"].met
    assert not verdicts["good_part_min"].met
    assert verdicts["error_rate"].measured == 0.25
    assert verdicts["tpot_p50_ms"].samples == 2


def test_slo_is_not_met_by_nothing() -> None:
    refused = [record(outcome=Outcome.REFUSED, t_first_us=None)]
    assert not judge(Slo(ttft_p50_ms=1e6), refused, 1.0)[0].met
    assert not judge(Slo(error_rate=1.0), [], 1.0)[0].met
