"""Open loop: requests or conversations arrive as `--arrivals` says, whether or not earlier ones have ended.

The turns of one conversation are no open loop: nobody answers before having read.
"""

from argparse import Namespace
from collections.abc import Sequence

from loadtests.generator.arrivals import ARRIVALS
from loadtests.generator.records import Record
from loadtests.generator.user import MeasuringUser, Profile
from loadtests.generator.workload import WORKLOADS, Session, sessions

__all__ = ["MeasuringUser", "OpenLoop"]


class OpenLoop(Profile):
    def phase(self, number: int, options: Namespace, before: Sequence[Record]) -> list[Session] | None:
        if number > 0:
            return None
        self.name = options.arrivals
        turns, think_s = (options.turns, options.think) if options.arrivals == "conversation" else (1, 0.0)
        limits = options.max_prompt, options.max_output
        due = ARRIVALS[options.arrivals](options)
        return sessions(due, WORKLOADS[options.workload], options.seed, limits, turns, think_s)
