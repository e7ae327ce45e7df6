"""Open loop: a Poisson process whose rate grows from nothing to `--rate`."""

from argparse import Namespace

from loadtests.arrivals import ramp
from loadtests.user import MeasuringUser, Profile

__all__ = ["MeasuringUser", "Ramp"]


class Ramp(Profile):
    def arrivals(self, options: Namespace) -> list[float]:
        return ramp(options.rate, options.duration, options.seed)
