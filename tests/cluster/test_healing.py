"""What users see, and what comes back, when a replica, HAProxy, the head's GCS or a whole node is killed under load."""

from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import psutil

from tests.cluster.conftest import Cluster
from tests.waiting import wait_until

USERS = 4
BACK_S = 300.0
BROKEN = {"RemoteProtocolError", "ReadError", "ConnectError"}
"""What a client sees of a connection that is cut: never a stream that looks whole."""


def named(cluster: Cluster, word: str) -> psutil.Process:
    """Return the one process of the cluster whose program has this name."""
    (found,) = [process for process in cluster.processes() if process.name() == word]
    return found


def kill_under_load(cluster: Cluster, gone: list[psutil.Process], over: Callable[[], bool] = lambda: True) -> None:
    """Kill what serves one replica while users ask, until the other has served on and it is `over`.

    What is lost is no more than what was in flight, and was told; the service is ready all the while.
    """
    readiness = []
    with cluster.load(USERS) as ends:
        wait_until("every user was answered", lambda: len(ends) > 2 * USERS, 120)
        for process in gone:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        at = len(ends)

        def served_on() -> bool:
            readiness.append(cluster.ready())
            return len(ends) > at + 4 * USERS

        wait_until("the other serves on", served_on, 180)
        wait_until("it is over", lambda: served_on() and over(), BACK_S)
    counts = Counter(ends)
    print(counts)
    assert counts["ok"] > 3 * USERS
    assert set(counts) <= {"ok", *BROKEN, "503 not_ready"}
    assert counts.total() - counts["ok"] <= USERS
    assert set(readiness) == {200}


def test_healing_killed_replica_loses_only_what_it_had_begun(cluster: Cluster) -> None:
    before = cluster.replicas()

    def replaced() -> bool:
        names = {replica.name for replica in cluster.replicas()}
        return len(names) == 2 and before[0].name not in names

    kill_under_load(cluster, [cluster.process_of(before[0])], replaced)


def test_healing_killed_haproxy_comes_back(cluster: Cluster) -> None:
    before = cluster.replicas()
    victim = named(cluster, "haproxy")
    victim.kill()
    wait_until("HAProxy again", lambda: cluster.ready() == 200, BACK_S)
    assert named(cluster, "haproxy").pid != victim.pid
    with cluster.load(USERS) as ends:
        wait_until("answers again", lambda: len(ends) > 4 * USERS, 120)
    assert set(ends) == {"ok"}
    assert cluster.replicas() == before


def test_healing_requests_go_on_while_the_gcs_is_away(cluster: Cluster) -> None:
    before = cluster.replicas()
    with cluster.load(USERS) as ends:
        wait_until("every user was answered", lambda: len(ends) > 2 * USERS, 120)
        named(cluster, "gcs_server").kill()
        lost = len(ends)
        # More than were in flight: so some began, and ended, without it. Each takes seconds longer meanwhile.
        wait_until("answers without it", lambda: len(ends) > lost + USERS, 50)
        away = len(ends)
        cluster.nodes.start_gcs()
        wait_until("answers with the new one", lambda: len(ends) > away + 2 * USERS, 120)
    assert set(ends) == {"ok"}
    assert cluster.replicas() == before


def test_healing_lost_node_leaves_the_other_serving(cluster: Cluster) -> None:
    before = cluster.replicas()
    raylet = cluster.nodes.worker
    gone = [raylet, *raylet.children(recursive=True)]
    lost = [replica.name for replica in before if cluster.process_of(replica) in gone]
    assert len(lost) == 1, "one replica a node"
    kill_under_load(cluster, gone)
    assert {replica.name for replica in cluster.replicas()} == {replica.name for replica in before} - set(lost)
    cluster.nodes.add_worker()
    wait_until("a replica on the new node", lambda: len(cluster.replicas()) == 2, BACK_S)
