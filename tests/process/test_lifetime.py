"""A process that ends with its parent: real processes, and a parent that is killed."""

import multiprocessing
import os
import subprocess
import sys
import time

import psutil
import pytest

from borg_serve.vllm_plugin.lifetime import end_with_parent
from tests.waiting import wait_until

PARENT = """
import multiprocessing, sys, time
from tests.process.test_lifetime import child

if __name__ == "__main__":
    multiprocessing.get_context(sys.argv[1]).Process(target=child).start()
    time.sleep(600)
"""


def child() -> None:
    """What vLLM's processes do first, and then something that takes long."""
    end_with_parent()
    end_with_parent()  # a worker in the engine's process asks again
    print(os.getpid(), flush=True)
    time.sleep(600)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_lifetime_ends_with_the_parents(method: str) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, method], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        left = psutil.Process(int(parent.stdout.readline()))
        try:
            assert left.ppid() == parent.pid
            parent.kill()
            parent.wait()
            wait_until("it has ended", lambda: not left.is_running(), 30)
        finally:
            if left.is_running():
                left.kill()


def test_lifetime_of_a_process_without_a_parent_of_its_kind_is_its_own() -> None:
    """A Ray worker, or the process of somebody who imports vLLM."""
    assert multiprocessing.parent_process() is None
    look = "import threading; from borg_serve.vllm_plugin.lifetime import end_with_parent as e; e(); "
    look += "print([thread.name for thread in threading.enumerate()])"
    assert subprocess.check_output([sys.executable, "-c", look], text=True).strip() == "['MainThread']"
