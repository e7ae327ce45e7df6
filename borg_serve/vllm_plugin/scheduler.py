"""vLLM's scheduler for prompts that all begin alike: it spaces prefills and looks the prefix's KV blocks up once.

vLLM creates it in the engine's process (`scheduler_cls`). It knows how many tokens the prompts
share, and not which.
"""

from itertools import count
from typing import Any

from borg_serve.engine.attention_choice import PREFIX_OPTION
from borg_serve.upstream import pinned
from borg_serve.vllm_plugin.kv_slots import allocate_where_needed, cache_where_full
from borg_serve.vllm_plugin.lifetime import end_with_parent
from borg_serve.vllm_plugin.patches import remember_prefix_hashes
from borg_serve.vllm_plugin.prefix_memo import remember_blocks

with pinned("plugin"):
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_coordinator import UnitaryKVCacheCoordinator
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

__all__ = ["SharedPrefixAsyncScheduler", "SharedPrefixScheduler"]


class SharedPrefixScheduler(Scheduler):
    """Schedules ahead of the results where vLLM does: it decides that after it was given this class."""

    def __new__(cls, vllm_config: VllmConfig, *_: Any, **__: Any) -> "SharedPrefixScheduler":
        """Create the asynchronous variant if the configuration says so."""
        return super().__new__(SharedPrefixAsyncScheduler if vllm_config.scheduler_config.async_scheduling else cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        end_with_parent()
        super().__init__(*args, **kwargs)
        self._steps = count()
        options: Any = self.vllm_config.additional_config or {}
        if _only_hashes_count(self.kv_cache_manager.coordinator):
            self._spare_the_cache_manager()
        remember_prefix_hashes(int(options.get(PREFIX_OPTION, 0)))

    def _spare_the_cache_manager(self) -> None:
        """Do without it what is known already: 1 ms a step of 256 requests, in which the GPU would wait."""
        manager: Any = self.kv_cache_manager
        coordinator: Any = manager.coordinator
        size, layers = coordinator.block_size, coordinator.single_type_managers[0]
        cached, blocks, nothing = layers.num_cached_block, layers.req_to_blocks, manager.empty_kv_cache_blocks
        coordinator.find_longest_cache_hit = remember_blocks(coordinator.find_longest_cache_hit, size)
        manager.allocate_slots = allocate_where_needed(manager.allocate_slots, size, blocks, cached, nothing)
        if manager.enable_caching:
            manager.cache_blocks = cache_where_full(manager.cache_blocks, size, cached)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule a step; one in `prefill_schedule_interval` admits prompts while others decode.

        A step without prompts runs in full CUDA graphs; prompts that come one after another share a step. vLLM does
        this for data parallelism alone (https://github.com/vllm-project/vllm/pull/54627), and then decides by itself.
        """
        if self.parallel_config.data_parallel_size == 1:
            throttle_prefills = bool(next(self._steps) % self.scheduler_config.prefill_schedule_interval)
        return super().schedule(throttle_prefills)


class SharedPrefixAsyncScheduler(SharedPrefixScheduler, AsyncScheduler):
    """The same on top of vLLM's asynchronous scheduler."""


def _only_hashes_count(coordinator: Any) -> bool:
    """Whether the hash of a block alone decides if the block is a hit.

    With windows, a draft model's dropped last block and context parallelism the blocks behind it decide too.
    """
    return (
        type(coordinator) is UnitaryKVCacheCoordinator
        and type(coordinator.single_type_managers[0]) is FullAttentionManager
        and not coordinator.eagle_group_ids
        and coordinator.dcp_world_size * coordinator.pcp_world_size == 1
    )
