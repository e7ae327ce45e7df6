"""Conversations begin as a Poisson process; each turn carries all before it, after a think time.

The arrivals are an open loop, the turns of one conversation are not: nobody answers before having read.
"""

from argparse import Namespace
from collections.abc import Sequence

from loadtests.arrivals import poisson
from loadtests.records import Record
from loadtests.user import MeasuringUser, Profile
from loadtests.workload import WORKLOADS, Session, sessions

__all__ = ["Conversation", "MeasuringUser"]


class Conversation(Profile):
    def phase(self, number: int, options: Namespace, before: Sequence[Record]) -> list[Session] | None:
        if number > 0:
            return None
        arrivals = poisson(options.rate, options.duration, options.seed)
        limits = options.max_prompt, options.max_output
        workload = WORKLOADS[options.workload]
        return sessions(arrivals, workload, options.seed, limits, options.turns, options.think)
