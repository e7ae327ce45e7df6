"""Workloads: lengths as published, no two texts alike."""

from statistics import mean, median

import pytest

from loadtests.workload import WORKLOADS, Lengths, message, sessions

NO_LIMIT = (10**9, 10**9)


@pytest.mark.parametrize(
    ("name", "statistic", "prompt", "output"),
    [
        ("alpaca", mean, 19.31, 58.45),
        ("sharegpt", mean, 161.31, 337.99),
        ("azure-conversation", median, 1020, 129),
        ("azure-code", median, 1500, 13),
        ("mooncake", mean, 7590, 182),
    ],
)
def test_workload_lengths_are_those_of_the_source(name: str, statistic: object, prompt: float, output: float) -> None:
    turns = [session.turns[0] for session in sessions([0.0] * 20_000, WORKLOADS[name], 1, NO_LIMIT)]
    assert callable(statistic)
    assert statistic([turn.prompt_tokens for turn in turns]) == pytest.approx(prompt, rel=0.05)
    assert statistic([turn.output_tokens for turn in turns]) == pytest.approx(output, rel=0.05)


@pytest.mark.parametrize("name", WORKLOADS)
def test_workload_says_where_its_lengths_were_published(name: str) -> None:
    assert "20" in WORKLOADS[name].source or name == "fixed"


def test_workload_lengths_keep_their_limits() -> None:
    turns = [session.turns[0] for session in sessions([0.0] * 500, WORKLOADS["mooncake"], 1, (100, 7))]
    assert {turn.output_tokens for turn in turns} <= set(range(1, 8))
    assert max(turn.prompt_tokens for turn in turns) == 100


def test_workload_texts_differ_from_their_first_words_on() -> None:
    places = [(phase, session, turn) for phase in (-1, 0) for session in range(300) for turn in range(3)]
    texts = [message(0, *place, words=12) for place in places]
    assert len({text[:20] for text in texts}) == len(texts)
    assert texts == [message(0, *place, words=12) for place in places]


def test_workload_text_has_as_many_words_as_asked() -> None:
    assert len(message(0, 0, 0, 0, words=40).split()) - len(message(0, 0, 0, 0, words=1).split()) == 39


def test_workload_conversations_have_the_mean_number_of_turns_and_think_between_them() -> None:
    found = sessions([0.0] * 2000, WORKLOADS["alpaca"], 1, NO_LIMIT, turns=3, think_s=2.0)
    counts = [len(session.turns) for session in found]
    assert set(counts) == {1, 2, 3, 4, 5}
    assert mean(counts) == pytest.approx(3, rel=0.05)
    assert {session.turns[0].think_s for session in found} == {0.0}
    later = [turn.think_s for session in found for turn in session.turns[1:]]
    assert mean(later) == pytest.approx(2.0, rel=0.1)


def test_workload_fixed_lengths_do_not_vary() -> None:
    import random

    assert Lengths(32, fixed=True).draw(random.Random(0), 100) == 32
