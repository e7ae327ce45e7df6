"""What a key may use, by a clock that the tests turn."""

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from borg_serve.api.errors import ApiError
from borg_serve.errors import ConfigError
from borg_serve.gate.budgets import Budgets, duration
from borg_serve.gate.keys import Key
from borg_serve.gate.quota import Quota
from borg_serve.usage.ledger import LedgerAway
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


async def full(quota: Quota, key: Key) -> ApiError | None:
    """The error of one more request at the same time, None if it may run."""
    try:
        await quota.begin(key)
    except ApiError as error:
        return error
    return None


async def charge(quota: Quota, key: Key, tokens: int) -> None:
    """Another request of the key, which no limit of requests counts, costs so much."""
    quota._running[key.name] += 1
    await quota.end(key, tokens)


async def admitted(quota: Quota, key: Key, times: int) -> list[bool]:
    return [await refusal(quota, key) is None for _ in range(times)]


async def test_quota_without_limits_admits_everything() -> None:
    quota, key = Quota(), Key("a")
    assert all(await admitted(quota, key, 100))
    await charge(quota, key, 10**9)
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
    await charge(quota, key, 99)
    assert await refusal(quota, key) is None
    await charge(quota, key, 8000)
    error = await refusal(quota, key)
    assert error is not None
    assert "its 100 tokens a minute" in error.message
    wall.now += retry_after_s(error) - 1.01
    assert await refusal(quota, key) is not None
    wall.now += 1.02
    assert await refusal(quota, key) is None


async def test_quota_request_refused_for_its_tokens_is_not_counted(wall: Clock) -> None:
    quota, key = Quota(), Key("a", requests_per_minute=2, tokens_per_minute=10)
    await charge(quota, key, 10)
    assert await admitted(quota, key, 5) == [False] * 5
    wall.now += 61
    assert await admitted(quota, key, 3) == [True, True, False]


async def test_quota_charging_nothing_changes_nothing() -> None:
    quota, key = Quota(), Key("a", tokens_per_minute=1)
    await charge(quota, key, 0)
    await charge(quota, key, -5)
    assert await refusal(quota, key) is None


@pytest.mark.parametrize("step_s", [-86_400, -3_600, 86_400])
async def test_quota_survives_a_step_of_the_wall_clock(monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    quota, key = Quota(), Key("a", requests_per_minute=2, tokens_per_minute=10)
    await charge(quota, key, 10)
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
    await charge(quota, key, 5)
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


async def test_quota_bounds_requests_running_at_once() -> None:
    quota, key = Quota(), Key("a", concurrent=2)
    assert await full(quota, key) is None
    assert await full(quota, key) is None
    error = await full(quota, key)
    assert error is not None
    assert (error.status, retry_after_s(error)) == (429, 1)
    await quota.end(key, 0)
    assert await full(quota, key) is None


async def test_quota_bounds_requests_that_come_at_the_same_instant() -> None:
    quota, key = Quota(), Key("a", concurrent=2, requests_per_minute=100)
    errors = await asyncio.gather(*(full(quota, key) for _ in range(9)))
    assert errors.count(None) == 2


async def test_quota_slots_of_other_keys_are_their_own() -> None:
    quota = Quota()
    assert await full(quota, Key("a", concurrent=1)) is None
    assert await full(quota, Key("b", concurrent=1)) is None
    assert all([await full(quota, Key("c")) is None for _ in range(100)])


@settings(deadline=None)
@given(st.lists(st.booleans()))
def test_quota_slots_come_back_to_zero(takes: list[bool]) -> None:
    asyncio.run(take_and_give_back(takes))


async def take_and_give_back(takes: list[bool]) -> None:
    quota, key, held = Quota(), Key("a", concurrent=3), 0
    for take in takes:
        if take:
            refused = await full(quota, key) is not None
            assert refused == (held == 3)
            held += not refused
        elif held:
            await quota.end(key, 1)
            held -= 1
    for _ in range(held):
        await quota.end(key, 1)
    assert not quota._running


# ----------------------------------------------------------------------------------------------- headers and budgets


async def test_quota_tells_what_is_left_in_openais_headers(wall: Clock) -> None:
    quota, key = Quota(), Key("a", requests_per_minute=3, tokens_per_minute=100)
    wall.now += 60 - wall.now % 60
    left = await quota.begin(key)
    assert left["x-ratelimit-limit-requests"] == "3"
    assert left["x-ratelimit-remaining-requests"] == "2"
    assert left["x-ratelimit-limit-tokens"] == left["x-ratelimit-remaining-tokens"] == "100"
    await quota.end(key, 60)
    left = await quota.begin(key)
    assert (left["x-ratelimit-remaining-requests"], left["x-ratelimit-remaining-tokens"]) == ("1", "40")
    assert left["x-ratelimit-reset-tokens"] in ("1m0s", "60s", "59s")
    await quota.end(key, 60)
    error = await full(quota, key)
    assert error is not None
    assert error.headers["x-ratelimit-remaining-tokens"] == "0"
    assert await Quota().begin(Key("free")) == {}


def rows(*used: tuple[str, str, int]) -> Callable[..., list[dict[str, Any]]]:
    """A ledger that says so: (key, day, tokens)."""
    found: list[dict[str, Any]] = [
        {"key": key, "day": day, "prompt_tokens": tokens // 2, "output_tokens": tokens - tokens // 2}
        for key, day, tokens in used
    ]
    return lambda since, until, by: [row for row in found if row["day"] >= f"{since:%Y-%m-%d}"]


async def test_budget_of_a_day_and_a_month_is_by_the_calendar() -> None:
    now = datetime(2026, 11, 29, 23, 0, tzinfo=UTC)
    budgets = Budgets(lambda: now)
    key = Key("a", tokens_per_day=100, tokens_per_month=250)
    await budgets.refresh(rows(("a", "2026-10-31", 10**6), ("a", "2026-11-28", 90), ("a", "2026-11-29", 60)))
    assert budgets.left(key) == [(40, 100, 3600), (100, 250, 25 * 3600)]
    quota = Quota(budgets=budgets)
    assert (await quota.begin(key))["x-ratelimit-remaining-tokens"] == "40"
    await quota.end(key, 41)
    error = await full(quota, key)
    assert error is not None
    assert (error.status, error.code, error.type) == (429, "insufficient_quota", "insufficient_quota")
    assert "2026-11-30T00:00Z" in error.message
    assert error.headers["x-should-retry"] == "false"
    assert error.headers["x-ratelimit-reset-tokens"] == "1h0m0s"
    now += timedelta(hours=2)
    assert (await quota.begin(key))["x-ratelimit-limit-tokens"] == "250", "the month has less left than the new day"
    await quota.end(key, 60)
    error = await full(quota, key)
    assert error is not None
    assert "2026-12-01T00:00Z" in error.message
    now += timedelta(days=1)
    assert await full(quota, key) is None, "another month"


async def test_budget_counts_what_the_ledger_has_not_yet() -> None:
    now = datetime(2026, 11, 29, tzinfo=UTC)
    budgets, key = Budgets(lambda: now), Key("a", tokens_per_day=100)
    day = "2026-11-29"
    budgets.add(key, 30)
    await budgets.refresh(rows())
    assert budgets.left(key)[0][0] == 70, "it may not have been in the sums"
    budgets.add(key, 10)
    await budgets.refresh(rows(("a", day, 30)))
    assert budgets.left(key)[0][0] == 60

    def away(*_: object) -> list[dict[str, Any]]:
        raise LedgerAway

    budgets.add(key, 20)
    for _ in range(5):
        with pytest.raises(LedgerAway):
            await budgets.refresh(away)
    assert budgets.left(key)[0][0] == 40, "a ledger that is away forgets nothing"
    for _ in range(2):
        await budgets.refresh(rows(("a", day, 60)))
    assert budgets.left(key)[0][0] == 40


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0004, "1ms"), (0.25, "250ms"), (1, "1s"), (59.2, "1m0s"), (360, "6m0s"), (95_650, "26h34m10s")],
)
def test_duration_is_written_as_openai_writes_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text
