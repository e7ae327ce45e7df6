"""Ratios of two sets of measurements with a bootstrap interval.

It knows numbers only.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Statistic = Callable[[Array], Array]
"""Along the last axis."""


@dataclass(frozen=True)
class Ratio:
    """A statistic of one side by that of the other, and the 95% percentile-bootstrap interval of it (Efron 1979)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def quantile(percent: float) -> Statistic:
    """The smallest value that at least `percent` % of the values do not exceed."""
    return lambda values: np.quantile(values, percent / 100, axis=-1, method="inverted_cdf")


def _median(values: Array) -> Array:
    found: Array = np.median(values, axis=-1)
    return found


def ratio(
    above: Sequence[float],
    below: Sequence[float],
    statistic: Statistic = _median,
    *,
    blocks: bool = False,
    fewest: int = 5,
    resamples: int = 2000,
    seed: int = 0,
) -> Ratio:
    """statistic(above) / statistic(below). Raises ValueError for fewer than `fewest` values of a side.

    `blocks`: neighbours are not independent, so blocks of n^(1/3) neighbours are drawn around the end (circular block
    bootstrap, Politis & Romano 1992).
    """
    sides = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    if min(side.size for side in sides) < fewest:
        raise ValueError(f"a ratio needs at least {fewest} values of each side, got {len(above)} and {len(below)}")
    rng = np.random.default_rng(seed)
    drawn = [statistic(_resample(side, rng, resamples, blocks)) for side in sides]
    low, high = np.quantile(drawn[0] / drawn[1], (0.025, 0.975), method="inverted_cdf")
    return Ratio(float(statistic(sides[0]) / statistic(sides[1])), float(low), float(high))


def _resample(values: Array, rng: np.random.Generator, resamples: int, blocks: bool) -> Array:
    """`resamples` samples as long as `values`."""
    count = values.size
    length = max(1, round(count ** (1 / 3))) if blocks else 1
    starts = rng.integers(0, count, size=(resamples, math.ceil(count / length)))
    indices = (starts[:, :, None] + np.arange(length)) % count
    taken: Array = values[indices.reshape(resamples, -1)[:, :count]]
    return taken
