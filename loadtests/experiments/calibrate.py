"""How wrong the generator is: `python -m loadtests.experiments.calibrate`, about two minutes on a quiet machine.

A server of known timing writes down when it read each request and wrote each event, on the clock that the generator
reads too; the difference is the generator's error, whatever the server itself was late by.
"""

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import httpx

from borg_serve.errors import EngineError
from loadtests.experiments.experiment import note, parser
from loadtests.generator.records import Record
from loadtests.generator.workload import message
from loadtests.load import CALIBRATIONS, generate
from loadtests.report.slo import percentile
from loadtests.report.summary import LAG_P50_MS, LAG_P99_MS, environment, peak
from loadtests.report.tables import render, write
from loadtests.servers import local

LEVELS = (1, 8, 32, 64, 128, 256, 512)
TTFT_MS, GAP_MS = 200.0, 20.0
BOUNDS_MS = {"p50": LAG_P50_MS, "p99": LAG_P99_MS}
ERRORS = ("ttft_error_ms", "itl_error_ms", "lag_ms")
SEED = 0
WORDS = 80
"""Of the workload `fixed`."""


def errors(
    records: Sequence[Record], log: Mapping[str, Mapping[str, Any]], begin_us: int
) -> tuple[list[float], list[float], list[float]]:
    """(TTFT errors, ITL errors, schedule lags) in ms of one phase, against what the server wrote down.

    A TTFT error counts both ends: from t_send to the server's reading, and from its writing to t_first.
    """
    ttft, itl, lag = [], [], []
    for record in records:
        truth = log[message(SEED, record.phase, record.session, record.turn, WORDS)]
        written = truth["written_us"]
        if record.t_first_us is None or len(written) != len(record.itl_us) + 1:
            raise EngineError(
                f"calibration: request {record.session} lost events, got {len(record.itl_us) + 1}. Again."
            )
        sent = truth["read_us"] - (begin_us + record.t_send_us)
        ttft.append((sent + begin_us + record.t_first_us - written[0]) / 1e3)
        gaps = [after - before for before, after in pairwise(written)]
        itl += [abs(mine - true) / 1e3 for mine, true in zip(record.itl_us, gaps, strict=True)]
        lag.append((record.t_send_us - record.t_sched_us) / 1e3)
    return ttft, itl, lag


def level(streams: int, tokens: int, folder: Path) -> dict[str, Any]:
    """One level: `streams` requests within a second, each with `tokens` events."""
    port = local.free_port()
    command = [
        sys.executable,
        "-m",
        "loadtests.generator.known",
        f"--port={port}",
        f"--ttft-ms={TTFT_MS}",
        f"--gap-ms={GAP_MS}",
    ]
    with local.running("known", command, port, "/", folder / "known.log", limit_s=30) as server:
        words = ["--headless", "--only-summary", "--loglevel=WARNING", "--host", server.url, "--rate", str(streams)]
        words += ["--duration=1", "--workload=fixed", f"--seed={SEED}", f"--max-output={tokens}"]
        run, records, _ = generate("smoke", folder, words, quiet=True)
        log = httpx.get(f"{server.url}/log", timeout=60).json()
    records = [record for record in records if record.phase == 0]
    bad = [record for record in records if not record.ok]
    if bad or len(records) != streams:
        what = f"{len(records)} requests, {len(bad)} failed: {bad[:1]}"
        raise EngineError(f"calibration at {streams} streams: not every stream was whole, got {what}. Run it again.")
    duration_s = max(record.t_end_us for record in records) / 1e6
    row: dict[str, Any] = {"streams": streams, "events_per_s": peak(records)["events_per_s"]}
    row |= {"at_once": peak(records)["streams"], "cpu_part": run["cpu_s"] / duration_s}
    for name, values in zip(ERRORS, errors(records, log, run["phases"][-1]["begin_us"]), strict=True):
        row[name] = {"p50": percentile(values, 50), "p99": percentile(values, 99), "max": max(values, default=0.0)}
    row["within"] = all(row[name][percent] <= bound for name in ERRORS for percent, bound in BOUNDS_MS.items())
    return row


def summary(levels: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The document: up to which load one process is accurate. A level above one that failed does not count."""
    accurate = [*takewhile(lambda row: row["within"], levels)][-1:]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": "make calibrate",
        "machine": environment()["machine"],
        "bounds_ms": BOUNDS_MS,
        "streams_per_worker": accurate[0]["streams"] if accurate else 0,
        "events_per_s_per_worker": accurate[0]["events_per_s"] if accurate else 0,
        "levels": list(levels),
    }


def text(document: Mapping[str, Any]) -> str:
    """The report for a person."""
    return render("calibration.md.j2", document, ttft_ms=TTFT_MS, gap_ms=GAP_MS)


def main() -> None:
    """Measure every level, write build/calibration.json and the report, print it."""
    options = parser(__doc__, "calibration", config=False)
    options.add_argument("--levels", type=int, nargs="+", default=LEVELS)
    options.add_argument("--tokens", type=int, default=300, help="events a stream")
    arguments = options.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="borg-calibrate-") as folder:
        for streams in arguments.levels:
            rows.append(level(streams, arguments.tokens, Path(folder)))
            note(json.dumps(rows[-1]))
    document = summary(rows)
    CALIBRATIONS[0].parent.mkdir(parents=True, exist_ok=True)
    CALIBRATIONS[0].write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    write(arguments.out, arguments.name, document, text(document))


if __name__ == "__main__":
    main()
