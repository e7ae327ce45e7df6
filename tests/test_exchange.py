"""One request and its answer: streams, deadlines, clients that stall or leave, errors that tell no secrets (I5)."""

import asyncio
import json
import time
from typing import Any

import pytest

from borg_serve import gate as gate_module
from borg_serve.exchange import Receive, Scope, Send
from tests.asgi import ANSWER, CHAT, DONE, QUESTION, STREAM, USAGE, Application, Client, chunk, document, make_gate


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine dies here: do not wait for word of it."""
    monkeypatch.setattr(gate_module, "DYING_S", 0.0)


# ----------------------------------------------------------------------------------------------------- answers


async def test_exchange_hands_a_document_back_as_it_is() -> None:
    client = await Client(make_gate(Application.whole(document("é 你"))), CHAT, QUESTION).run()
    assert client.status == 200
    assert client.json == document("é 你")
    assert client.headers["content-type"] == "application/json"


async def test_exchange_hands_a_stream_back_event_by_event() -> None:
    app = Application(chunk("a"), 0.05, chunk("b"), 0.05, chunk("", "stop"), USAGE, DONE)
    client = Client(make_gate(app), CHAT, STREAM).begin()
    await client.until(lambda: len(client.sent) == 2)
    assert client.sent[1]["body"] == chunk("a")
    await client.ended()
    assert client.content == chunk("a") + chunk("b") + chunk("", "stop") + DONE
    assert client.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert client.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("asked", [True, False, None])
async def test_exchange_always_asks_for_usage_and_shows_it_to_who_asked(asked: bool | None) -> None:
    app = Application(*ANSWER)
    body = STREAM if asked is None else STREAM | {"stream_options": {"include_usage": asked}}
    client = await Client(make_gate(app), CHAT, body).run()
    assert app.bodies[0]["stream_options"]["include_usage"] is True
    assert (USAGE in client.content) is bool(asked)
    assert client.content.endswith(DONE)


async def test_exchange_says_nothing_before_the_first_event() -> None:
    app = Application(0.2, *ANSWER)
    client = Client(make_gate(app), CHAT, STREAM).begin()
    await client.until(lambda: app.running == 1)
    await asyncio.sleep(0.02)
    assert client.sent == []
    await client.ended()


# ------------------------------------------------------------------------------------------- streams that fail


@pytest.mark.parametrize(
    "script",
    [
        [chunk("Hi"), DONE],
        [chunk("Hi")],
        [chunk("Hi"), chunk("", "abort"), DONE],
        [chunk("Hi"), chunk("", "error"), DONE],
        [chunk("Hi"), b'data: {"error":{"message":"/secret/path","type":"x","code":500}}\n\n', DONE],
        [chunk("Hi") + b'data: {"error":{"message":"/secret/path","type":"x","code":500}}\n\n' + DONE],
    ],
    ids=["early done", "broken off", "abort", "error reason", "error event", "glued"],
)
async def test_exchange_ends_a_failed_stream_with_one_error_event_and_no_done(script: list[bytes]) -> None:
    client = await Client(make_gate(Application(*script)), CHAT, STREAM).run()
    assert client.status == 200
    assert client.content.startswith(chunk("Hi"))
    assert client.error["code"] == "internal_error"
    assert client.content.count(b'{"error":') == 1
    assert b"[DONE]" not in client.content
    assert b"secret" not in client.content


async def test_exchange_gives_a_stream_that_fails_at_once_a_status() -> None:
    app = Application(b'data: {"error":{"message":"no","type":"x","code":500}}\n\n', DONE)
    client = await Client(make_gate(app), CHAT, STREAM).run()
    assert (client.status, client.error["code"]) == (500, "internal_error")


async def test_exchange_explains_a_clients_mistake_found_in_the_stream() -> None:
    event = b'data: {"error":{"message":"top_k must be less","type":"BadRequestError","param":"top_k","code":400}}\n\n'
    client = await Client(make_gate(Application(event, DONE)), CHAT, STREAM).run()
    assert client.status == 400
    assert client.error["param"] == "top_k"


# ------------------------------------------------------------------------------------------------- vLLM's errors


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("stop must hold strings", "stop must hold strings"),
        ("cannot open /root/models/x/config.json now", "cannot open … now"),
        ("refused by 10.0.0.7:5555 again", "refused by … again"),
        ("<object at 0x7f00deadbeef> is wrong", "<object…> is wrong"),
        ("first line\nTraceback (most recent call last):\n  File x", "first line"),
        ("", "The request was refused."),
        ("x" * 5000, "x" * 500),
        ("too small (parameter=top_k)", "too small"),
    ],
)
async def test_exchange_tells_a_clients_mistake_without_what_is_inside(message: str, shown: str) -> None:
    body = {"error": {"message": message, "type": "BadRequestError", "param": "top_k", "code": 422}}
    client = await Client(make_gate(Application.whole(body, status=400)), CHAT, QUESTION).run()
    assert client.status == 400
    assert client.error == {"message": shown, "type": "invalid_request_error", "param": "top_k", "code": None}


async def test_exchange_knows_an_overflow() -> None:
    body = {
        "error": {"message": "This model's context length is 8192 tokens: …", "type": "x", "param": None, "code": 400}
    }
    client = await Client(make_gate(Application.whole(body, status=400)), CHAT, QUESTION).run()
    assert client.error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("status", [500, 502, 503, 302, 100])
@pytest.mark.parametrize("raw", [b'{"error":{"message":"/secret","type":"x","code":%d}}', b"<html>/secret</html>", b""])
async def test_exchange_keeps_a_servers_mistake_to_the_log(
    status: int, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    raw = raw % status if b"%d" in raw else raw
    client = await Client(make_gate(Application.whole(raw, status=status)), CHAT, QUESTION).run()
    assert (client.status, client.error["code"]) == (500, "internal_error")
    assert b"secret" not in client.content
    assert f"vLLM answered {status}" in caplog.text


async def test_exchange_does_not_believe_a_200_that_is_no_json() -> None:
    client = await Client(make_gate(Application.whole(b"not json")), CHAT, QUESTION).run()
    assert (client.status, client.error["code"]) == (500, "internal_error")


# ---------------------------------------------------------------------------------------------------- deadlines


async def test_exchange_deadline_before_the_first_byte_is_504() -> None:
    app = Application.whole(document(), wait_s=60.0)
    gate = make_gate(app, deadline_s=0.1)
    begun = time.monotonic()
    client = await Client(gate, CHAT, QUESTION).run()
    assert (client.status, client.error["code"]) == (504, "deadline_exceeded")
    assert time.monotonic() - begun >= 0.1
    assert (app.stopped, app.running) == (1, 0), "what generated for it must have been told to stop"


@pytest.mark.parametrize("wait", [0.0, 60.0])
async def test_exchange_deadline_in_a_stream_is_an_error_event_and_no_done(wait: float) -> None:
    script = [chunk("Hi"), wait] if wait else [item for _ in range(5000) for item in (chunk("Hi"), 0.001)]
    app = Application(*script)
    client = await Client(make_gate(app, deadline_s=0.2), CHAT, STREAM).run()
    assert (client.status, client.error["code"]) == (200, "deadline_exceeded")
    assert client.content.startswith(chunk("Hi"))
    assert b"[DONE]" not in client.content
    assert (app.stopped, app.running) == (1, 0)


async def test_exchange_deadline_counts_from_the_arrival() -> None:
    app = Application.whole(document(), wait_s=0.25)
    headers = {"content-type": "application/json"}
    raw = json.dumps(QUESTION).encode()
    client = Client(make_gate(app, deadline_s=0.4), CHAT, headers=headers, pieces=[raw[:5], 0.25, raw[5:]])
    assert (await client.run()).status == 504


async def test_exchange_in_time_is_not_touched_by_its_deadline() -> None:
    gate = make_gate(Application(*ANSWER), deadline_s=0.2)
    client = await Client(gate, CHAT, STREAM).run()
    await asyncio.sleep(0.3)
    assert client.content.endswith(DONE)


# ------------------------------------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("body", [STREAM, QUESTION])
@pytest.mark.parametrize("after", ["first event", "nothing"])
async def test_exchange_stops_the_engine_when_the_client_leaves(body: dict[str, Any], after: str) -> None:
    app = Application(*([chunk("Hi")] if after == "first event" else []), 60.0)
    gate = make_gate(app)
    client = Client(gate, CHAT, body).begin()
    await client.until(lambda: app.running == 1)
    await asyncio.sleep(0.02)
    sent = len(client.sent)
    begun = time.monotonic()
    client.left.set()
    await client.ended()
    assert time.monotonic() - begun < 5  # not after the 60 s that the application still has to say something
    assert len(client.sent) == sent, "nobody is there to be answered"
    assert (app.stopped, app.running, len(gate.live)) == (1, 0, 0)
    assert gate._admission is not None
    assert gate._admission.running == 0


async def test_exchange_with_a_client_that_leaves_in_its_body_asks_nothing_of_the_engine() -> None:
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


# ------------------------------------------------------------------------------------------- readers that stall


async def test_exchange_ends_a_stream_that_nobody_reads() -> None:
    app = Application(*[chunk("Hi")] * 100, 60.0)
    gate = make_gate(app, stall_s=0.1)
    client = Client(gate, CHAT, STREAM)
    client.reads.clear()
    begun = time.monotonic()
    await client.run()
    assert 0.1 <= time.monotonic() - begun < 5
    assert client.aborted, "unread bytes must not keep the connection"
    assert (app.stopped, app.running, len(gate.live)) == (1, 0, 0)
    assert gate._admission is not None
    assert gate._admission.running == 0


async def test_exchange_gives_a_slow_reader_his_time_for_every_chunk() -> None:
    app = Application(*[chunk("Hi")] * 5, chunk("", "stop"), DONE)
    client = Client(make_gate(app, stall_s=0.3), CHAT, STREAM)
    send = client.send

    async def slowly(message: Any) -> None:
        await asyncio.sleep(0.1)
        await send(message)

    client.send = slowly  # type: ignore[method-assign]
    await client.run()
    assert client.content.endswith(DONE)


# ----------------------------------------------------------------------------------- an engine that stops slowly


class Slow:
    """An application that takes a while to stop, and then still has something to say, as one that is cut off has."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": chunk("Hi"), "more_body": True})
        self.asked.set()
        assert (await receive())["type"] == "http.disconnect"
        await asyncio.sleep(0.2)
        for late in (chunk("late"), chunk("", "abort"), DONE, b""):
            await send({"type": "http.response.body", "body": late, "more_body": bool(late)})


async def test_exchange_lets_nothing_of_an_aborted_answer_through() -> None:
    client = await Client(make_gate(Slow(), deadline_s=0.1), CHAT, STREAM).run()
    assert client.content.startswith(chunk("Hi"))
    assert client.error["code"] == "deadline_exceeded"
    assert b"late" not in client.content
    assert b"[DONE]" not in client.content


async def test_exchange_that_aborts_twice_keeps_the_first_reason() -> None:
    app = Slow()
    client = Client(make_gate(app, deadline_s=0.1), CHAT, STREAM).begin()
    await app.asked.wait()
    client.left.set()  # the deadline passes while the engine is stopping
    await client.ended()
    assert [message.get("body") for message in client.sent] == [None, chunk("Hi")]


async def test_exchange_leaves_no_task_behind() -> None:
    before = asyncio.all_tasks()
    gate = make_gate(Application(*ANSWER))
    bodies: tuple[dict[str, Any], ...] = (STREAM, QUESTION, {"messages": []})
    for body in bodies:
        await Client(gate, CHAT, body).run()
    await asyncio.sleep(0.01)
    assert asyncio.all_tasks() == before
