"""Two API processes over one engine, with keys and limits: one server from outside, and one life."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from borg_serve.gate.keys import new_key
from tests import qwen
from tests.engine.process import Server, living, running
from tests.engine.test_contract import CHAT, check_error

DEADLINE_S = 30.0
PATIENCE_S = 600
SLOTS = 10
"""Of both together."""


@pytest.fixture(scope="module")
def pair(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Pair"]:
    """Two API processes: no queue, 5 s for a request's body, and a key."""
    folder = tmp_path_factory.mktemp("pair")
    key, entry = new_key("tester", metrics=True)
    (folder / "keys.yaml").write_text(entry)
    with running(
        folder,
        *common(checkpoint),
        f"--set=server.keys={folder / 'keys.yaml'}",
        "--set=limits.body_s=5",
        f"--set=limits.deadline_s={PATIENCE_S}",  # 40 tokens must have their time on a crowded machine
        f"--set=server.drain_s={PATIENCE_S}",
        f"--set=limits.concurrent={SLOTS}",
        "--set=limits.max_wait_s=0",
    ) as server:
        yield Pair(server, {"authorization": f"Bearer {key}"})


@pytest.fixture(scope="module")
def hasty(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Pair"]:
    """Two API processes with 30 s for a request; they are started when the pair has ended."""
    with running(
        tmp_path_factory.mktemp("hasty"), *common(checkpoint), f"--set=limits.deadline_s={DEADLINE_S}"
    ) as server:
        yield Pair(server, {})


class Pair:
    """The server, and requests to it on connections of their own: either process may get each."""

    def __init__(self, server: Server, headers: dict[str, str]) -> None:
        self.server = server
        self.headers = headers

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.server.base_url}{path}", headers=self.headers, timeout=60)

    def post(self, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.server.base_url}{CHAT}", json=body, headers=self.headers, timeout=60)

    def clients(self, stack: ExitStack) -> list[httpx.Client]:
        """One with a connection to each of the two processes; they live as long as the stack."""
        found: dict[int, httpx.Client] = {}
        for _ in range(64):  # a connection goes to the process that happens to take it
            client = stack.enter_context(httpx.Client(base_url=self.server.base_url, headers=self.headers, timeout=60))
            own = client.get("/health").extensions["network_stream"].get_extra_info("client_addr")[1]
            (holder,) = (process for process in api_processes(self.server) if own in client_ports(process))
            found[holder.pid] = client
            if len(found) == 2:
                return list(found.values())
        raise AssertionError("one process took every connection")


def common(checkpoint: Path) -> list[str]:
    settings = (f"model.path={checkpoint}", "server.processes=2", "engine.kv_cache_memory_bytes=1073741824")
    return [f"--set={item}" for item in settings]


def request(**more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Tell me a long story."}]
    return {"messages": messages, "max_tokens": 4000, "ignore_eos": True, **more}


# ----------------------------------------------------------------------------------------------- as one server


def test_processes_find_the_identity_cached_from_the_first_request_on(pair: Pair) -> None:
    blocks = len(qwen.prefix("smollm2").token_ids) // 32 * 32
    for number in range(4):
        messages = [{"role": "user", "content": f"Fresh words {number}"}]
        answer = pair.post({"messages": messages, "max_tokens": 1})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= blocks


def test_processes_are_two_and_say_the_same(pair: Pair) -> None:
    parents = [process.ppid() for process in pair.server.family()]
    assert parents.count(pair.server.pid) >= 3, "two API processes and the engine"
    versions = [pair.get("/version").json() for _ in range(8)]
    assert all(version == versions[0] for version in versions)
    assert versions[0]["identity"]["tokens"] == len(qwen.prefix("smollm2").token_ids)
    assert {pair.get("/ready").status_code for _ in range(8)} == {200}


def test_processes_share_their_requests_and_add_up_their_metrics(pair: Pair) -> None:
    before = metrics(pair)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: pair.post(request(max_tokens=6)), range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [6] * 8
    after = metrics(pair)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown('borg_requests_total{outcome="ok",route="/v1/chat/completions"}') == 8
    assert grown("borg_queue_seconds_count") == 8
    assert after["borg_inflight"] == 0
    assert after["borg_ready"] == 1
    assert after["borg_identity_tokens"] == len(qwen.prefix("smollm2").token_ids)
    assert sum(value for name, value in after.items() if name.startswith("vllm:generation_tokens_total")) >= 48


def test_processes_ask_for_the_key_but_not_for_their_pulse(pair: Pair) -> None:
    with httpx.Client(base_url=pair.server.base_url, timeout=30) as stranger:
        for path in ("/health", "/ready"):
            assert stranger.get(path).status_code == 200
        for path in ("/version", "/metrics", "/v1/models"):
            check_error(stranger.get(path), 401)
        for wrong in ("Bearer borg-wrong", "Basic eA==", "Bearer"):
            answer = stranger.post(CHAT, json=request(), headers={"authorization": wrong})
            assert check_error(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"


# ------------------------------------------------------------------------------------------------------ limits


def test_processes_have_one_pool_of_slots(pair: Pair) -> None:
    """However the kernel deals out connections, no request is refused while a slot is free, and none beyond."""
    with ExitStack() as stack:
        for _ in range(SLOTS):
            client = stack.enter_context(httpx.Client(base_url=pair.server.base_url, headers=pair.headers, timeout=180))
            answer = stack.enter_context(client.stream("POST", CHAT, json=request(stream=True)))
            assert answer.status_code == 200
        seen = metrics(pair)
        assert (seen["borg_inflight"], seen["borg_places"]) == (SLOTS, SLOTS)
        refused = [pair.post(request(max_tokens=1)) for _ in range(6)]
        assert {check_error(answer, 503)["code"] for answer in refused} == {"busy"}
        assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
    end = time.monotonic() + 30
    while metrics(pair)["borg_inflight"]:
        assert time.monotonic() < end, "the slots must be free again"
        time.sleep(0.1)
    assert pair.post(request(max_tokens=1)).status_code == 200


def test_processes_take_no_slow_body(pair: Pair) -> None:
    def slowly() -> Iterator[bytes]:
        for _ in range(100):
            yield b" "
            time.sleep(0.1)

    headers = {"content-type": "application/json", **pair.headers}
    check_error(httpx.post(f"{pair.server.base_url}{CHAT}", content=slowly(), headers=headers), 408)


# -------------------------------------------------------------------------------------------------------- ends


def test_processes_drain_together_at_sigterm(pair: Pair) -> None:
    """Last of those that share the pair: it ends it."""
    family = pair.server.family()
    with ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        body = request(max_tokens=40, stream=True)
        streams = [  # on each of the two: one that has nothing to finish is gone at once
            stack.enter_context(client.stream("POST", CHAT, json=body)).iter_lines() for client in pair.clients(stack)
        ]
        for lines in streams:
            next(lines)
        stopping = pool.submit(pair.server.stop, PATIENCE_S + 60)
        end = time.monotonic() + 30
        while pair.get("/ready").status_code == 200:
            assert time.monotonic() < end
        ready, refused = pair.get("/ready"), pair.post(request())
        ends = [[line for line in lines if line][-2:] for lines in streams]
    assert (ready.status_code, ready.json()["status"]) == (503, "draining")
    assert check_error(refused, 503)["code"] == "not_ready"
    for finish, done in ends:
        assert json.loads(finish.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert done == "data: [DONE]"
    assert stopping.result() == 0, pair.server.tail()
    assert living(family) == []


def test_processes_end_what_passes_its_deadline(hasty: Pair) -> None:
    """Before the first byte with a 504, in a stream with an error event and no [DONE]."""
    begun = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        whole, streamed = pool.map(hasty.post, (request(), request(stream=True)))
    assert DEADLINE_S - 0.5 < time.monotonic() - begun < 2 * DEADLINE_S
    assert check_error(whole, 504)["code"] == "deadline_exceeded"
    assert streamed.status_code == 200
    *chunks, last, end = streamed.text.split("\n\n")
    assert end == ""
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert len(chunks) > 1
    assert "[DONE]" not in streamed.text
    assert '"finish_reason":"' not in streamed.text


def test_processes_end_together_when_an_api_process_is_killed(hasty: Pair) -> None:
    """Last of those that share this server: it ends it."""
    kill_and_see_the_end(hasty.server, "api")


@pytest.mark.skipif(not os.environ.get("BORG_TEST_SLOW"), reason="one more start: BORG_TEST_SLOW=1")
def test_processes_end_together_when_the_engine_is_killed(checkpoint: Path, tmp_path: Path) -> None:
    with running(tmp_path, *common(checkpoint)) as server:
        kill_and_see_the_end(server, "engine")


def kill_and_see_the_end(server: Server, victim: str) -> None:
    family = server.family()
    with httpx.stream("POST", f"{server.base_url}{CHAT}", json=request(stream=True), timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(victims(server)[victim].pid, signal.SIGKILL)
        rest = [line for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "engine_lost"
    assert "data: [DONE]" not in rest
    assert server.ended() == 1, server.tail()
    assert living(family) == []


def victims(server: Server) -> dict[str, psutil.Process]:
    """The engine, and the API process that does not hold the one client's connection."""
    (holder,) = connected(server)
    (engine,) = (child for child in psutil.Process(server.pid).children() if "EngineCore" in " ".join(child.cmdline()))
    (other,) = (process for process in api_processes(server) if process != holder)
    return {"api": other, "engine": engine}


def api_processes(server: Server) -> list[psutil.Process]:
    port = httpx.URL(server.base_url).port
    return [
        child
        for child in psutil.Process(server.pid).children()
        if any(item.laddr.port == port and item.status == psutil.CONN_LISTEN for item in child.net_connections("tcp"))
    ]


def connected(server: Server) -> list[psutil.Process]:
    """The API processes that hold a connection of a client."""
    return [process for process in api_processes(server) if client_ports(process)]


def client_ports(process: psutil.Process) -> set[int]:
    """Those at the other ends of the connections to the server that an API process holds."""
    (own,) = {item.laddr.port for item in process.net_connections("tcp") if item.status == psutil.CONN_LISTEN}
    return {
        item.raddr.port
        for item in process.net_connections("tcp")
        if item.laddr.port == own and item.status == psutil.CONN_ESTABLISHED
    }


def metrics(pair: Pair) -> dict[str, float]:
    lines = (line for line in pair.get("/metrics").text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}
