"""SLO files, their verdicts, and the exit status of a run."""

from pathlib import Path

import pytest

from borg_serve.errors import ConfigError
from loadtests.load import status
from loadtests.records import Outcome
from loadtests.saturation import Search, wilson
from loadtests.slo import Slo, judge, load, percentile
from loadtests.summary import document
from tests.loads import many, record, run

SLOS = sorted(Path("loadtests/slo").glob("*.yaml"))


@pytest.mark.parametrize("file", SLOS, ids=lambda file: str(file.stem))
def test_slo_files_that_ship_can_be_read(file: Path) -> None:
    assert load(file).bounds_ms()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ttft_p99: 5\n", "ttft_p99: unknown key, got 5. Did you mean `ttft_p99_ms`?"),
        ("ttft_p99_ms: fast\n", "ttft_p99_ms: input should be a valid number, got 'fast'"),
        ("ttft_p99_ms: -1\n", "ttft_p99_ms: input should be greater than 0, got -1"),
        ("error_rate: 2\n", "error_rate: input should be less than or equal to 1, got 2"),
        ("schedule_corrected: true\n", "sets no bound"),
        ("[1]\n", "must hold bounds"),
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


CALIBRATION = {"streams_per_worker": 4, "events_per_s_per_worker": 1000, "machine": {}, "date": "", "levels": []}


@pytest.mark.parametrize(
    ("bound_ms", "changes", "expected"),
    [
        (200, {}, 0),
        (50, {}, 1),
        (200, {"cpu_warning": True}, 3),
        (50, {"whole": False}, 3),
    ],
)
def test_status_is_of_the_verdict_unless_the_run_is_void(
    bound_ms: int, changes: dict[str, bool], expected: int
) -> None:
    slo = Slo(ttft_p99_ms=bound_ms)
    assert status(document(run(**changes), many(10), (Path("slo.yaml"), slo), CALIBRATION)) == expected


def test_status_is_void_past_what_the_generator_is_calibrated_for() -> None:
    at_once = [record(index) for index in range(5)]
    result = document(run(), at_once, None, CALIBRATION)
    assert status(result) == 3
    assert "5 streams open at once, and is calibrated for 4" in result["void"][0]
    split = [record(index, worker=index % 2) for index in range(5)]
    assert status(document(run(), split, None, CALIBRATION)) == 0


def test_wilson_interval_holds_known_values() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(90, 100)
    assert (round(low, 3), round(high, 3)) == (0.826, 0.945)


@pytest.mark.parametrize("capacity", [0.7, 3.0, 11.0])
def test_search_brackets_the_capacity(capacity: float) -> None:
    search = Search(start=2.0, need=0.9, budget=30)
    while (rate := search.next_rate()) is not None:
        search.observe(rate, 200 if rate <= capacity else 100, 200)
    low, high = search.bracket()
    assert low is not None
    assert high is not None
    assert low <= capacity < high <= low * search.tolerance * 1.001


def test_search_tries_a_rate_again_while_it_is_not_decided() -> None:
    search = Search(start=2.0, need=0.9)
    search.observe(2.0, 9, 10)
    assert search.tried[0].verdict(0.9) is None
    assert search.next_rate() == 2.0
    search.observe(2.0, 10, 10)
    assert search.next_rate() == 4.0  # as often as it may: 19 of 20 are enough
    assert search.document()["rates"][0]["decided"] is False  # type: ignore[index]


def test_search_keeps_its_budget() -> None:
    search = Search(start=2.0, budget=3)
    for _ in range(3):
        rate = search.next_rate()
        assert rate is not None
        search.observe(rate, 0, 100)
    assert search.next_rate() is None
    assert search.bracket()[0] is None
