"""The remembered block hashes against vLLM's own, on vLLM's own requests."""

import random
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.engine import core
from vllm.v1.request import Request

from borg_serve import plugin
from borg_serve.errors import EngineError
from borg_serve.hashes import Hasher, remembering

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
