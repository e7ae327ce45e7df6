"""Keys' budgets: tokens of a calendar day and month in UTC, by the usage ledger.

It knows dates and what keys have used; nothing of how that is stored.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from borg_serve.api.errors import ApiError
from borg_serve.gate.keys import Key

__all__ = ["Budgets", "duration"]

Sums = Callable[[datetime, None, Sequence[str]], Iterable[Mapping[str, Any]]]
"""(since, None, groups) -> rows with the groups, prompt_tokens and output_tokens. A day is written 2026-11-30."""
Days = dict[str, Counter[str]]
"""Key -> day -> tokens."""


class Budgets:
    """What keys have used: the ledger's sums of this month, and what has ended since.

    What ended in the last two periods of `refresh` may be counted twice, and never not at all. `clock` is the time now.
    """

    def __init__(self, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._clock = clock
        self._sums: Days = {}
        self._before: Days = {}
        """What ended between the last two calls of `refresh`."""
        self._since: Days = {}

    def add(self, key: Key, tokens: int) -> None:
        """A request of the key has ended, and cost so much."""
        self._since.setdefault(key.name, Counter())[f"{self._clock():%Y-%m-%d}"] += tokens

    async def refresh(self, sums: Sums) -> None:
        """Take the ledger's sums, in a thread. If that raises, all that was added still counts."""
        now = self._clock()
        month = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        rows = await asyncio.to_thread(sums, month, None, ("key", "day"))
        self._sums = {}
        for row in rows:
            self._sums.setdefault(row["key"], Counter())[row["day"]] += row["prompt_tokens"] + row["output_tokens"]
        self._before, self._since = self._since, {}

    def check(self, key: Key) -> None:
        """Raise ApiError 429 `insufficient_quota` if a budget of the key is used up."""
        over = [(reset_s, limit) for left, limit, reset_s in self.left(key) if left <= 0]
        if not over:
            return
        reset_s, limit = max(over)
        resets = self._clock() + timedelta(seconds=reset_s)
        what = f"The key {key.name} has used its budget of {limit} tokens. It is renewed at {resets:%Y-%m-%dT%H:%MZ}."
        headers = {"retry-after": str(math.ceil(reset_s)), "x-should-retry": "false"}
        raise ApiError(429, what, "insufficient_quota", None, "insufficient_quota", "budget", headers)

    def left(self, key: Key) -> list[tuple[int, int, float]]:
        """(tokens left, limit, seconds until it is renewed) of each budget that the key has."""
        now = self._clock()
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        tomorrow = midnight + timedelta(days=1)
        next_month = (midnight.replace(day=1) + timedelta(days=32)).replace(day=1)
        found = []
        budgets = ((key.tokens_per_day, "%Y-%m-%d", tomorrow), (key.tokens_per_month, "%Y-%m", next_month))
        for limit, start, end in budgets:
            if limit is not None:
                used = self._used(key.name, now.strftime(start))
                found.append((limit - used, limit, (end - now).total_seconds()))
        return found

    def _used(self, name: str, period: str) -> int:
        days = (counts[name] for counts in (self._sums, self._before, self._since) if name in counts)
        return sum(tokens for used in days for day, tokens in used.items() if day.startswith(period))


def duration(seconds: float) -> str:
    """Write a duration as OpenAI's headers do: 6m0s, 26h3m10s, 250ms."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{rest}s"
