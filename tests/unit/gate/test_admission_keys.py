"""Slots among keys: whose turn it is, who is refused, and what holds on any schedule."""

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from borg_serve.gate.admission import Admission, Busy, Demand, Grant
from borg_serve.gate.keys import Key
from borg_serve.gate.telemetry import Spent
from tests.admissions import BATCH, FLOOD, ONE, OTHER, OVER, asking, leaving, settle
from tests.asgi import slots


async def test_admission_serves_first_who_has_had_least() -> None:
    admission = Admission(slots(2), 10**6)
    held = [await admission.acquire(FLOOD, ONE) for _ in range(2)]
    flood = [asking(admission, FLOOD) for _ in range(30)]
    await settle()
    other = asking(admission, OTHER)
    await settle()
    admission.release(held.pop(), OVER)
    await settle()
    assert other.done()
    assert not flood[0].done()
    await leaving(*flood)


async def test_admission_refuses_who_floods_and_nobody_else() -> None:
    admission = Admission(slots(2), max_wait_s=5)
    for _ in range(10):
        admission.release(await admission.acquire(FLOOD, ONE), Spent(4, 0, 0, 100, engine_s=2.0))
    for _ in range(2):
        await admission.acquire(FLOOD, ONE)
    flood = [asking(admission, FLOOD) for _ in range(40)]
    await settle()
    refused = [task for task in flood if task.done()]
    assert len(refused) == 35
    assert all(isinstance(task.exception(), Busy) for task in refused)
    admission.refuse_if_late(OTHER)
    with pytest.raises(Busy):
        admission.refuse_if_late(FLOOD)
    other = asking(admission, OTHER)
    await settle()
    assert not other.done(), "it waits for the next slot"
    await leaving(other, *flood)


async def test_admission_reserves_slots_for_keys_that_have_less_than_their_share() -> None:
    admission = Admission(slots(4, reserved=2), 60)
    held = [await admission.acquire(FLOOD, ONE) for _ in range(4)]
    assert {grant.priority for grant in held} == {0}, "alone it has no more than its share"
    flood = asking(admission, FLOOD)
    night = asking(admission, BATCH)
    await settle()
    assert not flood.done(), "one key takes what there is, and nothing of the reserve"
    assert not night.done(), "nobody waits for a batch"
    heavy = Key("heavy", weight=2.0)
    first = await admission.acquire(heavy, ONE)
    second = await admission.acquire(heavy, ONE)
    assert first.reserved
    assert (first.priority, second.priority) == (0, 0)
    third = asking(admission, heavy)
    await settle()
    assert not third.done()
    assert admission.running == 6
    admission.release(first, OVER)
    await settle()
    assert third.done(), "two of four slots are less than two thirds of them"
    assert admission.running == 6
    admission.release(second, OVER)
    for grant in held:
        admission.release(grant, OVER)
    await settle()
    assert night.result().priority == 2
    assert flood.result().priority == 1, "others were running yet"


async def test_admission_gives_a_batch_a_little_and_never_nothing() -> None:
    admission = Admission(slots(1), 10**9)
    grant = await admission.acquire(None, ONE)
    served: list[str] = []

    async def user(key: Key) -> None:
        while len(served) < 400:
            mine = await admission.acquire(key, ONE)
            served.append(key.name)
            await asyncio.sleep(0)
            admission.release(mine, OVER)

    users = [asyncio.create_task(user(key)) for key in (OTHER, OTHER, BATCH, BATCH)]
    await settle()
    admission.release(grant, OVER)
    await asyncio.gather(*users)
    assert 15 <= served.count("night") <= 35


# --------------------------------------------------------------------------------------------------- schedules


@dataclass
class Arrival:
    key: Key
    demand: Demand
    task: "asyncio.Task[Grant]"


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.integers(0, 3), st.integers(1, 5), st.integers(0, 60)),
        st.tuples(st.just("leave"), st.integers(0, 9), st.just(0), st.just(0)),
        st.tuples(st.just("finish"), st.integers(0, 9), st.just(0), st.just(0)),
        st.tuples(st.just("finish and leave"), st.integers(0, 9), st.integers(0, 9), st.just(0)),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 4), st.integers(0, 2), st.sampled_from([0, 3, 10**6]), OPERATIONS)
def test_admission_holds_its_promises_on_any_schedule(
    concurrent: int, reserved: int, max_wait_s: float, operations: list[tuple[str, int, int, int]]
) -> None:
    asyncio.run(schedule(concurrent, reserved, max_wait_s, operations))


async def schedule(
    concurrent: int, reserved: int, max_wait_s: float, operations: list[tuple[str, int, int, int]]
) -> None:
    keys = [FLOOD, OTHER, BATCH, Key("heavy", weight=3.0)]
    admission = Admission(slots(concurrent, reserved, kv_tokens=800, queued_bytes=120), max_wait_s)
    waiting: list[Arrival] = []
    running: list[Grant] = []

    async def check() -> None:
        await settle()
        for arrival in [one for one in waiting if one.task.done()]:
            first = next(one for one in waiting if one.key is arrival.key)
            waiting.remove(arrival)
            if arrival.task.exception() is None:
                assert first is arrival, "within a key first come, first served"
                running.append(arrival.task.result())
            else:
                assert isinstance(arrival.task.exception(), Busy)
        ordinary = [grant for grant in running if not grant.reserved]
        assert sum(grant.sequences for grant in ordinary) <= concurrent
        assert sum(grant.sequences for grant in running) - sum(grant.sequences for grant in ordinary) <= reserved
        assert sum(grant.kv_tokens for grant in ordinary) <= 800 or len(ordinary) == 1
        assert admission.running == sum(grant.sequences for grant in running)
        assert admission.waiting == len(waiting)
        assert admission._waiting_bytes == sum(arrival.demand.size_bytes for arrival in waiting)
        assert running or not waiting, "with free slots nobody waits"

    def finish(index: int) -> None:
        if index < len(running):
            admission.release(running.pop(index), OVER)

    async def leave(index: int) -> None:
        if 0 <= index < len(waiting):
            gone = waiting.pop(index)
            await leaving(gone.task)
            assert gone.task.cancelled()

    for what, first, second, size in operations:
        if what == "arrive":
            demand = Demand(second, size, 100)
            waiting.append(Arrival(keys[first], demand, asking(admission, keys[first], demand)))
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
    assert not admission._queue.active()


async def test_admission_always_takes_a_key_that_has_less_than_its_share() -> None:
    """Every answer takes long, so that any wait would be too long; each of ten keys gets in all the same."""
    admission = Admission(slots(4), max_wait_s=1)
    for _ in range(10):
        admission.release(await admission.acquire(FLOOD, ONE), Spent(4, 0, 0, 100, engine_s=60.0))
    for _ in range(4):
        await admission.acquire(FLOOD, ONE)
    flood = [asking(admission, FLOOD) for _ in range(3)]
    keys = [Key(f"key {number}") for number in range(10)]
    first = [asking(admission, key) for key in keys]
    second = [asking(admission, key) for key in keys]
    await settle()
    assert not any(task.done() for task in first), "they wait"
    assert all(isinstance(task.exception(), Busy) for task in (*flood, *second[1:]))
    await leaving(*first, second[0])
