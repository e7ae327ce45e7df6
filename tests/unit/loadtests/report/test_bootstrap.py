"""Intervals of ratios: how often they hold what they should."""

from random import Random

import pytest

from loadtests.report.bootstrap import quantile, ratio
from tests.loads import many


def test_interval_is_around_the_ratio_of_the_medians() -> None:
    found = ratio([18, 19, 20, 21, 22], [9, 9.5, 10, 10.5, 11])
    assert found.value == 2
    assert found.low < 2 < found.high
    assert str(ratio([2.0] * 5, [1.0] * 5)) == "2.000 [2.000, 2.000]"


def test_interval_needs_enough_values() -> None:
    with pytest.raises(ValueError, match="at least 5 values of each side, got 5 and 4"):
        ratio([1.0] * 5, [1.0] * 4)


def test_interval_is_rarely_wrong_about_runs_of_the_same_kind() -> None:
    def ttft(seed: int) -> list[float]:
        return [record.ttft_ms(True) or 0.0 for record in many(120, seed=seed)]

    found = [ratio(ttft(2 * n + 1), ttft(2 * n), quantile(50), blocks=True) for n in range(40)]
    assert sum(one.low <= 1 <= one.high for one in found) >= 34  # 38 are expected of a 95 % interval


def test_interval_of_neighbours_that_share_a_queue_is_wider() -> None:
    rng = Random(1)
    queue = [rng.uniform(1, 2) for _ in range(40) for _ in range(10)]
    slow = [value for value in queue[::10] for _ in range(10)]
    alone, together = (ratio(slow, slow, blocks=blocks) for blocks in (False, True))
    assert together.high - together.low > 1.3 * (alone.high - alone.low)
