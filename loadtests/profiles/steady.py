"""Open loop: a Poisson process at a constant rate."""

from argparse import Namespace

from loadtests.arrivals import poisson
from loadtests.user import MeasuringUser, Profile

__all__ = ["MeasuringUser", "Steady"]


class Steady(Profile):
    def arrivals(self, options: Namespace) -> list[float]:
        return poisson(options.rate, options.duration, options.seed)
