"""Clients that leave: whatever they had begun ends in the engine too, and what it held is free again (I6)."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.engine.process import Server
from tests.waiting import wait_until

CHAT = "/v1/chat/completions"
FREED_WITHIN_S = 30.0
"""A request that is not aborted runs for minutes."""


def long_request(**more: Any) -> dict[str, Any]:
    """A request that would take far longer than any of these tests: it must be cut off to end."""
    messages = [{"role": "user", "content": "Tell me a long story. " * 20}]
    return {"messages": messages, "max_tokens": 4000, "ignore_eos": True, **more}


def held(server: Server) -> dict[str, float]:
    """What requests hold: slots at the gate, and in the engine requests and KV blocks (the share of all)."""
    metrics = server.metrics()
    names = ("borg_inflight", "borg_queued", "vllm:num_requests_running", "vllm:num_requests_waiting")
    return {name: metrics[name] for name in (*names, "vllm:kv_cache_usage_perc")}


def check_freed(server: Server, idle: dict[str, float]) -> None:
    wait_until("all is free", lambda: held(server) == idle, FREED_WITHIN_S)


@pytest.fixture
def idle(server: Server) -> dict[str, float]:
    """What an idle server holds: nothing, for the identity's blocks are cached and counted as free."""
    wait_until("the server is idle", lambda: not any(held(server).values()))
    return held(server)


def test_abort_in_a_stream_frees_what_it_held(server: Server, http: httpx.Client, idle: dict[str, float]) -> None:
    with http.stream("POST", CHAT, json=long_request(stream=True)) as answer:
        lines = answer.iter_lines()
        for _ in range(8):
            next(lines)
        during = held(server)
    assert during["borg_inflight"] == 1
    assert during["vllm:num_requests_running"] == 1
    assert during["vllm:kv_cache_usage_perc"] > 0
    check_freed(server, idle)


def test_abort_of_a_stream_with_n_frees_every_choice(
    server: Server, http: httpx.Client, idle: dict[str, float]
) -> None:
    with http.stream("POST", CHAT, json=long_request(stream=True, n=3)) as answer:
        lines = answer.iter_lines()
        for _ in range(16):
            next(lines)
        assert held(server)["borg_inflight"] == 3
    check_freed(server, idle)


@pytest.mark.parametrize("how", ["close", "reset"])
def test_abort_before_a_whole_answer_frees_what_it_held(server: Server, idle: dict[str, float], how: str) -> None:
    sock = send(server, json.dumps(long_request()).encode())
    wait_until("it runs", lambda: held(server)["vllm:num_requests_running"] == 1)
    if how == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    sock.close()
    check_freed(server, idle)


def test_abort_in_the_body_holds_nothing(server: Server, idle: dict[str, float]) -> None:
    body = json.dumps(long_request()).encode()
    send(server, body[: len(body) // 2], len(body)).close()
    check_freed(server, idle)


def test_abort_by_many_at_once_frees_everything(server: Server, idle: dict[str, float]) -> None:
    def leave(number: int) -> None:
        with (
            httpx.Client(base_url=server.base_url, timeout=60) as client,
            client.stream("POST", CHAT, json=long_request(stream=number % 2 == 0)) as answer,
        ):
            next(answer.iter_lines())

    def leave_whole(number: int) -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.base_url}{CHAT}", json=long_request(), timeout=1 + number / 4)

    with ThreadPoolExecutor(12) as pool:
        streams = [pool.submit(leave, 2 * number) for number in range(6)]
        wholes = [pool.submit(leave_whole, number) for number in range(6)]
        for work in (*streams, *wholes):
            work.result()
    check_freed(server, idle)


def test_abort_leaves_the_others_alone(server: Server, http: httpx.Client, idle: dict[str, float]) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"messages": question, "max_tokens": 150, "ignore_eos": True, "stream": True}
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=server.base_url, timeout=60) as other:
        with other.stream("POST", CHAT, json=long_request(stream=True)) as leaving:
            lines = leaving.iter_lines()  # kept: when it goes, httpx closes the connection
            next(lines)
            staying = pool.submit(http.post, CHAT, json=body)
            wait_until("both run", lambda: held(server)["vllm:num_requests_running"] == 2)
        text = staying.result().text
    assert text.endswith("data: [DONE]\n\n")
    assert text.count('"finish_reason":"length"') == 1
    check_freed(server, idle)


def send(server: Server, body: bytes, length: int | None = None) -> socket.socket:
    """Send a chat request on a socket of one's own, perhaps only a part of its body."""
    url = httpx.URL(server.base_url)
    sock = socket.create_connection((url.host, url.port or 80))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body)
    return sock
