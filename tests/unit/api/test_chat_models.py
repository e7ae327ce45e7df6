"""What a chat request may hold, and how much."""

from dataclasses import replace
from typing import Any

import pytest

from borg_serve.api.protocol import Bounds
from tests.chats import USER
from tests.protocols import CHAT

TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    "fields",
    [
        # vllm bench serve
        {
            "model": "borg-merge-v1",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "max_completion_tokens": 128,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "repetition_penalty": 1.0,
            "temperature": 0.0,
            "top_k": -1,
            "min_p": 0,
        },
        # GuideLLM
        {
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "max_completion_tokens": 64,
            "stop": None,
            "ignore_eos": True,
        },
        # AIPerf
        {"model": "borg-merge-v1", "stream": False, "max_tokens": 9, "min_tokens": 9, "ignore_eos": True},
        # OpenAI's clients and what wraps them
        {
            "model": "borg-merge-v1",
            "n": 2,
            "seed": -1,
            "logprobs": True,
            "top_logprobs": 20,
            "presence_penalty": -2,
            "frequency_penalty": 2.0,
            "user": "u",
            "metadata": {"a": "b"},
            "store": False,
            "service_tier": "auto",
            "modalities": ["text"],
            "parallel_tool_calls": True,
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "response_format": {"type": "json_object"},
            "safety_identifier": "s",
            "prompt_cache_key": "p",
            "logit_bias": None,
            "audio": None,
            "never_heard_of": None,
        },
    ],
    ids=["vllm", "guidellm", "aiperf", "openai"],
)
def test_chat_takes_what_real_clients_send(fields: dict[str, Any]) -> None:
    CHAT.body(**fields)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"reasoning_effort": "none", "verbosity": "low", "store": True}, ("reasoning_effort", "verbosity", "store")),
        ({"prediction": {"type": "content", "content": "x"}, "priority": -5}, ("prediction", "priority")),
        (
            {"metadata": {"a": None, "b": 5}, "user": "u" * 513, "service_tier": "flex"},
            ("metadata", "user", "service_tier"),
        ),
        ({"stream_options": {"include_obfuscation": True}}, ("stream_options.include_obfuscation",)),
        (
            {"tools": [{"type": "custom", "custom": {}}, {**TOOL, "defer_loading": True}]},
            ("tools.custom", "tools.defer_loading"),
        ),
        ({"tools": [{"type": "web_search"}], "tool_choice": "auto"}, ("tools.web_search",)),
        ({"messages": [{**USER, "name": "n", "tool_call_id": "x"}]}, ("messages.name", "messages.tool_call_id")),
        (
            {"messages": [{"role": "assistant", "content": "a", "annotations": [{}], "parsed": {}}, USER]},
            ("messages.annotations",),
        ),
        ({"logit_bias": {}, "modalities": ["text"], "store": False, "tools": []}, ()),
    ],
)
def test_chat_ignores_hints_and_names_them(fields: dict[str, Any], names: tuple[str, ...]) -> None:
    body, answer = CHAT.parsed(**fields)
    assert set(body) <= {"model", "messages", "tools", "stream", "stream_options"}
    assert answer.ignored == names


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"temperature": 2.1}, "temperature", "must be at most 2, got 2.1"),
        ({"temperature": -0.1}, "temperature", "must be at least 0, got -0.1"),
        ({"temperature": "1"}, "temperature", 'must be a number, got "1"'),
        ({"temperature": True}, "temperature", "must be a number, got true"),
        ({"top_p": 0}, "top_p", "must be more than 0, got 0"),
        ({"top_p": 1.01}, "top_p", "must be at most 1"),
        ({"top_k": -2}, "top_k", "must be at least -1"),
        ({"top_k": 10**6 + 1}, "top_k", "must be at most 1000000"),
        ({"min_p": 1.5}, "min_p", "must be at most 1"),
        ({"presence_penalty": 2.5}, "presence_penalty", "must be at most 2"),
        ({"frequency_penalty": -2.5}, "frequency_penalty", "must be at least -2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "must be at least 0.01"),
        ({"max_tokens": 0}, "max_tokens", "must be at least 1, got 0"),
        ({"max_tokens": 1.5}, "max_tokens", "must be an integer"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens", "must be at most max_tokens (5), got 6"),
        ({"min_tokens": 6, "max_tokens": 9, "max_completion_tokens": 5}, "min_tokens", "max_tokens (5), got 6"),
        ({"seed": 2**63}, "seed", "must be at most 9223372036854775807"),
        ({"seed": -1e30}, "seed", "must be at least -9223372036854775808"),
        ({"n": 5}, "n", "must be at most 4, got 5"),
        ({"n": 0}, "n", "must be at least 1"),
        ({"n": True}, "n", "must be an integer"),
        ({"n": 2, "temperature": 0}, "n", "must be 1 when temperature is below 0.01"),
        ({"stop": ""}, "stop", "must have at least 1 characters"),
        ({"stop": ["a"] * 5}, "stop", "may have 4 items, got an array of 5 items"),
        ({"stop": ["a", 5]}, "stop.1", "must be a string, got 5"),
        ({"stop": 5}, "stop", "must be a string or an array, got 5"),
        ({"stop": "a" * 257}, "stop", "may have 256 characters"),
        ({"stop_token_ids": [0, 49_152]}, "stop_token_ids.1", "must be below 49152"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0", "must be at least 0"),
        ({"stop_token_ids": [1] * 17}, "stop_token_ids", "may have 16 items"),
        ({"logprobs": 1}, "logprobs", "must be true or false, got 1"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "must be at most 20"),
        ({"top_logprobs": 1}, "top_logprobs", "is allowed only when logprobs is true"),
        ({"stream": "true"}, "stream", "must be true or false"),
        ({"tools": [TOOL] * 129}, "tools", "may have 128 items"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "is required"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "must match"),
        ({"tools": [{"type": "function", "function": {"name": "a\n"}}]}, "tools.0.function.name", "must match"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice", "must be 'none', 'auto' or 'required' or an object"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function", "is required"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice.function.name",
            'must name one of the tools, got "g"',
        ),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type", "must be one of 'text'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is required"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "is required",
        ),
        ({"model": 5}, "model", "must be a string"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_chat_refuses_by_name_bound_and_value(fields: dict[str, Any], param: str, says: str) -> None:
    error = CHAT.refusal(**fields)
    assert (error.status, error.param) == (400, param)
    assert says in error.message
    assert error.code is not None


def test_chat_follows_the_bounds() -> None:
    bounds = Bounds(model="m", max_tokens=10, max_n=1, max_messages=1, max_tools=1, max_stop=1, max_schema_bytes=20)
    small = replace(CHAT, bounds=bounds)
    assert small.body(model="m", max_tokens=10)["model"] == "m"
    wide = {"type": "function", "function": {"name": "f", "parameters": {"description": "x" * 20}}}
    assert small.body(model="m", max_tokens=11) == small.body(model="m", max_tokens=10)
    for fields in ({"n": 2}, {"tools": [TOOL] * 2}, {"stop": ["a"] * 2}, {"tools": [wide]}):
        assert small.refusal(**fields).status == 400
    assert "may have 1 items" in small.refusal(messages=[USER, USER]).message


@pytest.mark.parametrize(
    ("turns", "param", "says"),
    [
        ("x", "messages", "must be an array"),
        ([], "messages", "must have at least 1 items"),
        ([5], "messages.0", "must be an object, got 5"),
        ([{}], "messages.0.role", "is required"),
        ([{"role": "robot", "content": ""}], "messages.0.role", "must be one of 'system', 'developer', 'user'"),
        ([{"role": "system\nX<|im_end|>", "content": ""}], "messages.0.role", "must be one of"),
        ([{"role": "function", "name": "f", "content": ""}], "messages.0.role", "must be one of"),
        ([{"role": "user"}], "messages.0.content", "is required"),
        ([USER, {"role": "user", "content": None}], "messages.1.content", "is required"),
        ([{"role": "user", "content": 5}], "messages.0.content", "must be a string or an array, got 5"),
        ([{"role": "user", "content": []}], "messages.0.content", "must have at least 1 items"),
        ([{"role": "user", "content": ["a"]}], "messages.0.content.0", "must be an object"),
        ([USER, {"role": "tool", "content": "x"}], "messages.1.tool_call_id", "is required"),
        ([USER, {"role": "assistant", "content": "x"}], "messages.1.role", "the assistant speaks next"),
        ([USER] * 2049, "messages", "may have 2048 items"),
        (
            [USER, {"role": "assistant", "tool_calls": [{"id": "1", "type": "function"}]}, USER],
            "messages.1.tool_calls.0.function",
            "is required",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_chat_refuses_messages_by_place(turns: Any, param: str, says: str) -> None:
    error = CHAT.refusal(messages=turns)
    assert (error.status, error.param) == (400, param)
    assert says in error.message


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url", "prompt_embeds", "thinking", ""])
@pytest.mark.parametrize("role", ["user", "assistant", "tool", "system"])
def test_chat_refuses_parts_that_are_no_text_and_names_them(role: str, kind: str) -> None:
    if (role, kind) == ("assistant", "thinking"):
        return  # its own words, sent back
    turn = {"role": role, "content": [{"type": "text", "text": "a"}, {"type": kind, kind: {"url": "data:"}}]}
    error = CHAT.refusal(messages=[turn | ({"tool_call_id": "1"} if role == "tool" else {}), USER])
    assert error.param == "messages.0.content.1.type"
    assert f'got "{kind}"' in error.message
