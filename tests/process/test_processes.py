"""Finding the engine's processes and seeing that one has ended, on real processes."""

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from borg_serve.serving.processes import any_ended, workers
from tests.waiting import wait_until

PROCESS = """
import subprocess, sys, time
import setproctitle
name, *below = sys.argv[2:]
setproctitle.setproctitle(name)
if below:
    subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[1], *below])
time.sleep(600)
"""


def started(name: str, below: str) -> subprocess.Popen[bytes]:
    """A process of this name, with one of another name below it."""
    return subprocess.Popen([sys.executable, "-c", PROCESS, PROCESS, name, below])


def below(parents: list[subprocess.Popen[bytes]]) -> list[psutil.Process]:
    """The processes that these started, and these."""
    found = [psutil.Process(parent.pid) for parent in parents]
    return found + [child for process in found for child in process.children(recursive=True)]


@pytest.fixture
def engine() -> Iterator[None]:
    """An engine with a worker, beside another child of ours with one that only sounds like it."""
    parents = [started("VLLM::EngineCore", "VLLM::Worker_TP1"), started("helper", "VLLM::Worker_TP0")]
    expected = ["VLLM::EngineCore", "VLLM::Worker_TP0", "VLLM::Worker_TP1", "helper"]
    try:
        wait_until("all have their names", lambda: sorted(one.name() for one in below(parents)) == expected, 20)
        yield
    finally:
        for process in below(parents):
            process.kill()
        for parent in parents:
            parent.wait()


@pytest.mark.usefixtures("engine")
def test_processes_finds_the_engine_core_and_its_workers() -> None:
    found = workers()
    assert [process.name() for process in found] == ["VLLM::EngineCore", "VLLM::Worker_TP1"]
    assert not any_ended(found)
    found[1].kill()  # its parent does not ask for it: it stays, as a zombie
    wait_until("one has ended", lambda: any_ended(found), 10)


def test_processes_without_an_engine_finds_and_misses_none() -> None:
    assert workers() == []
    assert not any_ended([])
