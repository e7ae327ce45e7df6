"""Service level objectives: one YAML file -> one frozen model, and the verdict of a run against it.

It knows summaries of runs only. Latencies count from the schedule unless the file says `schedule_corrected: false`.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from borg_serve.errors import ConfigError, Problem
from borg_serve.validation import sentence
from borg_serve.yaml_file import read_yaml
from loadtests.generator.records import Record

METRICS = ("ttft", "tpot", "itl", "e2e")
PERCENTS = (50, 90, 95, 99)
Ms = Annotated[float, Field(gt=0)]
Part = Annotated[float, Field(ge=0, le=1)]


class Slo(BaseModel):
    """Every bound is optional, but there must be one."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schedule_corrected: bool = True
    ttft_p50_ms: Ms | None = None
    ttft_p90_ms: Ms | None = None
    ttft_p95_ms: Ms | None = None
    ttft_p99_ms: Ms | None = None
    tpot_p50_ms: Ms | None = None
    tpot_p90_ms: Ms | None = None
    tpot_p95_ms: Ms | None = None
    tpot_p99_ms: Ms | None = None
    itl_p50_ms: Ms | None = None
    itl_p90_ms: Ms | None = None
    itl_p95_ms: Ms | None = None
    itl_p99_ms: Ms | None = None
    e2e_p50_ms: Ms | None = None
    e2e_p90_ms: Ms | None = None
    e2e_p95_ms: Ms | None = None
    e2e_p99_ms: Ms | None = None
    error_rate: Part | None = None
    """The largest part of the requests that may end otherwise than well."""
    goodput_min: Annotated[float, Field(ge=0)] | None = None
    """Good requests a second, at least."""
    good_part_min: Part | None = None
    """Good requests of all, at least."""

    def bounds_ms(self) -> list[tuple[str, int, float]]:
        """(metric, percent, bound) of every latency bound."""
        names = ((metric, percent) for metric in METRICS for percent in PERCENTS)
        found = ((metric, percent, getattr(self, f"{metric}_p{percent}_ms")) for metric, percent in names)
        return [row for row in found if row[2] is not None]

    def good(self, record: Record) -> bool:
        """Whether a request ended well and met every bound: of a metric's bounds that of the highest percentile."""
        bounds = {metric: bound for metric, _, bound in self.bounds_ms()}
        values = {metric: record.metric_ms(metric, self.schedule_corrected) for metric in bounds}
        return record.ok and all(value is not None and value <= bounds[metric] for metric, value in values.items())


@dataclass(frozen=True)
class Verdict:
    """One bound, what was measured, whether it is met; `samples` is how many values the measured one stands on."""

    name: str
    bound: float
    measured: float | None
    met: bool
    samples: int


def load(file: Path) -> Slo:
    """Read an SLO. Raises ConfigError with every problem: file, key, value and what to do."""
    data = read_yaml(file, "Name an existing file, for example loadtests/slo/demo-cpu.yaml.")
    example = "For example: ttft_p99_ms: 5000."
    if not isinstance(data, dict):
        raise ConfigError([Problem(str(file), "must hold bounds", data, example)])
    problems = []
    try:
        slo = Slo.model_validate(data)
        if slo.model_fields_set <= {"schedule_corrected"}:
            problems.append(Problem(str(file), "sets no bound", data, example))
    except ValidationError as error:
        for detail in error.errors():
            key = str(detail["loc"][0])
            what, cure = sentence(detail), "Correct the value."
            if detail["type"] == "extra_forbidden":
                near = difflib.get_close_matches(key, Slo.model_fields, n=1)
                what = "unknown key"
                cure = f"Did you mean `{near[0]}`?" if near else "Remove it; docs/load.md lists the keys."
            problems.append(Problem(f"{file}: {key}", what, detail["input"], cure))
    if problems:
        raise ConfigError(problems)
    return slo


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that at least `percent` % of the values do not exceed; None of none."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * percent // 100) - 1)]


def judge(slo: Slo, records: Sequence[Record], duration_s: float) -> list[Verdict]:
    """Every bound of an SLO against all requests of a run."""
    found = []
    ok = [record for record in records if record.ok]
    for metric, percent, bound in slo.bounds_ms():
        if metric == "itl":
            values = [gap / 1e3 for record in ok for gap in record.itl_us]
        else:
            drawn = (record.metric_ms(metric, slo.schedule_corrected) for record in ok)
            values = [value for value in drawn if value is not None]
        measured = percentile(values, percent)
        met = measured is not None and measured <= bound
        found.append(Verdict(f"{metric}_p{percent}_ms", bound, measured, met, len(values)))
    total, good = len(records), sum(map(slo.good, records))
    parts = {
        "error_rate": 1 - len(ok) / total if total else None,
        "goodput_min": good / duration_s if duration_s > 0 else None,
        "good_part_min": good / total if total else None,
    }
    for name, part in parts.items():
        limit: float | None = getattr(slo, name)
        if limit is not None:
            met = part is not None and (part <= limit if name == "error_rate" else part >= limit)
            found.append(Verdict(name, limit, part, met, total))
    return found
