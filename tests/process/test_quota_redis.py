"""Limits that hold over several replicas: one real Redis, several quotas."""

import signal

from borg_serve.gate.keys import Key
from borg_serve.gate.quota import Quota
from tests.conftest import Redis
from tests.quotas import refusal, retry_after_s
from tests.waiting import await_room_in_the_minute


async def test_quota_of_replicas_is_counted_together(redis: Redis) -> None:
    await_room_in_the_minute()
    first, second = (Quota(f"redis://{redis.address}") for _ in range(2))
    key = Key("shared", requests_per_minute=3)
    errors = [await refusal(quota, key) for quota in (first, second, first, second, first)]
    assert [error is None for error in errors] == [True, True, True, False, False]
    assert errors[-1] is not None
    assert errors[-1].status == 429
    assert 1 <= retry_after_s(errors[-1]) <= 120


async def test_quota_of_replicas_counts_tokens_together(redis: Redis) -> None:
    await_room_in_the_minute()
    first, second = (Quota(f"redis://{redis.address}") for _ in range(2))
    key = Key("spender", tokens_per_minute=10)
    assert await refusal(second, key) is None
    assert await refusal(first, key, 4000) is None
    error = await refusal(second, key)
    assert error is not None
    assert "its 10 tokens a minute" in error.message


async def test_quota_stays_closed_while_its_redis_is_away(redis: Redis) -> None:
    quota, key = Quota(f"redis://{redis.address}"), Key("waiting", requests_per_minute=5)
    assert await refusal(quota, key) is None
    redis.process.send_signal(signal.SIGSTOP)
    try:
        error = await refusal(quota, key)
    finally:
        redis.process.send_signal(signal.SIGCONT)
    assert error is not None
    assert error.status == 503
    assert await refusal(quota, key) is None
