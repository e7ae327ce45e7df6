"""Keys, a full queue and deadlines of a server with two workers, then a killed worker; the last test ends it."""

import hashlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.engine.faults import LONG, PATH, SHORT, Clients, check_failed_stream, idle, lose_engine
from tests.engine.process import Server, running
from tests.waiting import await_room_in_the_minute, wait_until

DEADLINE_S = 15.0


KEYS = {
    "many": {},
    "few": {"requests_per_minute": 2},
    "one": {"concurrent": 1},
    "small": {"tokens_per_minute": 5},
}


def key(name: str) -> str:
    return f"borg-test-{name}"


@pytest.fixture(scope="module")
def hurried(divisible: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With two workers in tensor parallel, each a process of its own, and four tokens an event."""
    folder = tmp_path_factory.mktemp("hurried")
    entries = [
        {"name": name, "sha256": hashlib.sha256(key(name).encode()).hexdigest(), "metrics": True, "limits": limits}
        for name, limits in KEYS.items()
    ]
    (folder / "keys.yaml").write_text(yaml.safe_dump(entries))
    settings = (
        f"--set=model.path={divisible}",
        f"--set=server.keys={folder / 'keys.yaml'}",
        f"--set=limits.deadline_s={DEADLINE_S:g}",
        "--set=limits.concurrent=2",
        "--set=limits.queued_bytes=250",  # two of LONG
        "--set=limits.max_wait_s=1000",
        "--set=engine.tensor_parallel_size=2",
        "--set=engine.stream_interval=4",
        "--set=engine.kv_cache_memory_bytes=1073741824",  # each worker has its own
    )
    with running(folder, *settings) as server:
        yield server


def test_fault_two_workers_answer_as_one(hurried: Server) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer, end = Clients(hurried, key("many")).ask({"messages": messages, "max_tokens": 8, "temperature": 0})
    end.result(60)
    found = json.loads(answer.text)
    assert found["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] > 2300
    assert "system_fingerprint" not in found, "it would tell the engine's version"


def test_fault_tokens_come_together_where_the_profile_says_so(hurried: Server) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"messages": messages, "max_tokens": 16, "ignore_eos": True, "temperature": 0, "stream": True}
    answer, end = Clients(hurried, key("many")).ask(body, stream_options={"include_usage": True})
    end.result(60)
    *events, done = answer.events()
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    pieces = [choice["delta"]["content"] for choice in choices if choice["delta"].get("content")]
    assert done == "[DONE]"
    assert "".join(pieces).startswith("The capital of France is Paris.")
    assert len(pieces) <= 5, "the first token at once, then four at a time"
    assert json.loads(events[-1])["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", "Basic Ym9yZw==", "Bearer x y"])
def test_fault_missing_or_wrong_key_is_401_on_every_route(hurried: Server, header: str) -> None:
    routes = [
        ("POST", PATH),
        ("POST", "/v1/responses"),
        ("POST", "/v1/messages"),
        ("POST", "/v1/messages/count_tokens"),
    ]
    routes += [("GET", path) for path in ("/v1/models", "/metrics", "/version", "/openapi.json")]
    for method, path in routes:
        headers = {"authorization": header} if header else {}
        answer = httpx.request(
            method, hurried.base_url + path, headers=headers, json=SHORT if method == "POST" else None
        )
        assert answer.status_code == 401, path
        assert "error" in answer.json()
    for path in ("/health", "/ready"):
        assert httpx.get(hurried.base_url + path).status_code == 200


def test_fault_key_over_its_limits_is_429_with_retry_after(hurried: Server) -> None:
    def refused(clients: Clients) -> None:
        answer, end = clients.ask(SHORT)
        end.result(30)
        assert answer.status == 429, answer.text
        assert 1 <= int(answer.headers["retry-after"]) <= 120
        assert answer.error()["code"] == "rate_limit_exceeded"

    def served(clients: Clients, **more: Any) -> None:
        answer, end = clients.ask(SHORT, **more)
        end.result(30)
        assert answer.status == 200, answer.text

    few, one, small = (Clients(hurried, key(name)) for name in ("few", "one", "small"))
    await_room_in_the_minute(20)
    served(few)
    served(few)
    refused(few)
    await_room_in_the_minute(20)
    served(small)
    refused(small)
    streamed, end = one.ask(LONG, stream=True)
    assert streamed.begun.wait(30)
    refused(one)
    assert not end.done(), "no slot was taken any more"
    end.result(30)
    served(one)


def test_fault_full_queue_is_503_with_retry_after_at_once(hurried: Server) -> None:
    clients = Clients(hurried, key("many"))
    first = [clients.ask(LONG) for _ in range(4)]
    wait_until("two run, two wait", lambda: clients.metric("borg_queued") == 2, DEADLINE_S - 1)
    more = [clients.ask(LONG) for _ in range(6)]
    for answer, end in more:
        end.result(DEADLINE_S)
        assert answer.status == 503, answer.text
        assert answer.error()["code"] == "busy"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert not any(end.done() for _, end in first), "a refusal must not wait for those before it"
    for answer, end in first:
        end.result(60)
        assert answer.status == 504, answer.text
    wait_until("idle", lambda: idle(clients), 30)


def test_fault_deadline_before_the_first_byte_is_504(hurried: Server) -> None:
    answer, end = Clients(hurried, key("many")).ask(LONG)
    end.result(60)
    assert answer.status == 504
    assert answer.error()["code"] == "deadline_exceeded"
    assert answer.seconds > DEADLINE_S - 0.5


def test_fault_deadline_in_a_stream_is_an_error_event(hurried: Server) -> None:
    clients = Clients(hurried, key("many"))
    answer, end = clients.ask(LONG, stream=True)
    end.result(60)
    check_failed_stream(answer, "deadline_exceeded")
    assert answer.seconds > DEADLINE_S - 0.5
    wait_until("idle", lambda: idle(clients), 30)


def test_fault_killed_worker_ends_everything(hurried: Server) -> None:
    lose_engine(hurried, "VLLM::Worker_TP1", signal.SIGKILL, key("many"))
