"""Which replica gets a request: the one that holds the conversation's KV cache, unless it is full or gone.

A request router for Ray Serve: it runs where Serve picks replicas, and knows replicas and a request's fields. It does
not know vLLM. The identity is in every replica's cache, so it draws no conversation anywhere.
"""

import hashlib
import json
import math
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

__all__ = ["ConversationRouter", "conversation", "order"]

VIRTUAL_NODES = 1000
"""Points on the ring a replica: its share of conversations is within about 3% of even."""
BOUND = 1.25
"""A replica with this many times the mean load, and half its places taken, takes no more while others have room
(consistent hashing with bounded loads, Mirrokni et al., arXiv:1608.01350): a greeting that everybody begins with must
not fill one replica."""
QUEUE_ANSWER_S = 1.0
"""Ray asks a replica that it has not used for 10 s for its queue and goes on to the next one when it does not answer in
time. Ray's own 0.1 s is shorter than a busy replica's step, and costs a conversation its cache."""
FLIGHT_S = 3.0
"""How long a request may be on its way to a replica before it no longer counts: it was refused, or its client left.
A busy replica's process takes up to a second to look at one."""
CLIENT = ("prompt_cache_key", "safety_identifier", "user")
"""Fields by which a client may say whose request it is; the first one present counts."""


def conversation(fields: dict[str, Any]) -> str | None:
    """What stays the same over a conversation's turns, hashed: who asks, and the first thing a user said; None if
    nothing is said. The session header, where there is one, goes before it.
    """
    messages = fields.get("messages") or fields.get("input")
    if isinstance(messages, list):
        turns = (turn for turn in messages if isinstance(turn, dict) and turn.get("role") == "user")
        first = next((turn.get("content") for turn in turns), None)
    else:
        first = messages
    if not first:
        return None
    who = next((fields[name] for name in CLIENT if isinstance(fields.get(name), str)), "")
    return hashlib.sha256(json.dumps([who, first], sort_keys=True).encode()).hexdigest()


def order(ranked: list[str], load: dict[str, int], places: dict[str, float]) -> list[str]:
    """Put the replicas of one conversation in the order to try: its own first, unless that is full or overloaded.

    `ranked`: replicas by the ring, its own first. `load`: requests each one has; `places`: how many it takes, infinite
    until it tells. Where every replica is full the order stays: the first refuses with the time to try again.
    """
    mean = (sum(load[name] for name in ranked) + 1) / max(1, len(ranked))
    room = [name for name in ranked if load[name] < places[name]]
    light = [name for name in room if load[name] + 1 <= max(BOUND * mean, places[name] / 2)]
    return [*light, *(name for name in room if name not in light), *(name for name in ranked if name not in room)]


@dataclass
class Flight:
    """Requests on their way to one replica."""

    sent: deque[float] = field(default_factory=deque)
    """When each was sent, by the monotonic clock."""
    arrived: int = 0
    """How many had reached the replica when it last told; others' requests are among them."""

    def flying(self, arrived: int, now: float) -> int:
        """How many of those that were sent are not among the `arrived` ones that the replica tells of."""
        for _ in range(min(len(self.sent), arrived - self.arrived)):
            self.sent.popleft()
        self.arrived = arrived
        while self.sent and now - self.sent[0] > FLIGHT_S:
            self.sent.popleft()
        return len(self.sent)


class ConversationRouter(ConsistentHashRouter):
    """Serve's consistent hashing by session, and without a session by the conversation's beginning."""

    queue_len_response_deadline_s = QUEUE_ANSWER_S

    def initialize_state(self, **kwargs: Any) -> None:
        super().initialize_state(num_virtual_nodes=VIRTUAL_NODES, num_fallback_replicas=1_000_000, **kwargs)
        self._flights: dict[str, Flight] = {}

    def _routing_key(self, pending_request: PendingRequest | None) -> str | None:
        if pending_request is not None and not pending_request.metadata.session_id and pending_request.args:
            # Ray's router hands over the request's fields; its fallback proxy something else, which names nobody.
            key = conversation(getattr(pending_request.args[0], "__dict__", {}))
            if key is not None:
                return key
        own: str | None = super()._routing_key(pending_request)
        return own

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        if pending_request is None or not ranks:
            return ranks
        replicas = {str(rank[0].replica_id): rank[0] for rank in ranks}
        now = time.monotonic()
        self._flights = {name: self._flights.get(name, Flight()) for name in replicas}
        load = {name: self._load(name, replica.routing_stats, now) for name, replica in replicas.items()}
        places = {name: float(replica.routing_stats.get("places", math.inf)) for name, replica in replicas.items()}
        tried = order(list(replicas), load, places)
        self._flights[tried[0]].sent.append(now)
        return [[replicas[name]] for name in tried]

    def _load(self, name: str, told: dict[str, Any], now: float) -> int:
        """The load that a replica last told, and what had not reached it by then."""
        return int(told.get("load", 0)) + self._flights[name].flying(int(told.get("arrived", 0)), now)
