"""Users that ask a cluster, one short stream after another."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import httpx

from loadtests.servers.local import LOOK


@contextmanager
def load(url: str, users: int) -> Iterator[list[str]]:
    """Keep so many users asking, each one short stream after another; how their requests ended, as they do."""
    ends: list[str] = []
    stop = threading.Event()

    def user(name: int) -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            messages = [{"role": "user", "content": f"I am {name}, this is {turn}"}]
            body = {"messages": messages, "max_tokens": 12, "stream": True, "ignore_eos": True}
            ends.append(_end(f"{url}/v1/chat/completions", body))

    with ThreadPoolExecutor(users) as pool:
        running = [pool.submit(user, name) for name in range(users)]
        try:
            yield ends
        finally:
            stop.set()
    for each in running:
        each.result()


def _end(url: str, body: dict[str, Any]) -> str:
    """How one streamed request ends: `ok`, a status and its error code, or what broke its connection."""
    try:
        answer = LOOK.post(url, json=body, timeout=180)
    except httpx.TransportError as error:
        return type(error).__name__
    if answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n"):
        return "ok"
    last = answer.text.strip().rpartition("data: ")[2]
    with suppress(ValueError, KeyError):
        return f"{answer.status_code} {json.loads(last)['error']['code']}"
    return f"{answer.status_code} silent: {last[-100:]}"
