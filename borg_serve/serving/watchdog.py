"""Find out that the engine was killed, stopped or is stuck, by its lack of progress.

It knows time, a heartbeat to send and the time of the engine's last step. It does not know vLLM.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

__all__ = ["watch"]

POLL_S = 0.25
BUSY_SHARE = 0.2
"""An engine seen at work in this share of the polls is slow, not hung: on a crowded machine a step may take longer than
the limit, waiting for a core or for pages from the disk."""
PATIENCE = 10
"""How many times longer an engine that works, but makes no step, is waited for."""


async def watch(
    progress: Callable[[], float],
    dead: Callable[[], bool],
    heartbeat: Callable[[], Awaitable[object]],
    hang_s: float,
    busy: Callable[[], bool] = lambda: False,
) -> str:
    """Return why the engine is lost, as soon as it is; run until then.

    `progress()` is the monotonic time of the engine's last step for any request, in seconds. When it is older than
    a quarter of `hang_s`, `heartbeat` asks the engine for one token; without a step in the other three quarters the
    engine hangs. An engine that steps is never asked. `busy()` is whether its processes are at work at this instant:
    then it is given PATIENCE times as long.
    """
    while True:
        await asyncio.sleep(POLL_S)
        if dead():
            return "the engine died"
        if time.monotonic() - progress() < hang_s / 4:
            continue
        asked = time.monotonic()
        beat = asyncio.ensure_future(heartbeat())
        waited_s, polls, at_work = 0.0, 0, 0
        try:
            while progress() < asked and not (beat.done() and beat.exception() is None):
                before = time.monotonic()
                await asyncio.wait({beat}, timeout=POLL_S) if not beat.done() else await asyncio.sleep(POLL_S)
                if dead():
                    return "the engine died"
                # Time in which this process itself was stopped does not speak against the engine.
                waited_s += min(time.monotonic() - before, 2 * POLL_S)
                polls += 1
                at_work += busy()
                if waited_s <= hang_s * 3 / 4:
                    continue
                if at_work < BUSY_SHARE * polls or waited_s > PATIENCE * hang_s:
                    return f"the engine made no progress for {waited_s + hang_s / 4:.0f} s"
        finally:
            beat.cancel()
            await asyncio.gather(beat, return_exceptions=True)
