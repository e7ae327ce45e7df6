"""A test that failed while the machine stood still runs again; one that failed otherwise does not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
FAILING = """
import time
from pathlib import Path

def test_counted() -> None:
    with Path("runs").open("a") as runs:
        runs.write("x")
    time.sleep(1)
    assert len(Path("runs").read_text()) > 1
"""


@pytest.mark.parametrize(("stopped_s", "runs", "status"), [(3.0, "xx", 0), (0.0, "x", 1)])
def test_stillness_runs_a_failed_test_again(tmp_path: Path, stopped_s: float, runs: str, status: int) -> None:
    (tmp_path / "test_it.py").write_text(FAILING)
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    words = ["-q", "-p", "no:cacheprovider", "-p", "no:locust", f"--rootdir={tmp_path}", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        begun = (tmp_path / "runs").exists
        wait_until("the test began", lambda: begun() or process.poll() is not None)
        if stopped_s:
            process.send_signal(signal.SIGSTOP)
            time.sleep(stopped_s)
            process.send_signal(signal.SIGCONT)
        said = process.communicate(timeout=60)[0]
    assert (tmp_path / "runs").read_text() == runs, said
    assert process.returncode == status, said
    assert ("the machine stood still" in said) is bool(stopped_s)
