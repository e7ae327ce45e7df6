"""What a vLLM that borg-serve did not start has loaded, told by a process of its own: `--worker-extension-cls`."""

import sys
from inspect import signature
from typing import Any

PACKAGE = "borg_serve"


def loaded() -> list[str]:
    """Modules of ours in this process."""
    return sorted(name for name in sys.modules if name.partition(".")[0] == PACKAGE)


class Report:
    """A method more for vLLM's worker. With one worker process and no other, it speaks for the engine's core too."""

    def report(self) -> dict[str, Any]:
        from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

        worker: Any = self
        scheduler = worker.vllm_config.scheduler_config.get_scheduler_cls()
        return {
            "loaded": loaded(),
            "scheduler": f"{scheduler.__module__}.{scheduler.__name__}",
            "worker": f"{type(self).__module__}.{type(self).__name__}",
            "polls_s": signature(SpinCondition).parameters["busy_loop_s"].default,
            "hasher": sys.modules["vllm.v1.engine.core"].get_request_block_hasher.__module__,
        }
