"""Waiting for what another process does: on a shared machine nothing is due at a certain second."""

import time
from collections.abc import Callable


def wait_until(what: str, true: Callable[[], object], limit_s: float = 60.0, every_s: float = 0.1) -> float:
    """Wait until `true()`; the seconds it took. Fails naming `what`."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < limit_s, f"{what}: not within {limit_s:g} s"
        time.sleep(every_s)
    return time.monotonic() - began


def await_room_in_the_minute(needed_s: float = 10.0) -> None:
    """Wait until the wall clock's minute has so much left: where two meet, `limits` lets one more request through."""
    left_s = 60 - time.time() % 60
    if left_s < needed_s:
        time.sleep(left_s)
