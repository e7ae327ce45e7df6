"""The routes of the running server, what they say, and what no answer may say (I5)."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from borg_serve.checkpoint.manifest import read_manifest
from borg_serve.identity.text import load_identity
from borg_serve.upstream import PINS
from tests import qwen
from tests.engine.process import ROOT, Server

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hello"}
LEAKS = re.compile(
    r"Traceback|\bFile \"|(?:/[\w.\-]+){3,}|site-packages|\b\d{1,3}(?:\.\d{1,3}){3}\b|0x[0-9a-f]{6,}|vllm\.|asyncio"
)


def check_error(answer: httpx.Response, status: int) -> dict[str, Any]:
    """Return the error of an answer, which must be OpenAI's shape and tell nothing of the inside."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert LEAKS.search(error["message"].replace(answer.request.url.path, "").replace(CHAT, "")) is None, error[
        "message"
    ]
    return error


# ----------------------------------------------------------------------------------------------------- routes


def test_contract_health_and_ready_say_so(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "alive"}
    assert http.get("/ready").json() == {"status": "ready"}


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/metrics", "/v1/models"])
def test_contract_head_is_get_without_a_body(http: httpx.Client, path: str) -> None:
    answer = http.head(path)
    assert answer.status_code == 200
    assert answer.content == b""


def test_contract_version_names_the_identity_and_the_checkpoint(http: httpx.Client, checkpoint: Path) -> None:
    version = http.get("/version").json()
    text = load_identity(ROOT / "configs" / "identity" / "borg-merge-v1.md")
    assert version["identity"] == {"sha256": text.sha256, "tokens": len(qwen.prefix("smollm2").token_ids)}
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    assert version["checkpoint"] == {"root": manifest.root, "revision": None}
    assert version["vllm"] == PINS["vllm"][1]
    assert version["model"] == "borg-merge-v1"
    assert set(version) == {"borg_serve", "vllm", "ray", "python", "model", "identity", "checkpoint"}


def test_contract_models_lists_the_served_name_and_no_path(client: openai.OpenAI, http: httpx.Client) -> None:
    (model,) = list(client.models.list())
    assert model.id == "borg-merge-v1"
    assert model.to_dict()["max_model_len"] == 8192
    assert client.models.retrieve("borg-merge-v1") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    assert "/" not in http.get("/v1/models").text


def test_contract_metrics_hold_vllms_and_ours(server: Server) -> None:
    metrics = server.metrics()
    assert metrics["borg_identity_tokens"] == len(qwen.prefix("smollm2").token_ids)
    assert metrics["borg_ready"] == 1
    assert metrics["borg_guard_refusals_total"] == 0
    for name in ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:prefix_cache_queries_total"):
        assert name in metrics


def test_contract_metrics_count_requests_by_route_and_outcome(server: Server, http: httpx.Client) -> None:
    before = server.metrics()
    http.post(CHAT, json={"messages": [USER], "max_tokens": 1})
    http.post(CHAT, json={"messages": []})
    http.get("/nothing")
    after = server.metrics()
    assert after["vllm:request_success_total"] - before["vllm:request_success_total"] == 1
    assert after["borg_refusals_total"] - before.get("borg_refusals_total", 0) == 2
    assert after["borg_queue_seconds_count"] - before["borg_queue_seconds_count"] == 1


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("POST", path) for path in ("/invocations", "/tokenize", "/detokenize", "/v1/embeddings", "/pooling")),
        *(("POST", path) for path in ("/inference/v1/generate", "/generative_scoring", "/abort_requests", "/sleep")),
        *(("POST", path) for path in ("/v1/chat/completions/render", "/v1/chat/completions/batch", "/v1/completions/")),
        *(("GET", path) for path in ("/docs", "/redoc", "/load", "/ping", "/server_info", "/", "//health", "/HEALTH")),
        *(("GET", path) for path in ("/v1/chat/completions/", "/metrics/", "/v1/models/", "/static/x.js")),
    ],
)
def test_contract_other_routes_are_not_there(http: httpx.Client, method: str, path: str) -> None:
    error = check_error(http.request(method, path, json={"prompt": "x"} if method == "POST" else None), 404)
    assert error["type"] == "invalid_request_error"


def test_contract_completions_says_why_it_is_not_there(http: httpx.Client) -> None:
    error = check_error(http.post("/v1/completions", json={"prompt": "x"}), 404)
    assert "identity" in error["message"]
    assert CHAT in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", CHAT, "POST"), ("PUT", CHAT, "POST"), ("POST", "/health", "GET"), ("DELETE", "/v1/models", "GET")],
)
def test_contract_wrong_method_names_the_right_one(http: httpx.Client, method: str, path: str, allowed: str) -> None:
    answer = http.request(method, path)
    assert allowed in check_error(answer, 405)["message"]
    assert answer.headers["allow"] == allowed


# ------------------------------------------------------------------------------------------------ request ids


def test_contract_request_id_is_echoed(http: httpx.Client) -> None:
    for answer in (
        http.get("/health", headers={"x-request-id": "mine-1"}),
        http.get("/nothing", headers={"x-request-id": "mine-1"}),
        http.post(CHAT, json={"messages": [USER], "max_tokens": 1}, headers={"x-request-id": "mine-1"}),
    ):
        assert answer.headers.get_list("x-request-id") == ["mine-1"]
    assert answer.json()["id"] == "chatcmpl-mine-1"


@pytest.mark.parametrize("sent", ["a" * 65, "a b", "a/b", ""])
def test_contract_request_id_that_could_do_harm_is_replaced(http: httpx.Client, sent: str) -> None:
    got = http.get("/health", headers={"x-request-id": sent}).headers["x-request-id"]
    assert got != sent
    assert re.fullmatch("[0-9a-f]{32}", got)


def test_contract_same_request_id_twice_at_once_answers_both(server: Server) -> None:
    # vLLM names its request after the header: two of one name must not end each other.
    def ask(_: int) -> int:
        body = {"messages": [USER], "max_tokens": 24, "ignore_eos": True}
        answer = httpx.post(f"{server.base_url}{CHAT}", json=body, headers={"x-request-id": "twice"}, timeout=180)
        tokens: int = answer.json()["usage"]["completion_tokens"]
        return tokens

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, range(2))) == [24, 24]


# ----------------------------------------------------------------------------------------------------- errors


def bad_requests() -> Iterator[tuple[str, bytes, int, str | None]]:
    yield "no json", b"{", 400, None
    yield "bad utf-8", b'{"messages": [{"role": "user", "content": "\xff"}]}', 400, None
    yield "not an object", b"[]", 400, None
    yield "no messages", b"{}", 400, "messages"
    yield "wrong type", b'{"messages": "Hello"}', 400, "messages"
    yield "wrong role", b'{"messages": [{"role": "root", "content": "x"}]}', 400, "messages.0.role"
    yield "out of bounds", b'{"messages": [{"role": "user", "content": "x"}], "temperature": 3}', 400, "temperature"
    yield "not a number", b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400, None
    yield "too many", b'{"messages": [{"role": "user", "content": "x"}], "n": 100}', 400, "n"
    yield "unknown model", b'{"messages": [{"role": "user", "content": "x"}], "model": "gpt-4"}', 404, "model"


@pytest.mark.parametrize(("body", "status", "param"), [pytest.param(*case, id=name) for name, *case in bad_requests()])
def test_contract_bad_request_is_explained(http: httpx.Client, body: bytes, status: int, param: str | None) -> None:
    answer = http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert check_error(answer, status)["param"] == param


def test_contract_wrong_content_type_is_415(http: httpx.Client) -> None:
    check_error(http.post(CHAT, content=b"messages=1", headers={"content-type": "text/plain"}), 415)


def test_contract_large_body_is_413(http: httpx.Client) -> None:
    check_error(http.post(CHAT, json={"messages": [{"role": "user", "content": "x" * (1 << 20)}]}), 413)


def test_contract_grammar_that_cannot_be_compiled_is_400(http: httpx.Client) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?<=x)y\\1"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    check_error(http.post(CHAT, json={"messages": [USER], "max_tokens": 4, "response_format": form}), 400)


def test_contract_openai_client_sees_its_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="borg-merge-v1", messages=[], max_tokens=1)
    assert caught.value.param == "messages"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="borg-merge-v1", prompt="x")
