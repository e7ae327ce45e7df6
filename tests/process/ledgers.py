"""Servers that write usage and are killed, and a PostgreSQL that is, too; for tests/process/test_ledger.py."""

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from borg_serve.usage.drain import run
from borg_serve.usage.ledger import Ledger
from borg_serve.usage.spool import Entry, Spool
from loadtests.servers import local
from tests.waiting import wait_until

NOON_S = datetime(2026, 11, 1, 12, tzinfo=UTC).timestamp()
PROGRAMS = f"{os.environ['PATH']}:{':'.join(map(str, sorted(Path('/usr/lib/postgresql').glob('*/bin'))))}"


def serve(key: str, folder: Path, url: str, told: Connection) -> None:
    """Write entries 0, 1, 2… of a key and tell of each that was written, a byte; hand over and drain meanwhile."""

    async def write() -> None:
        spool, ledger = Spool(folder, 1 << 30), Ledger(url)
        draining = asyncio.create_task(run(spool, folder, ledger, 0.01))
        number = 0
        while not draining.done():
            for _ in range(10):
                spool.write(Entry(key, NOON_S + number, False, number, 1, 0, 1, 0.5))
                os.write(told.fileno(), b".")
                number += 1
            await asyncio.sleep(0.002)

    asyncio.run(write())


def end_before(folder: Path, url: str, both: Connection) -> None:
    """Drain once; when told that the database has stopped, write one more entry, and end as a server does."""

    async def write() -> None:
        spool, ledger = Spool(folder, 1 << 30), Ledger(url)
        draining = asyncio.create_task(run(spool, folder, ledger, 0.01))
        spool.write(Entry("alice", NOON_S, False, 1, 1, 0, 1, 0.5))
        while any(folder.iterdir()):
            await asyncio.sleep(0.01)
        both.send("drained")
        await asyncio.to_thread(both.recv)
        spool.write(Entry("alice", NOON_S, False, 1, 1, 0, 1, 0.5))
        await asyncio.sleep(0.2)
        draining.cancel()
        with suppress(asyncio.CancelledError):
            await draining

    asyncio.run(write())


class Postgres:
    """A real PostgreSQL on a free port of the loopback address."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port = local.free_port()
        self.url = f"postgresql://borg:geheim@127.0.0.1:{self.port}/postgres"
        self.user = "nobody" if os.geteuid() == 0 else None  # it refuses to run as root
        if self.user is not None:
            shutil.chown(home, self.user)
        words = ["-D", str(home / "data"), "-U", "borg", "-A", "trust", "--no-sync", "--locale=C", "-E", "UTF8"]
        with self._popen(["initdb", *words]) as made:
            assert made.wait() == 0
        self.start()

    def _popen(self, words: list[str]) -> subprocess.Popen[bytes]:
        program = shutil.which(words[0], path=PROGRAMS)
        assert program is not None
        with (self.home / "log").open("ab") as log:
            return subprocess.Popen(
                [program, *words[1:]],
                stdout=log,
                stderr=log,
                cwd=self.home,
                user=self.user,
                group=None if self.user is None else "nogroup",
                extra_groups=None if self.user is None else [],
            )

    def start(self) -> None:
        words = ["-D", str(self.home / "data"), "-p", str(self.port), "-c", "listen_addresses=127.0.0.1"]
        # What it has written survives its own end without fsync; only that of the machine needs it.
        words += ["-c", "unix_socket_directories=", "-c", "fsync=off", "-c", "shared_buffers=16MB"]

        def runs() -> bool:
            self.process = self._popen(["postgres", *words])
            return self._answers()  # else a process of the one before still ends

        wait_until("PostgreSQL starts", runs, 60, 0.2)

    def _answers(self) -> bool:
        probe = ["pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port), "-t", "1"]
        while self.process.poll() is None:
            with self._popen(probe) as asked:
                if asked.wait() == 0:
                    return True
        return False

    def family(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def kill(self) -> None:
        """End it without a shutdown: the next start recovers from its log."""
        family = self.family()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(family[1:], 30)

    def signal(self, number: signal.Signals) -> None:
        for process in self.family():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A new PostgreSQL; skips the test where there is none. Its folder must be open to its user: not pytest's."""
    if any(shutil.which(name, path=PROGRAMS) is None for name in ("initdb", "postgres", "pg_isready")):
        pytest.skip("no postgres: `make system` as root installs it")
    home = Path(tempfile.mkdtemp(prefix="borg-postgres-"))
    try:
        database = Postgres(home)
        yield database
        database.kill()
    finally:
        shutil.rmtree(home, ignore_errors=True)
