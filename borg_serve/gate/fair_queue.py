"""A queue that serves the tenant first who has had least of late: virtual token counters (arXiv:2401.00588).

It knows tenants' names, their weights and costs in tokens. It does not know slots, requests or time.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

__all__ = ["FairQueue", "Tenant"]

T = TypeVar("T")


@dataclass
class Tenant(Generic[T]):
    """What one tenant has had, and what waits for it."""

    weight: float = 1.0
    background: bool = False
    """Whether nobody waits for its answers."""
    clock: float = 0.0
    """Virtual time: tokens charged to it, each divided by its weight, lifted to the queue's own when it comes back."""
    running: int = 0
    """Sequences in the engine."""
    waiting: "deque[tuple[T, int, float]]" = field(default_factory=deque)
    """(item, its sequences, its cost in tokens), first come, first served."""

    @property
    def active(self) -> bool:
        """Whether it has anything in the engine or in the queue."""
        return bool(self.running or self.waiting)


class FairQueue(Generic[T]):
    """Items by tenant. With backlog, tenants get tokens in proportion to their weights, whatever they ask for.

    A tenant that comes back after a pause starts at the virtual time of the others: it keeps no credit for the pause.
    """

    def __init__(self) -> None:
        self._tenants: dict[str, Tenant[T]] = {}
        self._now = 0.0
        """Virtual time of the tenant that was charged last."""

    def __len__(self) -> int:
        return sum(len(tenant.waiting) for tenant in self._tenants.values())

    def tenant(self, name: str, weight: float = 1.0, background: bool = False) -> Tenant[T]:
        """Return the tenant of that name, with this weight from now on."""
        found = self._tenants.get(name)
        if found is None:
            found = self._tenants[name] = Tenant()
        found.weight, found.background = weight, background
        if not found.active:
            found.clock = max(found.clock, self._now)
        return found

    def active(self) -> list[Tenant[T]]:
        """Return the tenants that have anything in the engine or in the queue."""
        return [tenant for tenant in self._tenants.values() if tenant.active]

    def in_order(self) -> Iterator[tuple[str, Tenant[T]]]:
        """The tenants with something waiting, the one that has had least first."""
        waiting = [(name, tenant) for name, tenant in self._tenants.items() if tenant.waiting]
        return iter(sorted(waiting, key=lambda found: found[1].clock))

    def start(self, name: str, sequences: int, cost: float) -> None:
        """Charge a tenant for what it is given now."""
        tenant = self._tenants[name]
        self._now = max(self._now, tenant.clock)
        tenant.running += sequences
        tenant.clock += cost / tenant.weight

    def end(self, name: str, sequences: int, correction: float) -> None:
        """Take what has ended off its tenant; `correction` is its true cost less the one it was charged."""
        tenant = self._tenants[name]
        tenant.running -= sequences
        tenant.clock += correction / tenant.weight
        if not tenant.active:  # forget those that would come back at the queue's own time
            kept = {name: one for name, one in self._tenants.items() if one.active or one.clock > self._now}
            self._tenants = kept

    def remove(self, name: str, gone: Callable[[T], bool]) -> None:
        """Take the waiting items out for which `gone` holds."""
        tenant = self._tenants[name]
        tenant.waiting = deque(item for item in tenant.waiting if not gone(item[0]))

    def ahead(self, name: str) -> int:
        """How many waiting sequences would be served before a new item of this tenant, which `tenant` has made."""
        mine = self._tenants[name]
        reached = mine.clock + sum(cost for _, _, cost in mine.waiting) / mine.weight
        before = sum(sequences for _, sequences, _ in mine.waiting)
        for tenant in self._tenants.values():
            at = tenant.clock
            for _, sequences, cost in tenant.waiting if tenant is not mine else ():
                if at > reached:
                    break
                before += sequences
                at += cost / tenant.weight
        return before
