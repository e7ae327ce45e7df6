"""Made-up records and runs for the tests of what judges and reports them."""

from dataclasses import replace
from random import Random
from typing import Any

from loadtests.generator.records import Outcome, Record

GOOD = Record(
    0, 0, 0, 0, True, 0, 1000, 101_000, 301_000, 302_000, [100_000, 100_000], 50, 40, 3, Outcome.OK, 200, "stop"
)


def record(index: int = 0, **changes: Any) -> Record:
    """TTFT 100 ms (101 from schedule), TPOT 100 ms, E2E 301 ms."""
    return replace(GOOD, session=index, **changes)


def many(count: int, slower: float = 1.0, seed: int = 0) -> list[Record]:
    """Requests a second apart whose latencies vary by a fifth."""
    rng = Random(seed)
    found = []
    for index in range(count):
        at = index * 1_000_000
        first = at + round(100_000 * slower * rng.uniform(0.8, 1.2))
        gap = round(20_000 * slower * rng.uniform(0.8, 1.2))
        end = first + 2 * gap
        moments = {"t_sched_us": at, "t_send_us": at, "t_first_us": first, "t_last_us": end, "t_end_us": end}
        found.append(record(index, **moments, itl_us=[gap, gap]))
    return found


def run(**changes: Any) -> dict[str, Any]:
    """What Locust's side says of a run."""
    options = {"host": "http://x", "rate": 1.0, "duration": 10.0, "seed": 0, "workload": "short", "cache": "warm"}
    phases = [{"phase": 0, "begin_us": 0, "sessions": 1}]
    return {"profile": "steady", "whole": True, "cpu_warning": False, "phases": phases, "options": options, **changes}
