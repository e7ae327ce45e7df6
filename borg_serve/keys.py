"""API keys: who may call, how often and how much.

A key file holds SHA-256 digests, never a key. Knows files, clocks and the `limits` library; nothing of HTTP.
"""

import hashlib
import hmac
import logging
import math
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter, SlidingWindowCounterRateLimiter
from limits.errors import ConfigurationError, StorageError
from limits.storage import storage_from_string
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from borg_serve.errors import ConfigError, Problem

__all__ = ["Key", "KeyRing", "Quota", "Refusal", "new_key"]

logger = logging.getLogger(__name__)

CHECK_S = 1.0
"""How often the key file is looked at."""
CLOCK_STEP_S = 5.0
"""`limits` counts by the wall clock in memory: a step this large would keep a key out, or let it in, for as long."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Limit = Annotated[int, Field(ge=1, le=10**12)]


@dataclass(frozen=True)
class Key:
    """One caller and its limits; None is no limit."""

    name: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None


class LimitsEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrent: Limit | None = None


class Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Name
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    limits: LimitsEntry = LimitsEntry()


ENTRIES = TypeAdapter(list[Entry])
CURES = {
    "name": "Use letters, digits, dots, dashes and underscores.",
    "sha256": "Put the 64 lower-case hexadecimal digits there that `borg-serve key new` printed.",
    "limits": "Use requests_per_minute, tokens_per_minute and concurrent, each a number from 1 on.",
}


def new_key(name: str) -> tuple[str, str]:
    """Make a key: (the key, which is shown once; its entry for the key file, as YAML).

    Raises ConfigError for a name that the file could not hold.
    """
    key = "borg-" + secrets.token_urlsafe(32)
    entry = {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest()}
    try:
        ENTRIES.validate_python([entry])
    except ValidationError:
        raise ConfigError([Problem("key name", "cannot be used", name, CURES["name"])]) from None
    return key, yaml.safe_dump([entry], sort_keys=False)


class KeyRing:
    """The keys of a file, read again when it changes. A file that breaks later changes nothing: the old keys stay."""

    def __init__(
        self,
        path: Path,
        on_problem: Callable[[ConfigError], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        share: int = 1,
    ) -> None:
        """Read the file; later problems with it go to `on_problem`, or the log.

        `share`: how many processes count for themselves; each allows its part of every limit, one at least.

        Raises ConfigError when it is missing or wrong.
        """
        self._path = path
        self._on_problem = on_problem or self._log
        self._clock = clock
        self._share = share
        self._checked_at = clock()
        self._seen, self._entries = self._read()

    def lookup(self, bearer: str) -> Key | None:
        """Return the key's owner, or None. Every entry is compared, so that time tells nothing."""
        self._refresh()
        digest = hashlib.sha256(bearer.encode(errors="surrogatepass")).digest()
        found: Key | None = None
        for expected, key in self._entries:
            if hmac.compare_digest(expected, digest):
                found = key
        return found

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._checked_at < CHECK_S:
            return
        self._checked_at = now
        seen = _signature(self._path)
        if seen == self._seen:
            return
        try:
            self._seen, self._entries = self._read()
        except ConfigError as error:
            self._seen = seen
            self._on_problem(error)

    def _read(self) -> tuple[tuple[int, ...] | None, list[tuple[bytes, Key]]]:
        try:
            with self._path.open("rb") as file:
                # Of the open file, so that the signature belongs to the bytes that were read.
                seen = _stat(os.fstat(file.fileno()))
                data = yaml.safe_load(file)  # not its text: an error would quote the line, which may hold a key
        except OSError as error:
            raise self._error(f"cannot be read: {error.strerror}", str(self._path), "Name a key file.") from None
        except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
            what = f"is not YAML: {' '.join(str(error).split())[:200]}"
            raise self._error(what, str(self._path), "Correct that line.") from None
        if not isinstance(data, list):
            cure = "Append what `borg-serve key new` prints; `[]` admits nobody."
            raise self._error("must be a list of keys", type(data).__name__, cure)
        try:
            entries = ENTRIES.validate_python(data)
        except ValidationError as error:
            raise ConfigError([self._problem(dict(detail), data) for detail in error.errors()]) from None
        for field in ("name", "sha256"):
            value, count = Counter(getattr(entry, field) for entry in entries).most_common(1)[0] if entries else ("", 0)
            if count > 1:
                raise self._error(f"must have each {field} once", value, "Remove one of the entries.")
        return seen, [(bytes.fromhex(entry.sha256), self._key(entry)) for entry in entries]

    def _key(self, entry: Entry) -> Key:
        limits = {name: limit and max(1, limit // self._share) for name, limit in entry.limits.model_dump().items()}
        return Key(entry.name, **limits)

    def _problem(self, detail: dict[str, Any], data: list[Any]) -> Problem:
        index, *rest = detail["loc"] or (0,)
        entry = data[index] if isinstance(data[index], dict) else {}
        where = ".".join([f"{self._path}: entry {index + 1}", *map(str, rest)])
        if isinstance(entry.get("name"), str) and rest:
            where += f" ({entry['name'][:64]})"
        # A key pasted in clear, anywhere, must not end up in a log.
        got = detail["input"] if rest and rest[0] in ("name", "limits") else _hidden(detail["input"])
        what = "unknown key" if detail["type"] == "extra_forbidden" else detail["msg"][0].lower() + detail["msg"][1:]
        cure = CURES.get(str(rest[0]), "Remove it.") if rest else "Append what `borg-serve key new` prints."
        return Problem(where, what, got, cure)

    def _error(self, what: str, got: object, cure: str) -> ConfigError:
        return ConfigError([Problem(str(self._path), what, got, cure)])

    @staticmethod
    def _log(error: ConfigError) -> None:
        logger.error("the old API keys stay in use: %s", error)


def _hidden(value: object) -> str:
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, str | list | dict) else type(value).__name__


def _stat(status: os.stat_result) -> tuple[int, ...]:
    return status.st_mtime_ns, status.st_size, status.st_ino


def _signature(path: Path) -> tuple[int, ...] | None:
    try:
        return _stat(path.stat())
    except OSError:
        return None


# ---------------------------------------------------------------------------------------------------- quotas


@dataclass(frozen=True)
class Refusal:
    """Why a key must wait, and for how long."""

    status: int
    message: str
    retry_after_s: int


class Quota:
    """Requests and tokens a minute and requests at once, by key.

    Requests are counted in a sliding window: constant memory, no double burst where windows meet, one atomic step in
    Redis. Tokens are known only afterwards and may pass the limit, which only the fixed window records: the library's
    other strategies drop a charge that does not fit, and its tokens would be free.

    `storage_uri` is the library's: in memory by default, `redis://…` for all replicas together. Concurrency is counted
    in this process.
    """

    def __init__(self, storage_uri: str = "async+memory://") -> None:
        uri = storage_uri if storage_uri.startswith("async+") else f"async+{storage_uri}"
        try:
            self._storage: Any = storage_from_string(uri, wrap_exceptions=True, implementation="redispy")
        except ConfigurationError as error:
            cure = "Use async+memory:// or redis://host:port, with the package redis installed."
            raise ConfigError([Problem("quota storage", f"cannot be used: {error}", storage_uri, cure)]) from None
        self._requests = SlidingWindowCounterRateLimiter(self._storage)
        self._tokens = FixedWindowRateLimiter(self._storage)
        self._running: Counter[str] = Counter()
        self._clock_offset = time.time() - time.monotonic()

    def acquire(self, key: Key) -> Refusal | None:
        """Take one of the key's places; give it back with `release`, unless refused."""
        if key.concurrent is not None and self._running[key.name] >= key.concurrent:
            return Refusal(429, f"The key {key.name} has {key.concurrent} requests running, its limit.", 1)
        self._running[key.name] += 1
        return None

    def release(self, key: Key) -> None:
        """Give a place back."""
        self._running[key.name] -= 1
        if not self._running[key.name]:
            del self._running[key.name]

    async def admit(self, key: Key) -> Refusal | None:
        """Count one request against the key's minute; a refused one does not count."""
        if key.requests_per_minute is None and key.tokens_per_minute is None:
            return None
        try:
            await self._survive_clock_step()
            return await self._tokens_left(key) or await self._count_request(key)
        except StorageError:
            # Closed rather than open: a store that is down must not lift everybody's limits.
            logger.exception("the quota storage failed")
            return Refusal(503, "The request limits cannot be checked now.", 5)

    async def charge_tokens(self, key: Key, tokens: int) -> None:
        """Count what a request has cost. Past the limit, the key's next request is refused until a new minute."""
        if key.tokens_per_minute is None or tokens <= 0:
            return
        try:
            await self._tokens.hit(RateLimitItemPerMinute(key.tokens_per_minute), "tokens", key.name, cost=tokens)
        except StorageError:
            logger.exception("the quota storage failed: %d tokens of the key %s are not counted", tokens, key.name)

    async def _tokens_left(self, key: Key) -> Refusal | None:
        if key.tokens_per_minute is None:
            return None
        item = RateLimitItemPerMinute(key.tokens_per_minute)
        if await self._tokens.test(item, "tokens", key.name):
            return None
        reset_at, _ = await self._tokens.get_window_stats(item, "tokens", key.name)
        return _refusal(key, f"{key.tokens_per_minute} tokens", reset_at - time.time())

    async def _count_request(self, key: Key) -> Refusal | None:
        limit = key.requests_per_minute
        if limit is None or await self._requests.hit(item := RateLimitItemPerMinute(limit), "requests", key.name):
            return None
        # The library's own reset time tells when the count falls by one, which may still be over the limit.
        window_s = item.get_expiry()
        before, before_ends_s, now, now_ends_s = await self._storage.get_sliding_window(
            item.key_for("requests", key.name), window_s
        )
        falls = now < limit and before
        wait_s = before_ends_s - (limit - now) * window_s / before if falls else now_ends_s - window_s
        return _refusal(key, f"{limit} requests", wait_s)

    async def _survive_clock_step(self) -> None:
        """After a step of the wall clock, begin the counts anew: at worst one more minute's worth is let through."""
        offset = time.time() - time.monotonic()
        if abs(offset - self._clock_offset) > CLOCK_STEP_S and isinstance(self._storage, MemoryStorage):
            logger.warning(
                "the clock was set by %.0f s: request and token counts begin anew", offset - self._clock_offset
            )
            self._clock_offset = offset
            await self._storage.reset()


def _refusal(key: Key, limit: str, wait_s: float) -> Refusal:
    return Refusal(429, f"The key {key.name} has used its {limit} a minute.", max(1, math.floor(wait_s) + 1))
