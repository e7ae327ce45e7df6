"""Workloads: lengths as published, no two texts alike."""

from statistics import mean, median, quantiles

import pytest

from loadtests.generator.workload import WORKLOADS, Lengths, message, sessions

NO_LIMIT = (10**9, 10**9)


@pytest.mark.parametrize(
    ("name", "prompt", "output"),
    [
        ("azure-conversation", (1020, 2735), (129, 424)),
        ("azure-code", (1469, 5194), (13, 55)),
        ("mooncake", (6909, 27367), (350, 597)),
    ],
)
def test_workload_lengths_are_those_of_the_source(name: str, prompt: tuple[int, int], output: tuple[int, int]) -> None:
    turns = [session.turns[0] for session in sessions([0.0] * 20_000, WORKLOADS[name], 1, NO_LIMIT)]
    for lengths, (p50, p90) in (
        ([turn.prompt_tokens for turn in turns], prompt),
        ([turn.output_tokens for turn in turns], output),
    ):
        assert median(lengths) == pytest.approx(p50, rel=0.05)
        assert quantiles(lengths, n=10)[-1] == pytest.approx(p90, rel=0.05)
        assert all(f"{value:,}" in WORKLOADS[name].source for value in (p50, p90))


@pytest.mark.parametrize("name", WORKLOADS)
def test_workload_says_where_its_lengths_were_published(name: str) -> None:
    source = WORKLOADS[name].source
    assert ("github.com/" in source and "et al., " in source) or name in ("short", "fixed")


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
    found = sessions([0.0] * 2000, WORKLOADS["short"], 1, NO_LIMIT, turns=3, think_s=2.0)
    counts = [len(session.turns) for session in found]
    assert set(counts) == {1, 2, 3, 4, 5}
    assert mean(counts) == pytest.approx(3, rel=0.05)
    assert {session.turns[0].think_s for session in found} == {0.0}
    later = [turn.think_s for session in found for turn in session.turns[1:]]
    assert mean(later) == pytest.approx(2.0, rel=0.1)


def test_workload_fixed_lengths_do_not_vary() -> None:
    import random

    assert Lengths(32, 32).draw(random.Random(0), 100) == 32
