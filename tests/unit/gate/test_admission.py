"""The slots of an engine: never too many, in a fair order, and nothing lost when waiters leave."""

import asyncio

import pytest

from borg_serve.gate.admission import OUTPUT_TOKENS, Admission, Busy, Demand, Grant
from borg_serve.gate.telemetry import Spent
from tests.admissions import FLOOD, ONE, OTHER, OVER, asking, leaving, settle
from tests.asgi import slots

# --------------------------------------------------------------------------------------------------- one tenant


async def test_admission_lets_in_up_to_its_slots_and_queues_the_rest_in_order() -> None:
    admission = Admission(slots(2), 60)
    order: list[int] = []

    async def request(number: int) -> Grant:
        grant = await admission.acquire(None, ONE)
        order.append(number)
        return grant

    tasks = [asyncio.create_task(request(number)) for number in range(5)]
    await settle()
    assert (order, admission.running, admission.waiting) == ([0, 1], 2, 3)
    for expected in ([0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]):
        admission.release(tasks[0].result(), OVER)
        await settle()
        assert order == expected
    assert admission.begun == 5


async def test_admission_keeps_a_wide_request_at_the_head() -> None:
    admission = Admission(slots(3), 60)
    first = await admission.acquire(None, Demand(2, 1, 1))
    wide, narrow = asking(admission, demand=Demand(3, 1, 1)), asking(admission)
    await settle()
    assert not narrow.done(), "a later request must not pass an earlier one, even if it would fit"
    admission.release(first, OVER)
    await settle()
    assert wide.done()
    assert not narrow.done()
    admission.release(wide.result(), OVER)
    await narrow


async def test_admission_counts_a_request_wider_than_all_seats_as_all() -> None:
    admission = Admission(slots(2), 60)
    grant = await admission.acquire(None, Demand(4, 1, 1))
    assert admission.running == 2
    admission.release(grant, OVER)
    assert admission.running == 0


async def test_admission_without_a_wait_refuses_at_once() -> None:
    admission = Admission(slots(1), 0)
    admission.refuse_if_late(None)
    await admission.acquire(None, ONE)
    with pytest.raises(Busy) as caught:
        await admission.acquire(None, ONE)
    assert caught.value.retry_after_s >= 1
    with pytest.raises(Busy):
        admission.refuse_if_late(None)


async def test_admission_lets_narrower_ones_in_when_a_wide_head_leaves() -> None:
    admission = Admission(slots(2), 60)
    await admission.acquire(None, ONE)
    wide, narrow = asking(admission, demand=Demand(2, 1, 1)), asking(admission)
    await settle()
    assert not narrow.done()
    await leaving(wide)
    assert narrow.done()


async def test_admission_gives_back_slots_that_came_as_their_waiter_left() -> None:
    admission = Admission(slots(1), 60)
    held = await admission.acquire(None, ONE)
    gone, staying = asking(admission), asking(admission)
    await settle()
    admission.release(held, OVER)  # the slot is given to `gone`, which has not run yet …
    gone.cancel()  # … and leaves in the same instant
    await settle()
    assert gone.cancelled()
    assert staying.done()
    assert admission.running == 1


# ------------------------------------------------------------------------------------------------ the wait it means


async def test_admission_refuses_by_the_wait_that_a_queue_means() -> None:
    admission = Admission(slots(4), max_wait_s=10)
    for _ in range(20):
        admission.release(await admission.acquire(None, ONE), Spent(8, 0, 0, 100, engine_s=20.0))
    held = [await admission.acquire(None, ONE) for _ in range(4)]
    first, second = asking(admission), asking(admission)
    await settle()
    assert admission.waiting == 2, "one is likely served after 5 s, one after 10"
    with pytest.raises(Busy) as caught:
        await admission.acquire(None, ONE)
    assert caught.value.retry_after_s == 15
    await leaving(first, second)
    for _ in range(40):
        admission.release(held.pop(), Spent(8, 0, 0, 100, engine_s=0.4))
        held.append(await admission.acquire(None, ONE))
    many = [asking(admission) for _ in range(20)]
    await settle()
    assert admission.waiting == 20, "requests are quick now"
    await leaving(*many)


@pytest.mark.parametrize("sizes", [(60, 41), (101,)])
async def test_admission_refuses_more_bytes_than_may_wait_but_not_than_may_run(sizes: tuple[int, ...]) -> None:
    admission = Admission(slots(1, queued_bytes=100), 60)
    held = await admission.acquire(None, Demand(1, 10_000, 1))
    *fitting, too_big = sizes
    tasks = [asking(admission, demand=Demand(1, size, 1)) for size in fitting]
    await settle()
    with pytest.raises(Busy):
        await admission.acquire(None, Demand(1, too_big, 1))
    await leaving(*tasks)
    await leaving(asking(admission, demand=Demand(1, 100, 1)))
    admission.release(held, OVER)
    assert admission.running == admission.waiting == 0


async def test_admission_leaves_every_tenant_its_part_of_the_bytes() -> None:
    admission = Admission(slots(1, queued_bytes=1000), 10**6)
    await admission.acquire(FLOOD, ONE)
    tasks = [asking(admission, FLOOD, Demand(1, 100, 1)) for _ in range(10)]
    await settle()
    with pytest.raises(Busy):
        await admission.acquire(FLOOD, Demand(1, 1, 1))
    tasks.append(asking(admission, OTHER, Demand(1, 500, 1)))
    await settle()
    assert not tasks[-1].done()
    with pytest.raises(Busy):
        await admission.acquire(OTHER, Demand(1, 1, 1))
    await leaving(*tasks)
    assert admission._waiting_bytes == 0


# ---------------------------------------------------------------------------------------------------- KV tokens


async def test_admission_holds_what_requests_need_in_the_cache() -> None:
    admission = Admission(slots(100, kv_tokens=4096), 60)
    short = Demand(1, 100, 50)  # 30 tokens of text and 50 of the answer: 2 + 5 blocks of 16
    held = [await admission.acquire(None, short) for _ in range(4096 // (7 * 16))]
    late = asking(admission, demand=short)
    await settle()
    assert not late.done()
    admission.release(held.pop(), OVER)
    await late


async def test_admission_takes_a_request_that_fills_the_cache_when_it_is_alone() -> None:
    admission = Admission(slots(4, kv_tokens=256), 60)
    small = await admission.acquire(None, Demand(1, 16, 16))
    huge = asking(admission, demand=Demand(1, 100_000, 8192))
    await settle()
    assert not huge.done()
    admission.release(small, OVER)
    await huge
    assert admission.full


async def test_admission_learns_how_long_answers_and_prompts_are() -> None:
    admission = Admission(slots(100, kv_tokens=100_000), 60)
    unknown = Demand(1, 1000, 4096)
    before = (await admission.acquire(None, unknown)).kv_tokens
    assert before > OUTPUT_TOKENS
    for _ in range(60):
        grant = await admission.acquire(None, unknown)
        admission.release(grant, Spent(prompt_tokens=100, output_tokens=20, engine_s=1))
    after = (await admission.acquire(None, unknown)).kv_tokens
    assert 120 <= after <= 120 + 4 * 16
