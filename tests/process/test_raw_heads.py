"""Heads of requests as a hostile client writes them: endless, slow, malformed, ambiguous."""

import socket
import time
from contextlib import suppress

import pytest

from borg_serve.gate.http import HEAD_BYTES
from tests.process.raw import (
    CHAT,
    MIB,
    GateServer,
    answers,
    everything,
    memory_flat,
    post,
    statuses,
)


@pytest.mark.usefixtures("hasty_head")
@pytest.mark.parametrize(
    "part", [b"P", b"POST /v1/chat/completions", b"GET /health HTTP/1.1\r\nhost: x\r\n", post()[:60]]
)
def test_raw_slow_head_is_408(gate_server: GateServer, part: bytes) -> None:
    with gate_server.connect() as sock:
        sock.sendall(part)
        assert statuses(answers(everything(sock))) == [408]


@pytest.mark.usefixtures("hasty_head")
def test_raw_head_by_single_bytes_is_408(gate_server: GateServer) -> None:
    with gate_server.connect() as sock:
        with pytest.raises(ConnectionError):  # the time counts from the first byte, not from the last
            trickle(sock, b"GET /health HTTP/1.1\r\nx: " + b"a" * 1000)
        assert statuses(answers(everything(sock))) in ([408], [])


@pytest.mark.usefixtures("hasty_head")
def test_raw_connection_without_a_head_is_closed(gate_server: GateServer) -> None:
    with gate_server.connect() as sock:
        assert everything(sock) == b""


@pytest.mark.usefixtures("hasty_head")
def test_raw_many_silent_connections_are_closed_and_cost_little(gate_server: GateServer) -> None:
    with memory_flat(24):
        socks = [gate_server.connect() for _ in range(400)]
        for index, sock in enumerate(socks):
            if index % 2:
                with suppress(ConnectionError):  # its time may have passed already
                    sock.sendall(b"GET /health HTTP/1.1\r\n")
        assert gate_server.alive()
        for sock in socks:
            everything(sock)
            sock.close()


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nx: " + b"a" * 8 * MIB,
        b"GET /" + b"a" * 8 * MIB,
        b"GET /health HTTP/1.1\r\n" + b"a" * 8 * MIB,
        b"GET /health HTTP/1.1\r\n" + b"x: a\r\n" * MIB,
        b"G" * 8 * MIB,
    ],
    ids=["value", "target", "name", "count", "method"],
)
def test_raw_endless_head_is_refused_before_memory_grows(gate_server: GateServer, head: bytes) -> None:
    gate_server.alive()
    with memory_flat(16):
        assert statuses(gate_server.say(head)) in ([431], [400], [])


def test_raw_head_over_the_bound_is_431(gate_server: GateServer) -> None:
    fits = b"GET /health HTTP/1.1\r\nx: " + b"a" * (HEAD_BYTES - 200)
    assert statuses(gate_server.say(fits + b"\r\nconnection: close\r\n\r\n")) == [200]
    assert statuses(gate_server.say(fits + b"a" * 400 + b"\r\n\r\n")) == [431]
    many = b"GET /health HTTP/1.1\r\n" + b"x: a\r\n" * (HEAD_BYTES // 5)
    assert statuses(gate_server.say(many + b"\r\n")) == [431]


@pytest.mark.parametrize(
    "head",
    [
        b"\x00\x01\x02\x03\r\n\r\n",
        b"GET  HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"FETCH /health HTTP/1.1\r\n\r\n",
        b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET http://x HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /h\xc3\xa9alth\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /health\x00 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\x00y\r\n\r\n",
        b"GET /health HTTP/1.1\r\nho st: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost : x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nx: a\rb\r\n\r\n",
        b"GET /health HTTP/1.1\nhost: x\nx: a\n\n\x00",
        b"GET /health HTTP/1.1\r\n: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"GET /health HTTP/1.1\r\ncontent-length: 1e3\r\n\r\n",
        b"GET /health HTTP/1.1\r\ncontent-length: " + b"9" * 40 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
    ],
)
def test_raw_malformed_head_is_400_in_json_and_closed(gate_server: GateServer, head: bytes) -> None:
    found = gate_server.say(head)
    assert statuses(found) == [400], found
    assert gate_server.alive()


def test_raw_bytes_that_are_no_utf8_in_header_values_and_paths_do_no_harm(gate_server: GateServer) -> None:
    request = b"GET /health HTTP/1.1\r\nhost: x\r\nx-request-id: \xff\xfe\xc3\r\nconnection: close\r\n\r\n"
    assert statuses(gate_server.say(request)) == [200]
    request = b"GET /%ff%00%c3%28 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    assert statuses(gate_server.say(request)) == [404]
    assert statuses(gate_server.say(post(CHAT, b"content-type: \xff"))) == [415]


@pytest.mark.parametrize("target", [b"/health", b"http://other.example/health", b"http://127.0.0.1:1/health?x#y"])
def test_raw_absolute_form_is_read_as_its_path(gate_server: GateServer, target: bytes) -> None:
    request = b"GET " + target + b" HTTP/1.1\r\nhost: y\r\nconnection: close\r\n\r\n"
    assert gate_server.say(request) == [(200, {"status": "alive"})]


def test_raw_http_1_0_is_answered_and_closed(gate_server: GateServer) -> None:
    with gate_server.connect() as sock:
        sock.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert answers(everything(sock)) == [(200, {"status": "alive"})]


@pytest.mark.parametrize("path", [b"/health", b"/v1/chat/completions", b"/v1/realtime"])
def test_raw_websocket_upgrade_is_answered_as_plain_http(gate_server: GateServer, path: bytes) -> None:
    head = b"GET " + path + b" HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    request = head + b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n\x81\x00"
    with gate_server.connect() as sock:
        sock.sendall(request)
        text = sock.recv(MIB)
    assert statuses(answers(text)) == [{b"/health": 200, b"/v1/chat/completions": 405}.get(path, 404)]


@pytest.mark.parametrize("name", [b"authorization", b"content-type", b"x-api-key"])
def test_raw_header_that_decides_may_come_once(gate_server: GateServer, name: bytes) -> None:
    found = gate_server.say(post(CHAT, name + b": application/json", name + b": application/json"))
    assert statuses(found) == [400]
    assert name.decode() in found[0][1]["error"]["message"]


def test_raw_headers_of_a_client_do_not_reach_the_application(gate_server: GateServer) -> None:
    sent = (b"x-request-id: mine", b"x-data-parallel-rank: 1", b"priority: u=0", b"x-session-id: a", b"cookie: a=b")
    more = (b"authorization: Bearer secret", b"traceparent: 00-a-b-01", b"host: evil")
    ((status, document),) = gate_server.say(post(CHAT, *sent, *more))
    assert status == 200
    assert document["headers"] == {
        "content-type": "application/json",
        "x-request-id": "mine",
        "content-length": document["headers"]["content-length"],
        "host": "localhost",
    }


def trickle(sock: socket.socket, data: bytes) -> None:
    """Send byte by byte, each well before the time for a whole head is over."""
    for byte in data:
        sock.sendall(bytes([byte]))
        time.sleep(0.02)


@pytest.mark.parametrize("version", [b"HTTP/1.0", b"HTTP/1.1"])
def test_raw_stream_is_framed_as_the_clients_version_can_read_it(gate_server: GateServer, version: bytes) -> None:
    body = b'{"messages": [{"role": "user", "content": "briefly"}], "stream": true}'
    with gate_server.connect() as sock:
        sock.sendall(post(body).replace(b"HTTP/1.1", version))
        head, _, said = everything(sock).partition(b"\r\n\r\n")
    chunked = version == b"HTTP/1.1"
    assert (b"transfer-encoding: chunked" in head) is chunked
    assert said.startswith(b"data: ") is not chunked
    assert said.endswith(b"0\r\n\r\n" if chunked else b"data: [DONE]\n\n")


def test_raw_http_1_0_gets_documents_of_known_length(gate_server: GateServer) -> None:
    for request, status in ((post(), 200), (post(b"{"), 400), (post(path=b"/chat/completions"), 404)):
        assert statuses(gate_server.say(request.replace(b"HTTP/1.1", b"HTTP/1.0"))) == [status]
