"""Make a load, judge it, report it: `python -m loadtests.load steady --host http://127.0.0.1:8000 --rate 1`.

Locust runs in a process of its own; this one reads the server's metrics beside it and writes the report. Exit status: 0
every bound of the SLO is met (or there is none), 1 one is not, 2 a mistake in the arguments, 3 the run is void.
"""

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from borg_serve.errors import BorgServeError, ConfigError, Problem
from loadtests import page
from loadtests.records import Record, read, write_csv
from loadtests.saturation import answer
from loadtests.scrape import Scraper
from loadtests.servers import free_port
from loadtests.slo import load
from loadtests.summary import document

__all__ = ["CALIBRATIONS", "PROFILES", "calibration", "generate", "main", "status"]

PROFILES = Path(__file__).parent / "profiles"
CALIBRATIONS = (Path("build/calibration.json"), Path("docs/results/calibration.json"))
"""This machine's, else the one that was committed."""


def calibration(files: Sequence[Path]) -> dict[str, Any] | None:
    """The first of these calibrations that there is, None if there is none."""
    for file in files:
        if file.is_file():
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return found
    return None


def status(run: dict[str, Any]) -> int:
    """The exit status for a run's document."""
    return 3 if run["void"] else 1 if run["met"] is False else 0


def generate(
    profile: str, out: Path, arguments: Sequence[str], quiet: bool = False
) -> tuple[dict[str, Any], list[Record], float, int]:
    """Run Locust; (what it says of the run, records, CPU seconds of its processes, its exit status).

    Raises ConfigError when it left nothing to report.
    """
    for name in ("run.json", "records.jsonl"):
        (out / name).unlink(missing_ok=True)
    file = PROFILES / f"{profile}.py"
    # Its processes meet on a port of this run alone: on Locust's own, those of two runs would find each other.
    port = str(free_port())
    meeting = ["--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--master-port", port]
    words = [sys.executable, "-m", "locust", "-f", str(file), "--records", str(out), *meeting, *arguments]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL if quiet else None)
    family: set[psutil.Process] = set()
    spent: dict[int, float] = {}
    try:
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                family |= {psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)}
                for member in family:
                    with suppress(psutil.NoSuchProcess):
                        times = member.cpu_times()
                        spent[member.pid] = times.user + times.system
            with suppress(subprocess.TimeoutExpired):
                process.wait(1.0)  # looking for a process's children reads all of /proc: every second is enough
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        for member in family:  # workers whose master ended first wait for it for ever
            with suppress(psutil.NoSuchProcess):
                member.kill()
    if not (out / "run.json").is_file():
        what, cure = "made no run", "What it said is above."
        raise ConfigError([Problem(f"locust -f {file.name}", what, f"status {process.returncode}", cure)])
    with (out / "records.jsonl").open(encoding="utf-8") as lines:
        records = read(lines)
    return json.loads((out / "run.json").read_text(encoding="utf-8")), records, sum(spent.values()), process.returncode


def versions(host: str) -> dict[str, Any]:
    """What the server says of itself, if it is one of ours."""
    with suppress(httpx.HTTPError, ValueError):
        found = httpx.get(f"{host}/version", timeout=10).json()
        return found if isinstance(found, dict) else {}
    return {}


def verdict(run: dict[str, Any]) -> str:
    """The run in a few lines for a terminal."""
    figures = run["figures"]
    lines = [f"{figures['ok']} of {figures['requests']} requests ended well: {figures['outcomes']}"]
    lines.append(
        f"{figures['output_tokens_per_s']:.1f} output tokens/s over {figures['duration_s']:.1f} s, "
        f"generator {100 * (figures['generator_cpu_part'] or 0):.0f} % of one core"
    )
    for name in ("ttft_from_schedule", "tpot", "e2e_from_schedule", "lag"):
        row = figures["latency_ms"][name]
        if row["count"]:
            lines.append(f"{name:20} p50 {row['p50']:9.1f} ms  p95 {row['p95']:9.1f} ms  p99 {row['p99']:9.1f} ms")
    if found := run["run"].get("saturation"):
        lines.append(answer(found))
    for row in run["verdicts"]:
        measured = "undefined" if row["measured"] is None else f"{row['measured']:.4g}"
        word = "met" if row["met"] else "NOT MET"
        lines.append(f"{row['name']:20} bound {row['bound']:>9.6g}  measured {measured:>9}  {word}")
    lines.append(f"token totals of server and clients: {run['agreement']['verdict']}")
    lines += [f"note: {note}" for note in run["notes"]]
    lines += [f"VOID: {reason}" for reason in run["void"]]
    return "\n".join(lines)


def measure(
    profile: str,
    host: str,
    out: Path,
    slo_file: Path | None,
    calibrated: Sequence[Path],
    more: Sequence[str],
    web: bool,
) -> int:
    """One run with its report; the exit status."""
    slo = (slo_file, load(slo_file)) if slo_file else None
    out.mkdir(parents=True, exist_ok=True)
    words = ["--host", host, *(["--autostart", "--web-host", "127.0.0.1"] if web else ["--headless", "--only-summary"])]
    if slo_file:
        words += ["--slo", str(slo_file)]
    with Scraper(host) as scraper:
        run, records, cpu_s, left_with = generate(profile, out, [*words, *more])
    if left_with not in (0, 1, 3):
        run["whole"] = False
    result = document(
        run,
        records,
        slo,
        calibration(calibrated),
        samples=scraper.samples,
        metrics_problem=scraper.problem,
        generator_cpu_s=cpu_s,
        versions=versions(host),
    )
    (out / "run.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    write_csv(out / "requests.csv", [record for record in records if record.phase >= 0])
    (out / "report.html").write_text(page.page(result), encoding="utf-8")
    print(verdict(result))
    print(f"report: {out / 'report.html'}, {out / 'run.json'}, {out / 'requests.csv'}")
    return status(result)


def main() -> None:
    """Words that this command does not know go to Locust: `python -m locust -f loadtests/profiles/steady.py --help`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile", choices=sorted(file.stem for file in PROFILES.glob("[a-z]*.py")))
    parser.add_argument("--host", default="http://127.0.0.1:8000")
    parser.add_argument("--slo", type=Path)
    parser.add_argument("--out", type=Path, help="folder of the report; default: build/load/PROFILE")
    parser.add_argument("--calibration", type=Path, help="default: build/calibration.json, else the committed one")
    parser.add_argument("--web", action="store_true", help="Locust's web page beside it, until it is stopped")
    arguments, more = parser.parse_known_args()
    out = arguments.out or Path("build/load") / arguments.profile
    try:
        files = [arguments.calibration] if arguments.calibration else CALIBRATIONS
        host = arguments.host.rstrip("/")
        sys.exit(measure(arguments.profile, host, out, arguments.slo, files, more, arguments.web))
    except BorgServeError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
