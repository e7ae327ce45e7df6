"""The search for the highest rate that meets an SLO: which rate to try next, and what is known when the search ends.

It knows counts of good requests only. A rate meets the SLO if at least `need` of its requests are good. That is decided
by Wilson's 95% interval of their part (Wilson 1927); a rate that leaves it open is tried again, and its trials counted
together.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Z95 = 1.96


def wilson(good: int, total: int) -> tuple[float, float]:
    """95% score interval of a part."""
    if total == 0:
        return 0.0, 1.0
    part, z2 = good / total, Z95**2
    centre = (part + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 * math.sqrt(part * (1 - part) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass
class Rate:
    """All trials at one rate."""

    rate: float
    good: int = 0
    total: int = 0
    trials: int = 0

    def verdict(self, need: float) -> bool | None:
        """True: meets; False: does not; None: the requests so far leave it open."""
        low, high = wilson(self.good, self.total)
        return True if low >= need else False if high < need else None


@dataclass
class Search:
    """Doubles or halves until the answer is bracketed, then bisects (geometrically), at most `budget` trials."""

    start: float
    need: float = 0.9
    budget: int = 8
    again: int = 2
    """How often a rate is tried before its point estimate decides."""
    tolerance: float = 1.1
    """The search ends when the bracket's ends are this factor apart."""
    tried: list[Rate] = field(default_factory=list)

    def meets(self, rate: Rate) -> bool:
        decided = rate.verdict(self.need)
        return rate.good >= self.need * rate.total if decided is None else decided

    def bracket(self) -> tuple[float | None, float | None]:
        """(highest rate that met the SLO below every one that did not, lowest that did not)."""
        over = [rate.rate for rate in self.tried if not self.meets(rate)]
        high = min(over) if over else None
        under = [rate.rate for rate in self.tried if self.meets(rate) and (high is None or rate.rate < high)]
        return (max(under) if under else None), high

    def next_rate(self) -> float | None:
        """The rate to try next, or None when the search has ended."""
        if sum(rate.trials for rate in self.tried) >= self.budget:
            return None
        if not self.tried:
            return self.start
        last = self.tried[-1]
        if last.verdict(self.need) is None and last.trials < self.again:
            return last.rate
        low, high = self.bracket()
        if high is None:
            return max(rate.rate for rate in self.tried) * 2
        if low is None:
            return min(rate.rate for rate in self.tried) / 2
        return None if high / low <= self.tolerance else math.sqrt(low * high)

    def observe(self, rate: float, good: int, total: int) -> None:
        """Take the result of a trial at the rate that `next_rate` gave."""
        if not self.tried or self.tried[-1].rate != rate:
            self.tried.append(Rate(rate))
        last = self.tried[-1]
        last.good, last.total, last.trials = last.good + good, last.total + total, last.trials + 1

    def document(self) -> dict[str, object]:
        low, high = self.bracket()
        rows = [
            {
                "rate": rate.rate,
                "good": rate.good,
                "requests": rate.total,
                "trials": rate.trials,
                "interval": wilson(rate.good, rate.total),
                "meets": self.meets(rate),
                "decided": rate.verdict(self.need) is not None,
            }
            for rate in self.tried
        ]
        return {"need": self.need, "meets": low, "does_not": high, "rates": rows}


def answer(found: Mapping[str, Any]) -> str:
    """What a search found, by its document."""
    meets, not_ = (f"{found[name]:.3g}" if found[name] else "none" for name in ("meets", "does_not"))
    return f"Highest rate that met the SLO: {meets} requests/s; lowest that did not: {not_}."
