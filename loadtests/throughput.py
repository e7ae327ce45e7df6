"""Output tokens/s, TTFT and TPOT of a running server: `python -m loadtests.throughput URL --users 64 256`.

Closed loop, streaming, distinct prompts. The clients are processes that read the socket themselves: an HTTP
library spends more on an event than the server does.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import time
from collections import Counter
from statistics import median, quantiles
from typing import Any
from urllib.parse import urlsplit

from loadtests.streaming import body

FIRST = b'"content":"'
USAGE = b'"completion_tokens":'


async def one(host: str, port: int, request: dict[str, Any]) -> tuple[float, float, int]:
    """One request over a connection of its own: (TTFT, time to the end, output tokens), in seconds."""
    raw = json.dumps(request).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    )
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    writer.write(head.encode() + f"Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    first = 0.0
    last = b""
    status = (await reader.readline()).decode("latin-1").strip()
    async for line in reader:
        if line.startswith(b"data: {"):
            if not first and FIRST in line and b'"content":""' not in line:
                first = time.perf_counter() - begin
            if USAGE in line:
                last = line
    end = time.perf_counter() - begin
    writer.close()
    if not last or not first:
        raise RuntimeError(f"without an answer's end: {status}")
    return first, end, json.loads(last[6:])["usage"]["completion_tokens"]


async def users(
    host: str, port: int, count: int, requests: int, seed: int, tokens: tuple[int, int], system: str | None
) -> Any:
    """`count` users who share `requests` requests; ([TTFT], [TPOT], output tokens, why others failed), in seconds.

    `tokens`: of an answer, at least and at most.
    """
    rng = random.Random(seed)
    left = list(range(requests))
    ttft: list[float] = []
    tpot: list[float] = []
    total = 0
    failed: Counter[str] = Counter()

    async def user() -> None:
        nonlocal total
        while left:
            left.pop()
            try:
                first, end, n = await one(host, port, body(rng, rng.randint(*tokens), system, words=90))
            except (OSError, RuntimeError) as error:
                failed[str(error)] += 1
                continue
            ttft.append(first)
            tpot.append((end - first) / max(1, n - 1))
            total += n

    await asyncio.gather(*(user() for _ in range(count)))
    return ttft, tpot, total, failed


def lengths(tokens: int, spread: float) -> tuple[int, int]:
    """Tokens of an answer, at least and at most."""
    return round(tokens * (1 - spread)), round(tokens * (1 + spread))


def client(arguments: tuple[Any, ...]) -> Any:
    """One client process."""
    return asyncio.run(users(*arguments))


def measure(
    url: str, count: int, requests: int, processes: int, tokens: int, system: str | None, spread: float = 0.0
) -> dict[str, Any]:
    """One concurrency; figures as a JSON document. Answers are of `tokens` tokens, give or take this part of them."""
    address = urlsplit(url)
    where = address.hostname, address.port
    processes = min(processes, count)
    share = [
        (*where, count // processes, requests // processes, 1 + index, lengths(tokens, spread), system)
        for index in range(processes)
    ]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(client, [(*part[:2], 1, 1, 0, (4, 4), system) for part in share])  # imports and connections are ready
        begin = time.perf_counter()
        results = pool.map(client, share)
        elapsed = time.perf_counter() - begin
    ttft = [value * 1e3 for values, *_ in results for value in values]
    tpot = [value * 1e3 for _, values, *_ in results for value in values]
    failed = sum((why for *_, why in results), Counter[str]())
    return {
        "users": count,
        **({"spread": spread} if spread else {}),
        "requests": len(ttft),
        "failed": failed.total(),
        **({"why": dict(failed)} if failed else {}),
        "output_tokens_per_s": round(sum(total for *_, total, _ in results) / elapsed, 1),
        "ttft_p50_ms": round(median(ttft), 1),
        "ttft_p99_ms": round(quantiles(ttft, n=100)[98], 1),
        "tpot_p50_ms": round(median(tpot), 2),
    }


def main() -> None:
    """Measure each concurrency, a line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--users", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument(
        "--spread",
        type=float,
        default=0.0,
        help="answers are longer or shorter by up to this part; without it all of a step end, and begin, together",
    )
    parser.add_argument("--requests", type=int, default=4, help="requests a user")
    parser.add_argument("--system", help="a file whose text every request sends as its system message")
    arguments = parser.parse_args()
    system = None
    if arguments.system:
        with open(arguments.system, encoding="utf-8") as file:
            system = file.read().strip()
    for count in arguments.users:
        total = count * arguments.requests
        result = measure(arguments.url, count, total, arguments.processes, arguments.tokens, system, arguments.spread)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
