"""What a key may use, by a clock that the tests turn."""

import asyncio
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from borg_serve.api.errors import ApiError
from borg_serve.errors import ConfigError
from borg_serve.gate.keys import Key
from borg_serve.gate.quota import Quota
from tests.quotas import refusal, retry_after_s


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def wall(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Both clocks, turned together: the wall's, by which `limits` counts, and the monotonic one."""
    clock = Clock(1_800_000_000.0)
    monkeypatch.setattr(time, "time", clock)
    started, real = clock.now, time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + clock.now - started)
    return clock


def full(quota: Quota, key: Key) -> ApiError | None:
    """The error of one more request at the same time, None if it may run."""
    try:
        quota.acquire(key)
    except ApiError as error:
        return error
    return None


async def admitted(quota: Quota, key: Key, times: int) -> list[bool]:
    return [await refusal(quota, key) is None for _ in range(times)]


async def test_quota_without_limits_admits_everything() -> None:
    quota, key = Quota(), Key("a")
    assert all(await admitted(quota, key, 100))
    await quota.charge_tokens(key, 10**9)
    assert await refusal(quota, key) is None


async def test_quota_refuses_past_the_requests_of_a_minute_and_says_when(wall: Clock) -> None:
    quota, key = Quota(), Key("a", requests_per_minute=3)
    assert await admitted(quota, key, 5) == [True, True, True, False, False]
    error = await refusal(quota, key)
    assert error is not None
    assert error.status == 429
    assert "a has used its 3 requests a minute" in error.message
    wall.now += retry_after_s(error)
    assert await refusal(quota, key) is None


@pytest.mark.parametrize("pause_s", [0, 7, 29.5, 45, 59.9])
async def test_quota_retry_after_is_enough_and_hardly_more(wall: Clock, pause_s: float) -> None:
    quota, key = Quota(), Key("a", requests_per_minute=5)
    for _ in range(40):
        wall.now += pause_s / 5
        while (error := await refusal(quota, key)) is None:
            pass
        wall.now += max(0, retry_after_s(error) - 1.01)
        assert await refusal(quota, key) is not None
        wall.now += 1.02
        assert await refusal(quota, key) is None


async def test_quota_never_admits_twice_the_limit_where_windows_meet(wall: Clock) -> None:
    quota, key = Quota(), Key("a", requests_per_minute=10)
    wall.now += 60 - wall.now % 60 - 1
    assert sum(await admitted(quota, key, 20)) == 10
    wall.now += 2
    # The last window's ten still weigh 58/60.
    assert sum(await admitted(quota, key, 20)) == 1


async def test_quota_counts_each_key_alone() -> None:
    quota = Quota()
    assert await admitted(quota, Key("a", requests_per_minute=1), 2) == [True, False]
    assert await admitted(quota, Key("b", requests_per_minute=1), 2) == [True, False]


async def test_quota_counts_a_burst_of_tasks_exactly() -> None:
    quota, key = Quota(), Key("a", requests_per_minute=10)
    errors = await asyncio.gather(*(refusal(quota, key) for _ in range(50)))
    assert errors.count(None) == 10


async def test_quota_tokens_past_the_limit_refuse_the_next_request_for_a_minute(wall: Clock) -> None:
    quota, key = Quota(), Key("a", tokens_per_minute=100)
    await quota.charge_tokens(key, 99)
    assert await refusal(quota, key) is None
    await quota.charge_tokens(key, 8000)
    error = await refusal(quota, key)
    assert error is not None
    assert "its 100 tokens a minute" in error.message
    wall.now += retry_after_s(error) - 1.01
    assert await refusal(quota, key) is not None
    wall.now += 1.02
    assert await refusal(quota, key) is None


async def test_quota_request_refused_for_its_tokens_is_not_counted(wall: Clock) -> None:
    quota, key = Quota(), Key("a", requests_per_minute=2, tokens_per_minute=10)
    await quota.charge_tokens(key, 10)
    assert await admitted(quota, key, 5) == [False] * 5
    wall.now += 61
    assert await admitted(quota, key, 3) == [True, True, False]


async def test_quota_charging_nothing_changes_nothing() -> None:
    quota, key = Quota(), Key("a", tokens_per_minute=1)
    await quota.charge_tokens(key, 0)
    await quota.charge_tokens(key, -5)
    assert await refusal(quota, key) is None


@pytest.mark.parametrize("step_s", [-86_400, -3_600, 86_400])
async def test_quota_survives_a_step_of_the_wall_clock(monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    quota, key = Quota(), Key("a", requests_per_minute=2, tokens_per_minute=10)
    await quota.charge_tokens(key, 10)
    assert await refusal(quota, key) is not None
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + step_s)
    assert await admitted(quota, key, 3) == [True, True, False]


async def test_quota_unreachable_storage_refuses_with_503(monkeypatch: pytest.MonkeyPatch) -> None:
    from limits.errors import StorageError

    quota, key = Quota(), Key("a", requests_per_minute=2, tokens_per_minute=10)

    async def fails(*_: object, **__: object) -> None:
        raise StorageError(OSError("down"))

    monkeypatch.setattr(quota._requests, "hit", fails)
    monkeypatch.setattr(quota._tokens, "hit", fails)
    await quota.charge_tokens(key, 5)
    error = await refusal(quota, key)
    assert error is not None
    assert (error.status, retry_after_s(error)) == (503, 5)


@pytest.mark.parametrize("uri", ["nowhere://x", "async+nowhere://x"])
def test_quota_refuses_a_storage_it_does_not_know(uri: str) -> None:
    with pytest.raises(ConfigError, match="quota storage: cannot be used"):
        Quota(uri)


def test_quota_takes_a_storage_with_and_without_the_async_prefix() -> None:
    Quota("memory://")
    Quota("async+memory://")


def test_quota_bounds_requests_running_at_once() -> None:
    quota, key = Quota(), Key("a", concurrent=2)
    assert full(quota, key) is None
    assert full(quota, key) is None
    error = full(quota, key)
    assert error is not None
    assert (error.status, retry_after_s(error)) == (429, 1)
    quota.release(key)
    assert full(quota, key) is None


def test_quota_slots_of_other_keys_are_their_own() -> None:
    quota = Quota()
    assert full(quota, Key("a", concurrent=1)) is None
    assert full(quota, Key("b", concurrent=1)) is None
    assert all(full(quota, Key("c")) is None for _ in range(100))


@settings(deadline=None)
@given(st.lists(st.booleans()))
def test_quota_slots_come_back_to_zero(takes: list[bool]) -> None:
    quota, key, held = Quota(), Key("a", concurrent=3), 0
    for take in takes:
        if take:
            refused = full(quota, key) is not None
            assert refused == (held == 3)
            held += not refused
        elif held:
            quota.release(key)
            held -= 1
    for _ in range(held):
        quota.release(key)
    assert not quota._running
