"""The smoke profile against a real engine: every request ends well, and server and clients count the same tokens."""

import json
import subprocess
import sys
from pathlib import Path

from tests.engine.process import ROOT, Server, environment


def test_load_smoke_passes_and_agrees_with_the_server(server: Server, tmp_path: Path) -> None:
    slo = tmp_path / "slo.yaml"
    slo.write_text("error_rate: 0\n")
    calibration = tmp_path / "calibration.json"
    limits = {"streams_per_worker": 100, "events_per_s_per_worker": 10_000}
    calibration.write_text(json.dumps({**limits, "machine": {}, "date": "", "levels": []}))
    words = ["smoke", "--host", server.base_url, "--out", str(tmp_path), "--rate=2", "--duration=3"]
    words += ["--workload=fixed", "--max-output=12", f"--slo={slo}", f"--calibration={calibration}"]
    command = [sys.executable, "-m", "loadtests.load", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    run = json.loads((tmp_path / "run.json").read_text())
    assert done.returncode == (3 if run["void"] else 0), done.stdout + done.stderr  # a crowded machine voids a run
    assert run["figures"]["outcomes"] == {"ok": 6}
    assert {record["output_tokens"] for record in run["records"]} == {12}
    assert run["agreement"]["verdict"] == "agree within 1%", run["agreement"]
    assert run["figures"]["cached_part"] > 0.5  # the identity
    assert any(row.get("cache_hits") for row in run["course"])
