"""Clients that leave or do not read, then a stopped engine; the last test ends the server."""

import json
import random
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.engine.faults import HANG, LONG, PATH, SHORT, Clients, idle, lose_engine
from tests.engine.process import Server, running
from tests.waiting import wait_until

STALL_S = 2.0


@pytest.fixture(scope="module")
def watched(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = (*HANG, f"--set=limits.stall_s={STALL_S:g}", f"--set=model.path={checkpoint}")
    with running(tmp_path_factory.mktemp("watched"), *settings) as server:
        yield server


def check_kv_freed(clients: Clients, usage_before: float) -> None:
    # Heartbeats hold a block for a moment, so that the gauge may need a second look.
    wait_until("KV is free", lambda: clients.metric("vllm:kv_cache_usage_perc") <= usage_before + 1e-9, 60)


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
        wait_until("the slow reader is admitted", lambda: clients.metric("borg_inflight") == 4, 60)
        # Nothing is read from here on: the socket's buffers fill, then stall_s runs.
        # Where the engine takes longer to fill them than the kernel waits for an acknowledgement, the kernel ends it.
        wait_until("it is aborted", lambda: aborted(clients) == 1, 120)
        wait_until("its slots are free", lambda: idle(clients), 60)
        # The connection was ended, not left with what is unsent: reading finds its end at once.
        sock.settimeout(5)
        text = b""
        with suppress(ConnectionResetError):
            while piece := sock.recv(1 << 20):
                text += piece
    assert b"[DONE]" not in text
    check_kv_freed(clients, usage_before)


def aborted(clients: Clients) -> float:
    """How many requests were aborted because the client did not read, by the gate or by the kernel."""
    by_gate = clients.metric("borg_refusals_total", reason="stalled")
    return by_gate + clients.metric("borg_requests_total", outcome="gone")


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
    wait_until("all slots are free", lambda: idle(clients), 60)
    check_kv_freed(clients, usage_before)
    assert clients.metric("borg_requests_total", outcome="gone") >= 10
    answer, end = clients.ask(SHORT)
    end.result(60)
    assert answer.status == 200
    assert json.loads(answer.text)["usage"]["prompt_tokens_details"]["cached_tokens"] > 2000


def test_fault_stopped_engine_is_noticed_and_everything_ends(watched: Server) -> None:
    lose_engine(watched, "VLLM::EngineCore", signal.SIGSTOP)
