"""One replica becomes three under load, and one again when it is over; every request is answered."""

import os
import time
from typing import Any

import pytest

from tests.cluster.conftest import Cluster, configuration
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(not os.environ.get("BORG_TEST_SLOW"), reason="takes minutes: BORG_TEST_SLOW=1 runs it")

USERS = 6
SCALING = {
    "min_replicas": 1,
    "initial_replicas": 1,
    "max_replicas": 3,
    "target_ongoing_requests": 2,
    "upscale_delay_s": 2,
    "downscale_delay_s": 5,
    "metrics_interval_s": 1,
    "look_back_period_s": 4,
}


def test_scaling_follows_the_load_and_loses_no_request(cluster: Cluster) -> None:
    config: dict[str, Any] = configuration(
        int(cluster.url.rpartition(":")[2]), **{"cluster.replicas": 1, "cluster.max_replicas": 3, "cluster.cpus": 0.5}
    )
    config["applications"][0]["deployments"] = [{"name": "BorgServer:borg-merge-v1", "autoscaling_config": SCALING}]
    cluster.deploy(config)
    wait_until("one replica", lambda: len(cluster.replicas()) == 1 and cluster.ready() == 200, 300)
    with cluster.load(USERS) as ends:
        wait_until("three replicas", lambda: len(cluster.replicas()) == 3, 420)
        time.sleep(10)
    wait_until("one replica again", lambda: len(cluster.replicas()) == 1, 180)
    assert cluster.ready() == 200
    assert set(ends) == {"ok"}
    assert len(ends) > USERS
