"""The reports of docs/results are what their measurements and the templates make."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loadtests.experiments import (
    api_process,
    calibrate,
    compare,
    conversations,
    fairness,
    guesses,
    overhead,
    overload,
    peers,
    soak,
    tenants,
)

RESULTS = Path(__file__).parents[4] / "docs" / "results"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("api-process", api_process.text),
        ("api-process-ray", api_process.text),
        ("calibration", calibrate.text),
        ("compare-cpu", compare.text),
        ("fairness", fairness.text),
        ("guesses", guesses.text),
        ("overhead", overhead.text),
        ("overload", overload.text),
        ("peers-h200", peers.text),
        ("routing", conversations.text),
        ("soak", soak.text),
        ("tenants-h200", tenants.text),
    ],
)
def test_report_is_what_its_measurements_make(name: str, text: Callable[[dict[str, Any]], str]) -> None:
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert text(document) == (RESULTS / f"{name}.md").read_text(encoding="utf-8")
