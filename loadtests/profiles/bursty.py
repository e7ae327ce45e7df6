"""Open loop: gamma distances, in bursts for `--burstiness` under 1."""

from argparse import Namespace

from loadtests.arrivals import gamma
from loadtests.user import MeasuringUser, Profile

__all__ = ["Bursty", "MeasuringUser"]


class Bursty(Profile):
    def arrivals(self, options: Namespace) -> list[float]:
        return gamma(options.rate, options.duration, options.burstiness, options.seed)
