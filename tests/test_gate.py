"""The door: routes, readiness, keys, places, and what is asked in which order, before an application of known ways."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY

from borg_serve import gate as gate_module
from borg_serve.exchange import Refused
from borg_serve.keys import KeyRing, new_key
from borg_serve.readiness import Phase
from tests.asgi import ANSWER, CHAT, QUESTION, STREAM, Application, Client, chunk, document, make_gate
from tests.waiting import await_room_in_the_minute

LONG = Application.whole(document(), wait_s=60.0)


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


# ----------------------------------------------------------------------------------------------------- routes


async def test_gate_answers_its_own_routes() -> None:
    gate = make_gate(Application())
    assert (await Client(gate, "/health").run()).json == {"status": "alive"}
    assert (await Client(gate, "/ready").run()).json == {"status": "ready"}
    assert (await Client(gate, "/version").run()).json == gate.settings.version
    assert (await Client(gate, "/openapi.json").run()).json["openapi"].startswith("3.1")


@pytest.mark.parametrize("path", ["/metrics", "/v1/models"])
async def test_gate_hands_vllms_routes_through_without_the_clients_headers(path: str) -> None:
    app = Application(b"inner", content_type="text/plain")
    client = await Client(make_gate(app), path, headers={"x-data-parallel-rank": "1", "traceparent": "t"}).run()
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


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/v1/completions", "identity"),
        ("/v1/completions/x", "identity"),
        ("/v1/responses/resp_1", "not stored"),
        ("/v1/messages/count_tokens", "usage"),
        ("/invocations", "/invocations"),
        ("/", "no route"),
        ("/v1/chat/completions/", "no route"),
        ("/" + "x" * 5000, "no route"),
    ],
)
async def test_gate_has_no_other_routes(path: str, word: str) -> None:
    app = Application(*ANSWER)
    client = await Client(make_gate(app), path, QUESTION).run()
    assert client.status == 404
    body = client.json
    assert word in body["error"]["message"]
    assert len(body["error"]["message"]) < 200
    assert app.scopes == []


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


@pytest.mark.parametrize(("sent", "kept"), [("a.B-9_", True), ("x" * 65, False), ("a b", False), ("é", False)])
async def test_gate_keeps_a_request_id_that_is_harmless(sent: str, kept: bool) -> None:
    app = Application.whole(document())
    client = await Client(make_gate(app), CHAT, QUESTION, headers={"x-request-id": sent}).run()
    assert (client.headers["x-request-id"] == sent) is kept
    assert (b"x-request-id", client.headers["x-request-id"].encode()) in app.scopes[0]["headers"]


# -------------------------------------------------------------------------------------------------- readiness


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


# ----------------------------------------------------------------------------------------------- the body


@pytest.mark.parametrize("kind", ["text/plain", "", "application/jsonx", "multipart/form-data", "application/x-json"])
async def test_gate_takes_json_only(kind: str) -> None:
    client = await Client(make_gate(Application(*ANSWER)), CHAT, QUESTION, headers={"content-type": kind}).run()
    assert client.status == 415
    assert client.received_before_answer == 0


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/json ;x=y"])
async def test_gate_takes_json_however_it_is_written(kind: str) -> None:
    app = Application.whole(document())
    assert (await Client(make_gate(app), CHAT, QUESTION, headers={"content-type": kind}).run()).status == 200


async def test_gate_refuses_a_large_body_before_it_reads_any() -> None:
    client = Client(make_gate(Application(), body_bytes=4096), CHAT, b"x" * 4097)
    await client.run()
    assert client.status == 413
    assert client.received_before_answer == 0
    assert client.headers["connection"] == "close"


async def test_gate_stops_reading_a_body_that_grows_too_large() -> None:
    headers = {"content-type": "application/json"}
    client = Client(make_gate(Application(), body_bytes=4096), CHAT, headers=headers, pieces=[b"x" * 1000] * 100)
    await client.run()
    assert client.status == 413
    assert client.received_before_answer == 5


async def test_gate_does_not_wait_for_a_slow_body() -> None:
    headers = {"content-type": "application/json"}
    client = Client(make_gate(Application(), body_s=0.05), CHAT, headers=headers, pieces=[b"{", 60.0, b"}"])
    await client.run()
    assert client.status == 408
    assert client.headers["connection"] == "close"


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


# -------------------------------------------------------------------------------------------------------- keys


@pytest.fixture
def keys(tmp_path: Path) -> tuple[KeyRing, dict[str, str]]:
    """A ring of two keys, `free` and `bound`; and the keys by name."""
    made, entries = {}, []
    for name, limits in (("free", {}), ("bound", {"concurrent": 1, "requests_per_minute": 3})):
        made[name], entry = new_key(name)
        entries += [entry | {"limits": limits} for entry in yaml.safe_load(entry)]
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump(entries))
    return KeyRing(tmp_path / "keys.yaml"), made


@pytest.mark.parametrize("value", [None, "", "Bearer", "Bearer ", "Bearer borg-wrong", "Basic eA==", "borg-wrong"])
async def test_gate_with_keys_lets_no_stranger_in(keys: tuple[KeyRing, dict[str, str]], value: str | None) -> None:
    app = Application(*ANSWER)
    gate = make_gate(app, keys=keys[0])
    headers = {} if value is None else {"authorization": value}
    for path, body in ((CHAT, QUESTION), ("/version", None), ("/metrics", None), ("/v1/models", None)):
        client = await Client(gate, path, body, headers=headers).run()
        assert (client.status, client.error["code"]) == (401, "invalid_api_key")
        assert client.headers["www-authenticate"] == "Bearer"
        assert client.received_before_answer == 0
    assert app.scopes == []
    for path in ("/health", "/ready"):
        assert (await Client(gate, path, headers=headers).run()).status == 200


async def test_gate_with_keys_knows_a_friend_and_writes_his_name_down(
    keys: tuple[KeyRing, dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "borg_serve.access")
    gate = make_gate(Application.whole(document()), keys=keys[0])
    client = await Client(gate, CHAT, QUESTION, headers={"authorization": f"bearer {keys[1]['free']}"}).run()
    assert client.status == 200
    (line,) = [json.loads(record.message) for record in caplog.records if record.name == "borg_serve.access"]
    assert line["key"] == "free"
    assert keys[1]["free"] not in caplog.text
    assert (line["status"], line["outcome"], line["prompt_tokens"]) == (200, "ok", 2330)


async def test_gate_tells_a_key_over_its_limits_when_to_return(keys: tuple[KeyRing, dict[str, str]]) -> None:
    await_room_in_the_minute()
    gate = make_gate(Application.whole(document(), wait_s=0.2), keys=keys[0])
    headers = {"authorization": f"Bearer {keys[1]['bound']}"}
    first = Client(gate, CHAT, QUESTION, headers=headers).begin()
    await first.until(lambda: gate._admission is not None and gate._admission.running == 1)
    second = await Client(gate, CHAT, QUESTION, headers=headers).run()
    assert (second.status, second.error["type"]) == (429, "rate_limit_error")
    assert second.headers["retry-after"] == "1"
    assert second.received_before_answer == 0, "before any work is done for it"
    assert (await first.ended()).status == 200
    for _ in range(2):
        assert (await Client(gate, CHAT, QUESTION, headers=headers).run()).status == 200
    third = await Client(gate, CHAT, QUESTION, headers=headers).run()
    assert third.status == 429
    assert 1 <= int(third.headers["retry-after"]) <= 121
    other = {"authorization": f"Bearer {keys[1]['free']}"}
    assert (await Client(gate, CHAT, QUESTION, headers=other).run()).status == 200


async def test_gate_charges_a_key_for_its_own_tokens_not_for_the_identity(tmp_path: Path) -> None:
    key, entry = new_key("bound")
    (entry_data,) = yaml.safe_load(entry)
    limits = {"tokens_per_minute": 25}  # an answer here costs 2,332 tokens, 2,320 of them the identity's
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump([entry_data | {"limits": limits}]))
    gate = make_gate(Application.whole(document()), keys=KeyRing(tmp_path / "keys.yaml"))
    headers = {"authorization": f"Bearer {key}"}
    statuses = [(await Client(gate, CHAT, QUESTION, headers=headers).run()).status for _ in range(4)]
    assert statuses == [200, 200, 200, 429]


# ------------------------------------------------------------------------------------------------------ places


async def test_gate_that_is_full_refuses_before_it_reads_the_body() -> None:
    gate = make_gate(LONG, concurrent=1, queued=0)
    first = Client(gate, CHAT, QUESTION).begin()
    await first.until(lambda: LONG.running == 1)
    second = await Client(gate, CHAT, QUESTION).run()
    assert (second.status, second.error["code"]) == (503, "busy")
    assert 1 <= int(second.headers["retry-after"]) <= 60
    assert second.received_before_answer == 0
    first.left.set()
    await first.ended()
    assert LONG.running == 0
    assert first.sent == []


async def test_gate_lets_a_request_wait_for_its_place() -> None:
    app = Application.whole(document(), wait_s=0.1)
    gate = make_gate(app, concurrent=1, queued=2)
    clients = [Client(gate, CHAT, QUESTION).begin() for _ in range(3)]
    for client in clients:
        assert (await client.ended()).status == 200
        assert app.running <= 1
    assert gate._admission is not None
    assert (gate._admission.running, gate._admission.waiting) == (0, 0)


async def test_gate_counts_every_choice_as_a_place() -> None:
    app = Application.whole(document(), wait_s=60.0)
    gate = make_gate(app, concurrent=4)
    client = Client(gate, CHAT, QUESTION | {"n": 3}).begin()
    await client.until(lambda: app.running == 1)
    assert gate._admission is not None
    assert gate._admission.running == 3
    client.left.set()
    await client.ended()
    assert gate._admission.running == 0


@pytest.mark.parametrize("how", ["leaves", "deadline"])
async def test_gate_forgets_who_waits_no_longer(how: str) -> None:
    app = Application(*ANSWER)
    gate = make_gate(app, concurrent=1, queued=2, deadline_s=0.1 if how == "deadline" else 30)
    assert gate._admission is not None
    await gate._admission.acquire(1, 0)
    waiting = Client(gate, CHAT, QUESTION).begin()
    await waiting.until(lambda: gate._admission is not None and gate._admission.waiting == 1)
    if how == "leaves":
        waiting.left.set()
        await waiting.ended()
        assert waiting.sent == []
    else:
        assert (await waiting.ended()).status == 504
    assert (gate._admission.running, gate._admission.waiting) == (1, 0)
    gate._admission.release(1, 1)
    assert app.scopes == []


# ------------------------------------------------------------------------------------------------- the end of all


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
    await whole.until(lambda: app.running == 2 and gate._admission is not None and gate._admission.waiting == 1)
    lost = Refused.of(503, "engine_lost", "The engine was lost.", "server_error", "engine_lost")
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
    await gate.end_all(Refused.of(503, "engine_lost", "Lost.", "server_error", "engine_lost"), 5)
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
