"""The watchdog, with engines of known timing and everything some forty times faster than in service."""

import asyncio
import time

import pytest

from borg_serve.serving import watchdog
from borg_serve.serving.watchdog import watch

HANG_S = 0.2


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "POLL_S", 0.01)


class Engine:
    """Answers heartbeats after `takes_s`, never if that is None; each answer is a step."""

    def __init__(self, takes_s: float | None = 0.0) -> None:
        self.takes_s = takes_s
        self.last_step = time.monotonic()
        self.asked = 0
        self.cancelled = 0
        self.died = False
        self.raises = False
        self.at_work = False

    async def heartbeat(self) -> None:
        self.asked += 1
        if self.raises:
            raise RuntimeError("not now")
        try:
            await asyncio.sleep(3600 if self.takes_s is None else self.takes_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.last_step = time.monotonic()

    def watch(self, hang_s: float = HANG_S) -> "asyncio.Task[str]":
        return asyncio.create_task(
            watch(lambda: self.last_step, lambda: self.died, self.heartbeat, hang_s, lambda: self.at_work)
        )


async def asked(engine: Engine, times: int) -> None:
    """Wait until the engine has been asked so often."""
    async with asyncio.timeout(20):
        while engine.asked < times:
            await asyncio.sleep(0.005)


async def end(task: "asyncio.Task[str]") -> None:
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_watchdog_never_asks_a_busy_engine() -> None:
    engine = Engine(None)
    task = asyncio.create_task(watch(time.monotonic, lambda: False, engine.heartbeat, HANG_S))  # a step at every look
    await asyncio.sleep(4 * HANG_S)
    assert engine.asked == 0
    await end(task)


async def test_watchdog_asks_an_idle_engine_and_is_content_with_its_answer() -> None:
    engine = Engine(0.02)
    task = engine.watch()
    await asked(engine, 3)
    await end(task)


async def test_watchdog_is_content_with_an_answer_that_moved_no_clock() -> None:
    engine = Engine()
    begun = engine.last_step

    async def heartbeat() -> None:
        engine.asked += 1

    task = asyncio.create_task(watch(lambda: begun, lambda: False, heartbeat, HANG_S))
    await asked(engine, 3)
    await end(task)


async def test_watchdog_finds_a_hang_in_time_and_lets_go_of_the_heartbeat() -> None:
    engine = Engine(None)
    begun = time.monotonic()
    reason = await asyncio.wait_for(engine.watch(), 20)
    assert reason.startswith("the engine made no progress for")
    assert time.monotonic() - begun >= HANG_S * 0.95
    assert (engine.asked, engine.cancelled) == (1, 1)


async def test_watchdog_takes_a_step_of_anyone_for_life() -> None:
    engine = Engine(None)
    task = engine.watch()
    for _ in range(12):
        await asyncio.sleep(HANG_S * 0.5)
        engine.last_step = time.monotonic()
    assert engine.asked >= 2
    await end(task)


async def test_watchdog_takes_a_failing_heartbeat_for_no_answer() -> None:
    engine = Engine()
    engine.raises = True
    reason = await asyncio.wait_for(engine.watch(), 20)
    assert reason.startswith("the engine made no progress for")


@pytest.mark.parametrize("when", ["before", "while asked"])
async def test_watchdog_sees_a_death_at_once(when: str) -> None:
    engine = Engine(None)
    task = engine.watch(hang_s=60 if when == "before" else HANG_S)
    if when == "while asked":
        await asked(engine, 1)
    engine.died = True
    assert await asyncio.wait_for(task, 20) == "the engine died"
    assert engine.cancelled == engine.asked


async def test_watchdog_waits_longer_for_an_engine_at_work_but_not_for_ever() -> None:
    engine = Engine(None)
    engine.at_work = True
    begun = time.monotonic()
    reason = await asyncio.wait_for(engine.watch(hang_s=0.1), 30)
    assert time.monotonic() - begun > watchdog.PATIENCE * 0.1
    assert reason == "the engine made no progress for 1 s"


async def test_watchdog_waits_no_longer_for_an_engine_that_was_at_work_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "PATIENCE", 1000)
    engine = Engine(None)
    engine.at_work = True
    task = engine.watch()
    await asked(engine, 1)
    engine.at_work = False
    await asyncio.wait_for(task, 20)


async def test_watchdog_does_not_count_the_time_in_which_it_was_stopped_itself() -> None:
    engine = Engine(None)
    task = engine.watch()
    await asked(engine, 1)
    time.sleep(2 * HANG_S)  # the whole process stands still, engine or not
    await asyncio.sleep(0.03)
    assert not task.done()
    engine.last_step = time.monotonic()
    await asyncio.sleep(0.03)
    await end(task)


async def test_watchdog_that_watches_for_no_hang_only_sees_a_death() -> None:
    engine = Engine(None)
    engine.last_step -= 1e6
    task = engine.watch(hang_s=float("inf"))
    await asyncio.sleep(0.1)
    assert engine.asked == 0
    engine.died = True
    assert await asyncio.wait_for(task, 5) == "the engine died"
