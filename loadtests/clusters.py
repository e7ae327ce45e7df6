"""Start and end Ray Serve applications on a cluster of this machine for a measurement, with all their processes."""

import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil
import yaml

from borg_serve.config import Limits
from loadtests import servers

logging.getLogger("httpx").setLevel(logging.WARNING)  # Ray makes every look at a server a line

__all__ = ["ALIKE", "TUNED", "application", "direct", "end", "family", "ports", "running"]

MARK = "BORG_LOADTEST_CLUSTER"
FIRST_PORT = 31200
PORTS = 100
"""Replicas listen from here on, those of other clusters of this machine as well; below the ports of connections."""
READY_S = 600.0
TUNED = {
    # of HAProxy: a body that the gate takes and its headers. Ray's own is 8 MiB
    "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE": str(Limits().body_bytes + (1 << 16)),
    # no second thread in a replica and in the router: each message would go from one to the other
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
"""What differs from Ray's own settings on the way to a replica; what it gains is in docs/results/router-capacity.md."""
ALIKE = {
    "RAY_worker_niceness": "0",  # Ray's own, 15, starves replicas where clients share the machine
    "RAY_USAGE_STATS_ENABLED": "0",
    # with Ray's own 0.1 s and 100 ms its processes take half as much again: docs/results/ray.md
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
}
"""As `make cluster-demo` has it, for every application of Ray's."""
ROOM = {"RAY_OVERRIDE_RESOURCES": '{"CPU": 8}'}
"""Logical ones: four replicas ask for more than two, and so does Ray's own app."""


def application(replicas: int, changes: dict[str, Any] | None = None, **deployment: Any) -> dict[str, Any]:
    """The demo's application with so many replicas, changes to its profile, and options of Serve for its deployment."""
    found: dict[str, Any] = yaml.safe_load(Path("deploy/demo-cpu.yaml").read_text())["applications"][0]
    found["args"]["set"] |= {"cluster.replicas": replicas, **(changes or {})}
    if deployment:
        found["deployments"] = [{"name": "BorgServer:borg-merge-v1", **deployment}]
    return found


def ports(server: servers.Server) -> list[int]:
    """The ports of a cluster's replicas that answer; fewer than asked for while some start."""
    found = []
    for port in sorted(port for process in family(server) for port in _listened(process)):
        with suppress(httpx.TransportError, ValueError):
            if "replica" in servers.LOOK.get(f"http://127.0.0.1:{port}/version").json():
                found.append(port)
    return found


def _listened(process: psutil.Process) -> set[int]:
    with suppress(psutil.Error):
        listening = (entry for entry in process.net_connections("tcp") if entry.status == psutil.CONN_LISTEN)
        numbers = {int(str(tuple(entry.laddr)[1])) for entry in listening}
        return {number for number in numbers if FIRST_PORT <= number < FIRST_PORT + PORTS}
    return set()


def direct(first_port: int = FIRST_PORT) -> dict[str, str]:
    """The environment in which HAProxy talks straight to the replicas, every listener on a free port."""
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
        "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1",
        **TUNED,
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first_port + PORTS),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(servers.free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(servers.free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(servers.free_port()),
    }


@contextmanager
def running(
    name: str,
    application: dict[str, Any],
    folder: Path,
    more: Mapping[str, str],
    ready: str = "/ready",
    naming: str = "",
) -> Iterator[servers.Server]:
    """Run one application by `serve run` on a cluster of its own until the block ends, with every process of it.

    `more`: variables for its environment; `ready`, `naming` as `servers.running` takes them. Raises RuntimeError with
    the end of its log if it does not become ready.
    """
    port, mark = servers.free_port(), uuid4().hex
    http = {"host": "127.0.0.1", "port": port}
    config = {"proxy_location": "HeadOnly", "http_options": http, "applications": [application]}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("serve")), "run", str(file)]
    with ExitStack() as stack:
        ray = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
        stack.callback(end, mark)
        environment = {
            MARK: mark,
            "RAY_TMPDIR": ray,  # short: it holds sockets
            "PYTHONPATH": os.getcwd(),
            **ALIKE,
            **ROOM,
            **more,
        }
        log = folder / f"{name}.log"
        yield stack.enter_context(servers.running(name, command, port, ready, log, READY_S, environment, naming))


def family(server: servers.Server) -> list[psutil.Process]:
    """Every process of a server's cluster: Ray's own app answers before its engine exists, so look when you need it."""
    return servers.marked(MARK, server.process.environ()[MARK])


def end(mark: str) -> None:
    """Wait until every process with this mark has ended, at most 20 s, then kill: Ray leaves HAProxy behind."""
    deadline = time.monotonic() + 20
    while servers.marked(MARK, mark) and time.monotonic() < deadline:
        time.sleep(0.5)
    for process in servers.marked(MARK, mark):
        with suppress(psutil.NoSuchProcess):
            process.kill()
