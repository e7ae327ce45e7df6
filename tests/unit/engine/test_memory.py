"""The arithmetic of slots and memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from borg_serve.config import Limits
from borg_serve.engine.memory import MemoryPlan, Slots, reserve, slots


def slots_of(limits: Limits | None = None, **given: int) -> Slots:
    return slots(
        limits or Limits(),
        kv_tokens=given.get("kv_tokens", 93_184),
        block_tokens=given.get("block_tokens", 32),
        prefix_tokens=given.get("prefix_tokens", 2_320),
        max_num_seqs=given.get("max_num_seqs", 16),
        reserved=given.get("reserved", 0),
    )


def test_slots_are_what_the_scheduler_takes_and_the_cache_behind_the_identity() -> None:
    assert slots_of() == Slots(concurrent=16, reserved=0, kv_tokens=90_880, block_tokens=32, queued_bytes=1 << 20)


@pytest.mark.parametrize("kv_tokens", [0, 100, 2_304])
def test_slots_hold_a_request_where_the_cache_holds_nothing(kv_tokens: int) -> None:
    found = slots_of(kv_tokens=kv_tokens)
    assert found.kv_tokens == 0
    assert found.queued_bytes >= Limits().body_bytes


def test_slots_follow_the_profile_where_it_decides() -> None:
    found = slots_of(Limits(concurrent=7, queued_bytes=5000))
    assert (found.concurrent, found.queued_bytes) == (7, 5000)


@given(st.integers(1, 1024), st.integers(1, 1024))
def test_slots_reserved_are_beyond_the_ordinary_ones_and_in_the_engine(seqs: int, concurrent: int) -> None:
    extra = reserve(seqs)
    assert slots_of(max_num_seqs=seqs, reserved=extra).reserved == extra
    found = slots_of(Limits(concurrent=concurrent), max_num_seqs=seqs, reserved=extra)
    assert found.reserved <= reserve(concurrent)
    if concurrent <= seqs:
        assert found.reserved >= 1
        assert concurrent + found.reserved <= seqs + extra
    assert slots_of(Limits(concurrent=concurrent), max_num_seqs=seqs).reserved == 0, "without keys"


def plan(**changed: int) -> MemoryPlan:
    values = {
        "weights_bytes": 269_000_000,
        "kv_bytes_a_token": 23_040,
        "kv_bytes": 2 << 30,
        "block_tokens": 32,
        "prefix_tokens": 2_320,
    }
    return MemoryPlan(**values | changed)


def test_memory_plan_counts_whole_blocks() -> None:
    # The demo's: vLLM itself reports 93,184 tokens for these 2 GiB.
    assert plan().kv_tokens == 93_184
    assert plan().shared_tokens == 2_304
    assert plan().tail_tokens == 16
    assert plan(block_tokens=128).tail_tokens == 16
    assert plan(prefix_tokens=2_431, block_tokens=128).tail_tokens == 127


def test_memory_plan_stores_the_identity_once() -> None:
    # 8,192 tokens of context are 5,888 of one's own, 184 blocks: (93,184 - 2,304) / 5,888 = 15.4.
    assert plan().users(8_192) == 15
    assert plan(prefix_tokens=0).users(8_192) == 93_184 // 8_192 == 11


def test_memory_plan_rounds_a_users_own_tokens_up_to_blocks() -> None:
    assert plan().users(2_305) == plan().users(2_336) == (93_184 - 2_304) // 32
    assert plan().users(2_337) == (93_184 - 2_304) // 64


@pytest.mark.parametrize("kv_bytes", [0, 1, 23_040 * 31, 23_040 * 2_304])
def test_memory_plan_of_too_little_memory_serves_nobody(kv_bytes: int) -> None:
    assert plan(kv_bytes=kv_bytes).users(8_192) == 0


@given(st.integers(0, 1 << 40), st.integers(1, 512), st.integers(0, 5_000), st.integers(1, 40_000))
def test_memory_plan_never_promises_more_than_fits(
    kv_bytes: int, block_tokens: int, prefix_tokens: int, context: int
) -> None:
    found = plan(kv_bytes=kv_bytes, block_tokens=block_tokens, prefix_tokens=prefix_tokens)
    users = found.users(context)
    own = max(1, context - found.shared_tokens)
    assert users == 0 or found.shared_tokens + users * own <= found.kv_tokens
    assert found.kv_tokens * found.kv_bytes_a_token <= kv_bytes
