"""API keys: who may call, and with which limits.

The key file holds SHA-256 digests, never a key. It knows files and clocks; nothing of HTTP nor of counting requests.
"""

import hashlib
import hmac
import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from borg_serve import validation
from borg_serve.errors import ConfigError, Problem
from borg_serve.yaml_file import RepeatedKeys, parse

__all__ = ["Key", "KeyRing", "new_key"]

logger = logging.getLogger(__name__)

CHECK_S = 1.0
"""How often the key file is looked at."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Limit = Annotated[int, Field(ge=1, le=10**12)]
Priority = Literal["interactive", "batch"]
BATCH = 16
"""How much less a key of priority `batch` gets than an interactive one: little, but never nothing."""


@dataclass(frozen=True)
class Key:
    """One caller, its share of the engine and its limits; None is no limit. Tokens are those behind the identity."""

    name: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    """Of the calendar, in UTC."""
    tokens_per_month: int | None = None
    concurrent: int | None = None
    weight: float = 1.0
    priority: Priority = "interactive"
    metrics: bool = False
    """Whether it may read `/metrics`, which tell of all keys."""

    @property
    def background(self) -> bool:
        """Whether nobody waits for its answers."""
        return self.priority == "batch"

    @property
    def share(self) -> float:
        """Its weight against other keys that want the engine at the same time."""
        return self.weight / BATCH if self.background else self.weight


class LimitsEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    tokens_per_day: Limit | None = None
    tokens_per_month: Limit | None = None
    concurrent: Limit | None = None


class Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Name
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    limits: LimitsEntry = LimitsEntry()
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    priority: Priority = "interactive"
    metrics: bool = False


ENTRIES = TypeAdapter(list[Entry])
CURES = {
    "name": "Use letters, digits, dots, dashes and underscores.",
    "sha256": "Put the 64 lower-case hexadecimal digits there that `borg-serve key new` printed.",
    "limits": "Use requests_per_minute, tokens_per_minute, tokens_per_day, tokens_per_month and concurrent, from 1 on.",
    "weight": "Use a number above 0; a key of weight 2 gets twice the share of one without it.",
    "priority": "Use interactive or batch.",
    "metrics": "Use true for a key that may read /metrics.",
}


def new_key(name: str, metrics: bool = False) -> tuple[str, str]:
    """Make a key: (the key, which is shown once; its entry for the key file, as YAML).

    `metrics`: whether it may read `/metrics`.

    Raises ConfigError for a name that the file could not hold.
    """
    key = "borg-" + secrets.token_urlsafe(32)
    entry: dict[str, Any] = {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest()}
    if metrics:
        entry["metrics"] = True
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
        clock: Callable[[], float] = time.monotonic,
        budgets: bool = True,
    ) -> None:
        """Read the file; later problems with it are logged. Raises ConfigError when it is missing or wrong.

        `budgets`: whether there is a ledger by which tokens of a day or month can be counted.
        """
        self._path = path
        self._clock = clock
        self._budgets = budgets
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
        try:
            seen = _signature(self._path.stat())
        except OSError:
            seen = None
        if seen == self._seen:
            return
        try:
            self._seen, self._entries = self._read()
        except ConfigError as error:
            self._seen = seen
            logger.error("the old API keys stay in use: %s", error)

    def _read(self) -> tuple[tuple[int, ...] | None, list[tuple[bytes, Key]]]:
        try:
            with self._path.open("rb") as file:
                # Of the open file, so that the signature belongs to the bytes that were read.
                seen = _signature(os.fstat(file.fileno()))
                data = parse(file)  # not its text: an error would quote the line, which may hold a key
        except OSError as error:
            raise self._error(f"cannot be read: {error.strerror}", str(self._path), "Name a key file.") from None
        except RepeatedKeys as error:  # nor the name of what is there twice
            what, lines = "must have each key of an entry once", "; ".join(lines for _, lines in error.found)
            raise self._error(what, lines, "Remove one of them.") from None
        except yaml.YAMLError as error:
            what = f"is not YAML: {' '.join(str(error).split())[:200]}"
            raise self._error(what, str(self._path), "Correct that line.") from None
        if not isinstance(data, list):
            cure = "Append what `borg-serve key new` prints; `[]` admits nobody."
            raise self._error("must be a list of keys", _hidden(data), cure)
        try:
            entries = ENTRIES.validate_python(data)
        except ValidationError as error:
            raise ConfigError([self._problem(detail, data) for detail in error.errors()]) from None
        for field in ("name", "sha256"):
            value, count = Counter(getattr(entry, field) for entry in entries).most_common(1)[0] if entries else ("", 0)
            if count > 1:
                raise self._error(f"must have each {field} once", value, "Remove one of the entries.")
        keys = [self._key(number, entry) for number, entry in enumerate(entries, 1)]
        return seen, [(bytes.fromhex(entry.sha256), key) for entry, key in zip(entries, keys, strict=True)]

    def _key(self, number: int, entry: Entry) -> Key:
        key = Key(
            entry.name, **entry.limits.model_dump(), weight=entry.weight, priority=entry.priority, metrics=entry.metrics
        )
        if not self._budgets and (key.tokens_per_day or key.tokens_per_month):
            where = f"{self._path}: entry {number} ({entry.name}).limits"
            cure = "Set usage.url in the profile: budgets are counted by the ledger."
            raise ConfigError([Problem(where, "has a budget of a day or month, which needs a ledger", None, cure)])
        return key

    def _problem(self, detail: ErrorDetails, data: list[Any]) -> Problem:
        index, *rest = detail["loc"]
        entry = data[int(index)] if isinstance(data[int(index)], dict) else {}
        where = ".".join([f"{self._path}: entry {int(index) + 1}", *map(str, rest)])
        if isinstance(entry.get("name"), str) and rest:
            where += f" ({entry['name'][:64]})"
        # A key pasted in clear, anywhere, must not end up in a log.
        got = (
            detail["input"]
            if rest and rest[0] in ("name", "limits", "weight", "priority", "metrics")
            else _hidden(detail["input"])
        )
        what = "unknown key" if detail["type"] == "extra_forbidden" else validation.sentence(detail)
        cure = CURES.get(str(rest[0]), "Remove it.") if rest else "Append what `borg-serve key new` prints."
        return Problem(where, what, got, cure)

    def _error(self, what: str, got: object, cure: str) -> ConfigError:
        return ConfigError([Problem(str(self._path), what, got, cure)])


def _hidden(value: object) -> str | None:
    """What kind of value it is, and how long."""
    if isinstance(value, str | list | dict):
        kind = {"str": "text", "list": "a list", "dict": "a mapping"}[type(value).__name__]
        return f"{kind} of length {len(value)}"
    return None if value is None else "a number"


def _signature(status: os.stat_result) -> tuple[int, ...]:
    return status.st_mtime_ns, status.st_size, status.st_ino
