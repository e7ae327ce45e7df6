"""SIGTERM with answers in flight: they end well, nothing new begins, and the server is gone with status 0."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.engine.process import Server, living
from tests.engine.test_contract import CHAT, check_error
from tests.waiting import wait_until


def test_drain_finishes_what_has_begun_and_takes_nothing_new(ending: Server) -> None:
    family = ending.family()
    body = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 60, "ignore_eos": True}
    with (
        httpx.Client(base_url=ending.base_url, timeout=150) as client,
        ThreadPoolExecutor(2) as pool,
        client.stream("POST", CHAT, json=body | {"stream": True}) as answer,
    ):
        whole = pool.submit(client.post, CHAT, json=body)
        wait_until("both are in flight", lambda: ending.metrics()["borg_inflight"] == 2)
        lines = answer.iter_lines()
        next(lines)
        stopping = pool.submit(ending.stop, 150)
        wait_until("/ready tells", lambda: client.get("/ready").status_code != 200)
        ready, refused, alive = client.get("/ready"), client.post(CHAT, json=body), client.get("/health")
        rest = [line for line in lines if line]
    assert ready.status_code == 503
    assert ready.json() == {"status": "draining", "reason": "the server is being stopped"}
    assert check_error(refused, 503)["code"] == "not_ready"
    assert int(refused.headers["retry-after"]) >= 1
    assert alive.status_code == 200
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert whole.result().json()["usage"]["completion_tokens"] == 60
    assert stopping.result() == 0, ending.tail()
    assert living(family) == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{ending.base_url}/health")
