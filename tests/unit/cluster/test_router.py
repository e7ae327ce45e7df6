"""The order in which replicas are tried, and what makes requests one conversation."""

import asyncio
from statistics import mean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
    RunningReplicaInfo,
)
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica

from borg_serve.cluster.router import IN_TRANSIT_S, ConversationRouter, InTransit, conversation, order


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def test_conversation_is_the_same_for_every_turn() -> None:
    first = conversation({"messages": turns("Hi")})
    assert first == conversation({"messages": turns("Hi", "Hello", "More")})
    assert first == conversation({"messages": [{"role": "system", "content": "Be brief."}, *turns("Hi")]})
    assert first != conversation({"messages": turns("Ho")})


@pytest.mark.parametrize("name", ["user", "safety_identifier", "prompt_cache_key"])
def test_conversation_is_apart_for_another_client(name: str) -> None:
    assert conversation({"messages": turns("Hi"), name: "a"}) != conversation({"messages": turns("Hi"), name: "b"})


def test_conversation_reads_responses_and_parts() -> None:
    assert conversation({"input": "Hi"}) == conversation({"messages": turns("Hi")})
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert conversation({"messages": parts}) is not None


@pytest.mark.parametrize(
    "fields",
    [{}, {"messages": []}, {"messages": "x" * 0}, {"messages": [1, None, {"role": "system"}]}, {"messages": None}],
)
def test_conversation_is_none_where_nothing_is_said(fields: dict[str, object]) -> None:
    assert conversation(fields) is None


def test_order_keeps_a_conversation_on_its_replica() -> None:
    assert order(["a", "b", "c"], {"a": 3, "b": 0, "c": 0}, dict.fromkeys("abc", 16)) == ["a", "b", "c"]


def test_order_goes_on_when_the_own_replica_is_full() -> None:
    assert order(["a", "b", "c"], {"a": 16, "b": 2, "c": 0}, dict.fromkeys("abc", 16))[0] == "b"


def test_order_spares_a_replica_that_has_much_more_than_the_others() -> None:
    assert order(["a", "b"], {"a": 12, "b": 1}, dict.fromkeys("ab", 16)) == ["b", "a"]
    assert order(["a", "b"], {"a": 12, "b": 11}, dict.fromkeys("ab", 16)) == ["a", "b"]


def test_order_stays_where_every_replica_is_full() -> None:
    assert order(["b", "a"], {"a": 16, "b": 20}, dict.fromkeys("ab", 16)) == ["b", "a"]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_order_loses_no_replica(loads: list[int]) -> None:
    names = [str(index) for index in range(len(loads))]
    assert sorted(order(names, dict(zip(names, loads, strict=True)), dict.fromkeys(names, 16))) == names


@pytest.mark.parametrize("replicas", [2, 4])
def test_order_balances_a_greeting_that_everybody_begins_with(replicas: int) -> None:
    names = [str(index) for index in range(replicas)]
    load = dict.fromkeys(names, 0)
    for _ in range(200):
        load[order(names, load, dict.fromkeys(names, 100))[0]] += 1
    assert max(load.values()) / mean(load.values()) <= 1.25


def test_in_transit_counts_what_was_sent_and_has_not_arrived() -> None:
    transit = InTransit()
    transit.sent.extend([0.0, 0.1, 0.2])
    assert transit.count(0, 0.3) == 3
    assert transit.count(2, 0.4) == 1, "two of them are in the load that the replica tells"
    assert transit.count(2, 0.5) == 1
    assert transit.count(9, 0.6) == 0, "those of another router arrive too"
    transit.sent.append(0.7)
    assert transit.count(8, 0.8) == 1, "one that waited for a slot has left"


def test_in_transit_ends_for_what_never_arrives() -> None:
    transit = InTransit()
    transit.sent.extend([0.0, 1.0])
    assert transit.count(0, IN_TRANSIT_S + 0.5) == 1
    assert transit.count(0, IN_TRANSIT_S + 1.5) == 0


class Told(RunningReplica):
    """A replica as a router sees it, which tells its queue after a known time, and its load and slots if any."""

    def __init__(self, info: RunningReplicaInfo, delay_s: float) -> None:
        self._replica_info = info
        self._multiplexed_model_ids = set()
        self.delay_s = delay_s
        self.told: dict[str, int] = {}

    @property
    def routing_stats(self) -> dict[str, int]:
        return self.told

    async def get_queue_len(self, *, deadline_s: float) -> int:
        await asyncio.sleep(self.delay_s)
        return 0


DEPLOYMENT = DeploymentID("BorgServer", "borg")


def router_of(*delays_s: float) -> ConversationRouter:
    """A router of such replicas; none has told its load and slots."""
    make: Any = ConversationRouter  # Ray's types say nothing of it
    router: ConversationRouter = make(DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
    router.initialize_state()
    infos = [
        RunningReplicaInfo(ReplicaID(str(number), DEPLOYMENT), None, None, None, f"replica {number}", 100)
        for number in range(len(delays_s))
    ]
    router.update_replicas([Told(info, delay_s) for info, delay_s in zip(infos, delays_s, strict=True)])
    return router


async def chosen(router: ConversationRouter, session: str, number: int = 0) -> str:
    metadata = RequestMetadata(f"{session} {number}", f"{session} {number}", session_id=session)
    found = await router._choose_replica_for_request(PendingRequest([], {}, metadata))
    return found.replica_id.unique_id


async def test_router_keeps_a_conversation_before_its_replica_has_told_its_slots() -> None:
    router = router_of(0, 0)
    assert len({await chosen(router, "one", number) for number in range(5)}) == 1
    assert len({await chosen(router, str(number)) for number in range(12)}) == 2


async def test_router_waits_for_a_busy_replica_to_tell_its_queue() -> None:
    """Longer than Ray would."""
    sessions = [str(number) for number in range(8)]
    quick = [await chosen(router_of(0, 0), session) for session in sessions]
    assert len(set(quick)) == 2
    assert [await chosen(router_of(0.3, 0), session) for session in sessions] == quick


async def test_router_passes_over_a_replica_that_does_not_tell_its_queue() -> None:
    assert {await chosen(router_of(60, 0), str(number)) for number in range(2)} == {"1"}


async def test_router_counts_requests_that_a_busy_replica_has_not_seen_yet() -> None:
    """It tells of the first one, again and again, while the others wait for its process."""
    router = router_of(0, 0)
    replicas: list[Any] = list(router.curr_replicas.values())
    for replica in replicas:
        replica.told = {"load": 0, "slots": 8, "arrived": 0}
    first = [await chosen(router, "one", number) for number in range(5)]
    assert len(set(first)) == 2, "from half its slots on, not the whole of a conversation's"
    for replica in replicas:
        replica.told = {"load": 1, "slots": 8, "arrived": 1}
    everywhere = first + [await chosen(router, "one", number) for number in range(5, 16)]
    assert sorted(map(everywhere.count, set(everywhere))) == [8, 8], "as many as there are slots, on each"
