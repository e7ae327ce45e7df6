"""Our scheduler, made as vLLM's engine core makes it, on a model of one layer: no engine is started."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import core as engine_core
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from borg_serve.engine.arguments import SCHEDULER
from borg_serve.errors import EngineError
from borg_serve.vllm_plugin import patches

core: Any = engine_core
BLOCK = 32
IDENTITY = [random.Random(0).randrange(1000) for _ in range(20 * BLOCK + 5)]
SHA256 = get_hash_fn_by_name("sha256")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("model"))


def tiny(folder: Path) -> Path:
    """A checkpoint's configuration, without weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1000, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps({**kind, **sizes, "max_position_embeddings": 4096}))
    return folder


@pytest.fixture(autouse=True)
def hasher_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what a scheduler changes for the core that makes it."""
    monkeypatch.setattr(core, "get_request_block_hasher", core.get_request_block_hasher)


def configuration(model: Path, **more: Any) -> VllmConfig:
    arguments: dict[str, Any] = {
        "max_model_len": 4096,
        "max_num_batched_tokens": 4096,
        "max_num_seqs": 16,
        "block_size": BLOCK,
    }
    arguments |= {"scheduler_cls": SCHEDULER, "enforce_eager": True, "kv_cache_memory_bytes": 1 << 30}
    return EngineArgs(
        model=str(model), skip_tokenizer_init=True, dtype="bfloat16", **arguments | more
    ).create_engine_config()


def scheduler(config: VllmConfig, spec: type[Any] = FullAttentionSpec, blocks: int = 200, **more: Any) -> Any:
    """As `EngineCore.__init__` does it."""
    sizes = {"block_size": BLOCK, "num_kv_heads": 4, "head_size": 16, "dtype": torch.bfloat16}
    groups = [KVCacheGroupSpec(["layer"], spec(**sizes, **more))]
    config.cache_config.num_gpu_blocks = blocks
    return config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(blocks, kv_cache_tensors=[], kv_cache_groups=groups),
        structured_output_manager=StructuredOutputManager(config),
        include_finished_set=False,
        log_stats=False,
        block_size=BLOCK,
        hash_block_size=BLOCK,
    )


class Engine:
    """A scheduler with the hasher that a core would make after it, and a model that always says 7."""

    def __init__(self, config: VllmConfig, **more: Any) -> None:
        init_none_hash(SHA256)
        self.scheduler = scheduler(config, **more)
        self.hasher = core.get_request_block_hasher(BLOCK, SHA256)

    def ask(self, name: str, ids: list[int], tokens: int = 100) -> Request:
        asked = Request(name, ids, SamplingParams(max_tokens=tokens), None, block_hasher=self.hasher)
        self.scheduler.add_request(asked)
        return asked

    def step(self) -> dict[str, int]:
        """Run a step; the tokens that each request got in it."""
        planned = self.scheduler.schedule()
        self.scheduler.update_from_output(planned, result(planned))
        return dict(planned.num_scheduled_tokens)


def result(planned: Any, sampled: list[list[int]] | None = None) -> ModelRunnerOutput:
    """What a model runner returns of a step; without `sampled` its tokens are 7."""
    names = list(planned.num_scheduled_tokens)
    rows = {name: row for row, name in enumerate(names)}
    return ModelRunnerOutput(names, rows, sampled or [[7] for _ in names])


@pytest.mark.parametrize("interval", [1, 4])
def test_scheduler_admits_prompts_in_some_steps_while_others_decode(model: Path, interval: int) -> None:
    engine = Engine(configuration(model, prefill_schedule_interval=interval))
    engine.ask("first", [1] * 40)
    assert engine.step() == {"first": 40}
    admitted: list[int] = []
    for turn in range(2 * interval):
        engine.ask(str(turn), [turn + 2] * 40)
        admitted.append(len(engine.step()) - 1 - sum(admitted))
    assert admitted == [0] * (interval - 1) + [interval] + [0] * (interval - 1) + [interval]


def test_scheduler_lets_no_prompt_wait_where_nobody_decodes(model: Path) -> None:
    engine = Engine(configuration(model, prefill_schedule_interval=4))
    for turn in range(6):
        engine.ask(str(turn), [turn] * 40, tokens=1)
        assert engine.step() == {str(turn): 40}


def test_scheduler_leaves_the_choice_to_data_parallelism(model: Path) -> None:
    config = configuration(model, prefill_schedule_interval=4)
    config.parallel_config.data_parallel_size = 2
    engine = Engine(config)
    engine.ask("first", [1] * 40)
    engine.step()
    engine.ask("second", [2] * 40)
    assert engine.step() == {"first": 1, "second": 40}


def test_scheduler_does_not_look_up_or_hash_the_identity_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []

    def counted(keys: Any) -> bytes:
        hashed.append(1)
        return SHA256(keys)

    engine = Engine(configuration(model))
    make = core.get_request_block_hasher
    patches.remember_prefix_hashes(0)
    engine.hasher = core.get_request_block_hasher(BLOCK, counted)
    assert core.get_request_block_hasher is make, "only the core that this scheduler is for"
    pool = engine.scheduler.kv_cache_manager.block_pool
    asked: list[Any] = []
    find = pool.get_cached_block

    def look(key: Any, groups: list[int]) -> Any:
        asked.append(key)
        return find(key, groups)

    monkeypatch.setattr(pool, "get_cached_block", look)
    counts = []
    for turn in range(4):
        asked.clear()
        hashed.clear()
        engine.ask(str(turn), IDENTITY + [turn] * 40, tokens=1)
        computed = engine.step()[str(turn)]
        counts.append((computed, len(asked), len(hashed)))
    whole = len(IDENTITY) + 40
    blocks = len(IDENTITY) // BLOCK
    new = whole - blocks * BLOCK
    assert counts == [(whole, 1, blocks + 1), (new, blocks + 1, blocks + 1), (new, 1, 1), (new, 1, 1)]


def test_scheduler_leaves_the_lookup_to_vllm_where_more_than_hashes_decides(model: Path) -> None:
    found = scheduler(configuration(model), SlidingWindowSpec, sliding_window=64)
    assert "find_longest_cache_hit" not in vars(found.kv_cache_manager.coordinator)


@pytest.mark.parametrize("ahead", [False, True])
def test_scheduler_schedules_ahead_where_vllm_decides_so(model: Path, ahead: bool) -> None:
    """On a CPU vLLM never does, so the decision is set here where its own platform sets it."""
    config = configuration(model)
    config.scheduler_config.async_scheduling = ahead
    found = scheduler(config)
    assert isinstance(found, Scheduler)
    assert isinstance(found, AsyncScheduler) == ahead


def test_scheduler_of_a_vllm_that_makes_its_hasher_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(core, "get_request_block_hasher")
    with pytest.raises(EngineError, match=r"vLLM moved get_request_block_hasher, got none\. Use the pinned vLLM 0"):
        patches.remember_prefix_hashes(0)
