"""CUDA graphs of their own for steps without prompts, where all steps run in full graphs.

With `cudagraph_mode: FULL` vLLM captures one graph for each number of tokens, for whatever a step of so many tokens
holds. Attention of short rows with one token each is faster when it may count on that.
"""

from dataclasses import replace
from typing import Any

from borg_serve.upstream import pinned

with pinned("plugin"):
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager

__all__ = ["SHORT", "DecodeGraphs", "capture_decodes_apart"]

SHORT = 512
"""Most tokens of a row behind the prefix for which `kernels.decode` is used. With rows of up to 260 the two passes take
58 us a layer instead of 72 at 256 rows (H200); of up to 2,000 they take 202 instead of 171."""


class DecodeGraphs(ModelCudaGraphManager):
    """Captures a second graph for each number of tokens that may all be of different requests."""

    short = True
    """Whether the next step's rows are short enough for these."""

    def _init_candidates(self) -> None:
        super()._init_candidates()
        if self.cudagraph_mode is not CUDAGraphMode.FULL or self.decode_query_len != 1:
            return
        graphs = self._capture_descs.get(CUDAGraphMode.FULL, [])
        twins = {
            graph: replace(graph, num_reqs=graph.num_tokens, uniform_token_count=1)
            for graph in graphs
            if graph.num_tokens <= self.max_num_reqs and graph.num_ubatches == 1
        }
        self._capture_descs[CUDAGraphMode.FULL] = [
            each for graph in graphs for each in (graph, twins.get(graph)) if each
        ]
        for found in self._candidates.values():
            found[:0] = [twins[graph] for graph in found if graph in twins]

    def dispatch(
        self, num_reqs: int, num_tokens: int, uniform_token_count: int | None, *args: Any, **more: Any
    ) -> BatchExecutionDescriptor:
        """Find a step's graph; one for whatever a step holds if its rows are long."""
        return super().dispatch(num_reqs, num_tokens, uniform_token_count if self.short else None, *args, **more)

    def look(self, step: SchedulerOutput, prefix_tokens: int) -> None:
        """Note whether the step's rows are short. A row that begins is the prefix and a prompt: then none is apart."""
        self.short = max(step.scheduled_cached_reqs.num_computed_tokens, default=0) < prefix_tokens + SHORT


def capture_decodes_apart() -> None:
    """Make the model runners of this process use `DecodeGraphs`. vLLM's runner names its own class."""
    module: Any = model_runner
    module.ModelCudaGraphManager = DecodeGraphs
