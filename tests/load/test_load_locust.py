"""Real Locust against the server of known timing: what it measures, how it ends, that processes share the load."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from loadtests.experiments.calibrate import errors
from loadtests.generator.records import from_dict
from tests.engine.process import ROOT, environment, free_port

TTFT_MS, GAP_MS = 300.0, 30.0


@contextmanager
def known(*words: str) -> Iterator[str]:
    """A server of known timing."""
    port = free_port()
    timing = [f"--ttft-ms={TTFT_MS}", f"--gap-ms={GAP_MS}"]
    command = [sys.executable, "-m", "loadtests.generator.known", f"--port={port}", *timing, *words]
    process = subprocess.Popen(command, cwd=ROOT, env=environment())
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 60
        while True:
            try:
                httpx.get(url, timeout=5)
                break
            except httpx.TransportError:
                assert time.monotonic() < end
                assert process.poll() is None
                time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait()


def load(profile: str, url: str, out: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """Run the command; (its exit status, the run's document)."""
    calibration = out / "calibration.json"
    limits = {"streams_per_worker": 100, "events_per_s_per_worker": 10_000}
    calibration.write_text(json.dumps({**limits, "machine": {}, "date": "", "levels": []}))
    command = [sys.executable, "-m", "loadtests.load", profile, "--host", url, "--out", str(out), "--workload=fixed"]
    command.append(f"--calibration={calibration}")
    done = subprocess.run(
        [*command, "--max-output=8", *words], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert (out / "run.json").is_file(), done.stderr
    return done.returncode, json.loads((out / "run.json").read_text())


def test_load_measures_what_the_server_did(tmp_path: Path) -> None:
    slo = tmp_path / "slo.yaml"
    slo.write_text("ttft_p50_ms: 100\n")
    with known() as url:
        status, run = load("steady", url, tmp_path, "--rate=8", "--duration=2", f"--slo={slo}")
        log = httpx.get(f"{url}/log", timeout=30).json()
    # The server never answers before 300 ms, so this cannot be met however fast the machine is; a crowded one voids it.
    assert status == (3 if run["void"] else 1)
    records = run["records"]
    assert len(records) >= 8
    assert {record["outcome"] for record in records} == {"ok"}
    assert {record["output_tokens"] for record in records} == {8}
    assert all(record["t_first_us"] - record["t_send_us"] >= TTFT_MS * 1e3 for record in records)
    assert all(record["t_last_us"] - record["t_send_us"] >= (TTFT_MS + 7 * GAP_MS) * 1e3 for record in records)
    ttft_ms, itl_ms, _ = errors([from_dict(record) for record in records], log, run["run"]["phases"][-1]["begin_us"])
    assert 0 <= median(ttft_ms) < 150
    assert median(itl_ms) < 150
    assert all((tmp_path / name).stat().st_size for name in ("report.html", "requests.csv"))


def test_load_does_not_wait_for_a_slow_server(tmp_path: Path) -> None:
    with known("--ttft-ms=3000") as url:
        _, run = load("smoke", url, tmp_path, "--rate=10", "--duration=1", "--cache=cold")
    assert run["figures"]["requests"] == 10
    assert run["figures"]["peak"]["streams"] == 10  # a closed loop would have sent one after another


def test_load_calls_broken_streams_broken_and_ends(tmp_path: Path) -> None:
    with known("--fault=break") as url:
        status, run = load("smoke", url, tmp_path, "--rate=3", "--duration=1", "--cache=cold")
    assert run["figures"]["ok"] == 0
    assert set(run["figures"]["outcomes"]) == {"broken stream"}
    assert status == (3 if run["void"] else 0)  # no SLO was given


def test_load_of_several_processes_is_one_load(tmp_path: Path) -> None:
    with known() as url:
        status, run = load(
            "conversation", url, tmp_path, "--rate=4", "--duration=2", "--think=0.1", "--processes=2", "--cache=cold"
        )
    records = run["records"]
    assert status == (3 if run["void"] else 0)
    assert {record["worker"] for record in records} == {0, 1}
    assert sum(record["last_of_session"] for record in records) == run["run"]["phases"][-1]["sessions"]
    assert len({(record["session"], record["turn"]) for record in records}) == len(records)
    assert any(record["turn"] > 0 for record in records)


def test_load_searches_for_the_highest_rate(tmp_path: Path) -> None:
    slo = tmp_path / "slo.yaml"
    slo.write_text("ttft_p99_ms: 100\n")
    with known() as url:
        _, run = load(
            "saturation", url, tmp_path, "--rate=20", "--duration=0.5", f"--slo={slo}", "--trials=2", "--cache=cold"
        )
    found = run["run"]["saturation"]
    assert found["meets"] is None
    assert found["does_not"] == 10.0
    assert [row["rate"] for row in found["rates"]] == [20.0, 10.0]


def test_load_of_a_profile_that_lacks_something_says_so(tmp_path: Path) -> None:
    words = ["-m", "loadtests.load", "replay", "--host", "http://127.0.0.1:9", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert "--trace: is needed to replay one" in done.stdout + done.stderr
