"""Two runs beside each other, with intervals."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from borg_serve.errors import ConfigError
from loadtests.generator.records import Outcome
from loadtests.report import comparison
from loadtests.report.summary import document
from tests.loads import many, record, run


def saved(**changes: Any) -> dict[str, Any]:
    slower, seed = changes.pop("slower", 1.0), changes.pop("seed", 0)
    count = changes.pop("count", 120)
    found: dict[str, Any] = json.loads(json.dumps(document(run(**changes), many(count, slower, seed), None, None)))
    return found


def verdicts(a: dict[str, Any], b: dict[str, Any]) -> dict[str, str]:
    return {row.name: row.verdict for row in comparison.compare(a, b)[0]}


def test_compare_shows_no_difference_between_runs_of_the_same_kind() -> None:
    assert set(verdicts(saved(seed=1), saved(seed=2)).values()) == {"no difference shown"}


def test_compare_says_who_is_faster_both_ways() -> None:
    a, b = saved(seed=1), saved(seed=2, slower=1.5)
    assert set(verdicts(a, b).values()) == {"slower"}
    assert set(verdicts(b, a).values()) == {"faster"}
    row = comparison.compare(a, b)[0][0]
    assert row.low is not None
    assert row.high is not None
    assert row.low < 1.5 < row.high


def test_compare_gives_no_interval_for_a_few_requests() -> None:
    assert set(verdicts(saved(count=10), saved(count=120)).values()) == {"too few requests"}


def test_compare_notes_what_was_not_the_same() -> None:
    a, b = saved(), saved(cpu_warning=True)
    b["run"]["options"]["rate"] = 2.0
    notes = "\n".join(comparison.compare(a, b)[1])
    assert "B is void" in notes
    assert "rate (1.0 and 2.0)" in notes
    failed = json.loads(json.dumps(document(run(), [*many(5), record(9, outcome=Outcome.BROKEN)], None, None)))
    assert "A: 1 of 6 requests failed" in comparison.compare(failed, a)[1][0]


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "other"}'])
def test_compare_refuses_other_files(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"a\.json"):
        comparison.load_run(file)


def test_compare_command_prints_a_verdict_for_each_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["comparison", *words])
        comparison.main()
        return capsys.readouterr().out

    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    Path(files[0]).write_text(json.dumps(saved()))
    Path(files[1]).write_text(json.dumps(saved(slower=2.0)))
    assert printed(*files).count("slower") == 7
    assert json.loads(printed(*files, "--json"))["figures"][0]["verdict"] == "slower"
    with pytest.raises(SystemExit) as left:
        printed(files[0], str(tmp_path / "none.json"))
    assert left.value.code == 2
    assert "none.json: cannot be read as JSON" in capsys.readouterr().err
