"""Both sides of the gate for its tests: a client that does as it is told, and an application in vLLM's place."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from borg_serve.api.protocol import Bounds
from borg_serve.config import Limits
from borg_serve.engine.memory import Slots
from borg_serve.gate.admission import Admission
from borg_serve.gate.app import Gate
from borg_serve.gate.coordinator import Coordinator
from borg_serve.gate.http import ABORT
from borg_serve.gate.keys import KeyRing
from borg_serve.gate.quota import Quota
from borg_serve.gate.readiness import Phase, Readiness
from borg_serve.gate.request import Message, Receive, Scope, Send

CHAT = "/v1/chat/completions"
DONE = b"data: [DONE]\n\n"
IDENTITY_TOKENS = 2320
QUESTION: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
STREAM: dict[str, Any] = QUESTION | {"stream": True}


def chunk(content: str = "", finish: str | None = None, index: int = 0) -> bytes:
    """One event of a chat stream, in vLLM's compact form."""
    choice = {"index": index, "delta": {"content": content}, "logprobs": None, "finish_reason": finish}
    return b"data: " + json.dumps({"id": "chatcmpl-1", "choices": [choice]}, separators=(",", ":")).encode() + b"\n\n"


def document(content: str = "Hi") -> dict[str, Any]:
    """A whole chat answer."""
    usage = {"prompt_tokens": 2330, "completion_tokens": 2, "total_tokens": 2332}
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    return {"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice], "usage": usage}


USAGE = (
    b'data: {"id":"chatcmpl-1","choices":[],'
    b'"usage":{"prompt_tokens":2330,"completion_tokens":2,"total_tokens":2332}}\n\n'
)
ANSWER = (chunk("Hi"), chunk("!"), chunk("", "stop"), USAGE, DONE)


class Application:
    """Answers each request with a script: bytes are sent, seconds waited, exceptions raised.

    As vLLM's application does below ASGI 2.4, it stops when the client is said to have left.
    """

    def __init__(
        self, *script: bytes | float | Exception, status: int = 200, content_type: str = "text/event-stream"
    ) -> None:
        self.script = script
        self.status = status
        self.content_type = content_type
        self.scopes: list[Scope] = []
        self.bodies: list[Any] = []
        self.running = 0
        self.stopped = 0

    @classmethod
    def whole(cls, body: Mapping[str, Any] | bytes, status: int = 200, wait_s: float = 0.0) -> "Application":
        """One that answers with a JSON document, after a while."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return cls(wait_s, raw, status=status, content_type="application/json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        if scope["method"] == "POST":
            self.bodies.append(json.loads((await receive())["body"]))
        work, gone = asyncio.ensure_future(self._answer(send)), asyncio.ensure_future(receive())
        self.running += 1
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                assert gone.result()["type"] == "http.disconnect"
                self.stopped += 1
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                return
            work.result()
        finally:
            self.running -= 1
            gone.cancel()

    async def _answer(self, send: Send) -> None:
        headers = [(b"content-type", self.content_type.encode()), (b"server", b"inner"), (b"x-inner", b"1")]
        started = False
        for step in self.script:
            if isinstance(step, float):
                await asyncio.sleep(step)
                continue
            if isinstance(step, Exception):
                raise step
            if not started:
                started = True
                await send({"type": "http.response.start", "status": self.status, "headers": headers})
            await send({"type": "http.response.body", "body": step, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Client:
    """One request to an ASGI application, on its way from `begin` to `ended`."""

    def __init__(
        self,
        app: Any,
        path: str = CHAT,
        body: Any = None,
        *,
        method: str | None = None,
        headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
        pieces: Sequence[bytes | float] | None = None,
    ) -> None:
        self.app = app
        raw = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""
        self.pieces: list[bytes | float] = list(pieces) if pieces is not None else [raw]
        given = list(headers.items() if isinstance(headers, Mapping) else headers)
        if body is not None and not any(name == "content-type" for name, _ in given):
            given.append(("content-type", "application/json"))
        if pieces is None:
            given.append(("content-length", str(len(raw))))
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "method": method or ("GET" if body is None and pieces is None else "POST"),
            "path": path,
            "query_string": b"a=b",
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in given],
            "client": ("192.0.2.7", 50000),
            "extensions": {ABORT: {"call": self._abort}},
        }
        self.sent: list[Message] = []
        self.receives = 0
        self.received_before_answer = 0
        self.left = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()
        self.aborted = False
        self.task: asyncio.Task[None] | None = None

    def _abort(self) -> None:
        self.aborted = True

    async def receive(self) -> Message:
        self.receives += 1
        while self.pieces:
            piece = self.pieces.pop(0)
            if isinstance(piece, float):
                await asyncio.sleep(piece)
                continue
            return {"type": "http.request", "body": piece, "more_body": bool(self.pieces)}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if not self.sent:
            self.received_before_answer = self.receives
        self.sent.append(message)
        if message["type"] == "http.response.body":
            await self.reads.wait()

    def begin(self) -> "Client":
        self.task = asyncio.create_task(self.app(self.scope, self.receive, self.send))
        return self

    async def ended(self, limit_s: float = 10.0) -> "Client":
        assert self.task is not None
        await asyncio.wait_for(self.task, limit_s)
        return self

    async def run(self, limit_s: float = 10.0) -> "Client":
        """Begin, and wait for the end."""
        return await self.begin().ended(limit_s)

    async def until(self, condition: Any, limit_s: float = 10.0) -> "Client":
        """Wait until something is so while the request goes on."""
        async with asyncio.timeout(limit_s):
            while not condition():
                await asyncio.sleep(0.002)
        return self

    @property
    def status(self) -> int:
        starts = [message for message in self.sent if message["type"] == "http.response.start"]
        assert len(starts) == 1, self.sent
        assert self.sent[0] is starts[0]
        status: int = starts[0]["status"]
        return status

    @property
    def headers(self) -> dict[str, str]:
        pairs = [(name.decode(), value.decode()) for name, value in self.sent[0]["headers"]]
        assert len(dict(pairs)) == len(pairs), pairs
        return dict(pairs)

    @property
    def content(self) -> bytes:
        """The body, which must have ended, with its last message, and must be as long as was said."""
        bodies = [message for message in self.sent if message["type"] == "http.response.body"]
        assert [message.get("more_body", False) for message in bodies] == [True] * (len(bodies) - 1) + [False]
        raw = b"".join(message.get("body", b"") for message in bodies)
        if "content-length" in self.headers and self.scope["method"] != "HEAD":
            assert int(self.headers["content-length"]) == len(raw)
        return raw

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error, of a document or of a stream's last event."""
        raw = self.content
        if self.headers["content-type"].startswith("text/event-stream"):
            raw = raw.split(b"\n\n")[-2].removeprefix(b"data: ")
        body = json.loads(raw)
        assert list(body) == ["error"]
        error: dict[str, Any] = body["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


def slots(concurrent: int, reserved: int = 0, kv_tokens: int = 1 << 20, queued_bytes: int = 1 << 20) -> Slots:
    """What an engine holds."""
    return Slots(concurrent, reserved, kv_tokens, 16, queued_bytes)


def admission(gate: Gate) -> Admission:
    """The gate's own admission."""
    assert isinstance(gate.coordinator, Coordinator)
    assert gate.coordinator.admission is not None
    return gate.coordinator.admission


def make_gate(
    app: Any,
    *,
    phase: Phase = Phase.READY,
    concurrent: int = 4,
    max_wait_s: float = 60.0,
    keys: KeyRing | None = None,
    deadline_s: float = 30.0,
    body_bytes: int = 4096,
    body_s: float = 30.0,
    stall_s: float = 30.0,
) -> Gate:
    """A gate in front of an application."""
    limits = Limits(deadline_s=deadline_s, body_bytes=body_bytes, body_s=body_s, stall_s=stall_s)
    version = {"borg_serve": "test", "identity": {"tokens": IDENTITY_TOKENS}}
    readiness = Readiness()
    quota = Quota() if keys is not None else None
    coordinator = Coordinator(max_wait_s, quota)
    gate = Gate(limits, Bounds(), version, readiness, lambda text: text, coordinator, keys)
    if phase != Phase.STARTING:
        coordinator.admission = Admission(slots(concurrent), max_wait_s)
        gate.open(app)
    readiness.set(phase, "" if phase == Phase.READY else "the test says so")
    return gate
