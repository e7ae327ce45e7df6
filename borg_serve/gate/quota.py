"""How much a key may use: requests and tokens a minute, and requests at once.

It knows clocks and the `limits` library. It does not know the key file, nor what a request asks for.
"""

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
from borg_serve.gate.keys import Key

__all__ = ["Quota"]

logger = logging.getLogger(__name__)

CLOCK_STEP_S = 5.0
"""`limits` counts by the wall clock in memory: a step this large would keep a key out, or let it in, for as long."""


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

    def acquire(self, key: Key) -> None:
        """Take one of the key's slots; give it back with `release`. Raises ApiError 429 if all are taken."""
        if key.concurrent is not None and self._running[key.name] >= key.concurrent:
            raise _over(f"The key {key.name} has {key.concurrent} requests running, its limit.", 1)
        self._running[key.name] += 1

    def release(self, key: Key) -> None:
        """Give a slot back."""
        self._running[key.name] -= 1
        if not self._running[key.name]:
            del self._running[key.name]

    async def admit(self, key: Key) -> None:
        """Count one request against the key's minute. Raises ApiError, and counts nothing, if a limit is reached."""
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

    async def charge_tokens(self, key: Key, tokens: int) -> None:
        """Count what a request has cost. Past the limit, the key's next request is refused until a new minute."""
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


def _used_up(key: Key, limit: str, wait_s: float) -> ApiError:
    return _over(f"The key {key.name} has used its {limit} a minute.", max(1, math.floor(wait_s) + 1))


def _over(message: str, retry_after_s: int, status: int = 429, kind: str = "rate_limit_error") -> ApiError:
    headers = {"retry-after": str(retry_after_s)}
    return ApiError(status, message, kind, None, "rate_limit_exceeded", "quota", headers)
