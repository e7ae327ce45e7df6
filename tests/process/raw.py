"""What a hostile client can send below HTTP's surface: the real uvicorn, our protocol and gate, a stub behind them.

The stub answers at once, so that whatever is slow or large here is the gate's doing.
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil
import uvloop

from borg_serve.api.protocol import Bounds
from borg_serve.config import Limits
from borg_serve.gate.admission import Admission
from borg_serve.gate.app import Gate
from borg_serve.gate.coordinator import Coordinator
from borg_serve.gate.readiness import Phase, Readiness
from borg_serve.gate.request import Receive, Scope, Send
from borg_serve.serving.single import SEND_BYTES, http
from tests.asgi import ANSWER, document, slots

BODY_BYTES = 64 * 1024
BODY_S = 0.5
LIMITS = Limits(deadline_s=60, body_bytes=BODY_BYTES, body_s=BODY_S, stall_s=1)
CHAT = b'{"messages": [{"role": "user", "content": "hi"}]}'
MIB = 1 << 20


async def stub(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with what arrived, as the text of a chat completion; or never, or with an error of its own."""
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
    if "briefly" in str(body):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"".join(ANSWER)})
        return
    if "broken" in str(body):
        raise RuntimeError("Traceback in /usr/lib/secret.py")
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    arrived = json.dumps({"headers": headers, "path": scope["path"], "body": body})
    head = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": json.dumps(document(arrived)).encode()})


async def stream_for_ever(send: Send) -> None:
    head = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    while True:
        await send({"type": "http.response.body", "body": b"data: " + b"x" * 8192 + b"\n\n", "more_body": True})
        await asyncio.sleep(0)  # as any real generator does


@dataclass
class GateServer:
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
    """Split what a connection said into its answers, which must be whole; of a chat completion its text, as JSON."""
    found = []
    while text:
        head, _, rest = text.partition(b"\r\n\r\n")
        status, *lines = head.decode("ascii").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        assert status.startswith("HTTP/1.1 "), status
        assert headers["content-type"] == "application/json"
        length = int(headers["content-length"])
        assert len(rest) >= length, "a cut answer"
        said = json.loads(rest[:length])
        if "choices" in said:
            said = json.loads(said["choices"][0]["message"]["content"])
        found.append((int(status.split()[1]), said))
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
def serving(limits: Limits = LIMITS, opened: bool = True) -> Iterator[GateServer]:
    """Run the gate on a free port, in a thread with a loop of its own."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
    sock.bind(("127.0.0.1", 0))
    sock.listen(1024)
    stop, started = asyncio.Event(), threading.Event()
    loops = []
    readiness = Readiness()
    coordinator = Coordinator(max_wait_s=60)
    application = Gate(limits, Bounds(), {"identity": {"tokens": 0}}, readiness, lambda text: text, coordinator)

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        if opened:
            coordinator.admission = Admission(slots(4), max_wait_s=60)
            application.open(stub)
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

    found = GateServer(sock.getsockname()[1], application, end)
    try:
        yield found
    finally:
        found.stop()
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def memory_flat(within_mib: float) -> Iterator[None]:
    """Assert that this process, server and all, has not grown by more."""
    before = psutil.Process().memory_info().rss
    yield
    grown = (psutil.Process().memory_info().rss - before) / MIB
    assert grown < within_mib, f"grew by {grown:.0f} MiB"


def statuses(found: list[tuple[int, Any]]) -> list[int]:
    for status, said in found:
        if status >= 400:
            error = said["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert "Traceback" not in error["message"]
    return [status for status, _ in found]
