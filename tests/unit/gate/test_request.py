"""Requests: bodies too large or too slow, deadlines, clients that leave, and an engine that stops slowly."""

import asyncio
import json
import time
from typing import Any

import pytest

from borg_serve.api.errors import ApiError
from borg_serve.gate import app as gate_module
from borg_serve.gate.request import Receive, Scope, Send
from tests.asgi import ANSWER, CHAT, DONE, QUESTION, STREAM, Application, Client, admission, chunk, document, make_gate


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine dies here: do not wait for word of it."""
    monkeypatch.setattr(gate_module, "DYING_S", 0.0)


# -------------------------------------------------------------------------------------------------------- head and body


@pytest.mark.parametrize(("sent", "kept"), [("a.B-9_", True), ("x" * 65, False), ("a b", False), ("é", False)])
async def test_request_keeps_an_id_that_is_harmless(sent: str, kept: bool) -> None:
    app = Application.whole(document())
    client = await Client(make_gate(app), CHAT, QUESTION, headers={"x-request-id": sent}).run()
    assert (client.headers["x-request-id"] == sent) is kept
    assert (b"x-request-id", client.headers["x-request-id"].encode()) in app.scopes[0]["headers"]


async def test_request_with_a_large_body_is_refused_before_any_is_read() -> None:
    client = Client(make_gate(Application(), body_bytes=4096), CHAT, b"x" * 4097)
    await client.run()
    assert client.status == 413
    assert client.received_before_answer == 0
    assert client.headers["connection"] == "close"


async def test_request_is_read_no_further_than_its_body_may_grow() -> None:
    headers = {"content-type": "application/json"}
    client = Client(make_gate(Application(), body_bytes=4096), CHAT, headers=headers, pieces=[b"x" * 1000] * 100)
    await client.run()
    assert client.status == 413
    assert client.received_before_answer == 5


async def test_request_with_a_slow_body_is_refused() -> None:
    headers = {"content-type": "application/json"}
    client = Client(make_gate(Application(), body_s=0.05), CHAT, headers=headers, pieces=[b"{", 60.0, b"}"])
    await client.run()
    assert client.status == 408
    assert client.headers["connection"] == "close"


# ------------------------------------------------------------------------------------------------------------ deadlines


async def test_request_deadline_before_the_first_byte_is_504() -> None:
    app = Application.whole(document(), wait_s=60.0)
    gate = make_gate(app, deadline_s=0.5)
    begun = time.monotonic()
    client = await Client(gate, CHAT, QUESTION).run()
    assert (client.status, client.error["code"]) == (504, "deadline_exceeded")
    assert time.monotonic() - begun >= 0.5
    assert (app.stopped, app.running) == (1, 0), "what generated for it must have been told to stop"


@pytest.mark.parametrize("wait", [0.0, 60.0])
async def test_request_deadline_in_a_stream_is_an_error_event_and_no_done(wait: float) -> None:
    script = [chunk("Hi"), wait] if wait else [item for _ in range(5000) for item in (chunk("Hi"), 0.001)]
    app = Application(*script)
    client = await Client(make_gate(app, deadline_s=1.0), CHAT, STREAM).run()
    assert (client.status, client.error["code"]) == (200, "deadline_exceeded")
    assert client.content.startswith(chunk("Hi"))
    assert b"[DONE]" not in client.content
    assert (app.stopped, app.running) == (1, 0)


async def test_request_deadline_counts_from_the_arrival() -> None:
    app = Application.whole(document(), wait_s=0.25)
    headers = {"content-type": "application/json"}
    raw = json.dumps(QUESTION).encode()
    client = Client(make_gate(app, deadline_s=0.4), CHAT, headers=headers, pieces=[raw[:5], 0.25, raw[5:]])
    assert (await client.run()).status == 504


async def test_request_in_time_is_not_touched_by_its_deadline() -> None:
    gate = make_gate(Application(*ANSWER), deadline_s=1.0)
    client = await Client(gate, CHAT, STREAM).run()
    await asyncio.sleep(1.1)
    assert client.content.endswith(DONE)


# --------------------------------------------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("body", [STREAM, QUESTION])
@pytest.mark.parametrize("after", ["first event", "nothing"])
async def test_request_stops_the_engine_when_the_client_leaves(body: dict[str, Any], after: str) -> None:
    app = Application(*([chunk("Hi")] if after == "first event" else []), 60.0)
    gate = make_gate(app)
    client = Client(gate, CHAT, body).begin()
    await client.until(lambda: app.running == 1)
    await asyncio.sleep(0.02)
    sent = len(client.sent)
    client.left.set()
    await client.ended(limit_s=30)  # not after the 60 s that the application still has to say something
    assert len(client.sent) == sent, "nobody is there to be answered"
    assert (app.stopped, app.running, len(gate.live)) == (1, 0, 0)
    assert admission(gate).running == 0


async def test_request_with_a_client_that_leaves_in_its_body_asks_nothing_of_the_engine() -> None:
    app = Application(*ANSWER)
    headers = {"content-type": "application/json"}
    client = Client(make_gate(app), CHAT, headers=headers, pieces=[b'{"mess', 0.05, b"x", 60.0])
    receive = client.receive

    async def leaves() -> Any:
        return {"type": "http.disconnect"} if client.receives == 1 else await receive()

    client.receive = leaves  # type: ignore[method-assign]
    await client.run()
    assert client.sent == []
    assert app.scopes == []


# ------------------------------------------------------------------------------------------ an engine that stops slowly


class Slow:
    """An application that takes a while to stop, and then still has something to say, as one that is cut off has."""

    def __init__(self) -> None:
        self.told = asyncio.Event()
        self.may_stop = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": chunk("Hi"), "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        self.told.set()
        await self.may_stop.wait()
        for late in (chunk("late"), chunk("", "abort"), DONE, b""):
            await send({"type": "http.response.body", "body": late, "more_body": bool(late)})


async def test_request_lets_nothing_of_an_aborted_answer_through() -> None:
    app = Slow()
    client = Client(make_gate(app, deadline_s=1.0), CHAT, STREAM).begin()
    await app.told.wait()
    app.may_stop.set()
    await client.ended()
    assert client.content.startswith(chunk("Hi"))
    assert client.error["code"] == "deadline_exceeded"
    assert b"late" not in client.content
    assert b"[DONE]" not in client.content


async def test_request_that_aborts_twice_keeps_the_first_reason() -> None:
    app = Slow()
    gate = make_gate(app)
    client = Client(gate, CHAT, STREAM).begin()
    await client.until(lambda: len(client.sent) == 2)
    client.left.set()
    await app.told.wait()
    for request in gate.live:
        request.abort(ApiError(504, "The request's time ran out."))  # as the engine is stopping
    app.may_stop.set()
    await client.ended()
    assert [message.get("body") for message in client.sent] == [None, chunk("Hi")]


async def test_request_leaves_no_task_behind() -> None:
    before = asyncio.all_tasks()
    gate = make_gate(Application(*ANSWER))
    bodies: tuple[dict[str, Any], ...] = (STREAM, QUESTION, {"messages": []})
    for body in bodies:
        await Client(gate, CHAT, body).run()
    await asyncio.sleep(0.01)
    assert asyncio.all_tasks() == before
