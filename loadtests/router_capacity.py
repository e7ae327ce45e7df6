"""How many requests the way to a replica carries: `python -m loadtests.router_capacity`, about 7 minutes on two cores.

HAProxy, our router and the whole gate are real; behind the gate an application that only sleeps stands for the engine,
here and nowhere else. Users ask one short request after another; the figure is requests/s, with who used the CPU.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import psutil
from ray import serve
from ray.serve.deployment import Application

from borg_serve.admission import Admission
from borg_serve.cluster import Arguments, BorgServer, compose
from borg_serve.config import Config, load
from borg_serve.device import prepare_environment
from borg_serve.exchange import Receive, Scope, Send
from borg_serve.gate import Gate
from borg_serve.preparation import prepare
from borg_serve.readiness import Phase, Readiness
from borg_serve.server import log, make_gate
from loadtests import clusters
from loadtests.tables import table, write

ROWS = ((1, False), (1, True), (2, True), (4, True))
"""Replicas, and whether the way to them has our settings (clusters.TUNED)."""
USERS = 64
SLEEP_S = 0.05
DOCUMENT = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 2330, "completion_tokens": 2, "total_tokens": 2332},
}
BODY = json.dumps({"messages": [{"role": "user", "content": "river stone cloud engine " * 20}], "max_tokens": 2})
GROUPS = {"haproxy": "HAProxy", "LLMRouter": "router", "Sleeping": "gate and stand-in", "ServeController": "Serve"}
"""Processes by a word of their title; the rest is Ray's own."""


async def sleep(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer every request after SLEEP_S, as an engine that is never busy would."""
    if scope["type"] == "lifespan":
        for _ in range(2):
            await send({"type": f"{(await receive())['type']}.complete"})
        return
    await receive()
    await asyncio.sleep(SLEEP_S)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(DOCUMENT).encode()})


class Sleeping(BorgServer):
    """A replica whose engine only sleeps."""

    async def __init__(self, llm_config: Any, config: Config, identity_sha256: str) -> None:  # type: ignore[misc]
        log()
        self.engine = None
        self._prepared = await asyncio.to_thread(prepare, config)

    async def __serve_build_asgi_app__(self) -> Gate:
        readiness = Readiness()
        gate = make_gate(self._prepared, readiness, replica=str(serve.get_replica_context().replica_id.unique_id))
        self._admission = Admission(concurrent=USERS, queued=USERS, queued_bytes=1 << 30)
        gate.open(sleep, self._admission)
        readiness.set(Phase.READY)
        return gate

    async def check_health(self) -> None:
        """Nothing to ask."""

    async def __del__(self) -> None:
        """Nothing to end."""


def build(args: Arguments) -> Application:
    """The application with sleeping replicas; what `serve run` calls."""
    return compose(
        load(Path(args.profile), [f"{key}={json.dumps(value)}" for key, value in args.set.items()]), Sleeping
    )


async def users(url: str, seconds: float) -> int:
    """USERS users, each on a connection of its own, for so long; how many answers came."""
    address = urlsplit(url)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nX-Session-Id: "
    end = time.perf_counter() + seconds
    answers = 0

    async def user(number: int) -> None:
        nonlocal answers
        request = f"{head}user-{number}\r\nContent-Length: {len(BODY)}\r\n\r\n{BODY}".encode()
        while time.perf_counter() < end:
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            with suppress(asyncio.IncompleteReadError):  # HAProxy ends idle connections when it learns of a replica
                while time.perf_counter() < end:
                    writer.write(request)
                    answer = await reader.readuntil(b"\r\n\r\n")
                    if not answer.startswith(b"HTTP/1.1 200"):
                        raise RuntimeError(f"an answer was {answer[:60]!r}")
                    fields = answer.lower().split(b"\r\n")
                    length = next(field for field in fields if field.startswith(b"content-length:"))
                    await reader.readexactly(int(length.partition(b":")[2]))
                    answers += 1
            writer.close()

    await asyncio.gather(*(user(number) for number in range(USERS)))
    return answers


def cpu(processes: list[psutil.Process]) -> dict[str, float]:
    """CPU seconds so far, by group."""
    found = {"client": sum(os.times()[:2])}
    for process in processes:
        try:
            title = " ".join([process.name(), *process.cmdline()])
            times = process.cpu_times()
        except psutil.Error:
            continue
        group = next((group for word, group in GROUPS.items() if word in title), "Ray")
        found[group] = found.get(group, 0.0) + times.user + times.system
    return found


def measure(replicas: int, tuned: bool, rounds: int, seconds: float, folder: Path) -> dict[str, Any]:
    """One cluster; requests/s of each round, and CPU milliseconds a request by group over all of them."""
    more = {name: value for name, value in clusters.direct().items() if tuned or name not in clusters.TUNED}
    application = clusters.application(replicas) | {"import_path": "loadtests.router_capacity:build"}
    with clusters.running(f"sleeping-{replicas}", application, folder, more) as server:
        while len(clusters.ports(server)) < replicas:
            time.sleep(1)
        asyncio.run(users(server.url, 3))  # connections and caches are there
        before, total, rates = cpu(clusters.family(server)), 0, []
        for _ in range(rounds):
            begin = time.perf_counter()
            answers = asyncio.run(users(server.url, seconds))
            rates.append(answers / (time.perf_counter() - begin))
            total += answers
        after = cpu(clusters.family(server))
        spent = {group: round(1e3 * (after[group] - before.get(group, 0.0)) / total, 3) for group in after}
    print(
        f"{replicas} replicas, tuned {tuned}: {[round(rate) for rate in rates]} requests/s, {spent}",
        file=sys.stderr,
        flush=True,
    )
    return {"replicas": replicas, "tuned": tuned, "requests_per_s": rates, "cpu_ms_a_request": spent}


def markdown(document: dict[str, Any]) -> str:
    """The report for a person."""
    groups = sorted({group for row in document["rows"] for group in row["cpu_ms_a_request"]})
    rows = [
        (
            row["replicas"] if row["tuned"] else f"{row['replicas']}, Ray's own settings",
            f"{median(row['requests_per_s']):.0f}",
            f"{min(row['requests_per_s']):.0f}-{max(row['requests_per_s']):.0f}",
            *(f"{row['cpu_ms_a_request'].get(group, 0):.2f}" for group in groups),
        )
        for row in document["rows"]
    ]
    lines = [
        "# What the way to a replica carries",
        "",
        f"`{document['command']}` on {document['cores']} cores, Ray {document['ray']}.",
        "",
        f"{USERS} users on connections of their own, each with a session, one whole (not streamed) short request after "
        f"another, through HAProxy, our router and the gate, to an application that answers after {SLEEP_S} s "
        "without an engine. Everything, the client too, shares these cores: what the cores are spent on says more than "
        "the rate. CPU in milliseconds a request.",
        "",
        table(("replicas", "requests/s", "rounds from-to", *(f"CPU {group}" for group in groups)), rows),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the report and its JSON twin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args()
    prepare_environment()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(*row, arguments.rounds, arguments.seconds, Path(folder)) for row in ROWS]
    document = {
        "command": f"python -m loadtests.router_capacity --rounds {arguments.rounds} --seconds {arguments.seconds:g}",
        "cores": len(os.sched_getaffinity(0)),
        "ray": version("ray"),
        "rows": rows,
    }
    write(arguments.out, "router-capacity", document, markdown(document))


if __name__ == "__main__":
    main()
