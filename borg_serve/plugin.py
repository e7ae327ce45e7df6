"""What vLLM loads into each of its own processes (a general plugin): an engine ends with the server it belongs to.

vLLM's engine does not notice that its parent was killed, and would keep its memory, on a GPU all of it, until somebody
looks. It does not know vLLM.
"""

import multiprocessing
import os
import threading
import time

__all__ = ["register"]

LOOK_S = 1.0


def register() -> None:
    """Watch the parent of a process that was started by vLLM; do nothing in any other."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        threading.Thread(target=_end_with, args=(parent.pid,), name="end-with-parent", daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process, without ceremony, when its parent has ended: there is nobody left to answer to."""
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)
