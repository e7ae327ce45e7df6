"""Bodies as a hostile client writes them: endless, slow, smuggled, in bad chunks."""

import time
from contextlib import suppress

import pytest

from tests.process.raw import (
    BODY_S,
    CHAT,
    LAST,
    MIB,
    GateServer,
    answers,
    chunk,
    chunked,
    everything,
    memory_flat,
    post,
    statuses,
)


def test_raw_body_of_100_mb_is_413_before_it_is_read(gate_server: GateServer) -> None:
    with memory_flat(16), gate_server.connect() as sock:
        sock.sendall(post(b"", length=100 * MIB))
        assert statuses(answers(everything(sock))) == [413]


def test_raw_body_of_100_mb_that_is_sent_anyway_ends_with_413(gate_server: GateServer) -> None:
    with memory_flat(24), gate_server.connect() as sock:
        with suppress(ConnectionError):
            sock.sendall(post(b"", length=100 * MIB))
            for _ in range(100):
                sock.sendall(b" " * MIB)
        assert statuses(answers(everything(sock))) in ([413], [])


def test_raw_chunked_body_of_100_mb_is_413_where_the_bound_is(gate_server: GateServer) -> None:
    with memory_flat(24), gate_server.connect() as sock:
        with suppress(ConnectionError):
            sock.sendall(chunked())
            for _ in range(1600):
                sock.sendall(chunk(b" " * 65536))
        assert statuses(answers(everything(sock))) in ([413], [])


def test_raw_body_by_chunks_arrives(gate_server: GateServer) -> None:
    pieces = [chunk(bytes([byte])) for byte in CHAT]
    ((status, document),) = gate_server.say(chunked(*pieces, LAST))
    assert status == 200
    assert document["body"]["messages"] == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "rest",
    [
        b"zz\r\nabc\r\n",
        b"-5\r\nabc\r\n",
        b"0x5\r\nabcde\r\n",
        b"FFFFFFFFFFFFFFFFFF\r\na\r\n",
        b"5\r\nabc",
        b"3\r\nabcdef\r\n0\r\n\r\n",
        b"\r\n\r\n",
        b"5;\x00\r\nabcde\r\n",
    ],
)
def test_raw_bad_chunking_is_400_or_cut_and_never_served(gate_server: GateServer, rest: bytes) -> None:
    assert statuses(gate_server.say(chunked(rest))) in ([400], [408], [])
    assert gate_server.alive()


def test_raw_trailers_are_no_headers(gate_server: GateServer) -> None:
    trailers = b"0\r\nauthorization: Bearer secret\r\ntraceparent: smuggled\r\n\r\n"
    ((status, document),) = gate_server.say(chunked(chunk(CHAT), trailers))
    assert status == 200
    assert "traceparent" not in document["headers"]


@pytest.mark.parametrize(
    "endless", [b"x: a\r\n" * 100_000, b"x: " + b"a" * 600_000, b"a" * 600_000], ids=["count", "value", "name"]
)
def test_raw_endless_trailers_are_cut_before_memory_grows(gate_server: GateServer, endless: bytes) -> None:
    with memory_flat(16), gate_server.connect() as sock:
        with suppress(ConnectionError):
            sock.sendall(chunked(chunk(CHAT[:-1]), b"0\r\n"))
            for _ in range(60):
                sock.sendall(endless)
        assert statuses(answers(everything(sock))) in ([400], [431], [408], [])
    assert gate_server.alive()


@pytest.mark.parametrize("extension", [b";" + b"a" * MIB, b";a=" + b"b" * MIB])
def test_raw_endless_chunk_extensions_are_cut(gate_server: GateServer, extension: bytes) -> None:
    with memory_flat(16), gate_server.connect() as sock:
        with suppress(ConnectionError):
            sock.sendall(chunked(b"5" + extension))
            for _ in range(30):
                sock.sendall(b"a" * MIB)
        assert statuses(answers(everything(sock))) in ([400], [431], [408], [])


def test_raw_slow_body_is_408(gate_server: GateServer) -> None:
    with gate_server.connect() as sock:
        began = time.monotonic()
        sock.sendall(post(CHAT[:10], length=len(CHAT)))
        assert statuses(answers(everything(sock))) == [408]
        assert time.monotonic() - began >= BODY_S


def test_raw_declared_length_that_is_too_short_leaves_no_second_request(gate_server: GateServer) -> None:
    found = gate_server.say(post(CHAT + b"GET /version HTTP/1.1\r\n\r\nx", length=len(CHAT) - 1))
    assert statuses(found)[0] == 400
    assert 200 not in statuses(found)


@pytest.mark.parametrize(
    "both",
    [
        (b"content-length: 4", b"transfer-encoding: chunked"),
        (b"transfer-encoding: chunked", b"content-length: 4"),
        (b"transfer-encoding: chunked, identity",),
        (b"transfer-encoding: identity", b"content-length: 4"),
        (b"transfer-encoding:\x0bchunked",),
        (b"transfer-encoding: xchunked",),
    ],
)
def test_raw_smuggled_request_is_never_answered(gate_server: GateServer, both: tuple[bytes, ...]) -> None:
    head = b"\r\n".join([b"POST /v1/chat/completions HTTP/1.1", b"host: x", b"content-type: application/json", *both])
    found = gate_server.say(head + b"\r\n\r\n0\r\n\r\nGET /version HTTP/1.1\r\nhost: x\r\n\r\n")
    assert statuses(found)[:1] in ([400], [501])
    assert 200 not in statuses(found)


@pytest.mark.parametrize("body", [b"\xff\xfe", b'{"messages": "\xc3"}', b'{"a": "\\ud800"}', b"\x00"])
def test_raw_body_that_is_no_utf8_json_is_400(gate_server: GateServer, body: bytes) -> None:
    ((status, document),) = gate_server.say(post(body))
    assert status == 400
    assert document["error"]["code"] in {"invalid_json", "unknown_parameter"}


@pytest.mark.parametrize(
    "kind", [b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=x", b"", b"json"]
)
def test_raw_wrong_content_type_is_415(gate_server: GateServer, kind: bytes) -> None:
    assert statuses(gate_server.say(post(CHAT, b"content-type: " + kind))) == [415]
