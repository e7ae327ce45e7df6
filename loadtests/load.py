"""Make a load, judge it, report it: `python -m loadtests.load steady --host http://127.0.0.1:8000 --rate 1`.

Locust runs in a process of its own; this one reads the server's metrics beside it and writes the report. Exit status: 0
every bound of the SLO is met (or there is none), 1 one is not, 2 a mistake in the arguments, 3 the run is void.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from borg_serve.errors import BorgServeError, ConfigError, Problem
from loadtests.generator.arrivals import ARRIVALS
from loadtests.generator.records import Record, read, write_csv
from loadtests.generator.saturation import answer
from loadtests.report.page import page
from loadtests.report.scrape import Scraper
from loadtests.report.slo import load
from loadtests.report.summary import document
from loadtests.report.tables import render
from loadtests.servers.local import free_port

PROFILES = {name: ("open_loop.py", ["--arrivals", name]) for name in ARRIVALS}
PROFILES |= {name: (f"{name}.py", []) for name in ("replay", "saturation")}
"""Locust's file and options for each profile."""
CALIBRATIONS = (Path("build/calibration.json"), Path("docs/results/calibration.json"))
"""This machine's, else the one that was committed."""


def calibration(files: Sequence[Path]) -> dict[str, Any] | None:
    """The first of these calibrations that there is, None if there is none."""
    file = next((file for file in files if file.is_file()), None)
    found: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file else None
    return found


def status(run: dict[str, Any]) -> int:
    """The exit status for a run's document."""
    return 3 if run["void"] else 1 if run["met"] is False else 0


def generate(
    profile: str, out: Path, arguments: Sequence[str], quiet: bool = False
) -> tuple[dict[str, Any], list[Record], int]:
    """Run Locust; (what it says of the run, records, its exit status). Raises ConfigError if it left no run."""
    for name in ("run.json", "records.jsonl"):
        (out / name).unlink(missing_ok=True)
    file, words = PROFILES[profile]
    # Its processes meet on a port of this run alone: on Locust's own, those of two runs would find each other.
    port = str(free_port())
    meeting = ["--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--master-port", port]
    locust = [sys.executable, "-m", "locust", "-f", str(Path(__file__).parent / "profiles" / file), *words]
    process = subprocess.Popen(
        [*locust, "--records", str(out), *meeting, *arguments],
        stdout=subprocess.DEVNULL if quiet else None,
        start_new_session=True,
    )
    try:
        process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        with suppress(ProcessLookupError):  # workers whose master ended first wait for it for ever
            os.killpg(process.pid, signal.SIGKILL)
    if not (out / "run.json").is_file():
        what, cure = "made no run", "What it said is above."
        raise ConfigError([Problem(f"locust -f {file}", what, f"status {process.returncode}", cure)])
    with (out / "records.jsonl").open(encoding="utf-8") as lines:
        records = read(lines)
    return json.loads((out / "run.json").read_text(encoding="utf-8")), records, process.returncode


def versions(host: str) -> dict[str, Any]:
    """What the server says of itself, if it is one of ours."""
    with suppress(httpx.HTTPError, ValueError):
        found = httpx.get(f"{host}/version", timeout=10).json()
        return found if isinstance(found, dict) else {}
    return {}


def verdict(run: dict[str, Any]) -> str:
    """The run in a few lines for a terminal."""
    found = run["run"].get("saturation")
    return render("verdict.txt.j2", run, search=answer(found) if found else None)


def measure(arguments: argparse.Namespace, more: Sequence[str]) -> int:
    """One run with its report; the exit status."""
    host, file = arguments.host.rstrip("/"), arguments.slo
    slo, out = (file, load(file)) if file else None, arguments.out or Path("build/load") / arguments.profile
    out.mkdir(parents=True, exist_ok=True)
    shown = ["--autostart", "--web-host", "127.0.0.1"] if arguments.web else ["--headless", "--only-summary"]
    words = ["--host", host, *shown, *(["--slo", str(file)] if file else [])]
    with Scraper(host) as scraper:
        run, records, left_with = generate(arguments.profile, out, [*words, *more])
    run["whole"] &= left_with in (0, 1, 3)
    found = calibration([arguments.calibration] if arguments.calibration else CALIBRATIONS)
    samples, problem = scraper.samples, scraper.problem
    result = document(run, records, slo, found, samples=samples, metrics_problem=problem, versions=versions(host))
    (out / "run.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    write_csv(out / "requests.csv", [record for record in records if record.phase >= 0])
    (out / "report.html").write_text(page(result), encoding="utf-8")
    print(verdict(result))
    print(f"report: {out / 'report.html'}, {out / 'run.json'}, {out / 'requests.csv'}")
    return status(result)


def main() -> None:
    """Unknown options go to Locust: `python -m locust -f loadtests/profiles/open_loop.py --help` lists them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile", choices=sorted(PROFILES))
    parser.add_argument("--host", default="http://127.0.0.1:8000")
    parser.add_argument("--slo", type=Path)
    parser.add_argument("--out", type=Path, help="folder of the report; default: build/load/PROFILE")
    parser.add_argument("--calibration", type=Path, help="default: build/calibration.json, else the committed one")
    parser.add_argument("--web", action="store_true", help="Locust's web page beside it, until it is stopped")
    try:
        sys.exit(measure(*parser.parse_known_args()))
    except BorgServeError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
