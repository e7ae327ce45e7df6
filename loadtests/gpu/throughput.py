"""Output tokens/s, TTFT and TPOT of a running server: `python -m loadtests.gpu.throughput URL --users 64 256`.

Closed loop, streaming, distinct prompts, several client processes. It starts no server.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from loadtests.generator.closed_loop import Loop, closed_loop, common
from loadtests.generator.workload import body


def client(url: str, users: int, requests: int, seed: int, tokens: tuple[int, int], system: str | None) -> Loop:
    """One client process: `users` users share `requests` requests. `tokens`: of an answer, at least and at most."""
    rng = random.Random(seed)

    def bodies() -> Iterator[dict[str, Any]]:
        for _ in range(requests):
            yield body(rng, rng.randint(*tokens), system, words=90)

    return asyncio.run(closed_loop(url, users, bodies()))


def lengths(tokens: int, spread: float) -> tuple[int, int]:
    """Tokens of an answer, at least and at most."""
    return round(tokens * (1 - spread)), round(tokens * (1 + spread))


def measure(
    url: str, count: int, requests: int, processes: int, tokens: int, system: str | None, spread: float = 0.0
) -> dict[str, Any]:
    """One concurrency; figures as a JSON document. Answers are of `tokens` tokens, give or take this part of them."""
    processes = min(processes, count)
    users, spans = count // processes, lengths(tokens, spread)
    share = [(url, users, requests // processes, 1 + index, spans, system) for index in range(processes)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(client, [(url, 1, 1, 0, (4, 4), system)] * processes)  # imports and connections are ready
        begin = time.perf_counter()
        loops = pool.starmap(client, share)
        elapsed = time.perf_counter() - begin
    ttft = [value * 1e3 for loop in loops for value in loop.ttft_s]
    tpot = [value * 1e3 for loop in loops for value in loop.tpot_s]
    failed = sum((loop.failed for loop in loops), Counter[str]())
    figures: dict[str, Any] = {
        "users": count,
        **({"spread": spread} if spread else {}),
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
    parser.add_argument("--system", type=Path, help="a file whose text every request sends as its system message")
    arguments = parser.parse_args()
    system = arguments.system.read_text(encoding="utf-8").strip() if arguments.system else None
    void = []
    for count in arguments.users:
        total = count * arguments.requests
        result = measure(arguments.url, count, total, arguments.processes, arguments.tokens, system, arguments.spread)
        print(json.dumps(result), flush=True)
        void += [f"VOID: {count} users: {result['void']}"] if "void" in result else []
    print("\n".join(void), end="\n" if void else "", file=sys.stderr)
    sys.exit(3 if void else 0)


if __name__ == "__main__":
    main()
