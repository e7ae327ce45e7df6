"""A coordinator behind a socket pair: the same answers, and nothing held by whoever has left."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from borg_serve.api.errors import ApiError
from borg_serve.engine.memory import Slots
from borg_serve.gate.admission import Admission, Demand, Grant
from borg_serve.gate.coordinator import Coordinator
from borg_serve.gate.keys import Key
from borg_serve.gate.quota import Quota
from borg_serve.gate.remote import RemoteCoordinator, serve
from borg_serve.gate.telemetry import Spent
from tests.asgi import slots
from tests.waiting import await_room_in_the_minute

ONE = Demand(1, 10, 10)
ANNA = Key("anna", requests_per_minute=100, concurrent=3)


@asynccontextmanager
async def pair(
    held: Slots | None = None, clients: int = 2
) -> AsyncIterator[tuple[Coordinator, list[RemoteCoordinator]]]:
    """A coordinator, and API processes' views of it, all in this process."""
    ends, channels = zip(*(socket.socketpair() for _ in range(clients)), strict=True)
    coordinator = Coordinator(max_wait_s=60, quota=Quota())
    serving = asyncio.create_task(serve(coordinator, ends))
    remotes = [await RemoteCoordinator.connect(channel) for channel in channels]
    await asyncio.gather(*(remote.open(held or slots(2)) for remote in remotes))
    yield coordinator, remotes
    for remote in remotes:
        remote.close()
    await asyncio.wait_for(serving, 10)


def admission(coordinator: Coordinator) -> Admission:
    assert coordinator.admission is not None
    return coordinator.admission


async def test_coordinator_shares_one_pool_among_processes() -> None:
    async with pair() as (coordinator, (first, second)):
        held = [await first.acquire(None, ONE), await second.acquire(None, ONE)]
        waiting = asyncio.create_task(second.acquire(ANNA, ONE))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        assert (admission(coordinator).running, admission(coordinator).waiting) == (2, 1)
        await first.end(None, held[0], Spent(engine_s=1))
        assert isinstance(await waiting, Grant)
        await second.end(None, held[1], Spent())
        await second.end(None, waiting.result(), Spent())
        await asyncio.sleep(0.05)
        assert admission(coordinator).running == 0


async def test_coordinator_counts_limits_of_keys_over_processes() -> None:
    await_room_in_the_minute()
    async with pair() as (_, (first, second)):
        headers = [await remote.begin(ANNA, True) for remote in (first, second, first)]
        assert [left["x-ratelimit-remaining-requests"] for left in headers] == ["99", "98", "97"]
        with pytest.raises(ApiError) as refused:
            await second.begin(ANNA, True)
        assert (refused.value.status, refused.value.reason) == (429, "quota")
        assert refused.value.headers["retry-after"] == "1"
        await first.end(ANNA, None, Spent())
        await second.begin(ANNA, True)
        with pytest.raises(ApiError) as unknown:
            await first.usage("anna", "2026-11-01", None, "day")
        assert (unknown.value.status, unknown.value.code) == (404, "no_ledger")


async def test_coordinator_forgets_who_waits_no_longer() -> None:
    async with pair(slots(1)) as (coordinator, (first, second)):
        held = await first.acquire(None, ONE)
        gone = asyncio.create_task(second.acquire(None, ONE))
        await asyncio.sleep(0.05)
        assert admission(coordinator).waiting == 1
        gone.cancel()
        with suppress(asyncio.CancelledError):
            await gone
        await asyncio.sleep(0.05)
        assert admission(coordinator).waiting == 0
        await first.end(None, held, Spent())


async def test_coordinator_takes_back_what_came_as_its_waiter_left() -> None:
    async with pair(slots(1)) as (coordinator, (first, second)):
        for _ in range(50):
            held = await first.acquire(None, ONE)
            gone = asyncio.create_task(second.acquire(None, ONE))
            await asyncio.sleep(0)
            await first.end(None, held, Spent())
            for _ in range(3):
                await asyncio.sleep(0)
            gone.cancel()
            with suppress(asyncio.CancelledError):
                held = await gone
                await second.end(None, held, Spent())
        await asyncio.sleep(0.1)
        assert (admission(coordinator).running, admission(coordinator).waiting) == (0, 0)


async def test_coordinator_takes_back_what_an_ended_process_held() -> None:
    async with pair(slots(2)) as (coordinator, (first, second)):
        for _ in range(2):
            await first.acquire(None, ONE)
        waiting = [asyncio.create_task(remote.acquire(None, ONE)) for remote in (first, second)]
        await asyncio.sleep(0.05)
        first.close()
        grant = await asyncio.wait_for(waiting[1], 10)
        assert admission(coordinator).running == 1
        await second.end(None, grant, Spent())
        waiting[0].cancel()


async def test_coordinator_that_fails_answers_with_500(caplog: pytest.LogCaptureFixture) -> None:
    async with pair() as (coordinator, (first, _)):
        coordinator.quota = None
        coordinator.admission = None
        with pytest.raises(ApiError) as failed:
            await first.acquire(None, ONE)
        assert failed.value.status == 500
        assert "the coordinator failed" in caplog.text
