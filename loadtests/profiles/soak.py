"""Open loop: a Poisson process for half an hour, or for `--duration` where that is longer."""

from argparse import Namespace

from loadtests.arrivals import poisson
from loadtests.user import MeasuringUser, Profile

__all__ = ["MeasuringUser", "Soak"]

SOAK_S = 1800.0


class Soak(Profile):
    def arrivals(self, options: Namespace) -> list[float]:
        return poisson(options.rate, max(options.duration, SOAK_S), options.seed)
