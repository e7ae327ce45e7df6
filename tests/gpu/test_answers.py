"""Whole answers with shared-prefix attention on a GPU: as near to stock's as stock's own at another batch size."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

import pytest
import torch

from tests.waiting import wait_until

MODEL = os.environ.get("BORG_GPU_DEMO", "")
"""The demo's checkpoint, with its weights: `borg-serve demo-model`."""
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and Path(MODEL, "config.json").is_file()),
    reason="needs a CUDA device, and BORG_GPU_DEMO to name the demo's checkpoint",
)
Answer = list[tuple[int, float]]
ALL, FEW = "200", "64"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Answer]]:
    """(attention, batch) -> the answers; an engine of its own for each attention."""
    found: dict[tuple[str, str], list[Answer]] = {}
    for attention in ("stock", "shared"):
        out = tmp_path_factory.mktemp(attention) / "answers.json"
        command = [sys.executable, "-m", "tests.gpu.answers", MODEL, attention, str(out), ALL, FEW]
        run_until_written(command, out)
        found |= {(attention, batch): rows for batch, rows in json.loads(out.read_text()).items()}
    return found


def run_until_written(command: list[str], out: Path) -> None:
    """Run a command until its file is there; on one host the interpreter did not end behind an engine that had."""
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            wait_until(f"{out} is written", lambda: out.exists() or process.poll() is not None, 400)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def distances(one: list[Answer], other: list[Answer]) -> tuple[list[float], int]:
    """How far the log-probabilities of each token are apart, as long as the answers agree; and how many part."""
    apart, parted = [], 0
    for left, right in zip(one, other, strict=True):
        for (token, value), (its, its_value) in zip(left, right, strict=True):
            if token != its:
                parted += 1
                break
            apart.append(abs(value - its_value))
    return apart, parted


def figures(name: str, one: list[Answer], other: list[Answer]) -> dict[str, Any]:
    apart, parted = distances(one, other)
    found = {"mean": mean(apart), "p99": quantiles(apart, n=100)[98], "max": max(apart), "parted": parted}
    print(f"\n{name}: {found}, {len(apart)} tokens", end="")
    return found


def test_answers_are_within_stocks_own_spread(answers: dict[tuple[str, str], list[Answer]]) -> None:
    stock = answers["stock", ALL]
    spread = figures("stock, 64 at a time against 200", answers["stock", FEW], stock)
    ours = figures("shared, 200 at a time, against stock's 200", answers["shared", ALL], stock)
    few = figures("shared, 64 at a time, against stock's 200", answers["shared", FEW], stock)
    for found in (ours, few):
        assert found["mean"] <= 1.25 * spread["mean"]
        assert found["p99"] <= 1.25 * spread["p99"]
        assert found["parted"] <= 1.25 * spread["parted"] + 5


def test_answers_are_real_text(answers: dict[tuple[str, str], list[Answer]]) -> None:
    """Weights that were not loaded would give every token the same small chance."""
    chances = [value for row in answers["stock", ALL] for _, value in row]
    assert mean(chances) > -2
