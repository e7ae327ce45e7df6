"""SIGTERM with answers in flight: they end well, nothing new begins, and the server is gone with status 0."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.engine.process import Server, living
from tests.engine.test_contract import CHAT, check_error
from tests.waiting import wait_until

TOKENS = 60
"""Of each answer: enough to be in flight at SIGTERM, few enough for `server.drain_s` (120 s) on a crowded machine."""


def test_drain_finishes_what_has_begun_and_takes_nothing_new(ending: Server) -> None:
    family = ending.family()
    body = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": TOKENS, "ignore_eos": True}
    with (
        httpx.Client(base_url=ending.base_url, timeout=150) as client,
        ThreadPoolExecutor(2) as pool,
        client.stream("POST", CHAT, json=body | {"stream": True}) as first,
        client.stream("POST", CHAT, json=body | {"stream": True}) as second,
    ):
        whole = pool.submit(client.post, CHAT, json=body)
        wait_until("all are in flight", lambda: ending.metrics()["borg_inflight"] == 3)
        streams = [answer.iter_lines() for answer in (first, second)]
        for lines in streams:
            next(lines)
        stopping = pool.submit(ending.stop, 150)
        wait_until("it drains", lambda: client.get("/ready").status_code == 503, every_s=0.02)
        ready, refused, alive = client.get("/ready"), client.post(CHAT, json=body), client.get("/health")
        ends = [[line for line in lines if line][-2:] for lines in streams]
    assert ready.status_code == 503
    assert ready.json() == {"status": "draining", "reason": "the server is being stopped"}
    assert check_error(refused, 503)["code"] == "not_ready"
    assert int(refused.headers["retry-after"]) >= 1
    assert alive.status_code == 200
    for finish, done in ends:
        assert json.loads(finish.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert done == "data: [DONE]"
    assert whole.result().json()["usage"]["completion_tokens"] == TOKENS
    assert stopping.result() == 0, ending.tail()
    assert living(family) == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{ending.base_url}/health")
