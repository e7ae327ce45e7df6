"""How many workers share the model of each engine that tests start: one, or two in tensor parallel when asked for."""

import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

import psutil

WORKERS: Final = int(os.environ.get("BORG_TEST_WORKERS", "1"))
SETTINGS: Final[dict[str, int]] = {} if WORKERS == 1 else {"engine.tensor_parallel_size": WORKERS}
"""What a profile needs for them, by dotted key."""


def check(family: Iterable[psutil.Process]) -> None:
    """See that an engine among these processes has them: two are a process each, one has none of its own."""
    names = []
    for process in family:
        with suppress(psutil.NoSuchProcess):
            names += [name for name in process.cmdline()[:1] if name.startswith("VLLM::Worker")]
    assert len(names) == (0 if WORKERS == 1 else WORKERS), names
