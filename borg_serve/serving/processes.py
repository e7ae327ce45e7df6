"""Find, watch and stop the engine's child processes.

It knows how vLLM names its processes. It does not know what they do.
"""

import contextlib
from collections.abc import Collection, Iterable, Sequence

import psutil

__all__ = ["any_ended", "at_work", "children", "kill", "workers"]

ENGINE, WORKER = "VLLM::EngineCore", "VLLM::Worker"
"""What the names of vLLM's processes begin with, once they have set them."""


def children() -> list[psutil.Process]:
    """All descendants of this process."""
    return psutil.Process().children(recursive=True)


def workers() -> list[psutil.Process]:
    """The engine core, if this process started it, and its workers; without the short-lived processes they start."""
    cores = [child for child in psutil.Process().children() if child.name().startswith(ENGINE)]
    return cores + [child for core in cores for child in core.children() if child.name().startswith(WORKER)]


def any_ended(processes: Sequence[psutil.Process]) -> bool:
    """Whether one of them has ended. vLLM reports a lost worker only after it has ended the others, up to 8 s later."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(process.status() == psutil.STATUS_ZOMBIE for process in processes)
    return True


def at_work(root: int, excluded: Collection[int]) -> bool:
    """Whether a descendant of process `root`, some pids excluded, runs or waits for the disk, and none is stopped."""
    states = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(root).children(recursive=True):
            if process.pid not in excluded:
                states.add(process.status())
    return psutil.STATUS_STOPPED not in states and bool(states & {psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP})


def kill(known: Iterable[psutil.Process] = ()) -> None:
    """Kill all descendants of this process with SIGKILL, the only signal that a stopped process takes.

    `known`: descendants found earlier. A process whose parent was killed is no longer found as a descendant.
    """
    for child in {*known, *children()}:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
