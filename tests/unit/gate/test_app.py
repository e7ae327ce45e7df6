"""Routes, readiness and bodies at the gate, before an application that does as its script says."""

import asyncio
import json
import re
from importlib.util import find_spec
from typing import Any

import pytest
from prometheus_client import REGISTRY

from borg_serve.api.errors import ApiError
from borg_serve.gate import app as gate_module
from borg_serve.gate.readiness import Phase
from tests.asgi import ANSWER, CHAT, QUESTION, STREAM, Application, Client, admission, chunk, document, make_gate

LONG = Application.whole(document(), wait_s=60.0)


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


# --------------------------------------------------------------------------------------------------------------- routes


def test_gate_names_modules_that_exist_as_the_street_of_a_request() -> None:
    steps = re.findall(r"^ *\d+\. ([a-z_.]+) ", gate_module.__doc__ or "", re.MULTILINE)
    assert len(steps) > 10
    assert [name for name in steps if find_spec(f"borg_serve.{name}") is None] == []


async def test_gate_answers_its_own_routes() -> None:
    gate = make_gate(Application())
    assert (await Client(gate, "/health").run()).json == {"status": "alive"}
    assert (await Client(gate, "/ready").run()).json == {"status": "ready"}
    assert (await Client(gate, "/version").run()).json == gate.version
    assert (await Client(gate, "/openapi.json").run()).json["openapi"].startswith("3.1")


async def test_gate_hands_vllms_metrics_through_without_the_clients_headers() -> None:
    app = Application(b"inner", content_type="text/plain")
    client = await Client(make_gate(app), "/metrics", headers={"x-data-parallel-rank": "1", "traceparent": "t"}).run()
    assert (client.status, client.content) == (200, b"inner")
    (scope,) = app.scopes
    assert scope["query_string"] == b""
    names = {name for name, _ in scope["headers"]}
    assert names == {b"content-type", b"content-length", b"host", b"x-request-id"}


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/openapi.json", "/metrics", "/v1/models"])
async def test_gate_takes_head_for_get(path: str) -> None:
    app = Application(b"inner")
    client = await Client(make_gate(app), path, method="HEAD").run()
    assert client.status == 200
    assert [scope["method"] for scope in app.scopes] in ([], ["GET"])


@pytest.mark.parametrize(("method", "path", "allowed"), [("GET", CHAT, "POST"), ("POST", "/health", "GET")])
async def test_gate_names_the_method_a_route_takes(method: str, path: str, allowed: str) -> None:
    client = await Client(make_gate(Application()), path, method=method).run()
    assert client.status == 405
    assert client.headers["allow"] == allowed
    assert client.error["type"] == "invalid_request_error"


async def test_gate_hands_the_lifespan_to_the_application() -> None:
    seen = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    client = Client(make_gate(application))
    client.scope["type"] = "lifespan"
    assert (await client.run()).sent == []
    assert seen == ["lifespan"]


async def test_gate_closes_websockets() -> None:
    gate = make_gate(Application())
    client = Client(gate)
    client.scope["type"] = "websocket"
    await client.run()
    assert client.sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize("name", ["authorization", "content-type", "x-api-key"])
async def test_gate_takes_no_deciding_header_twice(name: str) -> None:
    headers = [(name, "application/json"), (name, "application/json")]
    client = await Client(make_gate(Application(*ANSWER)), CHAT, QUESTION, headers=headers).run()
    assert client.status == 400
    assert name in client.error["message"]


# ------------------------------------------------------------------------------------------------------------ readiness


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.DRAINING, Phase.FAILED])
async def test_gate_that_is_not_ready_says_so_and_when_to_return(phase: Phase) -> None:
    app = Application(*ANSWER)
    gate = make_gate(app, phase=phase)
    ready = await Client(gate, "/ready").run()
    assert ready.status == 503
    assert ready.json == {"status": phase.name.lower(), "reason": "the test says so"}
    assert int(ready.headers["retry-after"]) > 0
    chat = await Client(gate, CHAT, QUESTION).run()
    assert (chat.status, chat.error["code"]) == (503, "not_ready")
    assert int(chat.headers["retry-after"]) > 0
    assert (await Client(gate, "/health").run()).status == 200
    assert app.scopes == []


async def test_gate_without_an_application_has_no_models_yet() -> None:
    client = await Client(make_gate(None, phase=Phase.STARTING), "/v1/models").run()
    assert (client.status, client.error["code"]) == (503, "not_ready")


# ---------------------------------------------------------------------------------------------------- what is forwarded


@pytest.mark.parametrize("kind", ["text/plain", "", "application/jsonx", "multipart/form-data", "application/x-json"])
async def test_gate_takes_json_only(kind: str) -> None:
    client = await Client(make_gate(Application(*ANSWER)), CHAT, QUESTION, headers={"content-type": kind}).run()
    assert client.status == 415
    assert client.received_before_answer == 0


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/json ;x=y"])
async def test_gate_takes_json_however_it_is_written(kind: str) -> None:
    app = Application.whole(document())
    assert (await Client(make_gate(app), CHAT, QUESTION, headers={"content-type": kind}).run()).status == 200


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        ({"messages": []}, 400, "messages"),
        (QUESTION | {"kv_transfer_params": {"prompt_token_ids": [1]}}, 400, "kv_transfer_params"),
        (QUESTION | {"model": "other"}, 404, "model"),
    ],
)
async def test_gate_explains_a_bad_request_and_forwards_nothing(body: Any, status: int, param: str | None) -> None:
    app = Application(*ANSWER)
    before = counted("borg_refusals_total", reason="invalid")
    client = await Client(make_gate(app), CHAT, body).run()
    assert client.status == status
    assert client.error["param"] == param
    assert app.scopes == []
    assert counted("borg_refusals_total", reason="invalid") == before + 1


async def test_gate_forwards_what_it_understood_and_nothing_else() -> None:
    app = Application.whole(document())
    secret = {"authorization": "Bearer secret", "cookie": "c", "x-session-id": "s", "tracestate": "t", "host": "evil"}
    body = {"messages": [{"role": "user", "content": "Hello", "name": None}], "user": "me", "temperature": 0.005}
    client = await Client(make_gate(app), CHAT, body, headers=secret).run()
    assert client.json == document()
    assert app.bodies == [
        {"model": "borg-merge-v1", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0.0}
    ]
    (scope,) = app.scopes
    names = {name for name, _ in scope["headers"]}
    assert names == {b"content-type", b"content-length", b"host", b"x-request-id"}
    assert dict(scope["headers"])[b"content-length"] == str(len(json.dumps(app.bodies[0]))).encode()
    assert scope["query_string"] == b""
    assert not {"server", "x-inner"} & set(client.headers)


# ------------------------------------------------------------------------------------------------------- the end of all


async def test_gate_waits_for_what_is_in_flight_but_not_for_ever() -> None:
    app = Application.whole(document(), wait_s=0.2)
    gate = make_gate(app)
    assert await gate.drained(0) == 0
    client = Client(gate, CHAT, QUESTION).begin()
    await client.until(lambda: app.running == 1)
    assert await gate.drained(0.01) == 1
    assert await gate.drained(5) == 0
    assert (await client.ended()).status == 200


async def test_gate_ends_all_with_one_answer_in_the_shape_that_each_has_begun() -> None:
    app = Application(chunk("Hi"), 60.0)
    gate = make_gate(app, concurrent=2)
    streaming = Client(gate, CHAT, STREAM).begin()
    await streaming.until(lambda: len(streaming.sent) > 1)
    app.script = (60.0,)
    whole, waiting = Client(gate, CHAT, QUESTION).begin(), Client(gate, CHAT, QUESTION).begin()
    await whole.until(lambda: app.running == 2 and admission(gate).waiting == 1)
    lost = ApiError(503, "The engine was lost.", "server_error", None, "engine_lost", "engine_lost")
    await gate.end_all(lost, 5)
    for client in (streaming, whole, waiting):
        await client.ended()
        assert client.error["code"] == "engine_lost"
    assert (streaming.status, whole.status, waiting.status) == (200, 503, 503)
    assert b"[DONE]" not in streaming.content
    assert (app.running, app.stopped, len(gate.live)) == (0, 2, 0)


async def test_gate_turns_what_fails_inside_it_into_an_error_without_words(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gate_module, "DYING_S", 0.0)
    client = await Client(make_gate(Application(ValueError("/secret/path is broken"))), CHAT, QUESTION).run()
    assert (client.status, client.error["code"]) == (500, "internal_error")
    assert b"secret" not in client.content
    assert "secret" in caplog.text
    stream = await Client(make_gate(Application(chunk("Hi"), ValueError("/secret/path"))), CHAT, STREAM).run()
    assert (stream.status, stream.error["code"]) == (200, "internal_error")
    assert b"secret" not in stream.content
    assert b"[DONE]" not in stream.content


async def test_gate_lets_a_dying_engines_requests_wait_for_the_reason() -> None:
    app = Application.whole(b'{"error":{"message":"EngineDeadError","type":"x","code":500}}', status=500)
    gate = make_gate(app)
    client = Client(gate, CHAT, QUESTION).begin()
    await client.until(lambda: app.scopes and not app.running)
    await asyncio.sleep(0.02)
    assert client.sent == []
    await gate.end_all(ApiError(503, "Lost.", "server_error", None, "engine_lost", "engine_lost"), 5)
    assert (await client.ended()).status == 503


async def test_gate_counts_how_requests_end() -> None:
    labels = {"route": CHAT, "outcome": "ok"}
    before, other = (
        counted("borg_requests_total", **labels),
        counted("borg_requests_total", route="other", outcome="route"),
    )
    gate = make_gate(Application(*ANSWER))
    await Client(gate, CHAT, STREAM).run()
    await Client(gate, "/anything/at/all", STREAM).run()
    assert counted("borg_requests_total", **labels) == before + 1
    assert counted("borg_requests_total", route="other", outcome="route") == other + 1
    assert not gate.live
