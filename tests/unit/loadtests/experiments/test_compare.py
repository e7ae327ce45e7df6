"""The report of the ways to serve the same model."""

from typing import Any

import pytest

from loadtests.experiments import compare as ways
from loadtests.servers.local import GROUPS


def five_ways(rounds: int) -> dict[str, Any]:
    speeds = {"ours": 90.0, "stock": 50.0, "original": 6.0}
    blocks = {
        name: [
            {
                "users": users,
                "requests": 8,
                "failed": 0,
                "output_tokens_per_s": speed + number,
                "ttft_ms": 1000 / speed,
                "tpot_ms": 10.0,
                "cpu_s_per_1000": dict.fromkeys(GROUPS, 1.0),
                "memory_mib": 500.0,
            }
            for number in range(rounds)
            for users in ways.USERS
        ]
        for name, speed in speeds.items()
    }
    found: dict[str, Any] = {
        "command": "c",
        "versions": {"vllm": "1"},
        "machine": {"cores": 2, "processor": "x"},
        "rounds": rounds,
        "users": list(ways.USERS),
        "tokens": 64,
        "contenders": dict.fromkeys(speeds, "a server"),
        "blocks": blocks,
        "failures": ["round 1, ray: slow"],
    }
    return {**found, "summary": ways.summary(found)}


def test_five_ways_are_judged_by_their_ratios() -> None:
    result = five_ways(5)
    stock = next(row for row in result["summary"] if row["users"] == 8 and row["name"] == "stock")
    assert stock["ours_by_output_tokens_per_s"]["value"] == pytest.approx(92 / 52)
    text = ways.text(result)
    assert "| >= 12 | 11.50 | **no** |" in text
    assert "Failures: round 1, ray: slow." in text
    assert "| >= 1.5 | 1.77 | yes |" in text
    assert "| <= 0.4 | 0.56 | **no** |" in text


def test_five_ways_without_five_rounds_have_no_intervals() -> None:
    assert all(row.get("ours_by_ttft_ms") is None for row in five_ways(2)["summary"])
    assert ways.text(five_ways(2))
