"""Writes what each request used to files on this machine, so that a killed process loses nothing it has written.

It knows files and their locks. It does not know the ledger that takes the files over.
"""

import errno
import fcntl
import json
import logging
import math
import os
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from uuid import uuid4

from pydantic import Field

from borg_serve.config import Usage
from borg_serve.errors import ConfigError, Problem
from borg_serve.metrics import USAGE_LOST
from borg_serve.paths import state_directory

__all__ = ["SUFFIX", "Entry", "Refusals", "Seldom", "Spool", "lock", "spool_folder", "waiting_bytes"]

logger = logging.getLogger(__name__)

SUFFIX = ".jsonl"
LOG_EVERY_S = 60.0

# What a reader takes: a database must be able to hold it and its sums.
Text = Annotated[str, Field(pattern=r"^[^\x00]+$")]
Count = Annotated[int, Field(ge=0, lt=1 << 40)]
Seconds = Annotated[float, Field(ge=0, lt=1e9)]
Time = Annotated[float, Field(ge=0, lt=2.5e11)]


@dataclass(frozen=True)
class Entry:
    """What one request used."""

    key: Text
    ended_s: Time
    """Unix time."""
    aborted: bool
    prompt_tokens: Count
    """Without the identity's."""
    identity_tokens: Count
    cached_tokens: Count
    """Of `prompt_tokens`."""
    output_tokens: Count
    engine_s: Seconds


@dataclass(frozen=True)
class Refusals:
    """How many requests of each key were refused since the last line of this kind."""

    ended_s: Time
    refused: dict[Text, Count]


class Spool:
    """Appends entries to a file of its own, a segment. One thread uses it.

    The writer holds a lock on its segment. A segment without a lock is complete: its writer has closed it or is dead.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """Make the folder. Raises ConfigError where that cannot be done.

        `limit_bytes`: what all segments of the folder may hold together.
        """
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._segment: int | None = None
        self._size = 0
        self._waiting = 0
        self._refused: Counter[str] = Counter()
        self._seldom = Seldom()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._waiting = waiting_bytes(folder)
        except OSError as error:
            what, cure = f"cannot be used: {error.strerror}", "Name a folder that the server may write to."
            raise ConfigError([Problem("usage.spool", what, str(folder), cure)]) from None

    def write(self, entry: Entry) -> None:
        """Keep an entry. It outlives this process from here on; where that fails, it is dropped, counted and logged."""
        self._append(vars(entry), 1)

    def refuse(self, key: str) -> None:
        """Count a refusal, in memory until `flush` or `rotate`."""
        self._refused[key] += 1

    def flush(self) -> None:
        """Write the refusals, and look how full the folder is."""
        with suppress(OSError):
            self._waiting = waiting_bytes(self._folder)
        if self._refused:
            self._append({"ended_s": time.time(), "refused": self._refused}, self._refused.total())
            self._refused = Counter()

    def rotate(self) -> None:
        """Write the refusals and hand the segment over, if there is one. The next entry begins another."""
        self.flush()
        if self._segment is not None:
            segment, self._segment, self._size = self._segment, None, 0
            with suppress(OSError):
                os.close(segment)

    def close(self) -> None:
        """Hand over what is left."""
        self.rotate()

    def _append(self, line: dict[str, object], requests: int) -> None:
        data = json.dumps(line).encode() + b"\n"
        try:
            if self._waiting + len(data) > self._limit_bytes:
                raise OSError(errno.EDQUOT, "usage.spool_bytes are waiting")
            if self._segment is None:
                self._segment = self._open()
            if os.write(self._segment, data) < len(data):
                os.ftruncate(self._segment, self._size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            USAGE_LOST.inc(requests)
            self._seldom.warn("usage of requests is lost: %s: %s", self._folder, error.strerror)
        else:
            self._size += len(data)
            self._waiting += len(data)

    def _open(self) -> int:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for _ in range(3):
            path = self._folder / f"{uuid4().hex}{SUFFIX}"
            segment = lock(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL)
            if segment is not None:  # else a drainer was quicker; it deletes the empty file
                return segment
        raise OSError(errno.EAGAIN, "the lock of a new segment was taken")


def lock(path: Path, flags: int) -> int | None:
    """Open and lock a segment; None if another holds it, or if it has gone. Closing it gives the lock back."""
    try:
        segment = os.open(path, flags, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(segment, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(segment), os.stat(path)):  # not deleted between its opening and the lock
            return segment
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(segment)
        raise
    os.close(segment)
    return None


def spool_folder(usage: Usage) -> Path:
    """Where entries wait."""
    return usage.spool or state_directory() / "usage"


def waiting_bytes(folder: Path) -> int:
    """How many bytes wait in a folder. Raises OSError where it cannot be read."""
    total = 0
    with os.scandir(folder) as files:
        for file in files:
            if file.name.endswith(SUFFIX):
                with suppress(FileNotFoundError):
                    total += file.stat().st_size
    return total


class Seldom:
    """Logs a warning once a minute at most."""

    def __init__(self) -> None:
        self._next_s = -math.inf

    def warn(self, message: str, *values: object, exc_info: bool = False) -> None:
        now = time.monotonic()
        if now >= self._next_s:
            self._next_s = now + LOG_EVERY_S
            logger.warning(message, *values, exc_info=exc_info)
