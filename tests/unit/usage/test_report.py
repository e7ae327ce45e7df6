"""`borg-serve usage`: its forms, and each mistake in one line with its cure."""

import csv
import io
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from borg_serve import cli
from borg_serve.usage.ledger import COUNTS, Ledger, Row, hour
from borg_serve.usage.report import this_month
from tests.profiles import write

Run = Callable[..., tuple[object, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `borg-serve usage` in this process: (status, stdout, stderr)."""

    def here(*words: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["borg-serve", "usage", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, *capsys.readouterr()

    return here


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A ledger with two days of November 2026, and one row of this month."""
    ledger = Ledger(f"sqlite:///{tmp_path}/usage.db")
    counts: Row = dict.fromkeys(COUNTS, 1)
    rows: list[Row] = [
        {"key": "alice", "hour": "2026-11-01T13"} | counts | {"prompt_tokens": 1234567, "engine_s": 0.25},
        {"key": "alice", "hour": "2026-11-02T00"} | counts | {"prompt_tokens": 3, "engine_s": 0.5},
        {"key": "bob-the-second", "hour": "2026-11-02T23"} | counts,
    ]
    ledger.apply("batch", rows)
    ledger.close()
    return f"sqlite:///{tmp_path}/usage.db"


NOVEMBER = ("--since", "2026-11-01", "--until", "2026-12-01")


def test_usage_prints_an_aligned_table(run: Run, url: str) -> None:
    status, out, err = run("--url", url, *NOVEMBER)
    assert (status, err) == (0, "")
    head, alice, bob = out.splitlines()
    assert head.split() == ["key", *COUNTS]
    assert alice.split() == ["alice", "2", "2", "2", "1,234,570", "2", "2", "2", "0.8"]
    assert bob.split() == ["bob-the-second", *["1"] * 7, "1.0"]
    assert len({len(line) for line in (head, alice, bob)}) == 1
    assert head.index("requests") + len("requests") == alice.index("2") + 1


def test_usage_prints_csv_and_json(run: Run, url: str) -> None:
    status, out, _ = run("--url", url, *NOVEMBER, "--by", "key,day", "--format", "csv")
    assert status == 0
    assert out.splitlines()[0] == ",".join(["key", "day", *COUNTS])
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["key"], row["day"]) for row in rows] == [
        ("alice", "2026-11-01"),
        ("alice", "2026-11-02"),
        ("bob-the-second", "2026-11-02"),
    ]
    _, out, _ = run("--url", url, *NOVEMBER, "--by", "key,day", "--format", "json")
    document = json.loads(out)
    assert [{name: str(value) for name, value in row.items()} for row in document] == rows


def test_usage_ends_before_until(run: Run, url: str) -> None:
    _, out, _ = run("--url", url, "--since", "2026-11-01T13", "--until", "2026-11-02", "--format", "json")
    assert [row["requests"] for row in json.loads(out)] == [1]


def test_usage_begins_with_this_month(run: Run, tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path}/usage.db")
    counts, now = dict.fromkeys(COUNTS, 1), datetime.now(UTC)
    hours = {"old": "2020-01-01T00", "new": hour(now)}
    ledger.apply("batch", [{"key": key, "hour": when} | counts for key, when in hours.items()])
    _, out, _ = run("--url", f"sqlite:///{tmp_path}/usage.db", "--format", "json", "--by", "key,month")
    assert [(row["key"], row["month"]) for row in json.loads(out)] == [("new", hour(now)[:7])]
    assert hour(this_month())[7:] == "-01T00"


def test_usage_reads_the_profiles_ledger(run: Run, url: str, tmp_path: Path) -> None:
    status, out, _ = run("--config", str(write(tmp_path)), "--set", "usage.url=sqlite:///usage.db", *NOVEMBER)
    assert status == 0
    assert len(out.splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "named", "cure"),
    [
        (("--by", "kez"), "--by", "key, hour, day, month"),
        (("--by", "key,key"), "--by", "each once"),
        (("--by", ""), "--by", "--by key,day"),
        (("--since", "yesterday"), "--since", "2026-11-01"),
        (("--since", "2026-02-30"), "--since", "2026-11-01"),
        (("--until", "2026-11-01T13:30"), "--until", "--until 2026-11-01T13"),
        (("--format", "xml"), "--format", "'csv'"),
        (("--url", "mysql://borg:geheim@host/borg"), "usage.url", "postgresql://"),
        ((), "usage.url", "--url"),
    ],
)
def test_usage_explains_a_mistake_in_one_line(
    run: Run, tmp_path: Path, words: tuple[str, ...], named: str, cure: str
) -> None:
    status, out, err = run("--config", str(write(tmp_path)), *words)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert named in err
    assert cure in err
    assert "geheim" not in err


def test_usage_of_a_database_that_is_away_has_status_1(run: Run, tmp_path: Path) -> None:
    status, out, err = run("--url", f"sqlite:///{tmp_path}")
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
