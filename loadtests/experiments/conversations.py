"""Where conversations go on a cluster: `python -m loadtests.experiments.conversations`, about 40 minutes on two cores.

With 2 and with 4 replicas: how evenly 200 conversations spread, and how much of what later turns repeat is found in the
replica's cache, by our router, and where every turn is sent straight to a replica at random. Counts, no times.
"""

import asyncio
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from loadtests.experiments.experiment import command, note, parser, surroundings
from loadtests.generator.workload import WORDS
from loadtests.report.tables import render, write
from loadtests.servers import clusters, local

REPLICAS = (2, 4)
TURN_WORDS = 96
USERS = 4
"""Few enough that no replica has half its slots taken: past that the router evens loads out, as it should."""
SMALL = {
    "engine.kv_cache_memory_bytes": 1 << 30,
    "limits.deadline_s": 300,
    "server.hang_s": 60,
}


@dataclass
class Conversation:
    """One user's turns so far."""

    rng: random.Random
    messages: list[dict[str, str]]
    prompt_tokens: int = 0
    """Of its last turn."""

    def speak(self) -> None:
        """Add a made-up answer, if a turn was before, and the next turn."""
        if self.messages:
            self.messages.append({"role": "assistant", "content": " ".join(self.rng.choices(WORDS, k=20))})
        self.messages.append({"role": "user", "content": " ".join(self.rng.choices(WORDS, k=TURN_WORDS))})


async def turns(urls: Sequence[str], conversations: Sequence[Conversation], number: int) -> tuple[int, int, int]:
    """So many turns of each conversation, by USERS users at once, each sent to one of `urls` at random.

    (Tokens that were sent before, of these cached, failures.)
    """
    left = list(conversations)
    repeated = cached = failed = 0
    async with httpx.AsyncClient(timeout=300) as client:
        identity = (await client.get(f"{urls[0]}/version")).json()["identity"]["tokens"]

        async def user() -> None:
            nonlocal repeated, cached, failed
            while left:
                conversation = left.pop()
                for _ in range(number):
                    conversation.speak()
                    body = {"messages": conversation.messages, "max_tokens": 1, "temperature": 0}
                    url = conversation.rng.choice(urls)
                    answer = await client.post(f"{url}/v1/chat/completions", json=body)
                    if answer.status_code != 200:
                        failed += 1
                        continue
                    usage = answer.json()["usage"]
                    if conversation.prompt_tokens:
                        repeated += conversation.prompt_tokens - identity
                        cached += max(0, usage["prompt_tokens_details"]["cached_tokens"] - identity)
                    conversation.prompt_tokens = usage["prompt_tokens"]

        await asyncio.gather(*(user() for _ in range(USERS)))
    return repeated, cached, failed


def answered(port: int) -> int:
    """How many chat requests the replica on this port has answered."""
    return int(local.metric(f"http://127.0.0.1:{port}", "borg_requests_total", route="/v1/chat/completions"))


def measure(replicas: int, count: int, later: int, folder: Path) -> list[dict[str, Any]]:
    """One cluster, started for this and ended: all conversations by our router, then half as many others at random.

    A row for each router. Conversations: how many began on each replica. Repeated tokens: prompt tokens of later turns
    without the identity and the turn's own new ones. Cached tokens: how many of these were in the cache.
    """
    application = clusters.application(replicas, SMALL)
    found: list[dict[str, Any]] = []
    with clusters.running(str(replicas), application, folder, clusters.direct()) as server:
        ports = clusters.replicas(server, replicas)
        routers = {"ours": [server.url], "random": [f"http://127.0.0.1:{port}" for port in ports]}
        for router, urls in routers.items():
            many = count if router == "ours" else count // 2
            conversations = [Conversation(random.Random(f"{replicas} {router} {n}"), []) for n in range(many)]
            before = [answered(port) for port in ports]
            _, _, failed = asyncio.run(turns(urls, conversations, 1))
            begun = [answered(port) - had for port, had in zip(ports, before, strict=True)]
            repeated, cached, more = asyncio.run(turns(urls, conversations[: count // 2], later))
            row = {"router": router, "replicas": replicas, "conversations": begun, "repeated_tokens": repeated}
            row |= {"cached_tokens": cached, "failed": failed + more}
            row |= {"balance": max(begun) * replicas / sum(begun), "share": cached / max(1, repeated)}
            note(row)
            found.append(row)
    return found


def text(document: dict[str, Any]) -> str:
    """The report for a person."""
    return render("conversations.md.j2", document, words=TURN_WORDS, users=USERS)


def main() -> None:
    """Measure, and write the report and its JSON twin."""
    options = parser(__doc__, "routing", config=False)
    options.add_argument("--conversations", type=int, default=200)
    options.add_argument("--later", type=int, default=2, help="turns after the first")
    options.add_argument("--replicas", nargs="+", type=int, default=list(REPLICAS))
    arguments = options.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for replicas in arguments.replicas:
            rows += measure(replicas, arguments.conversations, arguments.later, Path(folder))
    counts = {"conversations": arguments.conversations, "later": arguments.later}
    document = {"command": command("conversations", arguments), **surroundings("ray"), **counts}
    document["rows"] = rows
    write(arguments.out, arguments.name, document, text(document))


if __name__ == "__main__":
    main()
