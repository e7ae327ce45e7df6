"""Random conversations and hostile strings on every POST route of the running server: no prompt without the identity.

The guard in the server compares every prompt's token ids and counts what it refuses: the count must stay. Besides, each
answer must tell of a prompt longer than the identity, whose full KV blocks were found in the cache, and nothing may end
in a 500. `make fuzz EXAMPLES=…` asks longer.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from borg_serve.api.chat_models import ChatRequest
from tests import chats, qwen
from tests.engine.process import Server

EXAMPLES = int(os.environ.get("EXAMPLES", "200"))
AT_ONCE = 8
BLOCK_TOKENS = 32
ROUTES = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}
Request = tuple[str, bytes]

PIECES = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_", "end|>", "<|", "|>", "<repo_name>", "<jupyter_text>",
    "<tool_call>", "</tool_call>", "system", "assistant", "\n", "user\n", "{{ messages }}", "{% endraw %}", "{%", "}}",
    "\u200b", "\uff1c\uff5c", "\ufeff", "\x00", "\x1b[2J", "\ud7ff", "\U0001f600", "e\u0301", "[INST]",
    "\\u003c|im_end|\\u003e", "&lt;|im_end|&gt;", "data: [DONE]\n\n", "\r\n\r\n", "a" * 300, "../../etc/passwd",
)  # fmt: skip
hostile = st.lists(st.sampled_from(PIECES) | chats.texts, max_size=5).map("".join)
fields = {
    name: st.none() | chats.values | hostile for name in sorted({*ChatRequest.REFUSED, *ChatRequest.model_fields})
}


def _chat(request: dict[str, Any]) -> dict[str, Any]:
    """The same request, asking for one token: what is tried here is the prompt."""
    cheap = {name: value for name, value in request.items() if name not in ("max_completion_tokens", "min_tokens")}
    cheap["max_tokens"] = 1
    if cheap.get("n") in (3, 4):
        cheap["n"] = 2
    if cheap.get("stream") is True:
        cheap["stream_options"] = {"include_usage": True}
    return cheap


def _turns(part: str, result: dict[str, Any]) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Turns as Responses and Messages have them; `part` is the type of a piece of the user's text."""
    content = hostile | st.lists(
        st.fixed_dictionaries({"type": st.just(part), "text": hostile}), min_size=1, max_size=3
    )
    user = st.fixed_dictionaries({"role": st.just("user"), "content": content})
    other = st.fixed_dictionaries({"role": st.sampled_from(["assistant", "system"]), "content": hostile})
    odd = st.fixed_dictionaries(result)
    return st.builds(lambda middle, last: [*middle, last], st.lists(user | other | odd, max_size=4), user)


_call = {"type": st.just("function_call"), "call_id": hostile, "name": hostile.filter(bool), "arguments": hostile}
_result = {"type": st.just("function_call_output"), "call_id": hostile, "output": hostile}
_use = {
    "type": st.just("tool_use"),
    "id": hostile,
    "name": hostile.filter(bool),
    "input": st.dictionaries(hostile, hostile),
}
_anthropic_result = {"type": st.just("tool_result"), "tool_use_id": hostile, "content": hostile}


def _object(required: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(required, optional=optional)


sound: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "chat": chats.requests(hostile).map(_chat),
    "responses": _object(
        {"input": hostile | _turns("input_text", _call) | _turns("input_text", _result)},
        {
            "instructions": hostile,
            "tools": st.lists(
                _object({"type": st.just("function"), "name": chats.names}, {"description": hostile}), max_size=2
            ),
            "temperature": st.floats(0, 2),
            "metadata": st.dictionaries(
                hostile.map(lambda text: text[:64]), hostile.map(lambda text: text[:512]), max_size=3
            ),
        },
    ).map(lambda request: {**request, "max_output_tokens": 1}),
    "messages": _object(
        {
            "messages": _turns(
                "text",
                {
                    "role": st.sampled_from(["user", "assistant"]),
                    "content": st.lists(_object(_use, {}) | _object(_anthropic_result, {}), min_size=1, max_size=2),
                },
            )
        },
        {
            "system": hostile,
            "tools": st.lists(
                _object(
                    {"name": chats.names, "input_schema": st.dictionaries(hostile, hostile, max_size=2)},
                    {"description": hostile},
                ),
                max_size=2,
            ),
            "temperature": st.floats(0, 2),
        },
    ).map(lambda request: {**request, "max_tokens": 1}),
}


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """A route and a body: mostly sound, often with fields that are refused or wrong, sometimes no request at all."""
    kind = draw(st.sampled_from(["chat", "responses", "messages"]))
    what = draw(st.integers(0, 9))
    if what == 9:
        return ROUTES[kind], draw(st.binary(max_size=200))
    request: Any = draw(sound[kind])
    if what >= 7:
        names = draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3, unique=True))
        cost = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n", "min_tokens")
        request |= {name: draw(fields[name]) for name in names if name not in cost}
        request = _chat(request) if kind == "chat" else request
    elif what == 6 and kind == "chat":
        request = draw(chats.broken())
        if isinstance(request, dict):
            request = _chat(request)
    return ROUTES[kind], json.dumps(request).encode("utf-8", "surrogatepass")


def prompt_tokens(path: str, text: str) -> tuple[int, int]:
    """Return the prompt's tokens, all and those found in the cache, from an answer, whole or streamed."""
    documents = [text]
    if text.startswith(("data: ", "event: ")):
        lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
        documents = [line for line in lines if '"usage":{' in line][-1:]
    usage = json.loads(documents[0])
    usage = usage.get("response", usage)["usage"]
    if path == ROUTES["messages"]:
        cached = usage["cache_read_input_tokens"]
        return usage["input_tokens"] + cached, cached
    kind = "prompt" if path == ROUTES["chat"] else "input"
    return usage[f"{kind}_tokens"], usage[f"{kind}_tokens_details"]["cached_tokens"]


@pytest.fixture(scope="module")
def outcomes(server: Server) -> Iterator[Counter[tuple[str, int]]]:
    """Count (route, status), and see that the guard found nothing to refuse."""
    before = server.metrics()["borg_guard_refusals_total"]
    counts: Counter[tuple[str, int]] = Counter()
    yield counts
    assert server.metrics()["borg_guard_refusals_total"] == before
    assert server.metrics()["borg_inflight"] == 0
    print(dict(counts))


@settings(
    max_examples=max(1, EXAMPLES // AT_ONCE),
    deadline=None,
    database=None,
    phases=[Phase.generate],  # the failing request is printed whole; shrinking it would ask a slow server for minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
@given(batch=st.lists(requests(), min_size=AT_ONCE, max_size=AT_ONCE))
def test_hypothesis_no_prompt_without_the_identity(
    http: httpx.Client, outcomes: Counter[tuple[str, int]], batch: list[Request]
) -> None:
    identity = len(qwen.prefix("smollm2").token_ids)
    blocks = identity // BLOCK_TOKENS * BLOCK_TOKENS

    def ask(request: Request) -> tuple[Request, httpx.Response]:
        path, body = request
        return request, http.post(path, content=body, headers={"content-type": "application/json"})

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for (path, body), answer in pool.map(ask, batch):
            outcomes[path, answer.status_code] += 1
            said = f"{path} {body[:2000]!r}: {answer.status_code} {answer.text[:500]}"
            if answer.status_code != 200:
                assert answer.status_code in (400, 404), said
                assert answer.json()["error"]["type"] in {"invalid_request_error", "not_found_error"}, said
                assert "Traceback" not in answer.text, said
                continue
            assert "[DONE]" in answer.text or not answer.text.startswith("data: "), said
            prompt, cached = prompt_tokens(path, answer.text)
            assert prompt > identity, said
            assert cached >= blocks, said


def test_hypothesis_tried_enough_of_everything(server: Server, outcomes: Counter[tuple[str, int]]) -> None:
    """A search that is refused everywhere would find nothing: see that it reached the engine by every route."""
    total = sum(outcomes.values())
    assert total >= EXAMPLES - AT_ONCE
    for path in ROUTES.values():
        served = outcomes[path, 200]
        assert served >= total / 40, f"{path}: {outcomes}"
        assert outcomes[path, 400] >= 1, f"{path}: {outcomes}"
    assert server.metrics()["borg_guard_refusals_total"] == 0
