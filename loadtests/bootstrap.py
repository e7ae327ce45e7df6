"""Ratios of two sets of repeated measurements, with an interval.

It knows numbers only.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

__all__ = ["Ratio", "ratio"]


@dataclass(frozen=True)
class Ratio:
    """median(ours) / median(theirs), and the 95% percentile-bootstrap interval of it (Efron 1979)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio(ours: Sequence[float], theirs: Sequence[float], resamples: int = 5000, seed: int = 0) -> Ratio:
    """Ratio of the medians of two samples of repeated blocks. Raises ValueError for fewer than five repeats."""
    if min(len(ours), len(theirs)) < 5:
        raise ValueError(f"a ratio needs at least 5 repeats of each side, got {len(ours)} and {len(theirs)}")
    rng = random.Random(seed)
    values = sorted(
        median(rng.choices(ours, k=len(ours))) / median(rng.choices(theirs, k=len(theirs))) for _ in range(resamples)
    )
    low, high = values[int(0.025 * resamples)], values[int(0.975 * resamples) - 1]
    return Ratio(median(ours) / median(theirs), low, high)
