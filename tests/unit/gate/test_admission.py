"""The queue before the engine: never too many, in order, and nothing lost when waiters leave."""

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from borg_serve.gate.admission import Admission, Busy


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def gauge(name: str) -> float:
    return REGISTRY.get_sample_value(name) or 0.0


# --------------------------------------------------------------------------------------------------- examples


async def test_admission_lets_in_up_to_its_places_and_queues_the_rest_in_order() -> None:
    admission = Admission(2, 5, 1000)
    order: list[int] = []

    async def request(number: int) -> None:
        await admission.acquire(1, 10)
        order.append(number)

    tasks = [asyncio.create_task(request(number)) for number in range(5)]
    await settle()
    assert (order, admission.running, admission.waiting) == ([0, 1], 2, 3)
    for expected in ([0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]):
        admission.release(1, 0.1)
        await settle()
        assert order == expected
    await asyncio.gather(*tasks)


async def test_admission_keeps_a_wide_request_at_the_head() -> None:
    admission = Admission(3, 5, 1000)
    await admission.acquire(2, 1)
    wide = asyncio.create_task(admission.acquire(3, 1))
    narrow = asyncio.create_task(admission.acquire(1, 1))
    await settle()
    assert not narrow.done(), "a later request must not pass an earlier one, even if it would fit"
    admission.release(2, 0.1)
    await settle()
    assert wide.done()
    assert not narrow.done()
    admission.release(3, 0.1)
    await narrow


async def test_admission_counts_a_request_wider_than_all_places_as_all() -> None:
    admission = Admission(2, 1, 1000)
    await admission.acquire(4, 1)
    assert admission.running == 2
    admission.release(4, 0.1)
    assert admission.running == 0


async def test_admission_refuses_when_the_queue_is_full() -> None:
    admission = Admission(1, 1, 1000)
    await admission.acquire(1, 1)
    admission.refuse_if_full()
    waiting = asyncio.create_task(admission.acquire(1, 1))
    await settle()
    with pytest.raises(Busy) as caught:
        await admission.acquire(1, 1)
    assert caught.value.retry_after_s >= 1
    with pytest.raises(Busy):
        admission.refuse_if_full()
    waiting.cancel()
    await settle()
    admission.refuse_if_full()


async def test_admission_refuses_more_bytes_than_may_wait_but_not_than_may_run() -> None:
    admission = Admission(1, 10, 100)
    await admission.acquire(1, 10_000)
    waiting = asyncio.create_task(admission.acquire(1, 60))
    await settle()
    with pytest.raises(Busy):
        await admission.acquire(1, 41)
    fits = asyncio.create_task(admission.acquire(1, 40))
    await settle()
    assert admission.waiting == 2
    waiting.cancel()
    await settle()
    with pytest.raises(Busy):
        await admission.acquire(1, 61)
    admission.release(1, 1)
    await fits
    assert admission.running == 1


async def test_admission_without_a_queue_refuses_at_once() -> None:
    admission = Admission(1, 0, 1000)
    await admission.acquire(1, 1)
    with pytest.raises(Busy):
        await admission.acquire(1, 1)
    with pytest.raises(Busy):
        admission.refuse_if_full()


async def test_admission_lets_narrower_ones_in_when_a_wide_head_leaves() -> None:
    admission = Admission(2, 5, 1000)
    await admission.acquire(1, 1)
    wide = asyncio.create_task(admission.acquire(2, 1))
    narrow = asyncio.create_task(admission.acquire(1, 1))
    await settle()
    assert not narrow.done()
    wide.cancel()
    await settle()
    assert narrow.done()


async def test_admission_gives_back_a_place_that_came_as_its_waiter_left() -> None:
    admission = Admission(1, 5, 1000)
    await admission.acquire(1, 1)
    leaving, staying = (asyncio.create_task(admission.acquire(1, 1)) for _ in range(2))
    await settle()
    admission.release(1, 0.1)  # the place is given to `leaving`, which has not run yet …
    leaving.cancel()  # … and leaves in the same instant
    await settle()
    assert leaving.cancelled()
    assert staying.done()
    assert admission.running == 1


async def test_admission_estimates_the_wait_from_how_long_requests_stay() -> None:
    admission = Admission(4, 100, 1000)
    assert admission.retry_after_s() == 1
    for _ in range(100):
        await admission.acquire(1, 1)
        admission.release(1, 20.0)
    assert admission.retry_after_s() == 5
    for _ in range(4):
        await admission.acquire(1, 1)
    waiters = [asyncio.create_task(admission.acquire(1, 1)) for _ in range(99)]
    await settle()
    assert admission.retry_after_s() == 60
    for waiter in waiters:
        waiter.cancel()
    await asyncio.gather(*waiters, return_exceptions=True)


async def test_admission_measures_the_wait_with_its_clock() -> None:
    now = 100.0
    admission = Admission(1, 1, 1000, clock=lambda: now)
    before, counted = gauge("borg_queue_seconds_sum"), gauge("borg_queue_seconds_count")
    await admission.acquire(1, 1)
    waiting = asyncio.create_task(admission.acquire(1, 1))
    await settle()
    now = 107.0
    admission.release(1, 1)
    await waiting
    assert gauge("borg_queue_seconds_sum") - before == pytest.approx(7)
    assert gauge("borg_queue_seconds_count") - counted == 2


# --------------------------------------------------------------------------------------------------- schedules


@dataclass
class Arrival:
    width: int
    size: int
    task: "asyncio.Task[None]"


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.integers(1, 5), st.integers(0, 60)),
        st.tuples(st.just("leave"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("finish"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("finish and leave"), st.integers(0, 9), st.integers(0, 9)),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 120), OPERATIONS)
def test_admission_holds_its_promises_on_any_schedule(
    concurrent: int, queued: int, queued_bytes: int, operations: list[tuple[str, int, int]]
) -> None:
    asyncio.run(schedule(concurrent, queued, queued_bytes, operations))


async def schedule(concurrent: int, queued: int, queued_bytes: int, operations: list[tuple[str, int, int]]) -> None:
    admission = Admission(concurrent, queued, queued_bytes)
    inflight, in_queue = gauge("borg_inflight"), gauge("borg_queued")
    waiting: list[Arrival] = []
    running: list[Arrival] = []

    def width(arrival: Arrival) -> int:
        return min(arrival.width, concurrent)

    async def check() -> None:
        await settle()
        # Whoever has come in must have been at the head: what is left is the tail of what was there.
        came = [arrival for arrival in waiting if arrival.task.done()]
        assert came == waiting[: len(came)]
        assert not any(arrival.task.exception() for arrival in came)
        running.extend(came)
        del waiting[: len(came)]
        assert admission.running == sum(map(width, running)) <= concurrent
        assert admission.waiting == len(waiting) <= queued
        assert sum(arrival.size for arrival in waiting) <= queued_bytes
        if waiting:
            assert admission.running + width(waiting[0]) > concurrent, "who fits must not wait"
        assert gauge("borg_inflight") - inflight == admission.running
        assert gauge("borg_queued") - in_queue == admission.waiting

    def finish(index: int) -> None:
        if index < len(running):
            admission.release(running.pop(index).width, 0.5)

    async def leave(index: int) -> None:
        if 0 <= index < len(waiting):
            leaving = waiting.pop(index)
            leaving.task.cancel()
            await asyncio.gather(leaving.task, return_exceptions=True)
            assert leaving.task.cancelled()

    for what, first, second in operations:
        if what == "arrive":
            fits = not waiting and admission.running + min(first, concurrent) <= concurrent
            room = len(waiting) < queued and sum(arrival.size for arrival in waiting) + second <= queued_bytes
            task = asyncio.create_task(admission.acquire(first, second))
            await settle()
            if fits or room:
                waiting.append(Arrival(first, second, task))
            else:
                assert isinstance(task.exception(), Busy)
        elif what == "leave":
            await leave(first)
        elif what == "finish":
            finish(first)
        else:
            finish(first)
            await leave(second)
        await check()
    while running or waiting:
        await leave(len(waiting) - 1)
        finish(0)
        await check()
    assert admission.running == 0
