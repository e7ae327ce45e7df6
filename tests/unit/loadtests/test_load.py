"""The exit status of a run."""

import json
import sys
from pathlib import Path

import pytest

from loadtests.generator.records import Outcome
from loadtests.gpu import throughput
from loadtests.load import status, verdict
from loadtests.report.slo import Slo
from loadtests.report.summary import document
from loadtests.servers.local import free_port
from tests.loads import many, record, run

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


def test_status_is_void_where_nothing_was_measured_and_says_why() -> None:
    refused = [record(index, outcome=Outcome.REJECTED, detail="invalid_api_key") for index in range(3)]
    failed = [*refused, record(3, outcome=Outcome.UNREACHABLE, detail="ConnectionRefusedError")]
    for slo in (None, (Path("slo.yaml"), Slo(error_rate=1))):
        result = document(run(), failed, slo, CALIBRATION)
        assert status(result) == 3
        why = "3 x rejected: invalid_api_key; 1 x unreachable: ConnectionRefusedError"
        assert result["void"][0] == f"nothing was measured: no request ended well ({why})"
        assert f"VOID: {result['void'][0]}" in verdict(result)
        assert "\nerror: 3 x rejected: invalid_api_key\n" in verdict(result)
    assert status(document(run(), [], None, CALIBRATION)) == 3
    assert status(document(run(), [*failed, record(4)], None, None)) == 0


def test_throughput_of_a_server_that_is_not_there_is_void(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setattr(sys, "argv", ["throughput", url, "--users", "1", "--processes", "1", "--requests", "2"])
    with pytest.raises(SystemExit) as caught:
        throughput.main()
    assert caught.value.code == 3
    said = capsys.readouterr()
    assert json.loads(said.out)["failed"] == 2
    assert said.err.startswith("VOID: 1 users: nothing was measured: no request ended well (2 x ")


def test_status_is_void_past_what_the_generator_is_calibrated_for() -> None:
    at_once = [record(index) for index in range(5)]
    result = document(run(), at_once, None, CALIBRATION)
    assert status(result) == 3
    assert "5 streams open at once, and is calibrated for 4" in result["void"][0]
    split = [record(index, worker=index % 2) for index in range(5)]
    assert status(document(run(), split, None, CALIBRATION)) == 0
