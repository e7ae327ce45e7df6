"""One streamed chat request, timed. The client of the benchmarks that need no load generator.

It knows the wire format of a stream, and that a stream must end with `[DONE]`.
"""

import asyncio
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import httpx

__all__ = ["WORDS", "Loop", "Timing", "body", "chat", "closed_loop", "stream"]

WORDS = (
    "river",
    "stone",
    "cloud",
    "engine",
    "paper",
    "light",
    "winter",
    "signal",
    "garden",
    "copper",
    "ladder",
    "market",
)


@dataclass(frozen=True)
class Timing:
    """How one request went; times in seconds from the moment it was sent."""

    status: int
    end_s: float
    first_s: float | None = None
    """To the first event with content: TTFT."""
    last_s: float | None = None
    """To the last such event."""
    tokens: int = 0
    """The server's own count (`usage.completion_tokens`)."""
    error: str | None = None
    """Why it was no success: the error's code or text, or `silent` for a stream that just ended."""
    retry_after: str | None = None


def body(rng: random.Random, max_tokens: int, system: str | None = None, words: int = 80) -> dict[str, Any]:
    """A greedy streamed request of `max_tokens` tokens with `words` random words of its own."""
    messages = [{"role": "user", "content": f"Write about these words: {' '.join(rng.choices(WORDS, k=words))}."}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return chat("borg-merge-v1", messages, max_tokens)


def chat(model: str, messages: Sequence[Mapping[str, str]], max_tokens: int) -> dict[str, Any]:
    """A greedy streamed request whose answer has exactly `max_tokens` tokens and ends with its usage."""
    return {
        "model": model,
        "messages": list(messages),
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def stream(client: httpx.AsyncClient, request: Mapping[str, Any], stop_after: int | None = None) -> Timing:
    """Send a request and read its stream to the end, or close the connection after `stop_after` events."""
    begin = time.perf_counter()
    first = last = error = None
    tokens = events = 0
    done = False
    async with client.stream("POST", "/v1/chat/completions", json=request) as response:
        if response.status_code != 200:
            await response.aread()
            elapsed = time.perf_counter() - begin
            retry_after = response.headers.get("retry-after")
            return Timing(response.status_code, elapsed, error=response.text[:200], retry_after=retry_after)
        async for line in response.aiter_lines():
            now = time.perf_counter() - begin
            done = done or line == "data: [DONE]"
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            events += 1
            if "error" in event:
                error = event["error"].get("code") or event["error"]["message"]
                continue
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                first, last = first or now, now
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            if stop_after is not None and events >= stop_after:
                return Timing(200, now, first, last, tokens, "stopped")
    if error is None and not done:
        error = "silent"
    return Timing(200, time.perf_counter() - begin, first, last, tokens, error)


@dataclass(frozen=True)
class Loop:
    """What came of a closed loop: the requests that ended well, why others did not, and how long all took."""

    done: list[Timing]
    failures: list[str]
    elapsed_s: float

    @property
    def tokens(self) -> int:
        return sum(timing.tokens for timing in self.done)

    @property
    def output_tokens_per_s(self) -> float:
        return self.tokens / self.elapsed_s

    @property
    def ttft_ms(self) -> float:
        return median(timing.first_s or 0.0 for timing in self.done) * 1e3

    @property
    def tpot_ms(self) -> float:
        return median(((t.last_s or 0.0) - (t.first_s or 0.0)) / (t.tokens - 1) for t in self.done) * 1e3


async def closed_loop(
    url: str, users: int, requests: Sequence[Mapping[str, Any]], tokens: int, timeout_s: float = 120
) -> Loop:
    """`users` users share these requests, each sending the next when its last has ended.

    A request ends well with `tokens` output tokens. Raises RuntimeError when none does.
    """
    left = list(reversed(requests))
    done: list[Timing] = []
    failures: list[str] = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=timeout_s, limits=limits) as client:

        async def user() -> None:
            while left:
                timing = await stream(client, left.pop())
                if timing.error is None and timing.tokens == tokens and timing.first_s is not None:
                    done.append(timing)
                else:
                    failures.append(timing.error or f"{timing.tokens} tokens")

        begin = time.perf_counter()
        await asyncio.gather(*(user() for _ in range(users)))
        elapsed = time.perf_counter() - begin
    if not done:
        raise RuntimeError(f"{url}: every request failed: {failures[:3]}")
    return Loop(done, failures, elapsed)
