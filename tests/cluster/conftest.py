"""The one Ray cluster that the tests of this folder share: two nodes, two replicas of the demo behind HAProxy."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest
import yaml

from borg_serve.config import load as profile
from borg_serve.engine import memory, report
from loadtests.servers import clusters, local
from loadtests.servers.local import LOOK
from tests import workers
from tests.cluster.users import load
from tests.conftest import Redis
from tests.engine.process import environment as environment_of_a_user
from tests.engine.process import free_port
from tests.process.ledgers import Postgres, postgres
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
SERVE = str(Path(sys.executable).with_name("serve"))
MARK = "BORG_TEST_CLUSTER"
READY_S = 420.0
END_S = 90.0
GENTLE = {
    "server.hang_s": 60,
    "limits.deadline_s": 180,
    "limits.stall_s": 60,
    "engine.kv_cache_memory_bytes": 1 << 30,
    "server.processes": 4,  # for one machine: a replica has one API process, and all slots
    **workers.SETTINGS,
}
TESTER = "tester"
KEYS: dict[str, dict[str, object]] = {
    TESTER: {"metrics": True},
    "one": {},
    "other": {},
    "few": {"limits": {"requests_per_minute": 4}},
    "budgeted": {"limits": {"tokens_per_day": 60}},
}
FIRST_PORT = 31000
"""Replicas listen from here on; connections take theirs from 32768 on, and Ray passes over a taken one."""


@dataclass(frozen=True)
class Replica:
    """One replica, asked on its own port, past HAProxy."""

    name: str
    url: str
    version: dict[str, Any]

    def answered(self) -> float:
        """Return how many chat requests it has answered."""
        lines = LOOK.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        found = [line for line in lines if line.startswith("borg_requests_total{") and "chat/completions" in line]
        return sum(float(line.rpartition(" ")[2]) for line in found)

    def gone(self) -> bool:
        """Return whether its process has ended: nobody listens at its port."""
        try:
            LOOK.get(f"{self.url}/health")
        except httpx.ConnectError:
            return True
        except httpx.TransportError:
            pass
        return False


@dataclass(frozen=True)
class Cluster:
    """A running application, and what a test does to it."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    folder: Path
    environment: dict[str, str]
    nodes: "Nodes"
    checkpoint: Path
    settings: dict[str, object]
    """Of its profile, beside GENTLE: keys, their quotas in Redis, their ledger."""

    def tail(self) -> str:
        """Return the last lines of its log, for a failed assertion to show."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def ready(self) -> int:
        """Return the status of /ready through HAProxy, 0 when nobody answers."""
        with suppress(httpx.TransportError):
            return LOOK.get(f"{self.url}/ready").status_code
        return 0

    def replicas(self) -> list[Replica]:
        """Return the replicas that answer, by name."""
        found = []
        for port in range(FIRST_PORT, FIRST_PORT + 24):
            url = f"http://127.0.0.1:{port}"
            with suppress(httpx.TransportError, ValueError):
                version = LOOK.get(f"{url}/version").json()
                if "replica" in version:
                    found.append(Replica(version["replica"], url, version))
        return sorted(found, key=lambda replica: replica.name)

    def processes(self) -> list[psutil.Process]:
        """Return every living process that descends from this cluster: they inherit its mark."""
        return local.marked(MARK, self.environment[MARK])

    def process_of(self, replica: Replica) -> psutil.Process:
        """Return the process that listens on the replica's port."""
        port = int(replica.url.rpartition(":")[2])
        (found,) = [process for process in self.processes() if port in _listened(process)]
        return found

    def engine_of(self, replica: Replica) -> psutil.Process:
        """Return the engine core of a replica."""
        children = self.process_of(replica).children(recursive=True)
        (found,) = [process for process in children if process.cmdline()[:1] == ["VLLM::EngineCore"]]
        return found

    def load(self, users: int) -> AbstractContextManager[list[str]]:
        """Keep so many users asking."""
        return load(self.url, users)

    def deploy(self, **changes: object) -> None:
        """Give Serve the same application again, with these changes to its profile."""
        file = self.folder / "again.yaml"
        port = int(self.url.rpartition(":")[2])
        file.write_text(yaml.safe_dump(configuration(self.checkpoint, port, **{**self.settings, **changes})))
        address = ["--address", self.nodes.dashboard]
        subprocess.run([SERVE, "deploy", *address, str(file)], cwd=ROOT, env=self.environment, check=True, timeout=120)

    def status(self) -> str:
        """Return what Serve says of its applications and deployments."""
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        return LOOK.get(f"{self.nodes.dashboard}/api/serve/applications/", headers=headers, timeout=60).text


def _listened(process: psutil.Process) -> set[int]:
    with suppress(psutil.Error):
        found = [entry for entry in process.net_connections("tcp") if entry.status == psutil.CONN_LISTEN]
        return {int(str(tuple(entry.laddr)[1])) for entry in found}
    return set()


def fits(*sets: str) -> int:
    """Return how many requests' own tokens the demo's KV cache holds with these settings."""
    plan = report.effective(profile(ROOT / "configs/demo-cpu.yaml", sets))["memory"]
    return int((plan["kv_tokens"] - plan["identity_shared_tokens"]) // memory.OWN_TOKENS)


def configuration(checkpoint: Path, port: int, **changes: object) -> dict[str, Any]:
    """Return the demo's own deploy file with another port and these changes to its profile."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "deploy/demo-cpu.yaml").read_text())
    config["http_options"]["port"] = port
    config["applications"][0]["args"]["set"] |= {"model.path": str(checkpoint), **GENTLE, **changes}
    return config


class Nodes:
    """The two Ray nodes that everything runs on."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.nodes", str(free_port()), str(free_port())],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        found = self._answer()
        self.address, self.dashboard = str(found["address"]), str(found["dashboard"])
        self.worker = self.add_worker()

    def add_worker(self) -> psutil.Process:
        """Add a node; its raylet, of which everything on that node descends."""
        self.worker = psutil.Process(int(self._ask("worker")))
        return self.worker

    def start_gcs(self) -> None:
        """Start the head's GCS again, on the port it had."""
        self._ask("gcs")

    def end(self) -> None:
        """End both nodes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_S)
        finally:
            self._process.kill()
            self._process.wait()

    def _ask(self, what: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("nodes: "):
                return json.loads(line.removeprefix("nodes: "))
        raise AssertionError(f"the nodes ended with status {self._process.wait()}")


@pytest.fixture(scope="session")
def database() -> Iterator[Postgres]:
    """Where all replicas keep one ledger."""
    with postgres() as found:
        yield found


@pytest.fixture(scope="session")
def tester() -> Iterator[None]:
    """Ask with a key that may read metrics, wherever a test says nothing else."""
    LOOK.headers["authorization"] = f"Bearer {TESTER}"
    yield
    del LOOK.headers["authorization"]


def tenancy(folder: Path, redis: Redis, request: pytest.FixtureRequest) -> dict[str, object]:
    """Return the settings of KEYS, their quotas in Redis and their ledger."""
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in KEYS}
    entries = [{"name": name, "sha256": digests[name], **more} for name, more in KEYS.items()]
    (folder / "keys.yaml").write_text(yaml.safe_dump(entries))
    try:
        ledger = request.getfixturevalue("database").url
    except pytest.skip.Exception:  # without PostgreSQL, a file that the replicas of this machine share
        ledger = f"sqlite:///{folder}/usage.db"
    return {
        "server.keys": str(folder / "keys.yaml"),
        "cluster.quota_url": f"redis://{redis.address}",
        "usage.url": ledger,
        "usage.spool": str(folder / "spool"),
    }


@pytest.fixture(scope="session")
def shared_cluster(
    checkpoint: Path,
    redis: Redis,
    tester: None,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Cluster]:
    """The demo's cluster, ready, one replica a node; at the end no process of it may be left behind."""
    folder = tmp_path_factory.mktemp("cluster")
    port = free_port()
    settings = tenancy(folder, redis, request)
    (folder / "deploy.yaml").write_text(yaml.safe_dump(configuration(checkpoint, port, **settings)))
    environment = {
        **environment_of_a_user(),
        MARK: uuid4().hex,
        "RAY_TMPDIR": tempfile.mkdtemp(prefix="ray-"),  # short: it holds sockets
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid4().hex,
        "RAY_REDIS_ADDRESS": redis.address,
        **clusters.direct(FIRST_PORT),
        **clusters.ALIKE,
        "RAY_SERVE_INGRESS_REQUEST_ROUTER_METRICS_ENABLED": "1",
    }
    log = folder / "serve.log"
    nodes = Nodes(environment)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [SERVE, "run", "--address", nodes.address, str(folder / "deploy.yaml")],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    cluster = Cluster(f"http://127.0.0.1:{port}", process, log, folder, environment, nodes, checkpoint, settings)
    try:
        end = time.monotonic() + READY_S
        while len(cluster.replicas()) < 2 or cluster.ready() != 200:
            assert process.poll() is None, cluster.tail()
            assert time.monotonic() < end, cluster.tail()
            time.sleep(1)
        yield cluster
        process.send_signal(signal.SIGTERM)
        process.wait(END_S)
        nodes.end()
        wait_until("every process of the cluster has ended", lambda: not cluster.processes(), END_S)
    finally:
        for left in cluster.processes():
            with suppress(psutil.NoSuchProcess):
                left.kill()
        nodes.end()
        process.kill()
        process.wait()
        shutil.rmtree(environment["RAY_TMPDIR"], ignore_errors=True)


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Cluster:
    """That cluster with both its replicas: the last test, or this one's first run in a pause, may have taken one."""
    wait_until("two replicas", lambda: len(shared_cluster.replicas()) == 2 and shared_cluster.ready() == 200, READY_S)
    return shared_cluster


@pytest.fixture
def targets(cluster: Cluster) -> list[str]:
    """Addresses of Ray's metrics, as Ray's own service discovery names them."""
    file = Path(cluster.environment["RAY_TMPDIR"]) / "ray" / "prom_metrics_service_discovery.json"
    wait_until("Ray's service discovery", file.is_file, 60)
    return [target for group in json.loads(file.read_text()) for target in group["targets"]]
