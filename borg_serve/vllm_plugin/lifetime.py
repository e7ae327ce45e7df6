"""End a process when its parent has ended. It does not know vLLM."""

import multiprocessing
import os
import threading
import time
from functools import cache

__all__ = ["end_with_parent"]

CHECK_S = 1.0


@cache
def end_with_parent() -> None:
    """End this process, once its parent has ended; a process without a parent of multiprocessing's stays.

    vLLM does not notice that a server was killed: its engine would run on and keep its memory
    (https://github.com/vllm-project/vllm/issues/55510).
    """
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        threading.Thread(target=_watch, args=(parent.pid,), name="end-with-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(CHECK_S)
    os._exit(1)  # nobody is left to answer to
