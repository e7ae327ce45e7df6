"""The gate on all three routes: errors in each protocol's shape, and one end to every stream, whatever happens."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from borg_serve.api.protocol import Bounds
from borg_serve.config import Limits
from borg_serve.gate import app as gate_module
from borg_serve.gate.admission import Admission
from borg_serve.gate.app import Gate
from borg_serve.gate.coordinator import Coordinator
from borg_serve.gate.keys import KeyRing, new_key
from borg_serve.gate.quota import Quota
from borg_serve.gate.readiness import Phase, Readiness
from borg_serve.gate.request import App, Message, Receive, Scope, Send
from tests.asgi import slots
from tests.protocols import document, event, events, stream

CHAT, RESPONSES, MESSAGES = PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/messages")
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hello"}]},
    RESPONSES: {"input": "hello"},
    MESSAGES: {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 9},
}
TERMINAL = {"response.completed", "response.incomplete", "response.failed", "message_stop", "error"}
JSON = {"content-type": "application/json"}


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no watchdog here that could say that a failure was the engine's death."""
    monkeypatch.setattr(gate_module, "DYING_S", 0.0)


class Engine:
    """Stands where vLLM's application does: answers with what it is given, and keeps what it was sent."""

    def __init__(self, *chunks: bytes, status: int = 200, breaks: bool = False) -> None:
        self.chunks = chunks
        self.status = status
        self.breaks = breaks
        self.path = ""
        self.body: dict[str, Any] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.path = scope["path"]
        self.body = json.loads((await receive())["body"])
        kind = b"text/event-stream" if self.body.get("stream") else b"application/json"
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"content-type", kind)]})
        for chunk in self.chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        if self.breaks:
            raise RuntimeError("broken in /usr/lib/engine.py at 10.1.2.3")
        await send({"type": "http.response.body", "body": b""})


def gate(app: App, keys: KeyRing | None = None) -> Gate:
    limits = Limits(deadline_s=30, body_bytes=10_000, body_s=30, stall_s=30)
    readiness = Readiness()
    quota = Quota() if keys is not None else None
    coordinator = Coordinator(60, quota)
    coordinator.admission = Admission(slots(4, queued_bytes=10_000), 60)
    opened = Gate(limits, Bounds(), {"identity": {"tokens": 2304}}, readiness, str, coordinator, keys)
    opened.open(app)
    readiness.set(Phase.READY)
    return opened


async def ask(
    asked: Gate, path: str, body: Any = None, method: str = "POST", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Send one request; its status, headers and body."""
    raw = json.dumps(body).encode()
    given = False
    sent: list[Message] = []

    async def receive() -> Message:
        nonlocal given
        if given:
            return await forever()
        given = True
        return {"type": "http.request", "body": raw, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    own = {**JSON, "x-request-id": "r1", "content-length": str(len(raw)), **(headers or {})}
    pairs = [(name.encode(), value.encode()) for name, value in own.items()]
    await asked({"type": "http", "method": method, "path": path, "headers": pairs}, receive, send)
    assert [message["type"] for message in sent].count("http.response.start") == 1
    assert sent[-1].get("more_body", False) is False
    told = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], told, b"".join(message.get("body", b"") for message in sent[1:])


async def forever() -> Message:
    await asyncio.Event().wait()
    raise AssertionError("never")


def message_of(path: str, raw: bytes) -> str:
    """What an error document says; it must have the shape of the path's protocol."""
    body = json.loads(raw)
    if path.startswith(MESSAGES):
        assert body.keys() == {"type", "error", "request_id"}
        assert (body["type"], body["request_id"]) == ("error", "r1")
        assert body["error"].keys() == {"type", "message"}
    else:
        assert body.keys() == {"error"}
        assert body["error"].keys() == {"message", "type", "param", "code"}
    return str(body["error"]["message"])


# -------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("streaming", [False, True])
async def test_protocol_reaches_the_chat_route_only(path: str, streaming: bool) -> None:
    answer = [("", "hi")]
    engine = Engine(*(stream(answer) if streaming else [document(answer)]))
    status, headers, raw = await ask(gate(engine), path, {**BODIES[path], "stream": streaming})
    assert (status, headers["x-request-id"], engine.path) == (200, "r1", CHAT)
    assert headers["content-type"].startswith("text/event-stream" if streaming else "application/json")
    assert engine.body["messages"] == [{"role": "user", "content": "hello"}]
    assert b"hi" in raw
    if streaming and path != CHAT:
        assert engine.body["stream_options"]["include_usage"] is True
        assert [said["type"] for said in events(raw) if said["type"] in TERMINAL] == [events(raw)[-1]["type"]]
    assert b"secret" not in raw


async def test_protocol_openapi_is_served() -> None:
    status, _, raw = await ask(gate(Engine()), "/openapi.json", method="GET")
    assert status == 200
    assert {*PATHS, "/openapi.json", "/version"} <= json.loads(raw)["paths"].keys()


# ------------------------------------------------------------------------------- errors before the first byte


@pytest.mark.parametrize("path", PATHS)
async def test_protocol_tells_errors_in_its_own_shape(path: str) -> None:
    asked = gate(Engine())
    for status, request in (
        (400, {"body": {**BODIES[path], "echo": True}}),
        (400, {"body": []}),
        (404, {"body": {**BODIES[path], "model": "other"}}),
        (405, {"method": "GET"}),
        (413, {"body": "x" * 20_000}),
        (415, {"body": {}, "headers": {"content-type": "text/plain"}}),
    ):
        answered, _, raw = await ask(asked, path, **request)
        assert answered == status
        assert message_of(path, raw)


@pytest.mark.parametrize(
    ("path", "method", "why"),
    [
        ("/v1/responses/resp_1", "GET", "not stored"),
        ("/v1/responses/resp_1", "DELETE", "not stored"),
        ("/v1/responses/resp_1/cancel", "POST", "not stored"),
        ("/v1/responses/resp_1/input_items", "GET", "not stored"),
        ("/v1/conversations", "POST", "not stored"),
        ("/v1/messages/batches", "POST", "no batches"),
        ("/v1/completions", "POST", "identity"),
        ("/v1/messages/x", "POST", "no route"),
    ],
)
async def test_protocol_neighbours_are_404_with_the_reason(path: str, method: str, why: str) -> None:
    status, _, raw = await ask(gate(Engine()), path, {}, method)
    assert status == 404
    assert why in message_of(path, raw)


async def test_protocol_takes_anthropics_key_header_on_its_own_route_only(tmp_path: Path) -> None:
    key, entry = new_key("anna")
    (tmp_path / "keys.yaml").write_text(entry)
    asked = gate(Engine(document([("", "hi")])), KeyRing(tmp_path / "keys.yaml"))
    own, bearer = {"x-api-key": key}, {"authorization": f"Bearer {key}"}
    for path in PATHS:
        assert (await ask(asked, path, BODIES[path], headers=bearer))[0] == 200
        assert (await ask(asked, path, BODIES[path], headers=own))[0] == (200 if path == MESSAGES else 401)
        status, headers, raw = await ask(asked, path, BODIES[path])
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert ("x-api-key" if path == MESSAGES else "Bearer") in message_of(path, raw)
    assert (await ask(asked, MESSAGES, BODIES[MESSAGES], headers={"x-api-key": "borg-wrong"}))[0] == 401
    assert (await ask(asked, "/openapi.json", method="GET"))[0] == 401


@pytest.mark.parametrize("path", PATHS)
async def test_protocol_names_its_own_field_in_an_error_of_vllm(path: str) -> None:
    error = {
        "error": {"message": "Too much.", "type": "BadRequestError", "param": "max_completion_tokens", "code": 400}
    }
    status, _, raw = await ask(gate(Engine(json.dumps(error).encode(), status=400)), path, BODIES[path])
    assert (status, message_of(path, raw)) == (400, "Too much.")
    if path == RESPONSES:
        assert json.loads(raw)["error"]["param"] == "max_output_tokens"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("streaming", [False, True])
async def test_protocol_failure_before_the_first_event_has_a_status(path: str, streaming: bool) -> None:
    for engine in (Engine(breaks=True), Engine(event({"error": {"message": "boom", "code": 500}}))):
        engine.status = 500 if not streaming else 200
        status, _, raw = await ask(gate(engine), path, {**BODIES[path], "stream": streaming})
        assert status == 500
        assert message_of(path, raw) == "The server failed to complete the request."


# ------------------------------------------------------------------------------------- streams that go wrong

WHOLE = stream([("", "hello there"), ("f", "{}")])
ABORTED = event({"id": "chatcmpl-r1", "choices": [{"index": 0, "delta": {}, "finish_reason": "abort"}]})
WAYS: dict[str, Callable[[int], Engine]] = {
    "breaks": lambda cut: Engine(*WHOLE[:cut], breaks=True),
    "ends": lambda cut: Engine(*WHOLE[:cut]),
    "errs": lambda cut: Engine(*WHOLE[:cut], event({"error": {"message": "/opt/x.py", "code": 500}}), WHOLE[-1]),
    "aborts": lambda cut: Engine(*WHOLE[: min(cut, 5)], ABORTED, *WHOLE[-2:]),
    "repeats its end": lambda cut: Engine(*WHOLE[:-2], WHOLE[-3], *WHOLE[-2:]),
}


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cut", [1, 3, 7, len(WHOLE) - 2, len(WHOLE) - 1])
async def test_protocol_stream_that_goes_wrong_ends_with_one_error_event(path: str, way: str, cut: int) -> None:
    status, _, raw = await ask(gate(WAYS[way](cut)), path, {**BODIES[path], "stream": True})
    said = events(raw)
    assert status == 200
    assert [one["type"] for one in said if one["type"] in TERMINAL] == ["error"]
    last = said[-1]
    if path == RESPONSES:
        assert last.keys() == {"type", "sequence_number", "code", "message", "param"}
        assert [one["sequence_number"] for one in said] == list(range(len(said)))
    else:
        assert last["error"] == {"type": "api_error", "message": "The server failed to complete the request."}
        assert last["request_id"] == "r1"
    for secret in (b"/usr/lib", b"/opt", b"10.1.2.3", b"Traceback"):
        assert secret not in raw


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
async def test_protocol_says_nothing_after_the_end(path: str) -> None:
    late = event({"id": "chatcmpl-r1", "choices": [{"index": 0, "delta": {"content": "late"}}]})
    _, _, raw = await ask(gate(Engine(*WHOLE, late, WHOLE[-1])), path, {**BODIES[path], "stream": True})
    assert b"late" not in raw
    assert events(raw)[-1]["type"] in {"response.completed", "message_stop"}


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
async def test_protocol_events_that_come_in_one_chunk_are_told_apart(path: str) -> None:
    _, _, raw = await ask(gate(Engine(b"".join(WHOLE))), path, {**BODIES[path], "stream": True})
    _, _, apart = await ask(gate(Engine(*WHOLE)), path, {**BODIES[path], "stream": True})
    assert events(raw) == events(apart)
