"""One replica becomes three under load, and one again when it is over; every request is answered."""

import os
import time
from pathlib import Path

import pytest

from borg_serve.checkpoint import demo
from loadtests.servers import clusters
from tests.cluster.conftest import GENTLE
from tests.cluster.users import load
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(not os.environ.get("BORG_TEST_SLOW"), reason="takes minutes: BORG_TEST_SLOW=1 runs it")

USERS = 6
SCALING = {
    "min_replicas": 1,
    "initial_replicas": 1,
    "max_replicas": 3,
    "target_ongoing_requests": 2,
    "upscale_delay_s": 2,
    # Longer than a dip in the load: Serve ends the replicas that it no longer wants, those that start first.
    "downscale_delay_s": 60,
    "metrics_interval_s": 1,
    "look_back_period_s": 10,
}


def test_scaling_follows_the_load_and_loses_no_request(tmp_path: Path) -> None:
    sets = {**GENTLE, "model.path": str(demo.materialise()), "cluster.max_replicas": 3}
    application = clusters.application(1, sets, autoscaling_config=SCALING)
    with clusters.running("scaling", application, tmp_path, clusters.direct()) as server:
        assert len(clusters.ports(server)) == 1
        with load(server.url, USERS) as ends:
            wait_until("three replicas", lambda: len(clusters.ports(server)) == 3, 600, every_s=2)
            time.sleep(10)
        with load(server.url, 1) as later:
            wait_until("one replica again", lambda: len(clusters.ports(server)) == 1, 300, every_s=2)
        print(f"{len(ends)} requests while it grew, {len(later)} while it shrank")
        assert set(ends) == set(later) == {"ok"}
        assert min(len(ends), len(later)) > USERS
