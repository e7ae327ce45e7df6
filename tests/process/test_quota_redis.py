"""Limits that hold over several replicas: one real Redis, several quotas."""

import signal

from borg_serve.keys import Key, Quota
from tests.conftest import Redis
from tests.waiting import await_room_in_the_minute


async def test_quota_of_replicas_is_counted_together(redis: Redis) -> None:
    await_room_in_the_minute()
    first, second = (Quota(f"redis://{redis.address}") for _ in range(2))
    key = Key("shared", requests_per_minute=3)
    refusals = [await quota.admit(key) for quota in (first, second, first, second, first)]
    assert [refusal is None for refusal in refusals] == [True, True, True, False, False]
    assert refusals[-1] is not None
    assert refusals[-1].status == 429
    assert 1 <= refusals[-1].retry_after_s <= 120


async def test_quota_of_replicas_counts_tokens_together(redis: Redis) -> None:
    first, second = (Quota(f"redis://{redis.address}") for _ in range(2))
    key = Key("spender", tokens_per_minute=10)
    assert await second.admit(key) is None
    await first.charge_tokens(key, 4000)
    refusal = await second.admit(key)
    assert refusal is not None
    assert "its 10 tokens a minute" in refusal.message


async def test_quota_stays_closed_while_its_redis_is_away(redis: Redis) -> None:
    quota, key = Quota(f"redis://{redis.address}"), Key("waiting", requests_per_minute=5)
    assert await quota.admit(key) is None
    redis.process.send_signal(signal.SIGSTOP)
    try:
        refusal = await quota.admit(key)
    finally:
        redis.process.send_signal(signal.SIGCONT)
    assert refusal is not None
    assert refusal.status == 503
    assert await quota.admit(key) is None
