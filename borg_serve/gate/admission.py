"""Slots in the engine, and a bounded first-in-first-out queue for them.

A request takes one slot for each sequence. It counts sequences and bytes; it does not know keys or tokens.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable

from borg_serve import metrics
from borg_serve.api.errors import ApiError

__all__ = ["Admission", "Busy"]


class Busy(ApiError):
    """Every slot is taken and the queue is full; `retry_after_s` is whole seconds until a slot is likely free."""

    def __init__(self, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        headers = {"retry-after": str(retry_after_s)}
        super().__init__(503, "The server is busy. Try again later.", "server_error", None, "busy", "busy", headers)


class Admission:
    """`concurrent` sequences at once; up to `queued` requests and `queued_bytes` of their text may wait.

    Used from one event loop only. `clock` is monotonic, in seconds.
    """

    def __init__(
        self, concurrent: int, queued: int, queued_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.concurrent = concurrent
        self.queued = queued
        self.queued_bytes = queued_bytes
        self.running = 0
        self.begun = 0
        """Requests that got their slots so far."""
        self._clock = clock
        self._waiting: deque[tuple[asyncio.Future[None], int, int]] = deque()
        self._waiting_bytes = 0
        metrics.SLOTS.set(concurrent)
        self._service_s = 1.0  # moving average of how long an admitted request stays

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def retry_after_s(self) -> int:
        """Seconds until the queue has likely moved up by what waits in it now, 1 to 60."""
        turns = (self.waiting + 1) / self.concurrent
        return min(60, max(1, math.ceil(turns * self._service_s)))

    def refuse_if_full(self, size_bytes: int = 0) -> None:
        """Raise Busy if a request of this size could neither run nor wait now."""
        if self.running >= self.concurrent or self._waiting:
            self._refuse_if_queue_full(size_bytes)

    async def acquire(self, sequences: int, size_bytes: int) -> None:
        """Take one slot for each of `sequences` (n of the request), waiting in the queue if need be.

        Raises Busy if the queue is full. Cancelling the wait leaves the queue.
        """
        arrived = self._clock()
        sequences = min(sequences, self.concurrent)
        if self._waiting or self.running + sequences > self.concurrent:
            self._refuse_if_queue_full(size_bytes)
            await self._wait(sequences, size_bytes)
        else:
            self._take(sequences)
        self.begun += 1
        metrics.QUEUE_SECONDS.observe(self._clock() - arrived)

    def release(self, sequences: int, service_s: float) -> None:
        """Give back what `acquire` took, after `service_s` seconds in the engine."""
        self._service_s += 0.1 * (service_s - self._service_s)
        self._release(min(sequences, self.concurrent))

    def _refuse_if_queue_full(self, size_bytes: int) -> None:
        if self.waiting >= self.queued or self._waiting_bytes + size_bytes > self.queued_bytes:
            raise Busy(self.retry_after_s())

    async def _wait(self, sequences: int, size_bytes: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (turn, sequences, size_bytes)
        self._waiting.append(entry)
        self._waiting_bytes += size_bytes
        try:
            with metrics.QUEUED.track_inprogress():
                await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._release(sequences)  # the slots came and the waiter left in the same instant
            else:
                self._waiting.remove(entry)
                self._waiting_bytes -= size_bytes
                self._admit()  # a wide request that leaves the head may let narrower ones in
            raise

    def _take(self, sequences: int) -> None:
        self.running += sequences
        metrics.INFLIGHT.inc(sequences)

    def _release(self, sequences: int) -> None:
        self.running -= sequences
        metrics.INFLIGHT.dec(sequences)
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            turn, sequences, size_bytes = self._waiting[0]
            if self.running + sequences > self.concurrent:
                return
            self._waiting.popleft()
            self._waiting_bytes -= size_bytes
            if not turn.done():
                self._take(sequences)
                turn.set_result(None)
