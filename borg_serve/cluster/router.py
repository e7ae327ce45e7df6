"""Routes a request to the replica that holds its conversation's KV cache, unless that replica is full or gone.

A request router for Ray Serve. It knows replicas and a request's fields; it does not know vLLM. The identity is in
every replica's cache, so it plays no part in the choice.
"""

import hashlib
import json
import math
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from borg_serve.upstream import pinned, require

with pinned("cluster"):
    from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
    from ray.serve.request_router import PendingRequest, RunningReplica

__all__ = ["ConversationRouter", "conversation", "order"]

require("cluster", ConsistentHashRouter, "initialize_state", "choose_replicas", "_routing_key")
require("cluster", ConsistentHashRouter, "queue_len_response_deadline_s")
require("cluster", RunningReplica, "routing_stats")

VIRTUAL_NODES = 1000
"""Points on the hash ring for each replica: its share of conversations is within about 3% of even."""
BOUND = 1.25
"""A replica with this many times the mean load, and half its slots taken, gets no more requests while others have room
(consistent hashing with bounded loads, Mirrokni et al., arXiv:1608.01350): a greeting that everybody begins with must
not fill one replica."""
QUEUE_ANSWER_S = 1.0
"""Ray asks a replica that it has not used for 10 s for its queue length, and takes the next replica if the answer is
late. Ray's own 0.1 s is shorter than a busy replica's step, and would cost a conversation its cache."""
IN_TRANSIT_S = 3.0
"""How long a request counts as on its way to a replica. After that it was refused, or its client left.
A busy replica's process takes up to a second to look at one."""
CLIENT_FIELDS = ("prompt_cache_key", "safety_identifier", "user")
"""Fields by which a client may say whose request it is; the first one present counts."""


def conversation(fields: dict[str, Any]) -> str | None:
    """A hash of what stays the same over a conversation's turns: the client and the first user message.

    None if there is no user message. A session header, if there is one, has precedence over this.
    """
    messages = fields.get("messages") or fields.get("input")
    if isinstance(messages, list):
        turns = (turn for turn in messages if isinstance(turn, dict) and turn.get("role") == "user")
        first = next((turn.get("content") for turn in turns), None)
    else:
        first = messages
    if not first:
        return None
    who = next((fields[name] for name in CLIENT_FIELDS if isinstance(fields.get(name), str)), "")
    return hashlib.sha256(json.dumps([who, first], sort_keys=True).encode()).hexdigest()


def order(ranked: list[str], load: dict[str, int], slots: dict[str, float]) -> list[str]:
    """Put the replicas of one conversation in the order to try: its own first, unless that is full or overloaded.

    `ranked`: replicas by the hash ring, its own first. `load`: requests of each one. `slots`: how many each one takes,
    infinite until it has reported. If every replica is full the order stays: the first answers 503 with Retry-After.
    """
    mean = (sum(load[name] for name in ranked) + 1) / max(1, len(ranked))
    room = [name for name in ranked if load[name] < slots[name]]
    light = [name for name in room if load[name] + 1 <= max(BOUND * mean, slots[name] / 2)]
    return [*light, *(name for name in room if name not in light), *(name for name in ranked if name not in room)]


@dataclass
class InTransit:
    """Requests on their way to one replica."""

    sent: deque[float] = field(default_factory=deque)
    """When each was sent, by the monotonic clock."""
    arrived: int = 0
    """How many requests, other routers' included, had reached the replica at its last report."""

    def count(self, arrived: int, now: float) -> int:
        """How many of the requests sent are not among the `arrived` ones that the replica reports."""
        for _ in range(min(len(self.sent), arrived - self.arrived)):
            self.sent.popleft()
        self.arrived = arrived
        while self.sent and now - self.sent[0] > IN_TRANSIT_S:
            self.sent.popleft()
        return len(self.sent)


class ConversationRouter(ConsistentHashRouter):
    """Serve's consistent hashing by session, and for requests without a session by the conversation's beginning."""

    queue_len_response_deadline_s = QUEUE_ANSWER_S

    def initialize_state(self, **kwargs: Any) -> None:
        super().initialize_state(num_virtual_nodes=VIRTUAL_NODES, num_fallback_replicas=1_000_000, **kwargs)
        self._in_transit: dict[str, InTransit] = {}

    def _routing_key(self, pending_request: PendingRequest | None) -> str | None:
        if pending_request is not None and not pending_request.metadata.session_id and pending_request.args:
            # Ray's LLM router passes an object with the request's fields; its fallback proxy passes something else.
            key = conversation(getattr(pending_request.args[0], "__dict__", {}))
            if key is not None:
                return key
        by_session: str | None = super()._routing_key(pending_request)
        return by_session

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        if pending_request is None or not ranks:
            return ranks
        replicas = {str(rank[0].replica_id): rank[0] for rank in ranks}
        now = time.monotonic()
        self._in_transit = {name: self._in_transit.get(name, InTransit()) for name in replicas}
        load = {name: self._load(name, replica.routing_stats, now) for name, replica in replicas.items()}
        slots = {name: float(replica.routing_stats.get("slots", math.inf)) for name, replica in replicas.items()}
        tried = order(list(replicas), load, slots)
        self._in_transit[tried[0]].sent.append(now)
        return [[replicas[name]] for name in tried]

    def _load(self, name: str, reported: dict[str, Any], now: float) -> int:
        """The load in a replica's last report, and the requests that had not reached it by then."""
        return int(reported.get("load", 0)) + self._in_transit[name].count(int(reported.get("arrived", 0)), now)
