"""When requests arrive: moments in seconds from the start, drawn before the run, the same for the same seed.

It knows stochastic processes only. Rates are requests a second.
"""

import csv
import random
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

from borg_serve.errors import ConfigError, Problem

SOAK_S = 1800.0


def even(rate: float, duration_s: float) -> list[float]:
    """Equal distances."""
    return [index / rate for index in range(round(rate * duration_s))]


def gamma(rate: float, duration_s: float, burstiness: float, seed: int) -> list[float]:
    """Gamma distances with mean 1 / rate and coefficient of variation 1 / sqrt(burstiness).

    `burstiness` is the gamma's shape, as vLLM's own benchmark names it: 1 is Poisson, less comes in bursts, more is
    more even. The first arrival comes a distance after the start.
    """
    return list(_until(duration_s, random.Random(seed), rate, burstiness))


def poisson(rate: float, duration_s: float, seed: int) -> list[float]:
    """A Poisson process: exponential distances, what many users who do not know of each other make."""
    return gamma(rate, duration_s, 1.0, seed)


def _until(duration_s: float, rng: random.Random, rate: float, burstiness: float) -> Iterator[float]:
    now = rng.gammavariate(burstiness, 1 / (rate * burstiness))
    while now < duration_s:
        yield now
        now += rng.gammavariate(burstiness, 1 / (rate * burstiness))


def ramp(rate: float, duration_s: float, seed: int) -> list[float]:
    """A Poisson process whose rate grows from 0 to `rate` in a straight line (thinning, Lewis & Shedler 1979)."""
    rng = random.Random(seed)
    return [due for due in _until(duration_s, rng, rate, 1.0) if rng.random() < due / duration_s]


def spike(rate: float, duration_s: float, seed: int, factor: float = 5.0) -> list[float]:
    """A Poisson process at `rate`, and at `factor` times that in the middle fifth of the time (by thinning)."""
    rng = random.Random(seed)
    inside = (0.4 * duration_s, 0.6 * duration_s)
    drawn = _until(duration_s, rng, rate * factor, 1.0)
    return [due for due in drawn if inside[0] <= due < inside[1] or rng.random() < 1 / factor]


ARRIVALS: dict[str, Callable[[Namespace], list[float]]] = {
    "smoke": lambda o: even(o.rate, o.duration),
    "steady": lambda o: poisson(o.rate, o.duration, o.seed),
    "bursty": lambda o: gamma(o.rate, o.duration, o.burstiness, o.seed),
    "ramp": lambda o: ramp(o.rate, o.duration, o.seed),
    "spike": lambda o: spike(o.rate, o.duration, o.seed),
    "soak": lambda o: poisson(o.rate, max(o.duration, SOAK_S), o.seed),
    "conversation": lambda o: poisson(o.rate, o.duration, o.seed),
}
"""Profiles of one phase, by what the options say."""


def read_trace(file: Path) -> list[tuple[float, int, int]]:
    """(second, prompt tokens, output tokens) of a CSV with the columns `timestamp_s,prompt_tokens,output_tokens`.

    Sorted, and shifted so that the first is due at 0. Raises ConfigError for a file that is not such a table.
    """
    cure = "The first line must be timestamp_s,prompt_tokens,output_tokens, each other one three numbers."
    try:
        with file.open(encoding="utf-8", newline="") as text:
            rows = list(csv.DictReader(text))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem(str(file), f"cannot be read: {error}", str(file), cure)]) from None
    found: list[tuple[float, int, int]] = []
    for number, row in enumerate(rows, 2):
        try:
            due, prompt, output = float(row["timestamp_s"]), int(row["prompt_tokens"]), int(row["output_tokens"])
            if not (due >= 0 and prompt >= 1 and output >= 1):
                raise ValueError("out of range")
        except (KeyError, TypeError, ValueError):
            raise ConfigError([Problem(f"{file}: line {number}", "is no request", dict(row), cure)]) from None
        found.append((due, prompt, output))
    if not found:
        raise ConfigError([Problem(str(file), "holds no request", 0, cure)])
    found.sort()
    return [(due - found[0][0], prompt, output) for due, prompt, output in found]
