"""Arrival processes: their rate, their burstiness, the same for the same seed."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean, pstdev

import pytest

from borg_serve.errors import ConfigError
from loadtests.generator.arrivals import even, gamma, poisson, ramp, read_trace, spike

SECONDS = 2000.0
RATE = 5.0


def gaps(arrivals: list[float]) -> list[float]:
    return [after - before for before, after in zip([0.0, *arrivals], arrivals, strict=False)]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_keep_their_rate_and_burstiness(burstiness: float) -> None:
    arrivals = gamma(RATE, SECONDS, burstiness, seed=3)
    assert len(arrivals) == pytest.approx(RATE * SECONDS, rel=0.06)
    variation = pstdev(gaps(arrivals)) / mean(gaps(arrivals))
    assert variation == pytest.approx(burstiness**-0.5, rel=0.08)


@pytest.mark.parametrize("draw", [poisson, ramp, spike])
def test_arrivals_are_the_same_for_the_same_seed_only(draw: Callable[[float, float, int], list[float]]) -> None:
    assert draw(RATE, 100.0, 1) == draw(RATE, 100.0, 1)
    assert draw(RATE, 100.0, 1) != draw(RATE, 100.0, 2)
    assert draw(RATE, 100.0, 1) == sorted(draw(RATE, 100.0, 1))


def test_arrivals_of_a_ramp_grow_to_the_rate() -> None:
    arrivals = ramp(RATE, SECONDS, seed=4)
    assert len(arrivals) == pytest.approx(RATE * SECONDS / 2, rel=0.06)
    late = [due for due in arrivals if due > 0.9 * SECONDS]
    assert len(late) == pytest.approx(0.95 * RATE * 0.1 * SECONDS, rel=0.15)


def test_arrivals_of_a_spike_are_five_times_as_many_in_its_middle() -> None:
    arrivals = spike(RATE, SECONDS, seed=5)
    inside = [due for due in arrivals if 0.4 * SECONDS <= due < 0.6 * SECONDS]
    assert len(inside) == pytest.approx(5 * RATE * 0.2 * SECONDS, rel=0.1)
    assert len(arrivals) - len(inside) == pytest.approx(RATE * 0.8 * SECONDS, rel=0.1)


def test_arrivals_at_equal_distances() -> None:
    assert even(4, 1) == [0.0, 0.25, 0.5, 0.75]


def test_arrivals_of_a_trace_begin_at_zero_in_order(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("timestamp_s,prompt_tokens,output_tokens\n12.5,10,20\n10,30,40\n")
    assert read_trace(file) == [(0.0, 30, 40), (2.5, 10, 20)]


@pytest.mark.parametrize(
    ("text", "named"),
    [("timestamp_s,prompt_tokens,output_tokens\n1,ten,20\n", "line 2"), ("a,b\n1,2\n", "line 2"), ("", "no request")],
)
def test_arrivals_of_a_wrong_trace_say_where(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(ConfigError, match=named):
        read_trace(file)


def test_arrivals_of_the_example_trace() -> None:
    assert len(read_trace(Path("loadtests/traces/example.csv"))) >= 10
