"""Usage in real processes and databases: servers and PostgreSQL are killed, and every entry is there once."""

import multiprocessing
import os
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import pytest

from borg_serve.usage.drain import drain
from borg_serve.usage.ledger import COUNTS, GROUPS, Ledger, LedgerAway
from tests.process import ledgers
from tests.waiting import wait_until

START = datetime(2026, 1, 1, tzinfo=UTC)
CONTEXT = multiprocessing.get_context("forkserver")  # a start takes milliseconds, not the imports
CONTEXT.set_forkserver_preload(["tests.process.ledgers"])
SERVERS_AT_ONCE = 2


@pytest.fixture(scope="module")
def postgres() -> Iterator[ledgers.Postgres]:
    with ledgers.postgres() as found:
        yield found


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/usage.db"
    found: ledgers.Postgres = request.getfixturevalue("postgres")
    psycopg = pytest.importorskip("psycopg", reason="no psycopg: pip install 'borg-serve[cluster]'")
    fresh = f"test_{time.monotonic_ns()}"
    with psycopg.connect(found.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {fresh}")
    return found.url.removesuffix("postgres") + fresh


def killed_servers(folder: Path, url: str, kills: int) -> dict[str, int]:
    """Start servers over one folder and kill one after another; how many entries each has told of."""
    random_ = random.Random(0)
    running: deque[tuple[str, multiprocessing.process.BaseProcess, Callable[[], int]]] = deque()
    told: dict[str, int] = {}
    numbers = count()
    while len(told) < kills:
        while len(running) < SERVERS_AT_ONCE and len(running) + len(told) < kills:
            key = f"server-{next(numbers)}"
            reader, writer = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(target=ledgers.serve, args=(key, folder, url, writer))
            process.start()
            writer.close()
            pool = ThreadPoolExecutor(1)

            def read(descriptor: int = reader.fileno(), keep: object = reader) -> int:
                total = 0
                while part := os.read(descriptor, 65536):
                    total += len(part)
                return total

            running.append((key, process, pool.submit(read).result))
            pool.shutdown(wait=False)
        time.sleep(random_.uniform(0.02, 0.3))
        key, ending, result = running.popleft()
        ending.kill()
        ending.join()
        told[key] = result()
        ending.close()
    return told


def check(folder: Path, url: str, told: dict[str, int]) -> None:
    """Every entry that a server has told of is there exactly once, and at most one more of each server."""
    ledger = Ledger(url)
    wait_until("all is drained", lambda: drain(folder, ledger) and not list(folder.iterdir()), 30)
    found = {row["key"]: row for row in ledger.sums(START, None)}
    assert sum(told.values()) > 100 * len(told) / 4
    for key, written in told.items():
        entries = found[key]["requests"] if key in found else 0
        assert written <= entries <= written + 1
        if entries:
            assert found[key]["prompt_tokens"] == entries * (entries - 1) // 2, "0, 1, 2… each once"
            assert (found[key]["output_tokens"], found[key]["engine_s"]) == (entries, entries / 2)
    assert found.keys() <= told.keys()
    ledger.close()


def test_ledger_has_every_entry_of_killed_servers_once(url: str, tmp_path: Path) -> None:
    told = killed_servers(tmp_path / "spool", url, 24)
    check(tmp_path / "spool", url, told)


def test_ledger_has_every_entry_once_while_its_postgresql_is_killed(tmp_path: Path) -> None:
    with ledgers.postgres() as database:
        done = threading.Event()
        kills = 0

        def kill_it() -> None:
            nonlocal kills
            random_ = random.Random(1)
            while not done.wait(random_.uniform(0.3, 0.8)):
                database.kill()
                kills += 1
                database.start()

        with ThreadPoolExecutor(1) as pool:
            killing = pool.submit(kill_it)
            try:
                told = killed_servers(tmp_path / "spool", database.url, 24)
            finally:
                done.set()
            killing.result()
        assert kills >= 2
        check(tmp_path / "spool", database.url, told)


def test_ledger_of_several_servers_that_start_at_once_makes_its_tables_once(url: str) -> None:
    together = threading.Barrier(8)

    def start(number: int) -> bool:
        ledger = Ledger(url)
        together.wait()
        counts = dict.fromkeys(COUNTS, 1)
        done = ledger.apply(f"batch-{number}", [{"key": "alice", "hour": "2026-11-01T12"} | counts])
        ledger.close()
        return done

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(start, range(8)))  # SQLite does not wait by itself where all open a new file
    ledger = Ledger(url)
    for by in ((), *((name,) for name in GROUPS), tuple(GROUPS)):
        assert [row["requests"] for row in ledger.sums(START, None, by)] == [8]
    ledger.close()


def test_ledger_applies_a_batch_of_several_drainers_once(url: str) -> None:
    ledger = Ledger(url)
    rows = [{"key": key, "hour": "2026-11-01T12"} | dict.fromkeys(COUNTS, 1) for key in "abc"]
    ledger.apply("first", [])
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda _: ledger.apply("same", rows), range(16))) == 1
    assert [row["requests"] for row in ledger.sums(START, None)] == [1, 1, 1]
    ledger.close()


def test_ledger_that_is_away_says_so_without_the_password(postgres: ledgers.Postgres) -> None:
    ledger = Ledger(f"postgresql://borg:geheim@127.0.0.1:{postgres.port}/missing?application_name=geheim")
    with pytest.raises(LedgerAway) as caught:
        ledger.sums(START, None)
    assert 'database "missing" does not exist' in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert "geheim" not in str(caught.value)


def test_ledger_that_hangs_does_not_keep_a_server_from_ending(postgres: ledgers.Postgres, tmp_path: Path) -> None:
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=ledgers.end_before, args=(tmp_path / "spool", postgres.url, theirs))
    process.start()
    assert ours.recv() == "drained"
    postgres.signal(signal.SIGSTOP)
    try:
        ours.send("stopped")
        process.join(60)
        assert process.exitcode == 0
    finally:
        postgres.signal(signal.SIGCONT)
    ledger = Ledger(postgres.url)
    wait_until("the rest is drained", lambda: drain(tmp_path / "spool", ledger))
    assert [row["requests"] for row in ledger.sums(START, None)] == [2]
    ledger.close()
