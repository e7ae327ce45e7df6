"""A scheduler that spares vLLM's KV cache manager against one that does not: the same blocks, step by step."""

import json
import random
import sys
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher

from loadtests.gpu import scheduler as cost
from tests.vllm import test_scheduler
from tests.vllm.test_scheduler import BLOCK, IDENTITY, SHA256, Engine, configuration, result

model = test_scheduler.model
hasher_maker = test_scheduler.hasher_maker

PARAMS = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None}
ASKED = st.lists(
    st.tuples(st.booleans(), st.integers(1, 3 * BLOCK), st.integers(1, 3 * BLOCK)), min_size=1, max_size=12
)


def told(model: Path, ours: bool, ahead: bool, blocks: int, asked: list[tuple[bool, int, int]], seed: int) -> list[Any]:
    """What the scheduler says in each step, until all requests have ended. `ahead`: a step before the last's result."""
    config = configuration(model, num_gpu_blocks_override=blocks)
    config.scheduler_config.async_scheduling = ahead
    engine = Engine(config, blocks=blocks)
    made, manager = engine.scheduler, engine.scheduler.kv_cache_manager
    if not ours:
        engine.hasher = get_request_block_hasher(BLOCK, SHA256)
        for name in ("allocate_slots", "cache_blocks"):
            vars(manager).pop(name)
    rng = random.Random(seed)
    waiting = list(enumerate(asked))
    planned: deque[Any] = deque()
    found: list[Any] = []
    for _ in range(2000):
        if waiting and rng.random() < 0.4:
            turn, (shares, more, tokens) = waiting.pop()
            engine.ask(str(turn), (IDENTITY if shares else []) + [turn] * more, tokens)
        plan = made.schedule()
        new = [(each.req_id, each.num_computed_tokens, each.block_ids) for each in plan.scheduled_new_reqs]
        old = plan.scheduled_cached_reqs
        cached = [block.block_hash for block in manager.block_pool.blocks]
        found.append((new, old.req_ids, old.new_block_ids, old.num_computed_tokens, plan.num_scheduled_tokens, cached))
        planned.append(plan)
        if len(planned) > ahead:
            done = planned.popleft()
            sampled = [[] if _reading(made, name) else [rng.randrange(1000)] for name in done.num_scheduled_tokens]
            made.update_from_output(done, result(done, sampled))
        if not waiting and not made.requests:
            return found
    raise AssertionError("some request never ended")


def _reading(made: Any, name: str) -> bool:
    request = made.requests.get(name)
    return request is not None and request.is_prefill_chunk


@settings(max_examples=25, **PARAMS)  # type: ignore[arg-type]
@given(st.booleans(), st.sampled_from([40, 60, 200]), ASKED, st.integers(0, 9))
def test_slots_are_vllms_own(
    model: Path, ahead: bool, blocks: int, asked: list[tuple[bool, int, int]], seed: int
) -> None:
    """With few blocks requests are preempted, and read again."""
    assert told(model, True, ahead, blocks, asked, seed) == told(model, False, ahead, blocks, asked, seed)


def test_slots_are_asked_for_once_in_a_block(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("allocate_slots", "cache_blocks"):
        _count(monkeypatch, name, calls)
    told(model, True, True, 200, [(True, 5, 3 * BLOCK)], 0)
    assert calls.count("allocate_slots") <= 3 * 4 + 2, "of 96 tokens; more while a step ahead is not known to be full"
    assert calls.count("cache_blocks") <= 3


@pytest.mark.parametrize("words", [[], ["--stock"]])
def test_slots_cost_is_measured(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scheduler", "--users", "4", "--steps", "250", *words])
    cost.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["scheduler"] == ("stock" if words else "ours")
    assert min(found["decode_ms"], found["prompts_ms"], found["update_ms"]) > 0


def _count(monkeypatch: pytest.MonkeyPatch, name: str, calls: list[str]) -> None:
    inner = getattr(KVCacheManager, name)

    def counted(*args: Any, **more: Any) -> Any:
        calls.append(name)
        return inner(*args, **more)

    monkeypatch.setattr(KVCacheManager, name, counted)
