"""The processes that descend from this one: which of them an engine cannot do without, whether one has ended, the end.

It knows how vLLM names its processes. It does not know what they do.
"""

import contextlib
from collections.abc import Iterable, Sequence

import psutil

__all__ = ["children", "crew", "end", "ended"]

ENGINE, WORKER = "VLLM::EngineCore", "VLLM::Worker"
"""What the names of vLLM's processes begin with, once they have begun."""


def children() -> list[psutil.Process]:
    """The processes that descend from this one."""
    return psutil.Process().children(recursive=True)


def crew() -> list[psutil.Process]:
    """The engine's core, if this process started it, and its workers; not what those start for a while."""
    cores = [child for child in psutil.Process().children() if child.name().startswith(ENGINE)]
    return cores + [child for core in cores for child in core.children() if child.name().startswith(WORKER)]


def ended(processes: Sequence[psutil.Process]) -> bool:
    """Whether one of them has ended. vLLM tells of a lost worker only when it has ended the others, up to 8 s later."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(process.status() == psutil.STATUS_ZOMBIE for process in processes)
    return True


def end(known: Iterable[psutil.Process] = ()) -> None:
    """Kill the descendants of this process by their ids; a stopped process takes no other signal.

    `known`: descendants of before. When their parent was killed they are no longer found, and run on for a while.
    """
    for child in {*known, *children()}:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
