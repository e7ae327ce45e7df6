"""How many requests the request path of a cluster carries: `python -m loadtests.experiments.router_capacity`.

HAProxy, our router and the whole gate are real; behind the gate an application that only sleeps stands for the engine,
here and nowhere else. Users ask one short request after another; the figure is requests/s, with who used the CPU.
"""

import asyncio
import json
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray import serve
from ray.serve.deployment import Application

from borg_serve.cluster.app import Arguments, compose
from borg_serve.cluster.replica import BorgServer
from borg_serve.config import Config, load
from borg_serve.engine.environment import prepare_environment
from borg_serve.engine.memory import Slots
from borg_serve.engine.prepare import prepare
from borg_serve.gate.app import Gate
from borg_serve.gate.coordinator import Coordinator
from borg_serve.gate.readiness import Phase, Readiness
from borg_serve.gate.request import Receive, Scope, Send
from borg_serve.serving.lifecycle import log_to_stderr, make_gate
from loadtests.experiments.experiment import command, note, parser, surroundings
from loadtests.report.tables import render, write
from loadtests.servers import clusters

ROWS = ((1, False), (1, True), (2, True), (4, True))
"""Replicas, and whether the request path has our settings (clusters.TUNED)."""
USERS = 64
SLEEP_S = 0.05
DOCUMENT = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 2330, "completion_tokens": 2, "total_tokens": 2332},
}
BODY = json.dumps({"messages": [{"role": "user", "content": "river stone cloud engine " * 20}], "max_tokens": 2})
TITLES = {
    "HAProxy": ("haproxy",),
    "router": ("LLMRouter",),
    "gate and stand-in": ("Sleeping",),
    "Serve": ("ServeController",),
}
"""Words in the titles of processes by what they are there for; the rest is Ray's own."""


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
        log_to_stderr()
        self.engine = None
        self._prepared = await asyncio.to_thread(prepare, config)

    async def __serve_build_asgi_app__(self) -> Gate:
        readiness = Readiness()
        self._coordinator = Coordinator(max_wait_s=60)
        await self._coordinator.open(Slots(USERS, 0, USERS << 20, 16, 1 << 30))
        replica = str(serve.get_replica_context().replica_id.unique_id)
        gate = make_gate(self._prepared, readiness, self._coordinator, None, replica)
        gate.open(sleep)
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


def measure(replicas: int, tuned: bool, rounds: int, seconds: float, folder: Path) -> dict[str, Any]:
    """One cluster; requests/s of each round, and CPU milliseconds a request by group over all of them."""
    more = {name: value for name, value in clusters.direct().items() if tuned or name not in clusters.TUNED}
    application = clusters.application(replicas) | {"import_path": "loadtests.experiments.router_capacity:build"}
    with clusters.running(f"sleeping-{replicas}", application, folder, more) as server:
        clusters.replicas(server, replicas)
        asyncio.run(users(server.url, 3))  # connections and caches are there
        before, mine, total, rates = server.cpu_s(TITLES), time.process_time(), 0, []
        for _ in range(rounds):
            begin = time.perf_counter()
            answers = asyncio.run(users(server.url, seconds))
            rates.append(answers / (time.perf_counter() - begin))
            total += answers
        spent = {group: after - before.get(group, 0.0) for group, after in server.cpu_s(TITLES).items()}
        spent["client"] = time.process_time() - mine
    row = {"replicas": replicas, "tuned": tuned, "requests_per_s": rates}
    row["cpu_ms_a_request"] = {group: round(1e3 * seconds / total, 3) for group, seconds in spent.items()}
    note(row)
    return row


def text(document: dict[str, Any]) -> str:
    """The report for a person."""
    groups = sorted({group for row in document["rows"] for group in row["cpu_ms_a_request"]})
    return render("router_capacity.md.j2", document, groups=groups, users=USERS, sleep_s=SLEEP_S)


def main() -> None:
    """Measure, and write the report and its JSON twin."""
    options = parser(__doc__, "router-capacity", config=False)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=8)
    arguments = options.parse_args()
    prepare_environment()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(*row, arguments.rounds, arguments.seconds, Path(folder)) for row in ROWS]
    document = {"command": command("router_capacity", arguments), **surroundings("ray"), "rows": rows}
    write(arguments.out, arguments.name, document, text(document))


if __name__ == "__main__":
    main()
