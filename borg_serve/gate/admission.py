"""Who may use the engine now: slots, room in the KV cache, and a fair queue before them.

A request takes a slot for each sequence, and the KV blocks that it is expected to need. Tenants are API keys; without
keys there is one. It does not know HTTP, nor what the engine does.
"""

import asyncio
import math
from collections.abc import Iterator
from dataclasses import dataclass

from borg_serve.api.errors import ApiError
from borg_serve.engine.memory import Slots
from borg_serve.gate.fair_queue import FairQueue, Tenant
from borg_serve.gate.keys import Key
from borg_serve.gate.telemetry import Spent

__all__ = ["Admission", "Busy", "Demand", "Grant"]

TOKENS_A_BYTE = 0.3
"""Prompt tokens for each byte of a request, until answers have told."""
OUTPUT_TOKENS = 256
"""Output tokens of a request that may write more, until answers have told."""
SERVICE_S = 5.0
"""Seconds of a request in the engine, until answers have told; or less, so that twice as many may wait as run."""
LEARNING = 0.1
"""Weight of the newest answer in moving averages; the first ones weigh more."""
RESERVE = 1 / 8
"""Part of the KV cache beyond its whole that reserved slots may take; if it is really needed vLLM preempts."""


class Busy(ApiError):
    """The wait for a slot would be too long; `retry_after_s` is whole seconds until it is likely shorter."""

    def __init__(self, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        headers = {"retry-after": str(retry_after_s)}
        super().__init__(503, "The server is busy. Try again later.", "server_error", None, "busy", "busy", headers)


@dataclass(frozen=True)
class Demand:
    """What a request asks for."""

    sequences: int
    """Answers to one prompt (`n`)."""
    size_bytes: int
    """Its body."""
    max_tokens: int
    """The most output tokens of each sequence."""


@dataclass(frozen=True)
class Grant:
    """What a request was given; it goes back whole."""

    tenant: str
    sequences: int
    size_bytes: int
    kv_tokens: int
    cost: float
    """New tokens that its tenant was charged beforehand."""
    reserved: bool
    """Whether it has slots beyond the ordinary ones."""
    priority: int = 0
    """By which the engine orders its prompts: 0 for a key that has less than its share, 1 for others, 2 for a batch."""
    number: int = 0
    """Of the call that asked for it, where another process did."""


class Average:
    """A moving average that begins with a guess."""

    def __init__(self, guess: float) -> None:
        self.value = guess
        self._count = 0

    def add(self, value: float) -> None:
        """Count one more value."""
        self._count += 1
        self.value += max(LEARNING, 1 / self._count) * (value - self.value)


@dataclass
class Pool:
    """Slots and KV tokens in use."""

    slots: int
    kv_tokens: int
    used_slots: int = 0
    used_kv_tokens: int = 0

    def holds(self, sequences: int, kv_tokens: int) -> bool:
        """Whether a request fits. One that needs more than there is fits when nothing else is there."""
        room = self.used_kv_tokens + kv_tokens <= self.kv_tokens or self.used_slots == 0
        return room and self.used_slots + sequences <= self.slots

    def take(self, sequences: int, kv_tokens: int) -> None:
        """Count a request in; negative numbers count it out."""
        self.used_slots += sequences
        self.used_kv_tokens += kv_tokens


class Waiter:
    """A request in the queue."""

    def __init__(self, demand: Demand, sequences: int, kv_tokens: int) -> None:
        self.size_bytes = demand.size_bytes
        self.sequences = sequences
        self.kv_tokens = kv_tokens
        self.turn: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()


class Admission:
    """The slots of one engine, for all API processes in front of it.

    Used from one event loop only. `max_wait_s`: the longest expected wait that is accepted.
    """

    def __init__(self, slots: Slots, max_wait_s: float) -> None:
        self.slots = slots
        self.max_wait_s = max_wait_s
        self.begun = 0
        """Requests that got their slots so far."""
        self._ordinary = Pool(slots.concurrent, slots.kv_tokens)
        self._reserved = Pool(slots.reserved, math.ceil(slots.kv_tokens * RESERVE))
        self._queue: FairQueue[Waiter] = FairQueue()
        self._waiting_bytes = 0
        self._service_s = Average(min(SERVICE_S, max_wait_s / 2) or SERVICE_S)
        self._tokens_a_byte = Average(TOKENS_A_BYTE)
        self._output_tokens = Average(OUTPUT_TOKENS)

    @property
    def running(self) -> int:
        """Sequences in the engine."""
        return self._ordinary.used_slots + self._reserved.used_slots

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def full(self) -> bool:
        """Whether a request of usual size would have to wait."""
        _, usual = self._estimate(Demand(1, 0, OUTPUT_TOKENS), 1)
        return self.waiting > 0 or not self._ordinary.holds(1, usual)

    def refuse_if_late(self, key: Key | None, size_bytes: int = 0) -> None:
        """Raise Busy if a request of this key and size could neither run soon nor wait.

        A key that has less than its share of the slots is not refused for its wait.
        """
        if (late := self._late(key, size_bytes)) is not None:
            raise late

    async def acquire(self, key: Key | None, demand: Demand) -> Grant:
        """Take slots, waiting for them if need be. Raises Busy if that would take too long.

        Cancelling the wait leaves the queue.
        """
        name = _name(key)
        sequences = min(demand.sequences, self.slots.concurrent)
        cost, kv_tokens = self._estimate(demand, sequences)
        late = self._late(key, demand.size_bytes)
        waiter = Waiter(demand, sequences, kv_tokens)
        self._tenant(key).waiting.append((waiter, sequences, cost))
        self._waiting_bytes += demand.size_bytes
        self._admit()
        if late is not None and not waiter.turn.done():
            self._leave(name, waiter)
            raise late
        try:
            return await waiter.turn
        except asyncio.CancelledError:
            if waiter.turn.done() and not waiter.turn.cancelled():
                self.release(waiter.turn.result(), Spent())  # the slots came as the waiter left
            else:
                self._leave(name, waiter)
            raise

    def release(self, grant: Grant, spent: Spent) -> None:
        """Give back what `acquire` took, and correct what was estimated."""
        pool = self._reserved if grant.reserved else self._ordinary
        pool.take(-grant.sequences, -grant.kv_tokens)
        if spent.engine_s:
            self._service_s.add(spent.engine_s / grant.sequences)
        if spent.prompt_tokens and grant.size_bytes:
            self._tokens_a_byte.add(spent.prompt_tokens / grant.size_bytes)
        if spent.output_tokens:
            self._output_tokens.add(spent.output_tokens / grant.sequences)
        actual = max(1, spent.prompt_tokens + spent.output_tokens)
        self._queue.end(grant.tenant, grant.sequences, actual - grant.cost)
        self._admit()

    def _tenant(self, key: Key | None) -> Tenant[Waiter]:
        return self._queue.tenant("", 1.0) if key is None else self._queue.tenant(key.name, key.share, key.background)

    def _estimate(self, demand: Demand, sequences: int) -> tuple[float, int]:
        """(new tokens, tokens of the KV blocks) that a request likely needs."""
        prompt = demand.size_bytes * self._tokens_a_byte.value
        output = min(demand.max_tokens, self._output_tokens.value)
        block = self.slots.block_tokens
        blocks = math.ceil(prompt / block) + sequences * math.ceil(output / block + 1)
        return max(1.0, prompt + sequences * output), blocks * block

    def _late(self, key: Key | None, size_bytes: int) -> Busy | None:
        """The refusal of a request that could neither run soon nor wait."""
        wait_s = self._wait_s(key)
        late = wait_s > self.max_wait_s or self._overflows(_name(key), size_bytes)
        return Busy(min(60, max(1, math.ceil(wait_s)))) if late else None

    def _wait_s(self, key: Key | None) -> float:
        """Seconds that a new request of this key likely waits; 0 if it would not."""
        tenant = self._tenant(key)
        if not self.full or self._may_reserve(tenant, 1, 0):
            return 0.0
        waiting = sum(sequences for _, sequences, _ in tenant.waiting)
        others = [other for other in self._queue.active() if other is not tenant]
        if others and self.max_wait_s and tenant.running + waiting < self._share(tenant):
            return 0.0
        ahead = self._queue.ahead(_name(key))
        return (ahead + 1) * self._service_s.value / max(1, self.running)

    def _overflows(self, name: str, size_bytes: int) -> bool:
        """Whether the text that waits would be too much, and this tenant's more than its part of it."""
        if self._waiting_bytes + size_bytes <= self.slots.queued_bytes:
            return False
        waiting = dict(self._queue.in_order())
        own = sum(waiter.size_bytes for waiter, _, _ in waiting[name].waiting) if name in waiting else 0
        return own + size_bytes > self.slots.queued_bytes / len({*waiting, name})

    def _leave(self, name: str, waiter: Waiter) -> None:
        self._queue.remove(name, lambda other: other is waiter)
        self._waiting_bytes -= waiter.size_bytes
        self._admit()  # a wide request that leaves may let narrower ones in

    def _admit(self) -> None:
        """Give slots to those whose turn it is, as far as there are any."""
        while any(self._admit_one(first, name, tenant) for first, name, tenant in self._candidates()):
            pass

    def _candidates(self) -> Iterator[tuple[bool, str, Tenant[Waiter]]]:
        return ((place == 0, name, tenant) for place, (name, tenant) in enumerate(self._queue.in_order()))

    def _admit_one(self, first: bool, name: str, tenant: Tenant[Waiter]) -> bool:
        """Give slots to the first request of a tenant. Ordinary ones are only for the tenant that is `first`."""
        waiter, sequences, cost = tenant.waiting[0]
        ordinary = first and self._ordinary.holds(sequences, waiter.kv_tokens)
        if not ordinary and not self._may_reserve(tenant, sequences, waiter.kv_tokens):
            return False
        tenant.waiting.popleft()
        self._waiting_bytes -= waiter.size_bytes
        if not waiter.turn.done():
            (self._ordinary if ordinary else self._reserved).take(sequences, waiter.kv_tokens)
            priority = 2 if tenant.background else int(tenant.running + sequences > self._share(tenant))
            self._queue.start(name, sequences, cost)
            self.begun += 1
            size_bytes, kv_tokens = waiter.size_bytes, waiter.kv_tokens
            waiter.turn.set_result(Grant(name, sequences, size_bytes, kv_tokens, cost, not ordinary, priority))
        return True

    def _may_reserve(self, tenant: Tenant[Waiter], sequences: int, kv_tokens: int) -> bool:
        """Whether a tenant may have reserved slots: one that is not in a hurry has none, nor one with its share."""
        if tenant.background or not self._reserved.holds(sequences, kv_tokens):
            return False
        return tenant.running + sequences <= self._share(tenant)

    def _share(self, tenant: Tenant[Waiter]) -> float:
        """Slots that a tenant may have if all that are active want theirs; one at least."""
        weights = sum(other.weight for other in self._queue.active() if other is not tenant) + tenant.weight
        return max(1.0, self.slots.concurrent * tenant.weight / weights)


def _name(key: Key | None) -> str:
    return key.name if key is not None else ""
