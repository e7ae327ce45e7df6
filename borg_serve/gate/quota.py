"""How much a key may use: requests and tokens a minute, requests at once, and tokens a day and month.

It knows clocks and the `limits` library. It does not know the key file, nor what a request asks for.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter
from typing import Any

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter, SlidingWindowCounterRateLimiter
from limits.errors import ConfigurationError, StorageError
from limits.storage import storage_from_string

from borg_serve.api.errors import ApiError
from borg_serve.errors import ConfigError, Problem
from borg_serve.gate.budgets import Budgets, duration
from borg_serve.gate.keys import Key

__all__ = ["Quota"]

logger = logging.getLogger(__name__)

CLOCK_STEP_S = 5.0
"""`limits` counts by the wall clock in memory: a step this large would keep a key out, or let it in, for as long."""


class Quota:
    """Requests and tokens a minute, requests at once, and budgets of tokens, by key.

    Requests are counted in a sliding window: constant memory, no double burst where windows meet, one atomic step in
    Redis. Tokens are known only afterwards and may pass the limit, which only the fixed window records: the library's
    other strategies drop a charge that does not fit, and its tokens would be free.

    `storage_uri` is the library's: in memory by default, `redis://…` for all replicas together. Concurrency is counted
    in this process.
    """

    def __init__(self, storage_uri: str = "async+memory://", budgets: Budgets | None = None) -> None:
        uri = storage_uri if storage_uri.startswith("async+") else f"async+{storage_uri}"
        try:
            self._storage: Any = storage_from_string(uri, wrap_exceptions=True, implementation="redispy")
        except ConfigurationError as error:
            cure = "Use async+memory:// or redis://host:port, with the package redis installed."
            raise ConfigError([Problem("quota storage", f"cannot be used: {error}", storage_uri, cure)]) from None
        self._requests = SlidingWindowCounterRateLimiter(self._storage)
        self._tokens = FixedWindowRateLimiter(self._storage)
        self.budgets = budgets
        self._running: Counter[str] = Counter()
        self._clock_offset = time.time() - time.monotonic()

    async def begin(self, key: Key) -> dict[str, str]:
        """Count a request of this key, until `end`; return headers that say what is left.

        Raises ApiError, and counts nothing, if a limit is reached.
        """
        if key.concurrent is not None and self._running[key.name] >= key.concurrent:
            raise _over(f"The key {key.name} has {key.concurrent} requests running, its limit.", 1)
        self._running[key.name] += 1
        try:
            if self.budgets is not None:
                self.budgets.check(key)
            await self._admit(key)
            return await self._left(key)
        except ApiError as error:
            self._release(key)
            if error.status == 429:
                error.headers = {**await self._left(key), **error.headers}
            raise
        except asyncio.CancelledError:
            self._release(key)
            raise

    async def end(self, key: Key, tokens: int) -> None:
        """The request is over and has cost so much. Past a limit, the key's next request is refused."""
        self._release(key)
        if self.budgets is not None:
            self.budgets.add(key, tokens)
        await self._charge(key, tokens)

    def _release(self, key: Key) -> None:
        self._running[key.name] -= 1
        if not self._running[key.name]:
            del self._running[key.name]

    async def _left(self, key: Key) -> dict[str, str]:
        """OpenAI's headers of the key's limits: of those in tokens, the one with the least left."""
        now = time.time()
        tokens = [] if self.budgets is None else self.budgets.left(key)
        found: dict[str, str] = {}
        with contextlib.suppress(StorageError):
            if (limit := key.requests_per_minute) is not None:
                item = RateLimitItemPerMinute(limit)
                reset_at, left = await self._requests.get_window_stats(item, "requests", key.name)
                found |= _headers("requests", limit, left, reset_at - now)
            if (limit := key.tokens_per_minute) is not None:
                item = RateLimitItemPerMinute(limit)
                reset_at, left = await self._tokens.get_window_stats(item, "tokens", key.name)
                tokens.append((left, limit, reset_at - now))
        if tokens:
            left, limit, reset_s = min(tokens)
            found |= _headers("tokens", limit, left, reset_s)
        return found

    async def _admit(self, key: Key) -> None:
        if key.requests_per_minute is None and key.tokens_per_minute is None:
            return
        try:
            await self._survive_clock_step()
            await self._check_tokens(key)
            await self._count_request(key)
        except StorageError:
            # Refuse: a storage that is down must not lift every key's limits.
            logger.exception("the quota storage failed")
            raise _over("The request limits cannot be checked now.", 5, 503, "server_error") from None

    async def _charge(self, key: Key, tokens: int) -> None:
        if key.tokens_per_minute is None or tokens <= 0:
            return
        try:
            await self._tokens.hit(RateLimitItemPerMinute(key.tokens_per_minute), "tokens", key.name, cost=tokens)
        except StorageError:
            logger.exception("the quota storage failed: %d tokens of the key %s are not counted", tokens, key.name)

    async def _check_tokens(self, key: Key) -> None:
        if key.tokens_per_minute is None:
            return
        item = RateLimitItemPerMinute(key.tokens_per_minute)
        if not await self._tokens.test(item, "tokens", key.name):
            reset_at, _ = await self._tokens.get_window_stats(item, "tokens", key.name)
            raise _used_up(key, f"{key.tokens_per_minute} tokens", reset_at - time.time())

    async def _count_request(self, key: Key) -> None:
        limit = key.requests_per_minute
        if limit is None or await self._requests.hit(item := RateLimitItemPerMinute(limit), "requests", key.name):
            return
        # The library's own reset time tells when the count falls by one, which may still be over the limit.
        window_s = item.get_expiry()
        before, before_ends_s, now, now_ends_s = await self._storage.get_sliding_window(
            item.key_for("requests", key.name), window_s
        )
        falls = now < limit and before
        wait_s = before_ends_s - (limit - now) * window_s / before if falls else now_ends_s - window_s
        raise _used_up(key, f"{limit} requests", wait_s)

    async def _survive_clock_step(self) -> None:
        """After a step of the wall clock, begin the counts anew: at worst one more minute's worth is let through."""
        offset = time.time() - time.monotonic()
        if abs(offset - self._clock_offset) > CLOCK_STEP_S and isinstance(self._storage, MemoryStorage):
            step_s, self._clock_offset = offset - self._clock_offset, offset
            logger.warning("the clock was set by %.0f s: request and token counts begin anew", step_s)
            await self._storage.reset()


def _headers(what: str, limit: int, left: int, reset_s: float) -> dict[str, str]:
    start = "x-ratelimit"
    return {
        f"{start}-limit-{what}": str(limit),
        f"{start}-remaining-{what}": str(max(0, left)),
        f"{start}-reset-{what}": duration(max(0.0, reset_s)),
    }


def _used_up(key: Key, limit: str, wait_s: float) -> ApiError:
    return _over(f"The key {key.name} has used its {limit} a minute.", max(1, math.floor(wait_s) + 1))


def _over(message: str, retry_after_s: int, status: int = 429, kind: str = "rate_limit_error") -> ApiError:
    headers = {"retry-after": str(retry_after_s)}
    return ApiError(status, message, kind, None, "rate_limit_exceeded", "quota", headers)
