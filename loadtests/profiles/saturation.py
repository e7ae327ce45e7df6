"""The highest rate that meets `--slo`: Poisson trials of `--duration` seconds each, from `--rate` on, bisected.

What is judged is the part of good requests, against the SLO's `good_part_min`, or 0.9.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from borg_serve.errors import ConfigError, Problem
from loadtests.generator.arrivals import poisson
from loadtests.generator.records import Record
from loadtests.generator.saturation import Search
from loadtests.generator.user import MeasuringUser, Profile
from loadtests.generator.workload import WORKLOADS, Session, sessions
from loadtests.report.slo import load

__all__ = ["MeasuringUser", "Saturation"]

NEED = 0.9


class Saturation(Profile):
    name = "saturation"
    rate = 0.0

    def check(self, options: Namespace) -> None:
        if options.slo is None:
            cure = "Name a file: --slo loadtests/slo/demo-cpu.yaml."
            raise ConfigError([Problem("--slo", "is needed to search for the rate that meets it", None, cure)])
        self.slo = load(Path(options.slo))
        need = NEED if self.slo.good_part_min is None else self.slo.good_part_min
        self.search = Search(options.rate, need, options.trials)

    def phase(self, number: int, options: Namespace, before: Sequence[Record]) -> list[Session] | None:
        if number > 0:
            self.search.observe(self.rate, sum(map(self.slo.good, before)), len(before))
            print(f"saturation: {self.rate:.3g} requests/s: {self.search.tried[-1]}", flush=True)
        following = self.search.next_rate()
        self.found = self.search.document()
        if following is None:
            return None
        self.rate = following
        seed = options.seed + number
        limits = options.max_prompt, options.max_output
        return sessions(poisson(following, options.duration, seed), WORKLOADS[options.workload], seed, limits)
