"""CUDA graphs of their own for steps without prompts, where all steps run in full graphs.

With `cudagraph_mode: FULL` vLLM captures one graph for each number of tokens, for whatever a step of so many tokens
holds. Attention of short rows with one token each is faster when it may count on that.
"""

from dataclasses import replace
from typing import Any

from borg_serve.engine.attention_choice import PREFIX_OPTION
from borg_serve.upstream import pinned

with pinned("plugin"):
    from vllm.config.compilation import CUDAGraphMode
    from vllm.utils.torch_utils import is_quantized_kv_cache
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager

__all__ = ["SHORT", "DecodeGraphs", "capture_decodes_apart"]

SHORT = 512
"""Most tokens of a row behind the prefix for which `kernels.decode` is used (docs/results/second-pass.md)."""


class DecodeGraphs(ModelCudaGraphManager):
    """Captures a second graph for each number of tokens that may all be of different requests."""

    short = True
    """Whether the next step's rows are short enough for these."""

    def _init_candidates(self) -> None:
        super()._init_candidates()
        attention, caches = self.vllm_config.attention_config, self.vllm_config.cache_config
        used = attention.backend is AttentionBackendEnum.CUSTOM and not is_quantized_kv_cache(caches.cache_dtype)
        if not used or self.cudagraph_mode is not CUDAGraphMode.FULL or self.decode_query_len != 1:
            return  # a graph takes memory and time, and these would be like vLLM's
        graphs = self._capture_descs.get(CUDAGraphMode.FULL, [])
        twins = {
            graph: replace(graph, num_reqs=graph.num_tokens, uniform_token_count=1)
            for graph in graphs
            if graph.num_tokens <= self.max_num_reqs and graph.num_ubatches == 1
        }
        self._capture_descs[CUDAGraphMode.FULL] = sorted(
            [*graphs, *twins.values()], key=lambda graph: -graph.num_tokens
        )
        for found in self._candidates.values():
            found[:0] = [twins[graph] for graph in found if graph in twins]

    def dispatch(
        self, num_reqs: int, num_tokens: int, uniform_token_count: int | None, *args: Any, **more: Any
    ) -> BatchExecutionDescriptor:
        """Find a step's graph; one for whatever a step holds if its rows are long."""
        return super().dispatch(num_reqs, num_tokens, uniform_token_count if self.short else None, *args, **more)

    def look(self, step: SchedulerOutput) -> None:
        """Note whether the step's rows are short. A row that begins is the prefix and a prompt: then none is apart."""
        options: Any = self.vllm_config.additional_config or {}
        limit = options.get(PREFIX_OPTION, 0) + SHORT
        self.short = max(step.scheduled_cached_reqs.num_computed_tokens, default=0) < limit


def capture_decodes_apart() -> None:
    """Make the model runners of this process use `DecodeGraphs`. vLLM's runner names its own class."""
    vars(model_runner)["ModelCudaGraphManager"] = DecodeGraphs
