"""The ledger on SQLite: exactly once, sums by every grouping, and URLs that cannot be used."""

import sqlite3
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from borg_serve.errors import ConfigError
from borg_serve.usage.ledger import COUNTS, GROUPS, KEPT_S, Ledger, LedgerAway, Row, hour

START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    found = Ledger(f"sqlite:///{tmp_path}/usage.db")
    yield found
    found.close()


def row(key: str, when: str, **counts: float) -> Row:
    return {"key": key, "hour": when} | dict.fromkeys(COUNTS, 0) | counts


def batches(folder: Path) -> list[str]:
    with sqlite3.connect(folder / "usage.db") as database:
        return [batch for (batch,) in database.execute("SELECT batch FROM borg_usage_batches ORDER BY batch")]


def test_ledger_applies_a_batch_once(ledger: Ledger, tmp_path: Path) -> None:
    rows = [row("alice", "2026-11-01T13", requests=2, engine_s=0.5), row("bob", "2026-11-01T13", refused=1)]
    assert [ledger.apply(batch, rows) for batch in ("a", "a", "b", "a")] == [True, False, True, False]
    found = {row["key"]: row for row in ledger.sums(START, None)}
    assert (found["alice"]["requests"], found["alice"]["engine_s"], found["bob"]["refused"]) == (4, 1.0, 2)
    assert batches(tmp_path) == ["a", "b"]
    ledger.forget(["a", "unknown"])
    assert batches(tmp_path) == ["b"]


def test_ledger_keeps_nothing_of_a_batch_that_fails(ledger: Ledger, tmp_path: Path) -> None:
    ledger.apply("first", [])
    with pytest.raises(LedgerAway):
        ledger.apply("bad", [row("alice", "2026-11-01T13", requests=1), row("bob", "x") | {"requests": None}])
    assert ledger.sums(START, None) == []
    assert batches(tmp_path) == ["first"]
    assert ledger.apply("bad", [row("alice", "2026-11-01T13", requests=1)])


def test_ledger_prunes_old_batches(tmp_path: Path) -> None:
    now = [1e9]
    ledger = Ledger(f"sqlite:///{tmp_path}/usage.db", clock=lambda: now[0])
    ledger.apply("old", [])
    now[0] += KEPT_S - 1
    ledger.apply("young", [])
    assert batches(tmp_path) == ["old", "young"]
    now[0] += 7200
    ledger.apply("new", [])
    assert batches(tmp_path) == ["new", "young"]
    ledger.close()


def test_ledger_sums_by_every_grouping(ledger: Ledger) -> None:
    hours = ["2026-10-31T23", "2026-11-01T00", "2026-11-01T13", "2026-11-30T23", "2026-12-01T00"]
    given = [row(key, when, requests=1, output_tokens=n) for key in ("b", "a") for n, when in enumerate(hours, 1)]
    ledger.apply("batch", given)
    cut = {"key": lambda r: r["key"], "hour": lambda r: r["hour"]}
    cut |= {"day": lambda r: r["hour"][:10], "month": lambda r: r["hour"][:7]}
    groupings = [(), *((one,) for one in GROUPS), *((one, two) for one in GROUPS for two in GROUPS if one != two)]
    for by in [*groupings, ("month", "key", "day")]:
        wanted: dict[tuple[Any, ...], list[int]] = {}
        for one in given:
            if "2026-11-01T00" <= one["hour"] < "2026-12-01T00":
                wanted.setdefault(tuple(cut[name](one) for name in by), []).append(one["output_tokens"])
        found = ledger.sums(datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC), by)
        assert [list(one) for one in found] == [[*by, *COUNTS]] * len(wanted)
        assert [tuple(one[name] for name in by) for one in found] == sorted(wanted)
        assert [one["output_tokens"] for one in found] == [sum(wanted[group]) for group in sorted(wanted)]
    assert [one["requests"] for one in ledger.sums(START, None, (), key="a")] == [5]
    assert ledger.sums(START, None, ("key",), key="c") == []


def test_ledger_without_entries_sums_to_nothing(ledger: Ledger) -> None:
    assert ledger.sums(START, None) == []
    assert ledger.sums(START, None, ()) == [dict.fromkeys(COUNTS, 0)]


def test_ledger_hours_are_utc() -> None:
    assert hour(datetime.fromisoformat("2026-11-01T00:59:59+02:00")) == "2026-10-31T22"


def test_ledger_on_sqlite_writes_ahead(ledger: Ledger, tmp_path: Path) -> None:
    ledger.apply("batch", [])
    with sqlite3.connect(tmp_path / "usage.db") as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("geheim", "is not a database's URL"),
        ("postgresql://borg:geheim@host:port/borg", "is not a database's URL"),
        ("mysql://borg:geheim@host/borg", "names a database that is not known"),
        ("postgresql+asyncpg://borg:geheim@host/borg", "names a database that is not known"),
        ("sqlite://", "would be lost with its process"),
        ("sqlite:///:memory:", "would be lost with its process"),
        ("sqlite:////no/such/folder/usage.db", "is in a folder that does not exist"),
        ("sqlite:///usage.db?timeout=geheim", "cannot be used"),
    ],
)
def test_ledger_refuses_a_url_and_shows_no_password(url: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Ledger(url)
    (problem,) = caught.value.problems
    assert (problem.where, problem.what[: len(what)]) == ("usage.url", what)
    assert "geheim" not in str(problem).replace("float: 'geheim'", "").replace("'geheim:…'", "")
    assert problem.cure


def test_ledger_names_the_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"needs a package .*Run: pip install 'borg-serve\[cluster\]'\."):
        Ledger("postgresql://borg:geheim@host/borg")


def test_ledger_that_cannot_be_opened_is_away(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path}")
    for ask in (lambda: ledger.sums(START, None), lambda: ledger.apply("batch", []), lambda: ledger.forget(["batch"])):
        with pytest.raises(LedgerAway, match=r"^the usage ledger sqlite:///.* cannot be used now: unable to open"):
            ask()
