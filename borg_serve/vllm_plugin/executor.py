"""vLLM's executor of several worker processes, for a CPU: it sleeps while it waits for them.

vLLM creates it in the engine's process (`distributed_executor_backend`).
"""

from borg_serve.upstream import pinned

with pinned("plugin"):
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

__all__ = ["SleepingExecutor"]


class SleepingExecutor(MultiprocExecutor):
    """Leaves the cores to the workers between two messages."""

    def _init_executor(self) -> None:
        from borg_serve.vllm_plugin.patches import sleep_while_waiting

        sleep_while_waiting()
        super()._init_executor()
