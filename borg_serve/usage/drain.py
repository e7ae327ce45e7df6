"""Takes segments over into the ledger: each is one batch, applied once and then deleted.

It does not know the database, nor who wrote the segments.
"""

import asyncio
import logging
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import IO, Final
from weakref import WeakSet

from pydantic import TypeAdapter, ValidationError

from borg_serve.metrics import USAGE_LOST, USAGE_WAITING
from borg_serve.usage.ledger import COUNTS, Ledger, LedgerAway, Row, hour
from borg_serve.usage.spool import SUFFIX, Entry, Refusals, Seldom, Spool, lock, waiting_bytes

__all__ = ["drain", "run"]

logger = logging.getLogger(__name__)

LAST_S: Final = 2.0
"""How long the end of a server may wait for the last drain. What is left then waits for the next server."""
LINE: Final[TypeAdapter[Entry | Refusals]] = TypeAdapter(Entry | Refusals)
AWAY: Final[WeakSet[Ledger]] = WeakSet()
"""Ledgers of which the log says so."""
SELDOM: Final = Seldom()


def drain(folder: Path, ledger: Ledger) -> bool:
    """Take over every segment that nobody writes to. False, and the rest waits, if the ledger is away."""
    done = []
    try:
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            try:
                if _take(path, ledger):
                    done.append(path.stem)
            except OSError as error:
                SELDOM.warn("usage waits in %s: %s", path, error.strerror)
        if done:
            _sync(folder)
            ledger.forget(done)
    except LedgerAway as error:
        if ledger not in AWAY:
            AWAY.add(ledger)
            logger.warning("usage waits in %s: %s", folder, error)
        return False
    finally:
        with suppress(OSError):
            USAGE_WAITING.set(waiting_bytes(folder))
    if done and ledger in AWAY:
        AWAY.discard(ledger)
        logger.info("the usage ledger is back")
    return True


async def run(spool: Spool, folder: Path, ledger: Ledger, period_s: float = 1.0) -> None:
    """Hand over and drain until cancelled, and then once more. While the ledger is away one segment grows."""
    here = True
    try:
        while True:
            await asyncio.sleep(period_s)
            if here:
                spool.rotate()
            else:
                spool.flush()
            here = await _in_thread(folder, ledger)
    finally:
        spool.rotate()
        with suppress(TimeoutError):
            await asyncio.wait_for(_in_thread(folder, ledger), LAST_S)


async def _in_thread(folder: Path, ledger: Ledger) -> bool:
    """Drain as asyncio.to_thread would, in a thread that the process does not wait for when it ends."""
    loop = asyncio.get_running_loop()
    drained: asyncio.Future[bool] = loop.create_future()

    def settle(here: bool) -> None:
        if not drained.done():
            drained.set_result(here)

    def work() -> None:
        here = False
        try:
            here = drain(folder, ledger)
        except Exception:  # noqa: BLE001 - logged
            SELDOM.warn("usage waits in %s", folder, exc_info=True)
        with suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(settle, here)

    Thread(target=work, name="usage-drain", daemon=True).start()
    return await drained


def _take(path: Path, ledger: Ledger) -> bool:
    """Apply one segment and delete it; False if another has it."""
    segment = lock(path, os.O_RDWR)
    if segment is None:
        return False
    with os.fdopen(segment, "rb") as file:
        rows, damaged = _read(file)
        if not rows or ledger.apply(path.stem, rows):
            USAGE_LOST.inc(damaged)
        path.unlink()
    return True


def _read(file: IO[bytes]) -> tuple[list[Row], int]:
    """(what each key used in each hour, how many lines are no lines of ours: a killed writer's last one)."""
    rows: dict[tuple[str, str], Row] = {}
    damaged = 0
    for text in file:
        try:
            line = LINE.validate_json(text)
        except ValidationError:
            damaged += 1
            continue
        when = hour(datetime.fromtimestamp(line.ended_s, UTC))
        for key, used in _counts(line).items():
            row = rows.setdefault((key, when), {"key": key, "hour": when} | dict.fromkeys(COUNTS, 0))
            for name, value in used.items():
                row[name] += value
    return list(rows.values()), damaged


def _counts(line: Entry | Refusals) -> dict[str, dict[str, float]]:
    if isinstance(line, Refusals):
        return {key: {"refused": count} for key, count in line.refused.items()}
    used = {name: getattr(line, name) for name in COUNTS if name not in ("requests", "refused")}
    return {line.key: used | {"requests": 1}}


def _sync(folder: Path) -> None:
    """Put the deletions on the disk: a batch is forgotten only when its file cannot come back."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
