"""The ledger's tables in SQLite or PostgreSQL: what each key used in each hour, added up batch by batch.

It does not know where batches come from.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from sqlite3 import OperationalError as SQLiteError
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    Engine,
    Index,
    MetaData,
    String,
    Table,
    bindparam,
    create_engine,
    delete,
    event,
    func,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError

from borg_serve.errors import ConfigError, Problem

__all__ = ["COUNTS", "GROUPS", "Ledger", "LedgerAway", "Row", "hour"]

Row = dict[str, Any]
"""`key`, `hour` and each of COUNTS."""

COUNTS: Final = (
    *("requests", "aborted", "refused", "prompt_tokens", "identity_tokens", "cached_tokens", "output_tokens"),
    "engine_s",
)
KEPT_S: Final = 90 * 86400
"""How long a batch is known: a folder of segments may come back with a machine that was off."""
PRUNE_EVERY_S: Final = 3600
DRIVERS: Final = {"sqlite": "sqlite+pysqlite", "postgresql": "postgresql+psycopg"}
WAIT_S: Final = 5
"""How long a connection, a lock or a PostgreSQL that does not answer may take."""
SUMS_S: Final = 60
CONNECT: Final[dict[str, dict[str, Any]]] = {
    "sqlite": {"timeout": WAIT_S},
    "postgresql": {"connect_timeout": WAIT_S, "tcp_user_timeout": WAIT_S * 1000, "keepalives_idle": WAIT_S},
}

METADATA: Final = MetaData()
USAGE: Final = Table(
    "borg_usage",
    METADATA,
    Column("key", String, primary_key=True),
    Column("hour", String(13), primary_key=True, comment="UTC, such as 2026-11-01T13"),
    *(Column(name, Double if name == "engine_s" else BigInteger, nullable=False) for name in COUNTS),
    Index("borg_usage_by_hour", "hour"),
    sqlite_with_rowid=False,
)
BATCHES: Final = Table(
    "borg_usage_batches",
    METADATA,
    Column("batch", String, primary_key=True),
    Column("applied_s", BigInteger, nullable=False, index=True, comment="Unix time"),
    sqlite_with_rowid=False,
)
INSERT: Final[dict[str, Callable[[Table], sqlite.Insert | postgresql.Insert]]] = {
    "sqlite": sqlite.insert,
    "postgresql": postgresql.insert,
}
GROUPS: Final = {
    "key": USAGE.c.key,
    "hour": USAGE.c.hour,
    "day": func.substr(USAGE.c.hour, 1, 10),
    "month": func.substr(USAGE.c.hour, 1, 7),
}
"""What sums can be asked by."""


class LedgerAway(Exception):
    """The database cannot be used now. The message names it without its password."""


def hour(moment: datetime) -> str:
    """The hour (UTC) of a moment, as the ledger writes it."""
    return moment.astimezone(UTC).isoformat(timespec="hours")[:13]


class Ledger:
    """What each key used. Threads may share it; several machines may use one database at once."""

    def __init__(self, url: str, clock: Callable[[], float] = time.time) -> None:
        """Connect to nothing yet. Raises ConfigError for a URL that cannot be used."""
        self._engine, self._shown = _engine(url)
        self._insert = INSERT[self._engine.dialect.name]
        self._clock = clock
        self._tables = False
        self._prune_at = 0.0

    def apply(self, batch: str, rows: Iterable[Row]) -> bool:
        """Add a batch, once: False if it was added before. Raises LedgerAway; then call again with the same batch."""
        now = self._clock()
        known = self._insert(BATCHES).values(batch=batch, applied_s=int(now)).on_conflict_do_nothing()
        added = self._insert(USAGE)
        sums = {name: USAGE.c[name] + added.excluded[name] for name in COUNTS}
        # In one order everywhere, so that two servers do not wait for each other.
        ordered = sorted(rows, key=lambda row: (row["key"], row["hour"]))
        with self._begin() as connection:
            if now >= self._prune_at:
                connection.execute(delete(BATCHES).where(BATCHES.c.applied_s < int(now) - KEPT_S))
            new = connection.execute(known.returning(BATCHES.c.batch)).first() is not None
            if new and ordered:
                connection.execute(added.on_conflict_do_update(index_elements=["key", "hour"], set_=sums), ordered)
        if now >= self._prune_at:
            self._prune_at = now + PRUNE_EVERY_S
        return new

    def forget(self, batches: Iterable[str]) -> None:
        """Drop batches that nobody can apply again. Raises LedgerAway."""
        with self._begin() as connection:
            which = BATCHES.c.batch == bindparam("which")
            connection.execute(delete(BATCHES).where(which), [{"which": batch} for batch in batches])

    def sums(
        self, since: datetime, until: datetime | None, by: Sequence[str] = ("key",), key: str | None = None
    ) -> list[Row]:
        """Add up the hours from `since` to before `until`, in groups of GROUPS, in their order; of one key if named.

        Without groups there is one row. Raises LedgerAway.
        """
        totals = [func.coalesce(func.sum(USAGE.c[name]), 0).label(name) for name in COUNTS]
        query = select(*(GROUPS[name].label(name) for name in by), *totals).where(USAGE.c.hour >= hour(since))
        if until is not None:
            query = query.where(USAGE.c.hour < hour(until))
        if key is not None:
            query = query.where(USAGE.c.key == key)
        with self._begin(SUMS_S) as connection:
            found = [dict(row) for row in connection.execute(query.group_by(*by)).mappings()]
        for row in found:
            row |= {name: round(float(row[name]), 3) if name == "engine_s" else int(row[name]) for name in COUNTS}
        return sorted(found, key=lambda row: [row[name] for name in by])

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    @contextmanager
    def _begin(self, limit_s: int = WAIT_S) -> Iterator[Connection]:
        try:
            if not self._tables:
                self._make_tables()
            with self._engine.begin() as connection:
                if connection.dialect.name == "postgresql":
                    connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{limit_s}s'")
                yield connection
        except SQLAlchemyError as error:
            self._tables = False  # another database may come back
            reason = " ".join(str(getattr(error, "orig", None) or error).split())
            raise LedgerAway(f"the usage ledger {self._shown} cannot be used now: {reason[:300]}") from None

    def _make_tables(self) -> None:
        """Several servers may do so at once: who comes second with a table or an index fails, and then finds it."""
        for _ in range(sum(1 + len(table.indexes) for table in METADATA.sorted_tables)):
            try:
                METADATA.create_all(self._engine)
                break
            except (IntegrityError, ProgrammingError):  # PostgreSQL's
                continue
            except OperationalError as error:
                if "already exists" not in str(error.orig):  # SQLite's
                    raise
        else:
            METADATA.create_all(self._engine)
        self._tables = True


def _engine(text: str) -> tuple[Engine, str]:
    """An engine for an address, and the address without its password."""
    cure = "Use sqlite:////folder/usage.db or postgresql://user@host/database."
    try:
        url = make_url(text)
    except (SQLAlchemyError, ValueError):
        raise _problem("is not a database's URL", text.partition(":")[0] + ":…", cure) from None
    shown = url.set(query={}).render_as_string(hide_password=True)
    driver = DRIVERS.get(url.drivername, url.drivername)
    if driver not in DRIVERS.values():
        raise _problem("names a database that is not known", shown, cure)
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise _problem("would be lost with its process", shown, "Name a file: sqlite:////folder/usage.db.")
    if url.get_backend_name() == "sqlite" and not (folder := Path(str(url.database)).parent).is_dir():
        raise _problem("is in a folder that does not exist", shown, f"Make it: mkdir -p {folder}.")
    try:
        return _connected(url.set(drivername=driver)), shown
    except ImportError as error:
        pip = "Run: pip install 'borg-serve[cluster]'."
        raise _problem(f"needs a package that cannot be imported ({error})", shown, pip) from None
    except (SQLAlchemyError, ValueError, TypeError) as error:
        raise _problem(f"cannot be used: {error}", shown, cure) from None


def _connected(url: URL) -> Engine:
    ours = CONNECT[url.get_backend_name()]
    engine = create_engine(url, connect_args={name: ours[name] for name in ours.keys() - url.query.keys()})
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def settings(connection: Any, _: object) -> None:
            _write_ahead(connection)
            connection.execute("PRAGMA synchronous=NORMAL")

    return engine


def _write_ahead(connection: Any) -> None:
    """Let readers and a writer go on beside each other. SQLite does not wait here where others open a new file too."""
    for _ in range(WAIT_S * 100):
        with suppress(SQLiteError):
            connection.execute("PRAGMA journal_mode=WAL")
            return
        time.sleep(0.01)
    connection.execute("PRAGMA journal_mode=WAL")


def _problem(what: str, got: str, cure: str) -> ConfigError:
    return ConfigError([Problem("usage.url", what, got, cure)])
