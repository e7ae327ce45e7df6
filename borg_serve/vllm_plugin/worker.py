"""vLLM's GPU worker with shared-prefix attention: it copies the prefix's token ids once and compiles for its own GPU.

vLLM creates it in each worker process (`worker_cls`). It does not know which prefix the prompts share.
"""

import os
from typing import Any

from borg_serve.upstream import moved, pinned
from borg_serve.vllm_plugin.graphs import DecodeGraphs, capture_decodes_apart
from borg_serve.vllm_plugin.lifetime import end_with_parent
from borg_serve.vllm_plugin.prefix_memo import remember_ids

with pinned("plugin"):
    from vllm import envs
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_worker import Worker

__all__ = ["GpuWorker"]


class GpuWorker(Worker):
    """vLLM's GPU worker; `attention_backend: CUSTOM` is the shared-prefix attention here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        end_with_parent()
        capture_decodes_apart()
        register_backend(AttentionBackendEnum.CUSTOM, "borg_serve.vllm_plugin.attention.SharedPrefixBackend")
        super().__init__(*args, **kwargs)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Run a step, in the graph that fits its rows."""
        graphs = getattr(self.model_runner, "cudagraph_manager", None)
        if isinstance(graphs, DecodeGraphs):
            graphs.look(scheduler_output)
        return super().execute_model(scheduler_output)

    def init_device(self) -> None:
        """Take the GPU, and give it a compile cache and a table of token ids of its own.

        vLLM's cache directories name the worker's rank, the code in them names the GPU. All GPUs of a host are visible
        to a Ray worker: a replica on the second GPU would load code for the first and end with "invalid argument".
        """
        super().init_device()
        device: Any = self.device
        os.environ["VLLM_CACHE_ROOT"] = os.path.join(envs.VLLM_CACHE_ROOT, f"cuda{device.index}")
        if not self.use_v2_model_runner:
            return  # model runner V1 has no such table
        table: Any = getattr(getattr(self.model_runner, "req_states", None), "all_token_ids", None)
        if not callable(getattr(table, "stage_write", None)):
            raise moved("plugin", "vllm", "req_states.all_token_ids.stage_write of the GPU's model runner")
        table.stage_write = remember_ids(table.stage_write)
