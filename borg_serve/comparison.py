"""Two load reports beside each other: ratios with intervals, and a plain verdict for each figure.

It knows the JSON that a load run writes (`run.json`), and statistics. It measures nothing.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from borg_serve.errors import ConfigError, Problem

__all__ = ["Comparison", "compare", "load_run", "table"]

FORMAT = "borg-serve load run 1"
RESAMPLES = 2000
FEWEST = 20
"""Requests of each side below which no interval is given."""
Word = Literal["faster", "slower", "no difference shown", "too few requests"]
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Comparison:
    """One figure of both sides; `ratio` is B / A, with its 95% interval."""

    name: str
    a: float | None
    b: float | None
    ratio: float | None
    low: float | None
    high: float | None
    verdict: Word
    """What B is, beside A."""


def load_run(file: Path) -> dict[str, Any]:
    """A run's document. Raises ConfigError for another file."""
    cure = "Name the run.json of a load report (make load)."
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([Problem(str(file), "cannot be read as JSON", str(error), cure)]) from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        got = found.get("format") if isinstance(found, dict) else type(found).__name__
        raise ConfigError([Problem(str(file), f"is no {FORMAT!r}", got, cure)])
    return found


def compare(a: Mapping[str, Any], b: Mapping[str, Any], seed: int = 0) -> tuple[list[Comparison], list[str]]:
    """(every figure of both runs, what the reader should know).

    Intervals are percentile intervals of a circular block bootstrap over the requests in the order of their schedule
    (Politis & Romano 1992, blocks of n^(1/3)): neighbours share a queue and are not independent. They hold what varies
    inside a run, not what varies from run to run.
    """
    rng = np.random.default_rng(seed)
    sides = _rows(a), _rows(b)
    found = []
    for name, column, statistic, better in _figures():
        values = [np.array([row[column] for row in side if row[column] is not None]) for side in sides]
        found.append(_one(name, (values[0], values[1]), statistic, better, rng))
    return found, _notes(a, b)


def _rows(document: Mapping[str, Any]) -> list[dict[str, float | None]]:
    """The figures of each request that ended well, in the order of the schedule."""
    rows = []
    for record in document["records"]:
        if record["outcome"] != "ok" or record["t_first_us"] is None:
            continue
        n = record["output_tokens"]
        decode = record["t_last_us"] - record["t_first_us"]
        rows.append(
            {
                "ttft": (record["t_first_us"] - record["t_sched_us"]) / 1e3,
                "tpot": decode / (n - 1) / 1e3 if n > 1 else None,
                "e2e": (record["t_end_us"] - record["t_sched_us"]) / 1e3,
                "speed": n / ((record["t_end_us"] - record["t_sched_us"]) / 1e6),
            }
        )
    return rows


def _figures() -> list[tuple[str, str, Callable[[Array], Array], Literal["less", "more"]]]:
    def quantile(percent: float) -> Callable[[Array], Array]:
        return lambda values: np.quantile(values, percent / 100, axis=-1, method="inverted_cdf")

    found: list[tuple[str, str, Callable[[Array], Array], Literal["less", "more"]]] = [
        (f"{metric.upper()} p{percent}, ms", metric, quantile(percent), "less")
        for metric in ("ttft", "tpot", "e2e")
        for percent in (50, 95)
    ]
    return [*found, ("output tokens/s of one request, median", "speed", quantile(50), "more")]


def _one(
    name: str,
    values: tuple[Array, Array],
    statistic: Callable[[Array], Array],
    better: Literal["less", "more"],
    rng: np.random.Generator,
) -> Comparison:
    a, b = (float(statistic(side)) if side.size else None for side in values)
    if a is None or b is None or min(side.size for side in values) < FEWEST or a <= 0:
        return Comparison(name, a, b, b / a if a and b is not None else None, None, None, "too few requests")
    ratios = np.sort(statistic(_resample(values[1], rng)) / statistic(_resample(values[0], rng)))
    low, high = float(ratios[int(0.025 * RESAMPLES)]), float(ratios[int(0.975 * RESAMPLES) - 1])
    verdict: Word = "no difference shown"
    if low > 1 or high < 1:
        verdict = "faster" if (high < 1) == (better == "less") else "slower"
    return Comparison(name, a, b, b / a, low, high, verdict)


def _resample(values: Array, rng: np.random.Generator) -> Array:
    """RESAMPLES samples as long as `values`, of blocks of neighbours taken around the end."""
    count = values.size
    length = max(1, round(count ** (1 / 3)))
    starts = rng.integers(0, count, size=(RESAMPLES, math.ceil(count / length)))
    places = (starts[:, :, None] + np.arange(length)) % count
    taken: Array = values[places.reshape(RESAMPLES, -1)[:, :count]]
    return taken


def _notes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    notes = []
    for side, document in (("A", a), ("B", b)):
        if document["void"]:
            notes.append(f"{side} is void: {'; '.join(document['void'])}")
        failed = document["figures"]["requests"] - document["figures"]["ok"]
        if failed:
            notes.append(f"{side}: {failed} of {document['figures']['requests']} requests failed and are left out")
    skipped = {"host", "slo", "model", "system"}
    mine, theirs = (
        {"profile": a["run"]["profile"], **a["run"]["options"]},
        {"profile": b["run"]["profile"], **b["run"]["options"]},
    )
    differ = [name for name in mine if name not in skipped and mine[name] != theirs.get(name)]
    if differ:
        notes.append(
            "the runs differ in " + ", ".join(f"{name} ({mine[name]} and {theirs.get(name)})" for name in differ)
        )
    notes.append("one run a side: the intervals hold what varies inside a run, not from run to run")
    return notes


def table(found: list[Comparison], notes: list[str]) -> str:
    """For a terminal."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    lines = [f"{'':40} {'A':>10} {'B':>10} {'B / A':>8}  {'95% interval':16}  B is"]
    for row in found:
        interval = "" if row.low is None else f"[{number(row.low)}, {number(row.high)}]"
        values = f"{number(row.a):>10} {number(row.b):>10} {number(row.ratio):>8}"
        lines.append(f"{row.name:40} {values}  {interval:16}  {row.verdict}")
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])
