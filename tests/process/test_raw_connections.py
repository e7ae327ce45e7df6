"""Connections of a hostile client: not read, pipelined, reset; and of any client of a server that starts or ends."""

import gc
import socket
import struct
import time
from contextlib import suppress

import pytest

from borg_serve.gate import answer, app, http
from borg_serve.gate.http import HEAD_BYTES, PIPELINED
from borg_serve.gate.request import Request
from borg_serve.serving import single
from tests.process.raw import (
    CHAT,
    LIMITS,
    MIB,
    GateServer,
    answers,
    everything,
    get,
    memory_flat,
    post,
    serving,
    statuses,
)
from tests.waiting import wait_until

# --------------------------------------------------------------------------------------------------------- slow readers


def test_raw_reader_that_does_not_read_is_cut_off_and_holds_nothing(
    gate_server: GateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody waits so long for the error event to be read either: it cannot be written.
    monkeypatch.setattr(answer, "LAST_WORD_S", 120.0)
    with memory_flat(8), socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(10)
        sock.connect(("127.0.0.1", gate_server.port))
        began = time.monotonic()
        sock.sendall(post(CHAT.replace(b"hi", b"flood")))
        time.sleep(0.2)
        assert len(gate_server.gate.live) == 1
        assert gate_server.idle(within_s=30)
        assert time.monotonic() - began > LIMITS.stall_s * 0.9
        text = everything(sock)
    assert b"[DONE]" not in text
    assert len(text) < MIB


def test_raw_client_that_leaves_a_stream_is_noticed_before_any_limit_is_reached() -> None:
    with serving(LIMITS.model_copy(update={"stall_s": 120.0, "deadline_s": 120.0})) as gate_server:
        with gate_server.connect() as sock:
            sock.sendall(post(CHAT.replace(b"hi", b"flood")))
            assert sock.recv(100)
        assert gate_server.idle(within_s=30)


# ----------------------------------------------------------------------------------------------------------- pipelining


def test_raw_pipelined_requests_are_answered_in_order(gate_server: GateServer) -> None:
    health, version = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n", b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"
    chat = post().replace(b"connection: close\r\n", b"")
    found = gate_server.say(health + chat + version + b"GET /no HTTP/1.1\r\nconnection: close\r\n\r\n")
    assert [status for status, _ in found] == [200, 200, 200, 404]
    assert found[1][1]["path"] == "/v1/chat/completions"


def test_raw_pipeline_is_bounded_and_what_was_taken_is_answered(gate_server: GateServer) -> None:
    request = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    with memory_flat(32), gate_server.connect() as sock:
        with suppress(ConnectionError):
            for _ in range(40):
                sock.sendall(request * 5000)
        text = everything(sock)
    # A reset, for what was sent and not read, may overtake the answers; they are few and whole.
    assert set(statuses(answers(text[: text.rfind(b"}") + 1]))) <= {200}
    assert text.count(b"HTTP/1.1 ") <= 20 * PIPELINED
    assert gate_server.alive()


@pytest.mark.parametrize(
    "garbage",
    [b"\x00garbage\r\n\r\n", b"GET /" + b"a" * 20 * HEAD_BYTES, b"GET / HTTP/1.1\r\nx: \x00\r\n\r\n"],
    ids=["no HTTP", "endless", "malformed"],
)
def test_raw_garbage_behind_a_request_leaves_its_answer_whole(gate_server: GateServer, garbage: bytes) -> None:
    # An error written now would be read as the answer to the request before it.
    found = statuses(gate_server.say(post().replace(b"connection: close\r\n", b"") + garbage))
    assert found in ([200], [200, 400], [200, 431])


@pytest.mark.usefixtures("hasty_head")
def test_raw_next_head_may_wait_but_not_be_slow(gate_server: GateServer) -> None:
    with gate_server.connect() as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"alive" in sock.recv(MIB)
        time.sleep(0.8)
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"alive" in sock.recv(MIB)
        sock.sendall(b"GET /hea")
        assert statuses(answers(everything(sock))) == [408]


# ---------------------------------------------------------------------------------------------- failures, start and end


def test_raw_clients_that_reset_leave_nothing(gate_server: GateServer) -> None:
    with memory_flat(24):
        for index in range(300):
            sock = gate_server.connect()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.sendall(post()[: 20 + index])
            sock.close()
    assert gate_server.alive()


@pytest.mark.parametrize(("word", "status"), [(b"never", 504), (b"broken", 500)])
def test_raw_failed_requests_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch, word: bytes, status: int) -> None:
    # An error that outlived its request would keep the frames it was raised in, and those the request's body.
    monkeypatch.setattr(app, "DYING_S", 0.01)
    monkeypatch.setattr(app.logger, "disabled", True)  # pytest keeps log records, and they keep frames
    with serving(LIMITS.model_copy(update={"deadline_s": 0.1 if status == 504 else 60.0})) as gate_server:
        for _ in range(8):
            ((got, document),) = gate_server.say(post(CHAT.replace(b"hi", word)))
            assert got == status
            assert "secret" not in str(document)
            assert "Traceback" not in str(document)
    gc.collect()
    assert not [
        found for found in gc.get_objects() if type(found) is Request
    ]  # isinstance asks objects of torch, and they warn


def test_raw_server_that_is_not_ready_says_so_without_a_trace() -> None:
    with serving(opened=False) as gate_server:
        for request in (post(), get(b"/v1/models"), get(b"/metrics")):
            ((status, document),) = gate_server.say(request)
            assert status == 503
            assert document["error"]["code"] == "not_ready"
        ((status, document),) = gate_server.say(get(b"/ready"))
        assert (status, document["status"]) == (503, "starting")
        assert gate_server.alive()


def test_raw_server_that_ends_answers_who_has_just_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_S", 4.0)
    monkeypatch.setattr(single, "CLOSING_S", 20.0)
    with serving() as gate_server, gate_server.connect() as late, gate_server.connect() as silent:
        assert gate_server.alive()  # so the two before it have been accepted as well
        gate_server.stop()
        wait_until("it takes no new connection", lambda: not listens(gate_server.port), 20)
        late.sendall(post())
        assert statuses(answers(everything(late))) == [200]
        assert everything(silent) == b""


def listens(port: int) -> bool:
    """Whether new connections are taken."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0
