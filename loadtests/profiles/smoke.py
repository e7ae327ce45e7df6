"""Requests at equal distances: does it work at all?"""

from argparse import Namespace

from loadtests.arrivals import even
from loadtests.user import MeasuringUser, Profile

__all__ = ["MeasuringUser", "Smoke"]


class Smoke(Profile):
    def arrivals(self, options: Namespace) -> list[float]:
        return even(options.rate, options.duration)
