"""Two load reports beside each other: `python -m loadtests.report.comparison A.json B.json [--json]`.

It knows the JSON that a load run writes (`run.json`), and prints ratios with intervals and a plain verdict for each
figure. It measures nothing.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from borg_serve.errors import BorgServeError, ConfigError, Problem
from loadtests.generator.records import from_dict
from loadtests.report.bootstrap import quantile, ratio
from loadtests.report.slo import percentile
from loadtests.report.tables import render

FORMAT = "borg-serve load run 1"
FEWEST = 20
"""Requests of each side below which no interval is given."""
FIGURES = {
    **{f"{m.upper()} p{percent}, ms": (m, percent) for m in ("ttft", "tpot", "e2e") for percent in (50, 95)},
    "output tokens/s of one request, median": ("speed", 50),
}
"""(column, percentile) of each figure."""
Word = Literal["faster", "slower", "no difference shown", "too few requests"]


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


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[list[Comparison], list[str]]:
    """(every figure of both runs, what the reader should know).

    The requests are resampled in blocks in the order of their schedule: neighbours share a queue. The intervals show
    what varies inside a run, not what varies from run to run.
    """
    sides = _columns(a), _columns(b)
    return [
        _figure(name, sides[0][column], sides[1][column], percent) for name, (column, percent) in FIGURES.items()
    ], _notes(a, b)


def _columns(document: Mapping[str, Any]) -> dict[str, list[float]]:
    """The figures of the requests that ended well, in the order of the schedule."""
    found: dict[str, list[float]] = {"ttft": [], "tpot": [], "e2e": [], "speed": []}
    for record in map(from_dict, document["records"]):
        if record.ok and record.t_first_us is not None:
            row = {name: record.metric_ms(name, True) for name in ("ttft", "tpot", "e2e")}
            row["speed"] = record.output_tokens / record.e2e_ms(True) * 1e3
            for name, value in row.items():
                found[name] += [] if value is None else [value]
    return found


def _figure(name: str, a: list[float], b: list[float], percent: int) -> Comparison:
    values = percentile(a, percent), percentile(b, percent)
    if values[0] is None or values[1] is None or min(len(a), len(b)) < FEWEST or values[0] <= 0:
        plain = values[1] / values[0] if values[0] and values[1] is not None else None
        return Comparison(name, *values, plain, None, None, "too few requests")
    found = ratio(b, a, quantile(percent), blocks=True)
    verdict: Word = "no difference shown"
    if found.low > 1 or found.high < 1:
        verdict = "faster" if (found.high < 1) == name.endswith("ms") else "slower"
    return Comparison(name, *values, found.value, found.low, found.high, verdict)


def _notes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    notes = []
    for side, document in (("A", a), ("B", b)):
        if document["void"]:
            notes.append(f"{side} is void: {'; '.join(document['void'])}")
        failed = document["figures"]["requests"] - document["figures"]["ok"]
        if failed:
            notes.append(f"{side}: {failed} of {document['figures']['requests']} requests failed and are left out")
    mine, theirs = ({"profile": run["run"]["profile"], **run["run"]["options"]} for run in (a, b))
    skipped = {"host", "slo", "model", "system"}
    differ = [name for name in mine if name not in skipped and mine[name] != theirs.get(name)]
    if differ:
        words = ", ".join(f"{name} ({mine[name]} and {theirs.get(name)})" for name in differ)
        notes.append(f"the runs differ in {words}")
    return [*notes, "one run a side: the intervals show what varies inside a run, not from run to run"]


def table(found: list[Comparison], notes: list[str]) -> str:
    """For a terminal."""
    return render("comparison.txt.j2", {"figures": found, "notes": notes}).rstrip()


def main() -> None:
    """Print the comparison, as a table or as JSON; status 2 for a file that is no load report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("a", type=Path, metavar="A.json", help="run.json of one load report")
    parser.add_argument("b", type=Path, metavar="B.json", help="run.json of the other")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    try:
        found, notes = compare(load_run(arguments.a), load_run(arguments.b))
    except BorgServeError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    document = {"figures": [asdict(row) for row in found], "notes": notes}
    print(json.dumps(document, indent=2) if arguments.json else table(found, notes))


if __name__ == "__main__":
    main()
