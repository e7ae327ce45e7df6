"""Faults on a real server: an engine killed or stopped, clients that leave or do not read, a full disk.

Four servers, one after the other; the last test of each ends it.
"""

import hashlib
import json
import os
import random
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from loadtests.servers import LOOK
from tests.engine.process import Server, living, running
from tests.waiting import await_room_in_the_minute, wait_until

PATH = "/v1/chat/completions"
LONG = {"messages": [{"role": "user", "content": "Tell me a long story."}], "max_tokens": 3000, "ignore_eos": True}
SHORT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
# Short steps: on a slow and shared machine the profile's own may take as long as a hang.
HANG = ("--set=server.hang_s=8", "--set=engine.max_num_batched_tokens=256")
NOTICED_S = 10.0
"""How soon `/ready` must tell of a lost engine."""
STALL_S = 2.0
DEADLINE_S = 10.0


@dataclass
class Answer:
    """One answer, growing while it is read."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""
    seconds: float = 0.0
    begun: threading.Event = field(default_factory=threading.Event)

    def error(self) -> dict[str, Any]:
        """Return the error of an answer that is one document."""
        error: dict[str, Any] = json.loads(self.text)["error"]
        return error

    def events(self) -> list[str]:
        """Return the data of a stream's events."""
        return [event.removeprefix("data: ") for event in self.text.split("\n\n") if event]


class Clients:
    """Requests in flight, each in a thread of its own."""

    def __init__(self, server: Server, key: str | None = None) -> None:
        self.url = server.base_url
        self.headers = {"authorization": f"Bearer {key}"} if key else {}
        self.pool = ThreadPoolExecutor(40)

    def ask(self, body: dict[str, Any], **more: Any) -> tuple[Answer, "Future[None]"]:
        """Start a request; its answer, and when it has ended. A connection cut without an end raises."""
        answer = Answer()

        def work() -> None:
            began = time.monotonic()
            with httpx.stream("POST", self.url + PATH, json={**body, **more}, headers=self.headers, timeout=200) as got:
                answer.status, answer.headers = got.status_code, dict(got.headers)
                for piece in got.iter_text():
                    answer.text += piece
                    answer.begun.set()
            answer.seconds = time.monotonic() - began

        return answer, self.pool.submit(work)

    def ready(self) -> int:
        """Return the status of /ready, 0 when nobody listens any more."""
        with suppress(httpx.TransportError):
            return LOOK.get(self.url + "/ready", timeout=5).status_code
        return 0

    def metrics(self) -> str:
        return LOOK.get(self.url + "/metrics", headers=self.headers, timeout=30).text

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples that have these labels."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.metrics())
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


def member(server: Server, name: str) -> psutil.Process:
    """Return the process of the server's family with this title."""
    (found,) = [process for process in server.family() if process.cmdline()[:1] == [name]]
    return found


def left(family: list[psutil.Process]) -> list[str]:
    """Return who of a family still runs after a while; a zombie only waits for its new parent to take notice."""
    names = []
    for process in living(family):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                names.append(f"{process.cmdline()[:1]} {process.status()}")
    return names


def check_failed_stream(answer: Answer, code: str) -> None:
    """Assert that a stream which had begun ended with one error event, said nothing of us, and not [DONE]."""
    *events, last = answer.events()
    assert answer.status == 200
    assert events
    assert "[DONE]" not in answer.text
    assert json.loads(last)["error"]["code"] == code
    assert not any('"error"' in event for event in events)
    check_discreet(answer.text)


def check_discreet(text: str) -> None:
    assert not [word for word in ("Traceback", "site-packages", "/vllm", "127.0.0.1", "0x") if word in text]


def in_flight(clients: Clients) -> list[tuple[Answer, "Future[None]"]]:
    """Start a streamed and a whole answer; both, once both run: on a slow machine one may meet its deadline first."""
    for _ in range(5):
        both = [clients.ask(LONG, stream=True), clients.ask(LONG)]
        while not any(end.done() for _, end in both):
            if both[0][0].begun.is_set() and clients.metric("borg_inflight") == 2:
                return both
        for _, end in both:
            end.result(60)
    raise AssertionError("a streamed and a whole answer were never in flight together")


def lose_engine(server: Server, name: str, number: signal.Signals, key: str | None = None) -> None:
    """Send a signal to a process of the engine with a whole and a streamed answer in flight; see all the rest end."""
    clients = Clients(server, key)
    family = server.family()
    victim = member(server, name)
    (streamed, stream_end), (whole, whole_end) = in_flight(clients)
    victim.send_signal(number)
    noticed_s = wait_until("/ready tells", lambda: clients.ready() != 200, NOTICED_S)
    stream_end.result(20)
    whole_end.result(20)
    check_failed_stream(streamed, "engine_lost")
    assert whole.status == 503, whole.text
    assert whole.error()["code"] == "engine_lost"
    check_discreet(whole.text)
    assert server.ended(20) == 1, server.tail()
    assert left(family) == []
    print(f"{name} {number.name}: noticed after {noticed_s:.1f} s")


# ------------------------------------------------------------------- one server: clients that misbehave, then SIGSTOP


@pytest.fixture(scope="module")
def watched(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = (*HANG, f"--set=limits.stall_s={STALL_S:g}", f"--set=model.path={checkpoint}")
    with running(tmp_path_factory.mktemp("watched"), *settings) as server:
        yield server


def idle(clients: Clients) -> bool:
    """Whether no request is anywhere: not at the gate, not in vLLM's queue, not in the KV cache."""
    busy = ("borg_inflight", "borg_queued", "vllm:num_requests_running", "vllm:num_requests_waiting")
    return not any(clients.metric(name) for name in busy)


def check_kv_freed(clients: Clients, usage_before: float) -> None:
    # Heartbeats hold a block for a moment, so that the gauge may need a second look.
    wait_until("KV is free", lambda: clients.metric("vllm:kv_cache_usage_perc") <= usage_before + 1e-9, 10)


def test_fault_slow_reader_is_aborted_and_frees_what_it_held(watched: Server) -> None:
    clients = Clients(watched)
    usage_before = clients.metric("vllm:kv_cache_usage_perc")
    body = json.dumps({**LONG, "stream": True, "n": 4, "logprobs": True, "top_logprobs": 20}).encode()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        host, _, port = watched.base_url.removeprefix("http://").partition(":")
        sock.connect((host, int(port)))
        head = (
            f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        sock.sendall(head.encode() + body)
        wait_until("the slow reader is admitted", lambda: clients.metric("borg_inflight") == 4, 30)
        # Nothing is read from here on: the socket's buffers fill, then stall_s runs.
        wait_until("it is aborted", lambda: clients.metric("borg_refusals_total", reason="stalled") == 1, 60)
        wait_until("its places are free", lambda: idle(clients), 30)
        # The connection was ended, not left with what is unsent: reading finds its end at once.
        sock.settimeout(5)
        text = b""
        with suppress(ConnectionResetError):
            while piece := sock.recv(1 << 20):
                text += piece
    assert b"[DONE]" not in text
    check_kv_freed(clients, usage_before)


def test_fault_disconnect_storm_leaves_nothing_behind(watched: Server) -> None:
    clients = Clients(watched)
    wait_until("idle", lambda: idle(clients), 30)
    usage_before = clients.metric("vllm:kv_cache_usage_perc")
    rng = random.Random(7)
    moments = [(rng.uniform(0, 3), rng.uniform(0, 4), rng.random() < 0.5) for _ in range(30)]

    def leave(moment: tuple[float, float, bool]) -> None:
        begin_s, stay_s, stream = moment
        time.sleep(begin_s)
        text = f"{rng.random()} " * 4  # KV blocks of its own
        body = json.dumps({**LONG, "messages": [{"role": "user", "content": text}], "stream": stream}).encode()
        head = (
            f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        address = watched.base_url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as sock:
            # Some leave in the head, some in the body, most in the answer.
            whole = head.encode() + body
            sock.sendall(whole[: rng.choice([30, len(head) + 20, len(whole), len(whole), len(whole), len(whole)])])
            time.sleep(stay_s)
            if stream:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset rather than close

    with ThreadPoolExecutor(30) as pool:
        list(pool.map(leave, moments))
    wait_until("all places are free", lambda: idle(clients), 20)
    check_kv_freed(clients, usage_before)
    assert clients.metric("borg_requests_total", outcome="gone") >= 10
    answer, end = clients.ask(SHORT)
    end.result(60)
    assert answer.status == 200
    assert json.loads(answer.text)["usage"]["prompt_tokens_details"]["cached_tokens"] > 2000


def test_fault_stopped_engine_is_noticed_and_everything_ends(watched: Server) -> None:
    lose_engine(watched, "VLLM::EngineCore", signal.SIGSTOP)


# --------------------------------------------------------- one server: keys, full queue, deadlines, then a dead worker

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
        {"name": name, "sha256": hashlib.sha256(key(name).encode()).hexdigest(), "limits": limits}
        for name, limits in KEYS.items()
    ]
    (folder / "keys.yaml").write_text(yaml.safe_dump(entries))
    settings = (
        f"--set=model.path={divisible}",
        f"--set=server.keys={folder / 'keys.yaml'}",
        f"--set=limits.deadline_s={DEADLINE_S:g}",
        "--set=limits.concurrent=2",
        "--set=limits.queued=2",
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
    assert "-tp2-" in found["system_fingerprint"]


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
    routes = [("POST", PATH), ("POST", "/v1/responses"), ("POST", "/v1/messages")]
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

    await_room_in_the_minute(20)
    few, one, small = (Clients(hurried, key(name)) for name in ("few", "one", "small"))
    served(few)
    served(few)
    refused(few)
    served(small)
    refused(small)
    streamed, end = one.ask(LONG, stream=True)
    assert streamed.begun.wait(30)
    refused(one)
    assert not end.done(), "no place was taken any more"
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


# ----------------------------------------------------------------- one server: a full disk, then a killed engine core


@pytest.fixture(scope="module")
def mute(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("mute"), *HANG, f"--set=model.path={checkpoint}") as server:
        yield server


def test_fault_full_disk_under_the_log_stops_nothing(mute: Server) -> None:
    size = mute.log.stat().st_size
    for process in (psutil.Process(mute.pid), *mute.family()):
        # From here on no file of theirs may grow, as on a full disk: writing fails with EFBIG.
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    clients = Clients(mute)
    for _ in range(50):
        httpx.get(f"{mute.base_url}/no-such-route")  # a line of log each
    for stream in (False, True):
        answer, end = clients.ask(SHORT, stream=stream)
        end.result(60)
        assert answer.status == 200
        assert answer.events()[-1] == "[DONE]" if stream else json.loads(answer.text)["choices"]
    assert clients.ready() == 200
    assert mute.log.stat().st_size == size


def test_fault_killed_engine_core_ends_everything(mute: Server) -> None:
    lose_engine(mute, "VLLM::EngineCore", signal.SIGKILL)


# ------------------------------------------------------------------------------------------- one server: SIGKILL


def test_fault_killed_server_leaves_no_engine_behind(checkpoint: Path, tmp_path: Path) -> None:
    with running(tmp_path, f"--set=model.path={checkpoint}") as server:
        family = server.family()
        assert {process.cmdline()[0] for process in family} >= {"VLLM::EngineCore"}
        os.kill(server.pid, signal.SIGKILL)
        assert server.ended() == -signal.SIGKILL
        wait_until("its engine has ended", lambda: left(family) == [], 30)
