"""The experiment on fairness: when a token counts, how even shares are, and what its report judges."""

from typing import Any

import pytest

from loadtests.experiments import fairness
from loadtests.experiments.fairness import FLOOD, OTHER, RUN_IN_S, Sent, figures, jain
from loadtests.experiments.stream import Timing

USAGE = {"prompt_tokens": 110, "completion_tokens": 30}
IDENTITY = 100


def row(tokens_per_s: float, ttft_ms: float = 1000.0, refused: int = 0, failed: int = 0) -> dict[str, Any]:
    counts = {"requests": 8 + refused + failed, "refused": refused, "failed": failed}
    return {"tokens_per_s": tokens_per_s, **counts, "ttft_ms": [ttft_ms + number for number in range(8)]}


def document(flooded: float = 70.0, ttft_ms: float = 1000.0, refused: int = 0, failed: int = 0) -> dict[str, Any]:
    rounds = {
        "alone": [{FLOOD: row(100.0 + number, refused=900)} for number in range(5)],
        "full": [{FLOOD: row(80.0), OTHER: row(30.0)} for _ in range(5)],
        "flooded": [
            {FLOOD: row(flooded + number, refused=700), OTHER: row(31.0, ttft_ms, refused)} for number in range(5)
        ],
    }
    keys = {load.key: row(5.0, failed=failed) for load in fairness.twenty()}
    around = {"versions": {"vllm": "0", "python": "3"}, "machine": {"cores": 2, "processor": "x"}}
    sizes = {"slots": 16, "identity_tokens": IDENTITY, "pause_s": 0.0, "period_s": 1.0}
    return {"command": "x", **around, "server": "ours", **sizes, "rounds": rounds, "twenty": keys}


@pytest.mark.parametrize(
    ("rates", "index"), [([3.0, 3.0, 3.0, 3.0], 1.0), ([5.0, 0.0, 0.0, 0.0], 0.25), ([0.0, 0.0], 0.0), ([1, 3], 0.8)]
)
def test_jain_is_one_for_equal_shares_and_one_by_n_for_a_single_one(rates: list[float], index: float) -> None:
    assert jain(rates) == pytest.approx(index)


@pytest.mark.parametrize(
    ("begin_s", "end_s", "tokens"),
    [(0, 100, 40), (0, 12, 0), (0, 13, 10), (0, 14, 20), (12, 14, 20), (13, 14, 10), (14, 100, 20), (15, 100, 10)],
)
def test_sent_counts_tokens_while_they_are_made(begin_s: float, end_s: float, tokens: float) -> None:
    sent = Sent(FLOOD, 10.0, Timing(200, 6.0, 3.0 - 1e-9, usage=USAGE))  # from 13 s to 16 s
    assert sent.tokens(begin_s, end_s, IDENTITY) == pytest.approx(tokens, abs=1e-6)


def test_figures_count_what_was_sent_after_the_run_in() -> None:
    answered = Timing(200, 2.0, 1.0, usage=USAGE)
    busy, broken = Timing(503, 0.1, error="busy", retry_after="1"), Timing(200, 2.0, 1.0, "no [DONE]")
    sent = [Sent(OTHER, at_s, answered) for at_s in (0.0, RUN_IN_S + 3, RUN_IN_S, RUN_IN_S + 10)]
    sent += [Sent(FLOOD, RUN_IN_S + 1, timing) for timing in (busy, broken, Timing(0, 0.1, error="ReadError"))]
    found = figures(sent, 10.0, IDENTITY)
    assert found[OTHER] == {"tokens_per_s": 8.0, "requests": 2, "refused": 0, "failed": 0, "ttft_ms": [1000.0, 1000.0]}
    assert found[FLOOD] == {"tokens_per_s": 0.0, "requests": 3, "refused": 1, "failed": 2, "ttft_ms": []}


def test_phases_differ_in_who_asks_and_how_much() -> None:
    loads_of = fairness.phases(16, 0.0, 1.0)
    found = {name: [(load.key, load.connections) for load in loads] for name, loads in loads_of.items()}
    assert tuple(found) == fairness.PHASES
    assert found["alone"] == [(FLOOD, 40)]
    assert found["full"] == [(FLOOD, 16), (OTHER, 0)]
    assert found["flooded"] == [(FLOOD, 40), (OTHER, 0)]
    loads = fairness.twenty()
    assert {(load.connections, load.pause_s) for load in loads} == {(3, None)}
    assert len({load.key for load in loads}) == 20
    assert {load.tokens for load in loads} == {8, 16, 32, 64}


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"ttft_ms": 1600.0}, ["TTFT p50"]),
        ({"flooded": 40.0}, ["tokens lost"]),
        ({"refused": 1}, ["requests of"]),
        ({"failed": 1}, ["requests that failed"]),
    ],
)
def test_report_says_which_bounds_are_reached(changes: dict[str, Any], missed: list[str]) -> None:
    judged = fairness.judged(document(**changes))
    assert [figure for figure, *_, met in judged if met is False] == [
        figure for figure, *_ in judged if figure.startswith(tuple(missed) or "none")
    ]
    assert len([figure for figure, *_, met in judged if met is False]) == len(missed)


def test_report_judges_a_key_that_was_refused_each_time() -> None:
    found = document()
    for one in found["rounds"]["flooded"]:
        one[OTHER]["ttft_ms"] = []
    assert fairness.judged(found)[0][2:] == ("None", False)


def test_report_has_a_line_for_each_phase_key_and_length() -> None:
    text = fairness.text(document())
    for line in (
        "| alone | flood | 102.0 | 4540 | 4500 | 0 | 1003 | 1007 |",
        "| flooded | other | 31.0 | 40 | 0 | 0 | 1003 | 1007 |",
        "| 64 | 5 | 5.00 | 5.00 | 40 | 0 | 0 |",
    ):
        assert line in text
