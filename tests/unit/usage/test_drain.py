"""Segments on their way into the ledger: each exactly once, whatever is killed in between."""

import asyncio
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from prometheus_client import REGISTRY

from borg_serve.usage import drain as drain_module
from borg_serve.usage.drain import drain, run
from borg_serve.usage.ledger import Ledger, LedgerAway
from borg_serve.usage.spool import Entry, Spool

START = datetime(2026, 1, 1, tzinfo=UTC)
HOUR_S = 3600
NOON_S = datetime(2026, 11, 1, 12, tzinfo=UTC).timestamp()
ENTRY = Entry("alice", NOON_S, False, 10, 20, 5, 7, 0.25)


def metric(name: str) -> float:
    return REGISTRY.get_sample_value(name) or 0.0


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    found = Ledger(f"sqlite:///{tmp_path}/usage.db")
    yield found
    found.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def test_drain_adds_up_every_field_by_key_and_hour(folder: Path, ledger: Ledger) -> None:
    spool = Spool(folder, 1 << 20)
    for entry in (
        ENTRY,
        Entry("alice", NOON_S + 3599.9, True, 1, 20, 0, 2, 0.5),
        Entry("alice", NOON_S + 3600, False, 1, 20, 1, 1, 1.0),
        Entry("bob", NOON_S, False, 3, 20, 0, 1, 2.0),
    ):
        spool.write(entry)
    spool.rotate()
    assert drain(folder, ledger)
    assert list(folder.iterdir()) == []
    names = "key hour requests aborted refused prompt_tokens identity_tokens cached_tokens output_tokens engine_s"
    assert [list(row.values()) for row in ledger.sums(START, None, ("key", "hour"))] == [
        ["alice", "2026-11-01T12", 2, 1, 0, 11, 40, 5, 9, 0.75],
        ["alice", "2026-11-01T13", 1, 0, 0, 1, 20, 1, 1, 1.0],
        ["bob", "2026-11-01T12", 1, 0, 0, 3, 20, 0, 1, 2.0],
    ]
    assert [list(row) for row in ledger.sums(START, None, ("key", "hour"))] == [names.split()] * 3


def test_drain_adds_refusals(folder: Path, ledger: Ledger) -> None:
    spool = Spool(folder, 1 << 20)
    for key in ("alice", "bob", "alice"):
        spool.refuse(key)
    spool.close()
    assert drain(folder, ledger)
    assert {row["key"]: row["refused"] for row in ledger.sums(START, None)} == {"alice": 2, "bob": 1}


@pytest.mark.parametrize(
    "damage",
    [
        *(b'{"key": "alice", "ended_s": 17', b"\xff\xfe", b"\n", b"{}\n", b"[1]\n"),
        json.dumps(vars(ENTRY) | {"prompt_tokens": -1}).encode(),
        json.dumps(vars(ENTRY) | {"prompt_tokens": 1 << 63}).encode(),
        json.dumps(vars(ENTRY) | {"engine_s": float("nan")}).encode(),
        json.dumps(vars(ENTRY) | {"ended_s": 1e30}).encode(),
        json.dumps(vars(ENTRY) | {"key": "a\0b"}).encode(),
        json.dumps(vars(ENTRY) | {"key": "\ud800"}).encode(),
    ],
    ids=str,
)
def test_drain_skips_and_counts_a_damaged_line(folder: Path, ledger: Ledger, damage: bytes) -> None:
    folder.mkdir()
    whole = json.dumps(vars(ENTRY)).encode() + b"\n"
    (folder / "torn.jsonl").write_bytes(whole + whole + damage)
    before = metric("borg_usage_lost_total")
    assert drain(folder, ledger)
    assert [row["requests"] for row in ledger.sums(START, None)] == [2]
    assert metric("borg_usage_lost_total") - before == 1
    assert list(folder.iterdir()) == []


def test_drain_leaves_open_segments_and_other_files_alone(folder: Path, ledger: Ledger) -> None:
    spool = Spool(folder, 1 << 20)
    spool.write(ENTRY)
    (folder / "notes.txt").touch()
    (folder / "empty.jsonl").touch()
    assert drain(folder, ledger)
    assert len(list(folder.iterdir())) == 2
    assert ledger.sums(START, None) == []
    assert metric("borg_usage_waiting_bytes") > 0
    spool.close()
    assert drain(folder, ledger)
    assert metric("borg_usage_waiting_bytes") == 0


def test_drain_without_a_folder_drains_nothing(folder: Path, ledger: Ledger) -> None:
    assert drain(folder, ledger)


class Away(Ledger):
    """A ledger that is away when told to be, before or after its commit."""

    when = ""

    def apply(self, batch: str, rows: Any) -> bool:
        if self.when == "before":
            raise LedgerAway("away")
        applied = super().apply(batch, rows)
        if self.when == "after":
            raise LedgerAway("lost while it answered")
        return applied


def test_drain_waits_while_the_ledger_is_away_and_logs_once(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger, spool = Away(f"sqlite:///{tmp_path}/usage.db"), Spool(folder, 1 << 20)
    spool.write(ENTRY)
    spool.rotate()
    with caplog.at_level(logging.INFO):
        for ledger.when in ("before", "after", "before"):
            assert not drain(folder, ledger)
        assert len(list(folder.iterdir())) == 1
        ledger.when = ""
        assert drain(folder, ledger)
    assert [row["requests"] for row in ledger.sums(START, None)] == [1]
    away, back = (record.message for record in caplog.records)
    assert away == f"usage waits in {folder}: away"
    assert back == "the usage ledger is back"
    ledger.close()


def test_drain_skips_a_segment_that_it_may_not_read(
    folder: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "directory.jsonl").mkdir(parents=True)
    spool = Spool(folder, 1 << 20)
    spool.write(ENTRY)
    spool.close()
    assert drain(folder, ledger)
    assert [row["requests"] for row in ledger.sums(START, None)] == [1]


async def test_drain_runs_until_cancelled_and_once_more(folder: Path, ledger: Ledger) -> None:
    spool = Spool(folder, 1 << 20)
    task = asyncio.create_task(run(spool, folder, ledger, 0.01))
    spool.write(ENTRY)
    while not ledger.sums(START, None):
        await asyncio.sleep(0.01)
    spool.write(ENTRY)
    spool.refuse("alice")
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    (row,) = ledger.sums(START, None)
    assert (row["requests"], row["refused"]) == (2, 1)


async def test_drain_fills_one_segment_while_the_ledger_is_away(folder: Path, tmp_path: Path) -> None:
    ledger, spool = Away(f"sqlite:///{tmp_path}/usage.db"), Spool(folder, 1 << 20)
    ledger.when = "before"
    task = asyncio.create_task(run(spool, folder, ledger, 0.005))
    for _ in range(20):
        spool.write(ENTRY)
        spool.refuse("alice")
        await asyncio.sleep(0.01)
    assert len(list(folder.iterdir())) <= 3
    ledger.when = ""
    while not ledger.sums(START, None):
        await asyncio.sleep(0.01)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    (row,) = ledger.sums(START, None)
    assert (row["requests"], row["refused"]) == (20, 20)


class Killed(BaseException):
    """What ends a drainer where the test says so."""


class Servers(RuleBasedStateMachine):
    """Two servers over one folder: they write, hand over, drain and are killed in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp())
        self.folder = self.home / "spool"
        self.ledger = Ledger(f"sqlite:///{self.home}/usage.db")
        self.spools = [Spool(self.folder, 1 << 20) for _ in range(2)]
        self.wanted: Counter[tuple[str, str]] = Counter()
        self.unwritten: list[Counter[str]] = [Counter(), Counter()]

    @rule(who=st.integers(0, 1), key=st.sampled_from("ab"), later_h=st.integers(0, 30), tokens=st.integers(0, 9))
    def write(self, who: int, key: str, later_h: int, tokens: int) -> None:
        self.spools[who].write(Entry(key, NOON_S + later_h * HOUR_S, False, 1, 2, 0, tokens, 0.5))
        self.wanted[key, "requests"] += 1
        self.wanted[key, "output_tokens"] += tokens

    @rule(who=st.integers(0, 1), key=st.sampled_from("ab"))
    def refuse(self, who: int, key: str) -> None:
        self.spools[who].refuse(key)
        self.unwritten[who][key] += 1

    @rule(who=st.integers(0, 1))
    def rotate(self, who: int) -> None:
        self.spools[who].rotate()
        for key, count in self.unwritten[who].items():
            self.wanted[key, "refused"] += count
        self.unwritten[who].clear()

    @rule(who=st.integers(0, 1), torn=st.binary(max_size=20))
    def kill_writer(self, who: int, torn: bytes) -> None:
        """Its lock goes with it, its refusals too, and the line that it was writing is torn."""
        spool = self.spools[who]
        spool._refused.clear()
        if spool._segment is not None:
            os.write(spool._segment, b"{" + torn.replace(b"\n", b""))
        spool.close()
        self.unwritten[who].clear()
        self.spools[who] = Spool(self.folder, 1 << 20)

    @rule(who=st.integers(0, 1), where=st.sampled_from(["before", "applied", "unlinked", "forgotten"]))
    def kill_drainer(self, who: int, where: str) -> None:
        self.write(who, "a", 0, 1)
        self.rotate(who)

        def ends(*_: object) -> None:
            raise Killed

        with pytest.MonkeyPatch.context() as patch:
            if where == "before":
                patch.setattr(self.ledger, "apply", ends)
            elif where == "applied":
                patch.setattr(Path, "unlink", ends)
            elif where == "unlinked":
                patch.setattr(drain_module, "_sync", ends)
            else:
                patch.setattr(self.ledger, "forget", ends)
            with suppress(Killed):
                drain(self.folder, self.ledger)

    @rule()
    def drain(self) -> None:
        assert drain(self.folder, self.ledger)

    @invariant()
    def never_too_much(self) -> None:
        self.compare(exact=False)

    def compare(self, exact: bool) -> None:
        sums = {row["key"]: row for row in self.ledger.sums(START, None)}
        for key in "ab":
            for name in ("requests", "output_tokens", "refused"):
                found = sums.get(key, {}).get(name, 0)
                assert found == self.wanted[key, name] if exact else found <= self.wanted[key, name]

    def teardown(self) -> None:
        for who in range(2):
            self.rotate(who)
        assert drain(self.folder, self.ledger)
        assert list(self.folder.iterdir()) == []
        self.compare(exact=True)
        self.ledger.close()
        shutil.rmtree(self.home)


TestServers = Servers.TestCase
TestServers.settings = settings(max_examples=60, stateful_step_count=25)
