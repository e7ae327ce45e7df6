"""How wrong the generator is: `python -m loadtests.calibrate`, about two minutes on a quiet machine.

A server of known timing writes down when it read each request and wrote each event, on the clock that the generator
reads too; the difference is the generator's error, whatever the server itself was late by.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from borg_serve.errors import EngineError
from loadtests import servers
from loadtests.load import CALIBRATIONS, generate
from loadtests.records import Record
from loadtests.slo import percentile
from loadtests.summary import LAG_P50_MS, LAG_P99_MS, environment, peak
from loadtests.tables import table, write
from loadtests.workload import message

LEVELS = (1, 8, 32, 64, 128, 256, 512)
TTFT_MS, GAP_MS = 200.0, 20.0
BOUNDS_MS = {"p50": LAG_P50_MS, "p99": LAG_P99_MS}
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
    port = servers.free_port()
    command = [sys.executable, "-m", "loadtests.known", f"--port={port}", f"--ttft-ms={TTFT_MS}", f"--gap-ms={GAP_MS}"]
    with servers.running("known", command, port, "/", folder / "known.log", limit_s=30) as server:
        words = ["--headless", "--only-summary", "--loglevel=WARNING", "--host", server.url, "--rate", str(streams)]
        words += ["--duration=1", "--workload=fixed", f"--seed={SEED}", f"--max-output={tokens}"]
        run, records, cpu_s, _ = generate("smoke", folder, words, quiet=True)
        log = httpx.get(f"{server.url}/log", timeout=60).json()
    records = [record for record in records if record.phase == 0]
    bad = [record for record in records if not record.ok]
    if bad or len(records) != streams:
        what = f"{len(records)} requests, {len(bad)} failed: {bad[:1]}"
        raise EngineError(f"calibration at {streams} streams: not every stream was whole, got {what}. Run it again.")
    ttft, itl, lag = errors(records, log, run["phases"][-1]["begin_us"])
    duration_s = max(record.t_end_us for record in records) / 1e6
    row: dict[str, Any] = {
        "streams": streams,
        "at_once": peak(records)["streams"],
        "events_per_s": peak(records)["events_per_s"],
        "cpu_part": cpu_s / duration_s,
    }
    for name, values in (("ttft_error_ms", ttft), ("itl_error_ms", itl), ("lag_ms", lag)):
        row[name] = {"p50": percentile(values, 50), "p99": percentile(values, 99), "max": max(values, default=0.0)}
    row["within"] = all(
        row[name][percent] <= bound
        for name in ("ttft_error_ms", "itl_error_ms", "lag_ms")
        for percent, bound in BOUNDS_MS.items()
    )
    return row


def summary(levels: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The document: up to which load one process is accurate. A level above one that failed does not count."""
    accurate: Mapping[str, Any] | None = None
    for row in levels:
        if not row["within"]:
            break
        accurate = row
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": "make calibrate",
        "machine": environment()["machine"],
        "bounds_ms": BOUNDS_MS,
        "streams_per_worker": accurate["streams"] if accurate else 0,
        "events_per_s_per_worker": accurate["events_per_s"] if accurate else 0,
        "levels": list(levels),
    }


def markdown(document: Mapping[str, Any]) -> str:
    """The report for a person."""
    machine = document["machine"]
    heads = ["streams", "events/s, busiest second", "generator CPU", "TTFT error p50 / p99", "ITL error p50 / p99"]
    rows = [
        [
            row["streams"],
            f"{row['events_per_s']:,.0f}",
            f"{row['cpu_part']:.0%}",
            *(
                f"{row[name]['p50']:.2f} / {row[name]['p99']:.2f} ms"
                for name in ("ttft_error_ms", "itl_error_ms", "lag_ms")
            ),
            "yes" if row["within"] else "**no**",
        ]
        for row in document["levels"]
    ]
    return f"""# The load generator's own error

`{document["command"]}` on {machine["cores"]} cores ({machine["processor"]}), {document["date"]}; the server of known
timing shares them. One generating process; every stream has a TTFT of {TTFT_MS:g} ms and an event each {GAP_MS:g} ms.

**Accurate up to {document["streams_per_worker"]} streams and {document["events_per_s_per_worker"]:,.0f} events/s a
process**: every error at most {BOUNDS_MS["p50"]:g} ms at p50 and {BOUNDS_MS["p99"]:g} ms at p99. A run with more in one
process calls itself void.

{table([*heads, "schedule lag p50 / p99", "within the bounds"], rows)}

Errors are against what the server wrote down on the same clock. TTFT error: what the client took for TTFT less the time
from the server's reading of the request to its writing of the first event. ITL error: absolute difference of each gap.
Schedule lag: how long after it was due a request was sent.
"""


def main() -> None:
    """Measure every level, write build/calibration.json and the report, print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--levels", type=int, nargs="+", default=LEVELS)
    parser.add_argument("--tokens", type=int, default=300, help="events a stream")
    parser.add_argument("--out", type=Path, default=CALIBRATIONS[1].parent)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="borg-calibrate-") as folder:
        for streams in arguments.levels:
            rows.append(level(streams, arguments.tokens, Path(folder)))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    document = summary(rows)
    text = json.dumps(document, indent=1) + "\n"
    CALIBRATIONS[0].parent.mkdir(parents=True, exist_ok=True)
    CALIBRATIONS[0].write_text(text, encoding="utf-8")
    write(arguments.out, "calibration", document, markdown(document))


if __name__ == "__main__":
    main()
