"""Open loop: a Poisson process at `--rate`, five times that in the middle fifth."""

from argparse import Namespace

from loadtests.arrivals import spike
from loadtests.user import MeasuringUser, Profile

__all__ = ["MeasuringUser", "Spike"]


class Spike(Profile):
    def arrivals(self, options: Namespace) -> list[float]:
        return spike(options.rate, options.duration, options.seed)
