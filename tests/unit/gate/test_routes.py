"""Routes that answer about a request instead of answering it, and what a wrong path, header or origin is told."""

import asyncio
import json
from pathlib import Path
from typing import Any

import anthropic.types
import openai.types
import pytest
from prometheus_client import REGISTRY

from borg_serve.api.openapi import openapi
from borg_serve.api.progress import CURRENT
from borg_serve.gate import answer as answer_module
from borg_serve.gate import app as gate_module
from borg_serve.gate.app import with_cors
from borg_serve.gate.keys import KeyRing, new_key
from borg_serve.gate.routes import ROUTES
from tests.asgi import CHAT, QUESTION, STREAM, Application, Client, document, make_gate
from tests.protocols import event, events, stream

MESSAGES, COUNT, INPUT = "/v1/messages", "/v1/messages/count_tokens", "/v1/responses/input_tokens"
TOLD = {"anthropic-version": "2023-06-01"}
TURN: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9}
COUNTED = Application.whole({"count": 2345, "max_model_len": 8192, "tokens": [1, 2, 3]})


# ---------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/chat/completions", ["/v1/chat/completions", "lacks /v1"]),
        ("/models", ["/v1/models", "lacks /v1"]),
        ("/models/borg-merge-v1", ["/v1/models/{id}", "lacks /v1"]),
        ("/responses", ["/v1/responses", "lacks /v1"]),
        ("/messages/count_tokens", ["/v1/messages/count_tokens", "lacks /v1"]),
        ("/v1/v1/messages", ["use /v1/messages", "/v1 twice"]),
        ("/v1/v1/chat/completions", ["use /v1/chat/completions", "/v1 twice"]),
        ("/v1/chat/completions/", ["use /v1/chat/completions."]),
        ("/v1/models/", ["use /v1/models."]),
        ("//health", ["use /health."]),
        ("/V1/Responses", ["use /v1/responses."]),
        ("/openai/deployments/x/chat/completions", ["use /v1/chat/completions."]),
        ("/completions", ["identity", "/v1/chat/completions"]),
        ("/v1/completions/x", ["identity"]),
        ("/api/chat", ["Ollama", "/v1"]),
        ("/v1/embeddings", ["writes text"]),
        ("/v1/responses/resp_1", ["not stored"]),
        ("/v1/threads/t/messages", ["not stored"]),
        ("/invocations", ["/invocations", "no route"]),
        ("/", ["no route", "/openapi.json"]),
        ("/v1/chat/completions/render", ["no route"]),
        ("/" + "x" * 5000, ["no route"]),
    ],
)
async def test_route_that_is_none_is_told_the_one_that_was_meant(path: str, words: list[str]) -> None:
    app = Application()
    client = await Client(make_gate(app), path, QUESTION).run()
    message = client.json["error"]["message"]
    assert client.status == 404
    assert [word for word in words if word not in message] == []
    assert len(message) < 220
    assert app.scopes == []


async def test_route_that_is_none_is_told_in_the_clients_protocol() -> None:
    client = await Client(make_gate(Application()), "/v1/v1/messages", TURN, headers=TOLD).run()
    assert client.json["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("headers", "word"),
    [({"content-type": "text/plain"}, "text/plain"), ({"content-encoding": "gzip"}, "gzip")],
)
async def test_route_tells_which_header_makes_a_body_unreadable(headers: dict[str, str], word: str) -> None:
    client = await Client(make_gate(Application()), CHAT, QUESTION, headers=headers).run()
    assert client.status == 415
    assert word in client.error["message"]


async def test_route_takes_a_body_behind_a_byte_order_mark() -> None:
    raw = b"\xef\xbb\xbf" + json.dumps(QUESTION).encode()
    assert (await Client(make_gate(Application.whole(document())), CHAT, raw).run()).status == 200


# --------------------------------------------------------------------------------------------------------------- models


async def test_models_are_the_same_at_every_call_in_both_protocols_shapes() -> None:
    gate, other = make_gate(Application()), make_gate(Application())
    openai_list, anthropic_list = [(await Client(gate, "/v1/models", headers=told).run()).json for told in ({}, TOLD)]
    assert (await Client(other, "/v1/models").run()).json == openai_list
    (one,) = openai_list["data"]
    assert openai_list["object"] == "list"
    assert openai.types.Model.model_validate(one, strict=True).id == "borg-merge-v1"
    assert (await Client(gate, "/v1/models/borg-merge-v1").run()).json == one
    (one,) = anthropic_list["data"]
    assert (anthropic_list["has_more"], anthropic_list["first_id"]) == (False, "borg-merge-v1")
    assert anthropic.types.ModelInfo.model_validate(one).max_tokens == gate.bounds.max_tokens
    assert (await Client(gate, "/v1/models/borg-merge-v1", headers=TOLD).run()).json == one


@pytest.mark.parametrize(("headers", "kind"), [({}, "invalid_request_error"), (TOLD, "not_found_error")])
@pytest.mark.parametrize("name", ["gpt-4", "a/b"])
async def test_model_of_another_name_is_not_here(headers: dict[str, str], kind: str, name: str) -> None:
    client = await Client(make_gate(Application()), f"/v1/models/{name}", headers=headers).run()
    assert (client.status, client.json["error"]["type"]) == (404, kind)
    assert "borg-merge-v1" in client.json["error"]["message"]


# ------------------------------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (COUNT, {"messages": TURN["messages"]}, {"input_tokens": 2345}),
        (INPUT, {"input": "Hello"}, {"object": "response.input_tokens", "input_tokens": 2345}),
    ],
)
async def test_count_asks_vllm_for_the_prompt_that_the_answer_would_have(path: str, body: Any, said: Any) -> None:
    tool = {"name": "f", "input_schema": {"type": "object"}}
    more = {"tools": [tool], "temperature": 0.5} if path == COUNT else {"temperature": 0.5, "stream": True}
    app = Application.whole({"count": 2345, "max_model_len": 8192, "tokens": [1, 2, 3]})
    gate = make_gate(app, concurrent=1)
    client = await Client(gate, path, body | more).run()
    assert (client.status, client.json) == (200, said)
    assert app.scopes[0]["path"] == "/tokenize"
    assert app.bodies[0].keys() - {"tools"} == {"model", "messages"}
    assert app.bodies[0]["messages"] == TURN["messages"]


async def test_count_needs_no_slot_but_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "COUNTING", 1)
    app = Application.whole(document(), wait_s=60.0)
    gate = make_gate(app, concurrent=1, max_wait_s=0)
    generating = await Client(gate, CHAT, QUESTION).begin().until(lambda: app.running == 1)
    counting = await Client(gate, COUNT, TURN).begin().until(lambda: app.running == 2)
    refused = await Client(gate, COUNT, TURN).run()
    assert (refused.status, refused.headers["retry-after"]) == (503, "1")
    for client in (generating, counting):
        client.left.set()
        await client.ended()
    app.script = COUNTED.script
    assert (await Client(gate, COUNT, TURN).run()).json == {"input_tokens": 2345}


async def test_count_explains_what_vllm_refuses_and_hides_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "DYING_S", 0.0)
    for status, shown in ((400, "too many tools"), (500, "The server failed")):
        error = {"error": {"message": "too many tools", "type": "x", "param": "tools", "code": status}}
        client = await Client(make_gate(Application.whole(error, status=status)), COUNT, TURN).run()
        assert client.status == status
        assert shown in client.json["error"]["message"]


# -------------------------------------------------------------------------------------------------------------- headers


@pytest.mark.parametrize("path", [CHAT, MESSAGES, COUNT, "/v1/messages/x"])
async def test_messages_answers_carry_the_id_that_anthropics_clients_read(path: str) -> None:
    client = await Client(make_gate(COUNTED), path, TURN, headers={"x-request-id": "r1"}).run()
    assert client.headers.get("request-id") == ("r1" if path != CHAT else None)


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_error_that_would_come_again_tells_clients_not_to_repeat(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "DYING_S", 0.0)
    late = await Client(make_gate(Application.whole(b"", wait_s=60.0), deadline_s=0.05), path, TURN).run()
    failed = await Client(make_gate(Application.whole(b"", status=500)), path, TURN).run()
    assert [(one.status, one.headers["x-should-retry"]) for one in (late, failed)] == [(504, "false"), (500, "false")]
    busy = await Client(make_gate(Application(), concurrent=1, max_wait_s=0, body_bytes=1024), path, b"x" * 2048).run()
    assert "x-should-retry" not in busy.headers


async def test_answer_names_the_fields_it_ignored_and_counts_them() -> None:
    sent = {"thinking": {"type": "adaptive"}, "never_seen": 1}
    labels = [{"field": "thinking"}, {"field": "other"}]
    before = [REGISTRY.get_sample_value("borg_ignored_fields_total", label) or 0 for label in labels]
    script = [Application.whole(document()), Application(*stream([("", "hi")])), Application.whole(b"", wait_s=60.0)]
    for app in script:
        question = STREAM if app is script[1] else QUESTION
        client = await Client(make_gate(app, deadline_s=0.2), CHAT, question | sent).run()
        assert set(client.headers["x-borg-ignored"].split(",")) == {"thinking", "never_seen"}
    after = [REGISTRY.get_sample_value("borg_ignored_fields_total", label) or 0 for label in labels]
    assert [now - then for now, then in zip(after, before, strict=True)] == [3, 3]


# ----------------------------------------------------------------------------------------------------------------- cors


async def test_cors_lets_a_known_origin_ask_without_a_key_whether_it_may(tmp_path: Path) -> None:
    _, entry = new_key("anna")
    (tmp_path / "keys.yaml").write_text(entry)
    gate = make_gate(Application.whole(document()), keys=KeyRing(tmp_path / "keys.yaml"))
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    app = with_cors(gate, ["https://chat.example.com"])
    for origin, status in (("https://chat.example.com", 200), ("https://evil.example.com", 400)):
        client = await Client(app, CHAT, method="OPTIONS", headers={**asks, "origin": origin}).run()
        assert client.status == status
        assert client.headers.get("access-control-allow-origin") == (origin if status == 200 else None)
    refused = await Client(app, CHAT, QUESTION, headers={"origin": "https://chat.example.com"}).run()
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, "https://chat.example.com")
    assert "x-borg-ignored" in refused.headers["access-control-expose-headers"]
    assert with_cors(gate, []) is gate


# ----------------------------------------------------------------------------------------------------- messages streams


class Slow:
    """An application whose engine knows its prompt at once, and takes its time."""

    def __init__(self, *chunks: bytes, known: bool = True) -> None:
        self.chunks = chunks
        self.known = known
        self.go = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        progress = CURRENT.get()
        assert progress is not None
        if self.known:
            progress.prompt_tokens, progress.cached_tokens = 2345, 2304
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        gone = asyncio.ensure_future(receive())
        await asyncio.wait({asyncio.ensure_future(self.go.wait()), gone}, return_when=asyncio.FIRST_COMPLETED)
        for chunk in self.chunks if self.go.is_set() else ():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"BEGIN_S": 0.01, "PING_S": 0.02}.items():
        monkeypatch.setattr(answer_module, name, seconds)
    monkeypatch.setattr(gate_module, "DYING_S", 0.0)


@pytest.mark.usefixtures("hasty")
async def test_messages_stream_begins_and_pings_before_its_first_token() -> None:
    app = Slow(*stream([("", "hi")]))
    client = Client(make_gate(app), MESSAGES, {**TURN, "stream": True}, headers={"x-request-id": "r1"}).begin()
    await client.until(lambda: len(client.sent) >= 4)
    app.go.set()
    said = events((await client.ended()).content)
    kinds = [one["type"] for one in said if one["type"] != "ping"]
    assert said[1] == {"type": "ping"}
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds.count("message_start") == kinds.count("message_stop") == 1
    start = said[0]["message"]
    assert (start["id"], start["model"]) == ("msg_r1", "borg-merge-v1")
    assert (start["usage"]["input_tokens"], start["usage"]["cache_read_input_tokens"]) == (41, 2304)


@pytest.mark.usefixtures("hasty")
async def test_messages_stream_keeps_its_status_open_until_the_prompt_is_known() -> None:
    app = Slow(event({"error": {"message": "no", "type": "x", "param": "top_k", "code": 400}}), known=False)
    client = Client(make_gate(app), MESSAGES, {**TURN, "stream": True}).begin()
    await asyncio.sleep(0.05)
    app.go.set()
    assert (await client.ended()).status == 400


@pytest.mark.usefixtures("hasty")
async def test_messages_stream_that_began_early_ends_with_an_error_event() -> None:
    client = await Client(make_gate(Slow(), deadline_s=0.1), MESSAGES, {**TURN, "stream": True}).run()
    said = events(client.content)
    assert (said[0]["type"], said[-1]["error"]["type"]) == ("message_start", "timeout_error")
    assert CURRENT.get() is None


def test_routes_are_documented() -> None:
    assert openapi()["paths"].keys() == ROUTES.keys()
