"""Users who send their next request when the last has ended, reading the socket themselves.

An HTTP library spends more on an event than the server does. It knows streamed chat answers; it does not check grammar.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any
from urllib.parse import urlsplit

CONTENT, EMPTY, USAGE = b'"content":"', b'"content":""', b'"completion_tokens":'


def common(errors: Mapping[str, int]) -> str:
    """The three most frequent errors with their counts."""
    found = Counter(errors).most_common(3)
    return "; ".join(f"{count} x {error}" for error, count in found) or "none was sent"


@dataclass
class Loop:
    """What came of a closed loop, of the requests that ended well."""

    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    """(last event with content - first) / (tokens - 1)."""
    tokens: int = 0
    """By the server's own count."""
    failed: Counter[str] = field(default_factory=Counter)
    """Why others did not end well."""
    elapsed_s: float = 0.0

    def figures(self) -> dict[str, float]:
        """Counts, output tokens/s, and medians of TTFT and TPOT. Raises RuntimeError when every request failed."""
        if not self.ttft_s:
            raise RuntimeError(f"nothing was measured: no request ended well ({common(self.failed)})")
        return {
            "requests": len(self.ttft_s),
            "failed": self.failed.total(),
            "output_tokens_per_s": self.tokens / self.elapsed_s,
            "ttft_ms": median(self.ttft_s) * 1e3,
            "tpot_ms": median(self.tpot_s) * 1e3,
        }


async def closed_loop(
    url: str, users: int, requests: Iterable[Mapping[str, Any]], timeout_s: float = 600, keys: Sequence[str] = ("none",)
) -> Loop:
    """`users` users share these requests, each on a connection of its own, and take these API keys in turn.

    A request ends well with exactly its `max_tokens` output tokens.
    """
    left, loop = iter(requests), Loop()

    async def user(key: str) -> None:
        for request in left:
            try:
                async with asyncio.timeout(timeout_s):
                    first, last, tokens = await _one(url, request, key)
                if tokens != request["max_tokens"]:
                    raise RuntimeError(f"{tokens} tokens")
            except (OSError, RuntimeError, ValueError, LookupError) as error:
                loop.failed[str(error) or type(error).__name__] += 1
                continue
            loop.ttft_s.append(first)
            loop.tpot_s.append((last - first) / max(1, tokens - 1))
            loop.tokens += tokens

    begin = time.perf_counter()
    await asyncio.gather(*(user(keys[number % len(keys)]) for number in range(users)))
    loop.elapsed_s = time.perf_counter() - begin
    return loop


async def _one(url: str, request: Mapping[str, Any], key: str) -> tuple[float, float, int]:
    """One request: (seconds to the first event with content, to the last, output tokens)."""
    address, raw = urlsplit(url), json.dumps(request).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.hostname}\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {key}\r\nConnection: close\r\nContent-Length: {len(raw)}\r\n\r\n"
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=1 << 20)
    first = last = 0.0
    usage = b""
    try:
        writer.write(head.encode() + raw)
        status = (await reader.readline()).decode("latin-1").strip()
        async for line in reader:
            if line.startswith(b"data: {"):
                if CONTENT in line and EMPTY not in line:
                    last = time.perf_counter() - begin
                    first = first or last
                if USAGE in line:
                    usage = line
    finally:
        writer.close()
    if not usage or not first:
        raise RuntimeError(f"without an answer's end: {status}")
    return first, last, json.loads(usage[6:])["usage"]["completion_tokens"]
