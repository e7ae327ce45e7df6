"""Output tokens/s, TTFT and TPOT of a running server: `python -m loadtests.gpu.throughput URL --users 64 256`.

Closed loop, streaming, distinct prompts, several client processes. It starts no server.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from loadtests.generator.closed_loop import Loop, closed_loop, common
from loadtests.generator.workload import body


def client(
    url: str, users: int, requests: int, seed: str, tokens: tuple[int, int], system: str | None, words: int = 90
) -> Loop:
    """One client process: `users` users share `requests` requests. `tokens`: of an answer, at least and at most."""
    rng = random.Random(seed)

    def bodies() -> Iterator[dict[str, Any]]:
        for _ in range(requests):
            yield body(rng, rng.randint(*tokens), system, words)

    return asyncio.run(closed_loop(url, users, bodies()))


def clients(processes: int) -> Pool:
    """Fresh client processes, to be used as a context."""
    return multiprocessing.get_context("spawn").Pool(processes)


def lengths(tokens: int, spread: float) -> tuple[int, int]:
    """Tokens of an answer, at least and at most."""
    return round(tokens * (1 - spread)), round(tokens * (1 + spread))


@dataclass(frozen=True)
class Load:
    """What is asked of a server: by how many users, how much of each, and how much in each request."""

    users: int
    spread: float = 0.0
    """Answers are longer or shorter than `tokens` by up to this part."""
    requests: int = 4
    """Of each user."""
    words: int = 90
    """In each prompt, drawn from few: 90 are about 107 tokens."""
    tokens: int = 128


def measure(
    url: str, load: Load, processes: int, system: str | None, seed: str, pool: Pool | None = None
) -> dict[str, Any]:
    """One load; figures as a JSON document. Prompts follow from `seed`: with one of before they are in the KV cache.

    `pool`: of so many client processes, for several loads one after another.
    """
    if pool is None:
        with clients(processes) as own:
            return measure(url, load, processes, system, seed, own)
    processes = min(processes, load.users)
    users, spans = load.users // processes, lengths(load.tokens, load.spread)
    share = [
        (url, users, users * load.requests, f"{seed} {load} {index}", spans, system, load.words)
        for index in range(processes)
    ]
    pool.starmap(client, [(url, 1, 1, f"{seed} first {index}", (4, 4), system) for index in range(processes)], 1)
    begin = time.perf_counter()  # imports are done, and connections were made
    loops = pool.starmap(client, share, 1)
    elapsed = time.perf_counter() - begin
    ttft = [value * 1e3 for loop in loops for value in loop.ttft_s]
    tpot = [value * 1e3 for loop in loops for value in loop.tpot_s]
    failed = sum((loop.failed for loop in loops), Counter[str]())
    figures: dict[str, Any] = {
        "users": load.users,
        **({"spread": load.spread} if load.spread else {}),
        "requests": len(ttft),
        "failed": failed.total(),
        **({"why": dict(failed.most_common())} if failed else {}),
    }
    if not ttft:
        return {**figures, "void": f"nothing was measured: no request ended well ({common(failed)})"}
    return {
        **figures,
        "output_tokens_per_s": round(sum(loop.tokens for loop in loops) / elapsed, 1),
        "ttft_p50_ms": round(median(ttft), 1),
        "ttft_p99_ms": round(quantiles(ttft, n=100)[98] if len(ttft) > 1 else ttft[0], 1),
        "tpot_p50_ms": round(median(tpot), 2),
    }


def main() -> None:
    """Measure each concurrency, a line of JSON each; exit status 3 if one of them measured nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--users", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    spread = "answers are longer or shorter by up to this part; without it all of a step begin and end together"
    parser.add_argument("--spread", type=float, default=0.0, help=spread)
    parser.add_argument("--requests", type=int, default=4, help="requests a user")
    parser.add_argument("--words", type=int, default=90, help="in each prompt; 900 are about 1,000 tokens")
    parser.add_argument("--seed", default="", help="of the prompts; those of a second run with one seed are cached")
    parser.add_argument("--system", type=Path, help="a file whose text every request sends as its system message")
    given = parser.parse_args()
    system = given.system.read_text(encoding="utf-8").strip() if given.system else None
    seed = given.seed or secrets.token_hex(4)
    void = []
    for count in given.users:
        load = Load(count, given.spread, given.requests, given.words, given.tokens)
        result = {**measure(given.url, load, given.processes, system, seed), "seed": seed}
        print(json.dumps(result), flush=True)
        void += [f"VOID: {count} users: {result['void']}"] if "void" in result else []
    print("\n".join(void), end="\n" if void else "", file=sys.stderr)
    sys.exit(3 if void else 0)


if __name__ == "__main__":
    main()
