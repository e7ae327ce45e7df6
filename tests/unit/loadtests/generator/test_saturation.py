"""The search for the highest rate that meets an SLO."""

import pytest

from loadtests.generator.saturation import Search, wilson


def test_wilson_interval_holds_known_values() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(90, 100)
    assert (round(low, 3), round(high, 3)) == (0.826, 0.945)


@pytest.mark.parametrize("capacity", [0.7, 3.0, 11.0])
def test_search_brackets_the_capacity(capacity: float) -> None:
    search = Search(start=2.0, need=0.9, budget=30)
    while (rate := search.next_rate()) is not None:
        search.observe(rate, 200 if rate <= capacity else 100, 200)
    low, high = search.bracket()
    assert low is not None
    assert high is not None
    assert low <= capacity < high <= low * search.tolerance * 1.001


def test_search_tries_a_rate_again_while_it_is_not_decided() -> None:
    search = Search(start=2.0, need=0.9)
    search.observe(2.0, 9, 10)
    assert search.tried[0].verdict(0.9) is None
    assert search.next_rate() == 2.0
    search.observe(2.0, 10, 10)
    assert search.next_rate() == 4.0  # as often as it may: 19 of 20 are enough
    assert search.document()["rates"][0]["decided"] is False  # type: ignore[index]


def test_search_keeps_its_budget() -> None:
    search = Search(start=2.0, budget=3)
    for _ in range(3):
        rate = search.next_rate()
        assert rate is not None
        search.observe(rate, 0, 100)
    assert search.next_rate() is None
    assert search.bracket()[0] is None
