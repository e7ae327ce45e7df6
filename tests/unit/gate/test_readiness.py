"""Whether the server may take requests, over one process and over several."""

from itertools import product

import pytest
from prometheus_client import REGISTRY

from borg_serve.gate.readiness import Phase, Readiness


def test_readiness_begins_with_starting_and_says_why() -> None:
    readiness = Readiness()
    assert readiness.phase == Phase.STARTING
    assert readiness.reason
    assert REGISTRY.get_sample_value("borg_ready") == 0


def test_readiness_follows_its_phases_and_shows_them_in_the_metrics() -> None:
    readiness = Readiness()
    readiness.set(Phase.READY)
    assert (readiness.phase, readiness.reason) == (Phase.READY, "")
    assert REGISTRY.get_sample_value("borg_ready") == 1
    readiness.set(Phase.DRAINING, "the server is being stopped")
    assert (readiness.phase, readiness.reason) == (Phase.DRAINING, "the server is being stopped")
    assert REGISTRY.get_sample_value("borg_ready") == 0


@pytest.mark.parametrize("phases", list(product(Phase, repeat=2)))
def test_readiness_of_several_is_that_of_the_worst(phases: tuple[Phase, Phase]) -> None:
    shared = bytearray(2)
    one, two = Readiness(shared, 0), Readiness(shared, 1)
    one.set(phases[0], "one")
    two.set(phases[1], "two")
    worst = next((phase for phase in (Phase.FAILED, Phase.DRAINING, Phase.STARTING) if phase in phases), Phase.READY)
    assert one.phase == two.phase == worst
    assert (worst == Phase.READY) == (phases == (Phase.READY, Phase.READY))


def test_readiness_tells_another_processs_trouble_from_its_own() -> None:
    shared = bytearray(2)
    one, two = Readiness(shared, 0), Readiness(shared, 1)
    one.set(Phase.READY)
    two.set(Phase.FAILED, "the engine died")
    assert two.reason == "the engine died"
    assert one.reason == "another API process says so"
