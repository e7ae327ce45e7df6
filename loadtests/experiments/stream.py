"""One streamed request, timed, that may be refused or abandoned.

It does not know what is asked.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from loadtests.generator.records import Outcome
from loadtests.generator.sse import Stream


@dataclass(frozen=True)
class Timing:
    """How one request went; times in seconds from the moment it was sent."""

    status: int
    end_s: float
    first_s: float | None = None
    """To the first event with content: TTFT."""
    error: str | None = None
    """Why it was no success: the error's code or text, or how the stream was wrong."""
    retry_after: str | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    """The server's own count of tokens."""


def client(url: str, timeout_s: float = 120) -> httpx.AsyncClient:
    """A client with as many connections as there are requests."""
    return httpx.AsyncClient(base_url=url, timeout=timeout_s, limits=httpx.Limits(max_connections=None))


async def stream(client: httpx.AsyncClient, request: Mapping[str, Any], stop_after: int | None = None) -> Timing:
    """Send a request and read its stream to the end, or close the connection after `stop_after` events."""
    begin = time.perf_counter()
    found, events, error = Stream(), 0, None
    async with client.stream("POST", "/v1/chat/completions", json=request) as response:
        if response.status_code != 200:
            await response.aread()
            elapsed = time.perf_counter() - begin
            retry_after = response.headers.get("retry-after")
            return Timing(response.status_code, elapsed, error=response.text[:200], retry_after=retry_after)
        async for line in response.aiter_lines():
            found.feed(line.encode(), round((time.perf_counter() - begin) * 1e6))
            events += line.startswith("data: {")
            if stop_after is not None and events >= stop_after:
                error = "stopped"
                break
    outcome, detail = found.outcome()
    if error is None and outcome != Outcome.OK:
        error = outcome.value if outcome == Outcome.GRAMMAR else detail
    first_s = None if found.first_us is None else found.first_us / 1e6
    return Timing(200, time.perf_counter() - begin, first_s, error, usage=found.usage)
