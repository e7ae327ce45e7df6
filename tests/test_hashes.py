"""What is remembered of the identity against vLLM's own, on vLLM's own requests: hashes, blocks, token ids."""

import random
from inspect import getsource
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_coordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.engine import core
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.request import Request
from vllm.v1.worker.gpu import states

from borg_serve import plugin
from borg_serve.errors import EngineError
from borg_serve.hashes import Hasher, remembering, writing

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
    ours = remembering(plain, BLOCK)
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
    hasher = remembering(counted(stock(), calls), BLOCK)
    for tail in ([1] * 20, [1] * 20, [2] * 20, [3] * 50, [4] * 5):
        request(IDENTITY + tail, hasher)
    first, again, learned, long, short = calls
    assert first == 41
    assert again == 0
    assert learned == 41  # the first one that differs shows where the identity ends
    assert (long, short) == (3, 0)


def test_hashes_that_depend_on_more_than_tokens_are_not_remembered() -> None:
    plain = stock()
    ours = remembering(plain, BLOCK)
    request(IDENTITY, ours)
    salted = request(IDENTITY, ours, cache_salt="x")
    assert salted.block_hashes == request(IDENTITY, plain, cache_salt="x").block_hashes
    assert salted.block_hashes != request(IDENTITY, ours).block_hashes


def test_hashes_are_remembered_where_the_engine_makes_its_hasher(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = core
    monkeypatch.setattr(module, "get_request_block_hasher", module.get_request_block_hasher)
    plugin.remember_hashes(module)
    init_none_hash(SHA256)
    hasher = module.get_request_block_hasher(BLOCK, SHA256)
    assert request(IDENTITY, hasher).block_hashes == request(IDENTITY, stock()).block_hashes
    assert hasher.__module__ == "borg_serve.hashes"
    with pytest.raises(EngineError, match="moved get_request_block_hasher"):
        plugin.remember_hashes(object())


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's coordinator as the plugin leaves it, for one test."""
    found: Any = kv_cache_coordinator.UnitaryKVCacheCoordinator
    monkeypatch.setattr(found, "__init__", found.__init__)
    plugin.remember_blocks()
    return found


def manager(blocks: int, spec: type[Any] = FullAttentionSpec, **more: Any) -> KVCacheManager:
    sizes = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.bfloat16}
    groups = [KVCacheGroupSpec(["layer"], spec(**sizes, **more))]
    config = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
    return KVCacheManager(config, max_model_len=8192, scheduler_block_size=BLOCK, hash_block_size=BLOCK)


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
    plain = manager(100)
    with pytest.MonkeyPatch.context() as patch:
        found: Any = kv_cache_coordinator.UnitaryKVCacheCoordinator
        patch.setattr(found, "__init__", found.__init__)
        plugin.remember_blocks()
        ours = manager(100)
    assert "find_longest_cache_hit" in vars(ours.coordinator)
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


def test_blocks_of_the_identity_are_looked_up_once(coordinator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = manager(500)
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


def test_blocks_are_looked_up_by_vllm_where_more_than_hashes_decides(coordinator: Any) -> None:
    cache = manager(100, SlidingWindowSpec, sliding_window=64)
    assert "find_longest_cache_hit" not in vars(cache.coordinator)


def test_blocks_cannot_be_remembered_where_vllm_moved_its_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(kv_cache_coordinator, "UnitaryKVCacheCoordinator")
    with pytest.raises(EngineError, match="moved UnitaryKVCacheCoordinator"):
        plugin.remember_blocks()


class Table:
    """Rows of token ids as a GPU's worker has them, written to as it says."""

    def __init__(self) -> None:
        self.rows = {row: [0] * 900 for row in range(3)}
        self.written: list[int] = []

    def write(self, row: int, start: int, ids: list[int]) -> None:
        self.rows[row][start : start + len(ids)] = ids
        self.written.append(len(ids))


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(["identity", "other", "part", "dummy"]), st.integers(0, 70)), max_size=20))
def test_ids_written_are_all_there_whatever_came_before(prompts: list[tuple[str, int]]) -> None:
    table = Table()
    write = writing(table.write)
    for turn, (kind, more) in enumerate(prompts):
        start = {"identity": IDENTITY, "other": [turn], "part": IDENTITY[: 3 * BLOCK + 7], "dummy": []}[kind]
        ids = [*start, *([turn] * more)]
        row = turn % 3
        write(row, 0, ids)
        found = table.rows[row]
        assert found[: len(ids)] == ids
        found[len(ids) : len(ids) + 40] = [-1] * 40  # what is generated is written past the writer


def test_ids_of_the_identity_are_written_once_a_row() -> None:
    table = Table()
    write = writing(table.write)
    for turn, tail in enumerate(([1] * 20, [2] * 20, [3] * 20, [4] * 30, [5] * 5, [6] * 10)):
        write(turn % 3, 0, IDENTITY + tail)
    whole = len(IDENTITY)
    assert table.written == [whole + 20, whole + 20, whole + 20, 30, 5, 10]


def test_ids_after_an_engines_own_dummies_are_the_identitys() -> None:
    table = Table()
    write = writing(table.write)
    for dummy in ([0] * 50, [0] * 60, [1] * 900):
        write(0, 0, dummy)
    for tail in ([1] * 20, [2] * 20, [3] * 20):
        write(0, 0, IDENTITY + tail)
    assert table.written[-1] == 20


def test_ids_are_written_where_a_gpus_worker_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """That worker cannot run here; what is changed of it is found here."""
    assert "self.all_token_ids.stage_write(req_idx, 0, all_token_ids)" in getsource(states.RequestState.add_request)
    table = Table()

    class State:
        def __init__(self) -> None:
            self.all_token_ids = SimpleNamespace(stage_write=table.write)

    monkeypatch.setattr(states, "RequestState", State)
    plugin.remember_ids()
    state = State()
    for tail in ([1] * 20, [2] * 20, [3] * 20):
        state.all_token_ids.stage_write(0, 0, IDENTITY + tail)
    assert table.written[-1] == 20
    monkeypatch.setattr(states, "RequestState", type("Moved", (), {}))
    plugin.remember_ids()
    with pytest.raises(EngineError, match="moved a worker's table of token ids"):
        states.RequestState()  # type: ignore[call-arg]
