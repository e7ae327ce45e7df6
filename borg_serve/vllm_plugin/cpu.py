"""vLLM's CPU worker that shares its cores with other processes and keeps seeds while a prompt is computed in parts.

vLLM creates it in each worker process (`worker_cls`).
"""

from typing import Any

from borg_serve.upstream import pinned
from borg_serve.vllm_plugin.lifetime import end_with_parent
from borg_serve.vllm_plugin.patches import sleep_while_waiting, talk_through_gloo

with pinned("plugin"):
    from vllm.v1.worker import cpu_worker

__all__ = ["CpuWorker"]


class CpuWorker(cpu_worker.CPUWorker):
    """vLLM's CPU worker."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        end_with_parent()
        sleep_while_waiting()
        talk_through_gloo()
        super().__init__(*args, **kwargs)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample without the generators of requests whose prompt is not whole yet.

        Model runner V1 samples after each part of a prompt and then rewinds a seed's generator by an offset that only
        CUDA generators have: on a CPU that ended the engine. V2 has no generators.
        """
        if self.use_v2_model_runner:
            return super().sample_tokens(grammar_output)
        runner: Any = self.model_runner
        unfinished = runner.discard_request_mask.np
        generators = runner.input_batch.generators
        kept = {row: generators.pop(row) for row in list(generators) if unfinished[row]}
        try:
            return super().sample_tokens(grammar_output)
        finally:
            generators.update(kept)
