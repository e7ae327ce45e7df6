"""Remembered block hashes and remembered KV blocks against vLLM's own, on vLLM's own requests and caches."""

import random
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from borg_serve.vllm_plugin.prefix_memo import Hasher, remember_blocks, remember_hashes

BLOCK = 16
SHA256 = get_hash_fn_by_name("sha256")
IDENTITY = [random.Random(0).randrange(150_000) for _ in range(40 * BLOCK + 5)]


def stock() -> Hasher:
    init_none_hash(SHA256)
    return cast(Hasher, get_request_block_hasher(BLOCK, SHA256))


def request(ids: list[int], hasher: Hasher, **more: Any) -> Request:
    return Request("r", ids, SamplingParams(max_tokens=9), None, block_hasher=hasher, **more)  # type: ignore[arg-type]


def counted(hasher: Hasher, calls: list[int]) -> Hasher:
    """The hasher, and how many hashes it computed in each call."""

    def count(given: Any) -> list[bytes]:
        found = hasher(given)
        calls.append(len(found))
        return found

    return count


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["identity", "other", "part"]), st.integers(0, 70)), max_size=8))
def test_hashes_are_vllms_own_whatever_came_before(prompts: list[tuple[str, int]]) -> None:
    plain = stock()
    ours = remember_hashes(plain, BLOCK)
    for turn, (kind, more) in enumerate(prompts):
        start = {"identity": IDENTITY, "other": [], "part": IDENTITY[: 3 * BLOCK + 7]}[kind]
        ids = [*start, *([turn] * more)] or [1]
        one, other = request(ids, ours), request(ids, plain)
        assert one.block_hashes == other.block_hashes
        for token in range(BLOCK + 1):  # and as tokens are generated
            one.append_output_token_ids(token)
            other.append_output_token_ids(token)
        assert one.block_hashes == other.block_hashes


def test_hashes_of_the_identity_are_computed_once() -> None:
    calls: list[int] = []
    hasher = remember_hashes(counted(stock(), calls), BLOCK)
    for tail in ([1] * 20, [1] * 20, [2] * 20, [3] * 50, [4] * 5):
        request(IDENTITY + tail, hasher)
    first, again, learned, long, short = calls
    assert first == 41
    assert again == 0
    assert learned == 41  # the first one that differs shows where the identity ends
    assert (long, short) == (3, 0)


def test_hashes_that_depend_on_more_than_tokens_are_not_remembered() -> None:
    plain = stock()
    ours = remember_hashes(plain, BLOCK)
    request(IDENTITY, ours)
    salted = request(IDENTITY, ours, cache_salt="x")
    assert salted.block_hashes == request(IDENTITY, plain, cache_salt="x").block_hashes
    assert salted.block_hashes != request(IDENTITY, ours).block_hashes


TAILS = st.lists(st.integers(0, 2), max_size=3 * BLOCK)
WHO = st.sampled_from([None, "one", "other"])


@settings(max_examples=50)
@given(st.lists(st.tuples(WHO, TAILS, st.integers(0, 2 * BLOCK)), min_size=2, max_size=6), st.integers(0, BLOCK))
def test_salted_hashes_are_shared_for_the_prefix_and_by_the_same_salt_alone(
    requests: list[tuple[str | None, list[int], int]], more: int
) -> None:
    """Two requests have a block's hash in common where it lies in the prefix, or where text and salt are the same."""
    tokens = 40 * BLOCK + more % 5
    ours = remember_hashes(stock(), BLOCK, tokens)
    shared = tokens // BLOCK
    made = []
    for salt, tail, answer in requests:
        one = request(IDENTITY + tail, ours, cache_salt=salt)
        for token in range(answer):
            one.append_output_token_ids(token % 2)
        assert one.cache_salt == salt
        assert len(one.block_hashes) == one.num_tokens // BLOCK
        made.append((salt, list(one.all_token_ids), one.block_hashes))
    for salt, ids, hashes in made:
        for its, its_ids, its_hashes in made:
            for block, (mine, others) in enumerate(zip(hashes, its_hashes, strict=False)):
                end = (block + 1) * BLOCK
                assert (mine == others) == (block < shared or (salt == its and ids[:end] == its_ids[:end]))


def test_salted_hashes_of_the_prefix_are_those_without_a_salt_and_computed_once() -> None:
    calls: list[int] = []
    ours = remember_hashes(counted(stock(), calls), BLOCK, len(IDENTITY))
    first, again = (request(IDENTITY + [1] * 20, ours, cache_salt="x") for _ in range(2))
    assert calls == [41, 1, 1]
    assert first.block_hashes == again.block_hashes
    assert first.block_hashes[:40] == request(IDENTITY, stock()).block_hashes
    assert request([1] * 99, ours, cache_salt="x").block_hashes != request([1] * 99, stock()).block_hashes


def manager(blocks: int, remembers: bool) -> KVCacheManager:
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.bfloat16)
    config = KVCacheConfig(blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    found = KVCacheManager(config, max_model_len=8192, scheduler_block_size=BLOCK, hash_block_size=BLOCK)
    if remembers:
        coordinator: Any = found.coordinator
        coordinator.find_longest_cache_hit = remember_blocks(coordinator.find_longest_cache_hit, BLOCK)
    return found


def looked_up(cache: KVCacheManager, asked: Request) -> tuple[list[int], int]:
    """(the cached blocks a request begins with, their tokens); if there is room, the request takes what it needs."""
    blocks, tokens, _ = cache.get_computed_blocks(asked)
    found = blocks.get_block_ids()[0]
    if cache.allocate_slots(asked, asked.num_tokens - tokens, tokens, blocks) is not None:
        asked.num_computed_tokens = asked.num_tokens
    return found, tokens


PROMPTS = st.tuples(st.sampled_from(["identity", "other", "part"]), st.integers(0, 3), st.integers(0, 70))
ENDED = st.integers(0, 4)
"""How many of the oldest requests end before the next one comes: their blocks may be given to others."""


@settings(max_examples=50)
@given(st.lists(st.tuples(PROMPTS, ENDED, st.sampled_from([False] * 9 + [True])), max_size=20))
def test_blocks_found_are_vllms_own_whatever_came_before(turns: list[tuple[tuple[str, int, int], int, bool]]) -> None:
    """In a cache with room for two and a half identities, on twins that only differ in the lookup."""
    hasher = stock()
    plain, ours = manager(100, False), manager(100, True)
    running: list[tuple[Request, Request]] = []
    for turn, ((kind, speaker, more), ended, reset) in enumerate(turns):
        for one, other in running[:ended]:
            plain.free(one)
            ours.free(other)
        del running[:ended]
        if reset:
            assert plain.reset_prefix_cache() == ours.reset_prefix_cache()
        start = {"identity": IDENTITY, "other": [turn], "part": IDENTITY[: 3 * BLOCK + 7]}[kind]
        ids = [*start, *([speaker] * more)]
        pair = request(ids, hasher), request(ids, hasher)
        for item in pair:
            item.request_id = str(turn)
        assert looked_up(plain, pair[0]) == looked_up(ours, pair[1])
        if pair[0].num_computed_tokens:
            running.append(pair)


def test_blocks_of_the_identity_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = manager(500, True)
    pool = cache.block_pool
    asked: list[bytes] = []
    find = pool.get_cached_block

    def look(key: Any, groups: list[int]) -> Any:
        asked.append(key)
        return find(key, groups)

    monkeypatch.setattr(pool, "get_cached_block", look)
    hasher = stock()
    counts = []
    for turn, tail in enumerate(([1] * 40, [2] * 40, [3] * 40, [1] * 40)):
        asked.clear()
        one = request(IDENTITY + tail, hasher)
        one.request_id = str(turn)
        found, tokens = looked_up(cache, one)
        counts.append(len(asked))
        assert len(found) * BLOCK == tokens
    assert counts == [1, 41, 1, 2]  # nothing is there; the identity and a miss; a miss; what the first one said
