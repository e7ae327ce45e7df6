"""Start and end a Ray Serve application on a cluster of its own on this machine, and find its replicas.

It knows the variables that Ray reads before it starts. It measures nothing.
"""

import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from borg_serve.config import Limits
from borg_serve.yaml_file import parse
from loadtests.servers import local

logging.getLogger("httpx").setLevel(logging.WARNING)  # Ray makes every look at a server a line

FIRST_PORT = 31200
PORTS = 100
"""Replicas listen from here on, those of other clusters of this machine as well; below the ports of connections."""
READY_S = 600.0
_VARIABLES = parse(Path(__file__).with_name("ray.yaml").read_text(encoding="utf-8"))
TUNED = {
    # HAProxy holds a body that the gate takes and its headers; Ray's own limit is 8 MiB
    "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE": str(Limits().body_bytes + (1 << 16)),
    **_VARIABLES["tuned"],
}
"""Request path settings that differ from Ray's own; what they gain is in docs/results/router-capacity.md."""
ALIKE: dict[str, str] = _VARIABLES["alike"]
"""As `make cluster-demo` has it, for every application of Ray's."""


def application(count: int, changes: dict[str, Any] | None = None, **deployment: Any) -> dict[str, Any]:
    """The demo's application with so many replicas, changes to its profile, and options of Serve for its deployment."""
    found: dict[str, Any] = parse(Path("deploy/demo-cpu.yaml").read_text())["applications"][0]
    found["args"]["set"] |= {"cluster.replicas": count, **(changes or {})}
    if deployment:
        found["deployments"] = [{"name": "BorgServer:borg-merge-v1", **deployment}]
    return found


def ports(server: local.Server) -> list[int]:
    """The ports of a cluster's replicas that answer; fewer than asked for while some start."""
    found, processes = [], {process.pid for process in server.processes()}
    listening = (one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN)
    for port in sorted({getattr(one.laddr, "port", 0) for one in listening if one.pid in processes}):
        with suppress(httpx.TransportError, ValueError):
            url = f"http://127.0.0.1:{port}/version"
            if FIRST_PORT <= port < FIRST_PORT + PORTS and "replica" in local.LOOK.get(url).json():
                found.append(port)
    return found


def replicas(server: local.Server, count: int) -> list[int]:
    """Wait until so many replicas answer; their ports."""
    while len(found := ports(server)) < count:
        time.sleep(1)
    return found


def direct(first_port: int = FIRST_PORT) -> dict[str, str]:
    """The environment in which HAProxy talks straight to the replicas, every listener on a free port."""
    listeners = ("HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT", "FALLBACK_PROXY_HTTP_PORT")
    return {
        **_VARIABLES["direct"],
        **TUNED,
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first_port + PORTS),
        **{f"RAY_SERVE_{listener}": str(local.free_port()) for listener in listeners},
    }


@contextmanager
def running(
    name: str,
    application: dict[str, Any],
    folder: Path,
    more: Mapping[str, str],
    ready: str = "/ready",
    naming: str = "",
) -> Iterator[local.Server]:
    """Run one application by `serve run` on a cluster of its own until the block ends, with every process of it.

    `more`: variables for its environment; `ready`, `naming` as `local.running` takes them. Raises RuntimeError with
    the end of its log if it does not become ready.
    """
    port = local.free_port()
    http = {"host": "127.0.0.1", "port": port}
    config = {"proxy_location": "HeadOnly", "http_options": http, "applications": [application]}
    file, log = folder / f"{name}.yaml", folder / f"{name}.log"
    file.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("serve")), "run", str(file)]
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as ray:  # short: it holds sockets
        environment = {"RAY_TMPDIR": ray, "PYTHONPATH": os.getcwd(), **ALIKE, **_VARIABLES["room"], **more}
        with local.running(name, command, port, ready, log, READY_S, environment, naming) as server:
            yield server
