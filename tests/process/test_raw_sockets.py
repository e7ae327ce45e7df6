"""What a hostile client can send below HTTP's surface: the real uvicorn, our protocol and gate, a stub behind them.

The stub answers at once, so that whatever is slow or large here is the door's doing.
"""

import asyncio
import json
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import psutil
import pytest
import uvloop

from borg_serve import gate, protocol
from borg_serve.admission import Admission
from borg_serve.exchange import DEADLINE, FAILED, Receive, Scope, Send
from borg_serve.gate import Gate, Settings
from borg_serve.protocol import HEAD_BYTES, PIPELINED
from borg_serve.readiness import Phase, Readiness
from borg_serve.schema import Bounds
from borg_serve.server import SEND_BYTES, http

BODY_BYTES = 64 * 1024
BODY_S = 0.5
SETTINGS = Settings(Bounds(), 5.0, BODY_BYTES, BODY_S, 1.0, {"identity": {"tokens": 0}})
CHAT = b'{"messages": [{"role": "user", "content": "hi"}]}'
MIB = 1 << 20


async def stub(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with what arrived, as a chat completion's usage would tell it; or never, or with an error of its own."""
    body = json.loads((await receive())["body"] or b"{}")
    if "never" in str(body):
        await receive()
        return
    if "flood" in str(body):
        flood, gone = asyncio.ensure_future(stream_for_ever(send)), asyncio.ensure_future(receive())
        await asyncio.wait({flood, gone}, return_when=asyncio.FIRST_COMPLETED)
        flood.cancel()
        await asyncio.gather(flood, return_exceptions=True)
        return
    if "broken" in str(body):
        raise RuntimeError("Traceback in /usr/lib/secret.py")
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    document = json.dumps({"usage": {"total_tokens": 1}, "headers": headers, "path": scope["path"], "body": body})
    head = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": document.encode()})


async def stream_for_ever(send: Send) -> None:
    head = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    while True:
        await send({"type": "http.response.body", "body": b"data: " + b"x" * 8192 + b"\n\n", "more_body": True})
        await asyncio.sleep(0)  # as any real generator does


@dataclass
class Door:
    """A running server."""

    port: int
    gate: Gate
    stop: Callable[[], None]
    """Tell the server to end."""

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def say(self, *pieces: bytes) -> list[tuple[int, Any]]:
        """Send the pieces and return the answers, status and document, until the server closes."""
        with self.connect() as sock:
            with suppress(ConnectionError):
                for piece in pieces:
                    sock.sendall(piece)
            return answers(everything(sock))

    def idle(self, within_s: float) -> bool:
        """Whether no request is being answered, at the latest after so long."""
        end = time.monotonic() + within_s
        while self.gate.live and time.monotonic() < end:
            time.sleep(0.02)
        return not self.gate.live

    def alive(self) -> bool:
        return self.say(get(b"/health")) == [(200, {"status": "alive"})]


def everything(sock: socket.socket) -> bytes:
    """Read until the server closes."""
    text = b""
    with suppress(ConnectionResetError):
        while piece := sock.recv(MIB):
            text += piece
    return text


def answers(text: bytes) -> list[tuple[int, Any]]:
    """Split what a connection said into its answers; every one must be whole, and JSON."""
    found = []
    while text:
        head, _, rest = text.partition(b"\r\n\r\n")
        status, *lines = head.decode("ascii").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        assert status.startswith("HTTP/1.1 "), status
        assert headers["content-type"] == "application/json"
        length = int(headers["content-length"])
        assert len(rest) >= length, "a cut answer"
        found.append((int(status.split()[1]), json.loads(rest[:length])))
        text = rest[length:]
    return found


def get(path: bytes) -> bytes:
    return b"GET " + path + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


def post(body: bytes = CHAT, *more: bytes, path: bytes = b"/v1/chat/completions", length: int | None = None) -> bytes:
    """Return a request; `length` is what it declares when that is a lie."""
    head = [b"POST " + path + b" HTTP/1.1", b"host: x", b"connection: close", *more]
    if not any(line.startswith(b"content-type:") for line in more):
        head.append(b"content-type: application/json")
    return b"\r\n".join([*head, b"content-length: %d" % (len(body) if length is None else length), b"", body])


def chunked(*rest: bytes) -> bytes:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nconnection: close\r\ncontent-type: application/json\r\n"
    return head + b"transfer-encoding: chunked\r\n\r\n" + b"".join(rest)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


LAST = b"0\r\n\r\n"


@contextmanager
def serving(settings: Settings = SETTINGS, opened: bool = True) -> Iterator[Door]:
    """Run the door on a free port, in a thread with a loop of its own."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
    sock.bind(("127.0.0.1", 0))
    sock.listen(1024)
    stop, started = asyncio.Event(), threading.Event()
    loops = []
    readiness = Readiness()
    application = Gate(settings, readiness, lambda text: text)

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        if opened:
            application.open(stub, Admission(4, 64, MIB))
            readiness.set(Phase.READY)
        async with http(application, sock):
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: uvloop.run(serve()))
    thread.start()
    assert started.wait(10)

    def end() -> None:
        with suppress(RuntimeError):  # its loop has ended
            loops[0].call_soon_threadsafe(stop.set)

    door = Door(sock.getsockname()[1], application, end)
    try:
        yield door
    finally:
        door.stop()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def door() -> Iterator[Door]:
    with serving() as door:
        yield door
        assert door.alive()


@pytest.fixture
def hasty_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head must arrive within half a second."""
    monkeypatch.setattr(protocol, "HEAD_S", 0.5)


@contextmanager
def memory_flat(within_mib: float) -> Iterator[None]:
    """Assert that this process, server and all, has not grown by more."""
    before = psutil.Process().memory_info().rss
    yield
    grown = (psutil.Process().memory_info().rss - before) / MIB
    assert grown < within_mib, f"grew by {grown:.0f} MiB"


def statuses(found: list[tuple[int, Any]]) -> list[int]:
    for status, document in found:
        if status >= 400:
            error = document["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert "Traceback" not in error["message"]
    return [status for status, _ in found]


# ------------------------------------------------------------------------------------------------------- heads


@pytest.mark.usefixtures("hasty_head")
@pytest.mark.parametrize(
    "part", [b"P", b"POST /v1/chat/completions", b"GET /health HTTP/1.1\r\nhost: x\r\n", post()[:60]]
)
def test_raw_slow_head_is_408(door: Door, part: bytes) -> None:
    with door.connect() as sock:
        sock.sendall(part)
        assert statuses(answers(everything(sock))) == [408]


@pytest.mark.usefixtures("hasty_head")
def test_raw_head_by_single_bytes_is_408(door: Door) -> None:
    with door.connect() as sock:
        began = time.monotonic()
        with suppress(ConnectionError):
            for byte in b"GET /health HTTP/1.1\r\nx: " + b"a" * 100:
                sock.sendall(bytes([byte]))
                time.sleep(0.02)
        assert statuses(answers(everything(sock))) in ([408], [])
        assert time.monotonic() - began < 4


@pytest.mark.usefixtures("hasty_head")
def test_raw_connection_without_a_head_is_closed(door: Door) -> None:
    with door.connect() as sock:
        assert everything(sock) == b""


@pytest.mark.usefixtures("hasty_head")
def test_raw_many_silent_connections_are_closed_and_cost_little(door: Door) -> None:
    with memory_flat(24):
        socks = [door.connect() for _ in range(400)]
        for index, sock in enumerate(socks):
            if index % 2:
                sock.sendall(b"GET /health HTTP/1.1\r\n")
        assert door.alive()
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
def test_raw_endless_head_is_refused_before_memory_grows(door: Door, head: bytes) -> None:
    door.alive()
    with memory_flat(16):
        assert statuses(door.say(head)) in ([431], [400], [])


def test_raw_head_over_the_bound_is_431(door: Door) -> None:
    fits = b"GET /health HTTP/1.1\r\nx: " + b"a" * (HEAD_BYTES - 200)
    assert statuses(door.say(fits + b"\r\nconnection: close\r\n\r\n")) == [200]
    assert statuses(door.say(fits + b"a" * 400 + b"\r\n\r\n")) == [431]
    many = b"GET /health HTTP/1.1\r\n" + b"x: a\r\n" * (HEAD_BYTES // 5)
    assert statuses(door.say(many + b"\r\n")) == [431]


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
def test_raw_malformed_head_is_400_in_json_and_closed(door: Door, head: bytes) -> None:
    found = door.say(head)
    assert statuses(found) == [400], found
    assert door.alive()


def test_raw_bytes_that_are_no_utf8_in_header_values_and_paths_do_no_harm(door: Door) -> None:
    request = b"GET /health HTTP/1.1\r\nhost: x\r\nx-request-id: \xff\xfe\xc3\r\nconnection: close\r\n\r\n"
    assert statuses(door.say(request)) == [200]
    request = b"GET /%ff%00%c3%28 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    assert statuses(door.say(request)) == [404]
    assert statuses(door.say(post(CHAT, b"content-type: \xff"))) == [415]


@pytest.mark.parametrize("target", [b"/health", b"http://other.example/health", b"http://127.0.0.1:1/health?x#y"])
def test_raw_absolute_form_is_read_as_its_path(door: Door, target: bytes) -> None:
    request = b"GET " + target + b" HTTP/1.1\r\nhost: y\r\nconnection: close\r\n\r\n"
    assert door.say(request) == [(200, {"status": "alive"})]


def test_raw_http_1_0_is_answered_and_closed(door: Door) -> None:
    with door.connect() as sock:
        sock.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert answers(everything(sock)) == [(200, {"status": "alive"})]


@pytest.mark.parametrize("path", [b"/health", b"/v1/chat/completions", b"/v1/realtime"])
def test_raw_websocket_upgrade_is_answered_as_plain_http(door: Door, path: bytes) -> None:
    head = b"GET " + path + b" HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    request = head + b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n\x81\x00"
    with door.connect() as sock:
        sock.sendall(request)
        text = sock.recv(MIB)
    assert statuses(answers(text)) == [{b"/health": 200, b"/v1/chat/completions": 405}.get(path, 404)]


@pytest.mark.parametrize("name", [b"authorization", b"content-type", b"x-api-key"])
def test_raw_header_that_decides_may_come_once(door: Door, name: bytes) -> None:
    found = door.say(post(CHAT, name + b": application/json", name + b": application/json"))
    assert statuses(found) == [400]
    assert name.decode() in found[0][1]["error"]["message"]


def test_raw_headers_of_a_client_do_not_reach_the_application(door: Door) -> None:
    sent = (b"x-request-id: mine", b"x-data-parallel-rank: 1", b"priority: u=0", b"x-session-id: a", b"cookie: a=b")
    more = (b"authorization: Bearer secret", b"traceparent: 00-a-b-01", b"host: evil")
    ((status, document),) = door.say(post(CHAT, *sent, *more))
    assert status == 200
    assert document["headers"] == {
        "content-type": "application/json",
        "x-request-id": "mine",
        "content-length": document["headers"]["content-length"],
        "host": "localhost",
    }


# ------------------------------------------------------------------------------------------------------ bodies


def test_raw_body_of_100_mb_is_413_before_it_is_read(door: Door) -> None:
    with memory_flat(16), door.connect() as sock:
        sock.sendall(post(b"", length=100 * MIB))
        assert statuses(answers(everything(sock))) == [413]


def test_raw_body_of_100_mb_that_is_sent_anyway_ends_with_413(door: Door) -> None:
    with memory_flat(24), door.connect() as sock:
        with suppress(ConnectionError):
            sock.sendall(post(b"", length=100 * MIB))
            for _ in range(100):
                sock.sendall(b" " * MIB)
        assert statuses(answers(everything(sock))) in ([413], [])


def test_raw_chunked_body_of_100_mb_is_413_where_the_bound_is(door: Door) -> None:
    with memory_flat(24), door.connect() as sock:
        with suppress(ConnectionError):
            sock.sendall(chunked())
            for _ in range(1600):
                sock.sendall(chunk(b" " * 65536))
        assert statuses(answers(everything(sock))) in ([413], [])


def test_raw_body_by_chunks_arrives(door: Door) -> None:
    pieces = [chunk(bytes([byte])) for byte in CHAT]
    ((status, document),) = door.say(chunked(*pieces, LAST))
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
def test_raw_bad_chunking_is_400_or_cut_and_never_served(door: Door, rest: bytes) -> None:
    assert statuses(door.say(chunked(rest))) in ([400], [408], [])
    assert door.alive()


def test_raw_trailers_are_no_headers(door: Door) -> None:
    trailers = b"0\r\nauthorization: Bearer secret\r\ntraceparent: smuggled\r\n\r\n"
    ((status, document),) = door.say(chunked(chunk(CHAT), trailers))
    assert status == 200
    assert "traceparent" not in document["headers"]


@pytest.mark.parametrize(
    "endless", [b"x: a\r\n" * 100_000, b"x: " + b"a" * 600_000, b"a" * 600_000], ids=["count", "value", "name"]
)
def test_raw_endless_trailers_are_cut_before_memory_grows(door: Door, endless: bytes) -> None:
    with memory_flat(16), door.connect() as sock:
        with suppress(ConnectionError):
            sock.sendall(chunked(chunk(CHAT[:-1]), b"0\r\n"))
            for _ in range(60):
                sock.sendall(endless)
        assert statuses(answers(everything(sock))) in ([400], [431], [408], [])
    assert door.alive()


@pytest.mark.parametrize("extension", [b";" + b"a" * MIB, b";a=" + b"b" * MIB])
def test_raw_endless_chunk_extensions_are_cut(door: Door, extension: bytes) -> None:
    with memory_flat(16), door.connect() as sock:
        with suppress(ConnectionError):
            sock.sendall(chunked(b"5" + extension))
            for _ in range(30):
                sock.sendall(b"a" * MIB)
        assert statuses(answers(everything(sock))) in ([400], [431], [408], [])


def test_raw_slow_body_is_408(door: Door) -> None:
    with door.connect() as sock:
        began = time.monotonic()
        sock.sendall(post(CHAT[:10], length=len(CHAT)))
        assert statuses(answers(everything(sock))) == [408]
        assert BODY_S <= time.monotonic() - began < BODY_S + 3


def test_raw_declared_length_that_is_too_short_leaves_no_second_request(door: Door) -> None:
    found = door.say(post(CHAT + b"GET /version HTTP/1.1\r\n\r\nx", length=len(CHAT) - 1))
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
def test_raw_smuggled_request_is_never_answered(door: Door, both: tuple[bytes, ...]) -> None:
    head = b"\r\n".join([b"POST /v1/chat/completions HTTP/1.1", b"host: x", b"content-type: application/json", *both])
    found = door.say(head + b"\r\n\r\n0\r\n\r\nGET /version HTTP/1.1\r\nhost: x\r\n\r\n")
    assert statuses(found)[:1] in ([400], [501])
    assert 200 not in statuses(found)


@pytest.mark.parametrize(
    "body", [b"\xff\xfe", b'{"messages": "\xc3"}', b'{"a": "\\ud800"}', b"\x00", b"\xef\xbb\xbf{}"]
)
def test_raw_body_that_is_no_utf8_json_is_400(door: Door, body: bytes) -> None:
    ((status, document),) = door.say(post(body))
    assert status == 400
    assert document["error"]["code"] in {"invalid_json", "unknown_parameter"}


@pytest.mark.parametrize(
    "kind", [b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=x", b"", b"json"]
)
def test_raw_wrong_content_type_is_415(door: Door, kind: bytes) -> None:
    assert statuses(door.say(post(CHAT, b"content-type: " + kind))) == [415]


# ------------------------------------------------------------------------------------------------ slow readers


def test_raw_reader_that_does_not_read_is_cut_off_and_holds_nothing(door: Door) -> None:
    with memory_flat(8), socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(10)
        sock.connect(("127.0.0.1", door.port))
        began = time.monotonic()
        sock.sendall(post(CHAT.replace(b"hi", b"flood")))
        time.sleep(0.2)
        assert len(door.gate.live) == 1
        # stall_s is 1; the error event that cannot be written either must not make it longer.
        assert door.idle(within_s=2)
        assert time.monotonic() - began > SETTINGS.stall_s * 0.9
        text = everything(sock)
    assert b"[DONE]" not in text
    assert len(text) < MIB


def test_raw_client_that_leaves_a_stream_is_noticed_at_once(door: Door) -> None:
    with door.connect() as sock:
        sock.sendall(post(CHAT.replace(b"hi", b"flood")))
        assert sock.recv(100)
    assert door.idle(within_s=1)


# -------------------------------------------------------------------------------------------------- pipelining


def test_raw_pipelined_requests_are_answered_in_order(door: Door) -> None:
    health, version = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n", b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"
    chat = post().replace(b"connection: close\r\n", b"")
    found = door.say(health + chat + version + b"GET /no HTTP/1.1\r\nconnection: close\r\n\r\n")
    assert [status for status, _ in found] == [200, 200, 200, 404]
    assert found[1][1]["usage"] == {"total_tokens": 1}


def test_raw_pipeline_is_bounded_and_what_was_taken_is_answered(door: Door) -> None:
    request = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    with memory_flat(32), door.connect() as sock:
        with suppress(ConnectionError):
            for _ in range(40):
                sock.sendall(request * 5000)
        text = everything(sock)
    # A reset, for what was sent and not read, may overtake the answers; they are few and whole.
    assert set(statuses(answers(text[: text.rfind(b"}") + 1]))) <= {200}
    assert text.count(b"HTTP/1.1 ") <= 20 * PIPELINED
    assert door.alive()


@pytest.mark.parametrize(
    "garbage",
    [b"\x00garbage\r\n\r\n", b"GET /" + b"a" * 20 * HEAD_BYTES, b"GET / HTTP/1.1\r\nx: \x00\r\n\r\n"],
    ids=["no HTTP", "endless", "malformed"],
)
def test_raw_garbage_behind_a_request_leaves_its_answer_whole(door: Door, garbage: bytes) -> None:
    # An error written now would be read as the answer to the request before it.
    found = statuses(door.say(post().replace(b"connection: close\r\n", b"") + garbage))
    assert found in ([200], [200, 400], [200, 431])


@pytest.mark.usefixtures("hasty_head")
def test_raw_next_head_may_wait_but_not_be_slow(door: Door) -> None:
    with door.connect() as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"alive" in sock.recv(MIB)
        time.sleep(0.8)
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"alive" in sock.recv(MIB)
        sock.sendall(b"GET /hea")
        assert statuses(answers(everything(sock))) == [408]


# ----------------------------------------------------------------------------------------------------- the rest


def test_raw_clients_that_reset_leave_nothing(door: Door) -> None:
    with memory_flat(24):
        for index in range(300):
            sock = door.connect()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.sendall(post()[: 20 + index])
            sock.close()
    assert door.alive()


@pytest.mark.parametrize(("word", "status"), [(b"never", 504), (b"broken", 500)])
def test_raw_failed_requests_leave_no_frames_behind(monkeypatch: pytest.MonkeyPatch, word: bytes, status: int) -> None:
    # Errors that are constants keep the frames of every raise, and those the requests' bodies.
    monkeypatch.setattr(gate, "DYING_S", 0.01)
    with serving(replace(SETTINGS, deadline_s=0.1)) as door:
        for _ in range(8):
            ((got, document),) = door.say(post(CHAT.replace(b"hi", word)))
            assert got == status
            assert "secret" not in str(document)
            assert "Traceback" not in str(document)
    for error in (DEADLINE, FAILED):
        assert len(traceback.extract_tb(error.__traceback__)) < 12


def test_raw_server_that_is_not_ready_says_so_without_a_trace() -> None:
    with serving(replace(SETTINGS), opened=False) as door:
        for request in (post(), get(b"/v1/models"), get(b"/metrics")):
            ((status, document),) = door.say(request)
            assert status == 503
            assert document["error"]["code"] == "not_ready"
        ((status, document),) = door.say(get(b"/ready"))
        assert (status, document["status"]) == (503, "starting")
        assert door.alive()


def test_raw_server_that_ends_answers_who_has_just_connected() -> None:
    with serving() as door, door.connect() as late, door.connect() as silent:
        assert door.alive()  # so the two before it have been accepted as well
        door.stop()
        time.sleep(0.5)  # longer than uvicorn takes to notice
        late.sendall(post())
        assert statuses(answers(everything(late))) == [200]
        assert everything(silent) == b""
