"""Clients of a real server on which something goes wrong, and the loss of its engine."""

import json
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from loadtests.servers.local import LOOK
from tests.engine.process import Server, living
from tests.waiting import wait_until

PATH = "/v1/chat/completions"
LONG = {"messages": [{"role": "user", "content": "Tell me a long story."}], "max_tokens": 3000, "ignore_eos": True}
SHORT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
# Short steps: on a slow and shared machine the profile's own may take as long as a hang.
HANG = ("--set=server.hang_s=8", "--set=engine.max_num_batched_tokens=256")
NOTICED_S = 60.0
"""How soon `/ready` must tell of a lost engine; the requests in flight have 180 s."""


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
    stream_end.result(60)
    whole_end.result(60)
    check_failed_stream(streamed, "engine_lost")
    assert whole.status == 503, whole.text
    assert whole.error()["code"] == "engine_lost"
    check_discreet(whole.text)
    assert server.ended() == 1, server.tail()
    assert left(family) == []
    print(f"{name} {number.name}: noticed after {noticed_s:.1f} s")


def idle(clients: Clients) -> bool:
    """Whether no request is anywhere: not at the gate, not in vLLM's queue, not in the KV cache."""
    busy = ("borg_inflight", "borg_queued", "vllm:num_requests_running", "vllm:num_requests_waiting")
    return not any(clients.metric(name) for name in busy)
