"""What a client is sent: documents, streams, errors that tell no secrets (I5); and clients that do not read."""

import asyncio
import time
from typing import Any

import pytest

from borg_serve.gate import app as gate_module
from tests.asgi import (
    ANSWER,
    CHAT,
    DONE,
    QUESTION,
    STREAM,
    USAGE,
    Application,
    Client,
    admission,
    chunk,
    document,
    make_gate,
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine dies here: do not wait for word of it."""
    monkeypatch.setattr(gate_module, "DYING_S", 0.0)


# -------------------------------------------------------------------------------------------------------------- answers


async def test_answer_hands_a_document_back_as_it_is() -> None:
    client = await Client(make_gate(Application.whole(document("é 你"))), CHAT, QUESTION).run()
    assert client.status == 200
    assert client.json == document("é 你")
    assert client.headers["content-type"] == "application/json"


async def test_answer_hands_a_stream_back_event_by_event() -> None:
    app = Application(chunk("a"), 0.05, chunk("b"), 0.05, chunk("", "stop"), USAGE, DONE)
    client = Client(make_gate(app), CHAT, STREAM).begin()
    await client.until(lambda: len(client.sent) == 2)
    assert client.sent[1]["body"] == chunk("a")
    await client.ended()
    assert client.content == chunk("a") + chunk("b") + chunk("", "stop") + DONE
    assert client.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert client.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("asked", [True, False, None])
async def test_answer_always_asks_for_usage_and_shows_it_to_who_asked(asked: bool | None) -> None:
    app = Application(*ANSWER)
    body = STREAM if asked is None else STREAM | {"stream_options": {"include_usage": asked}}
    client = await Client(make_gate(app), CHAT, body).run()
    assert app.bodies[0]["stream_options"]["include_usage"] is True
    assert (USAGE in client.content) is bool(asked)
    assert client.content.endswith(DONE)


async def test_answer_says_nothing_before_the_first_event() -> None:
    app = Application(0.2, *ANSWER)
    client = Client(make_gate(app), CHAT, STREAM).begin()
    await client.until(lambda: app.running == 1)
    await asyncio.sleep(0.02)
    assert client.sent == []
    await client.ended()


# ---------------------------------------------------------------------------------------------------- streams that fail


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
async def test_answer_ends_a_failed_stream_with_one_error_event_and_no_done(script: list[bytes]) -> None:
    client = await Client(make_gate(Application(*script)), CHAT, STREAM).run()
    assert client.status == 200
    assert client.content.startswith(chunk("Hi"))
    assert client.error["code"] == "internal_error"
    assert client.content.count(b'{"error":') == 1
    assert b"[DONE]" not in client.content
    assert b"secret" not in client.content


async def test_answer_gives_a_stream_that_fails_at_once_a_status() -> None:
    app = Application(b'data: {"error":{"message":"no","type":"x","code":500}}\n\n', DONE)
    client = await Client(make_gate(app), CHAT, STREAM).run()
    assert (client.status, client.error["code"]) == (500, "internal_error")


async def test_answer_explains_a_clients_mistake_found_in_the_stream() -> None:
    event = b'data: {"error":{"message":"top_k must be less","type":"BadRequestError","param":"top_k","code":400}}\n\n'
    client = await Client(make_gate(Application(event, DONE)), CHAT, STREAM).run()
    assert client.status == 400
    assert client.error["param"] == "top_k"


# -------------------------------------------------------------------------------------------------------- vLLM's errors


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
async def test_answer_tells_a_clients_mistake_without_what_is_inside(message: str, shown: str) -> None:
    body = {"error": {"message": message, "type": "BadRequestError", "param": "top_k", "code": 422}}
    client = await Client(make_gate(Application.whole(body, status=400)), CHAT, QUESTION).run()
    assert client.status == 400
    assert client.error == {"message": shown, "type": "invalid_request_error", "param": "top_k", "code": None}


async def test_answer_knows_an_overflow() -> None:
    body = {
        "error": {"message": "This model's context length is 8192 tokens: …", "type": "x", "param": None, "code": 400}
    }
    client = await Client(make_gate(Application.whole(body, status=400)), CHAT, QUESTION).run()
    assert client.error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("status", [500, 502, 503, 302, 100])
@pytest.mark.parametrize("raw", [b'{"error":{"message":"/secret","type":"x","code":%d}}', b"<html>/secret</html>", b""])
async def test_answer_keeps_a_servers_mistake_to_the_log(
    status: int, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    raw = raw % status if b"%d" in raw else raw
    client = await Client(make_gate(Application.whole(raw, status=status)), CHAT, QUESTION).run()
    assert (client.status, client.error["code"]) == (500, "internal_error")
    assert b"secret" not in client.content
    assert f"vLLM answered {status}" in caplog.text


async def test_answer_does_not_believe_a_200_that_is_no_json() -> None:
    client = await Client(make_gate(Application.whole(b"not json")), CHAT, QUESTION).run()
    assert (client.status, client.error["code"]) == (500, "internal_error")


# --------------------------------------------------------------------------------------------------- readers that stall


async def test_answer_ends_a_stream_that_nobody_reads() -> None:
    app = Application(*[chunk("Hi")] * 100, 60.0)
    gate = make_gate(app, stall_s=0.1)
    client = Client(gate, CHAT, STREAM)
    client.reads.clear()
    begun = time.monotonic()
    await client.run()
    assert time.monotonic() - begun >= 0.1
    assert client.aborted, "unread bytes must not keep the connection"
    assert (app.stopped, app.running, len(gate.live)) == (1, 0, 0)
    assert admission(gate).running == 0


async def test_answer_gives_a_slow_reader_its_time_for_every_chunk() -> None:
    app = Application(*[chunk("Hi")] * 5, chunk("", "stop"), DONE)
    client = Client(make_gate(app, stall_s=0.6), CHAT, STREAM)
    send = client.send

    async def slowly(message: Any) -> None:
        await asyncio.sleep(0.15)
        await send(message)

    client.send = slowly  # type: ignore[method-assign]
    await client.run()
    assert client.content.endswith(DONE)
