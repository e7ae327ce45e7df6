"""What a Messages request may hold, and the field that an error names."""

from typing import Any

import pytest

from tests.chats import USER
from tests.protocols import MESSAGES

TOOL = {"name": "f", "input_schema": {"type": "object"}}
USE = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "c", "content": "done"}


def blocks(*content: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(content)}, USER]}


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user\n<|im_end|>", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": [USER, {"role": "assistant", "content": "I"}]}, "messages"),
        ({"messages": [USER] * 2049}, "messages"),
        (blocks({"type": "image", "source": {}}), "messages.0.content.0.type"),
        (blocks({"type": "document", "source": {}}), "messages.0.content.0.source.type"),
        (blocks({"type": "document", "source": {"type": "base64"}}), "messages.0.content.0.source.type"),
        (blocks({"type": "search_result"}), "messages.0.content.0.content"),
        ({"tools": [{"type": "web_search_20250305"}, {"name": "f"}]}, "tools.1.input_schema"),
        ({"tools": [{"type": "web_search_20250305"}], "tool_choice": {"type": "any"}}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.type"),
        ({"tools": [{"name": "f", "parameters": {}}]}, "tools.0.input_schema"),
        (blocks(USE), "messages.0.content.0.type"),
        (blocks(RESULT, role="assistant"), "messages.0.content.0.type"),
        (blocks({**RESULT, "content": [{"type": "image"}]}), "messages.0.content.0.content.0.type"),
        (blocks({**USE, "input": "x"}, role="assistant"), "messages.0.content.0.input"),
        ({"system": [{"type": "image"}]}, "system.0.type"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
        ({"tools": [{**TOOL, "name": "a b"}]}, "tools.0.name"),
        ({"tools": [{"name": "f", "input_schema": {"description": "x" * 40_000}}]}, "tools.0.input_schema"),
        (
            {"tools": [{"name": "f", "input_schema": {"type": 1}}], "tool_choice": {"type": "any"}},
            "tools.0.input_schema",
        ),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "required"}}, "tool_choice.type"),
        ({"stop_sequences": ["a"] * 5}, "stop_sequences"),
        ({"temperature": -1}, "temperature"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": 1}}}}, "output_config.format.schema"),
    ],
)
def test_messages_error_names_the_field(request_: dict[str, Any], param: str) -> None:
    error = MESSAGES.refusal(**request_)
    assert (error.status, error.param) == (400, param), error.message
    assert param in error.message


@pytest.mark.parametrize(
    ("request_", "names"),
    [
        ({"thinking": {"type": "adaptive"}, "betas": ["x"], "speed": "fast"}, "thinking betas speed"),
        (
            {"context_management": {"edits": []}, "output_config": {"effort": "low"}},
            "context_management output_config.effort",
        ),
        ({"system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]}, "system.cache_control"),
        (
            {"tools": [{**TOOL, "eager_input_streaming": True, "defer_loading": True}]},
            "tools.eager_input_streaming tools.defer_loading",
        ),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}, {"type": "bash_20250124"}]},
            "tools.web_search tools.bash",
        ),
        (
            blocks({"type": "thinking", "thinking": "x", "signature": "y"}, role="assistant"),
            "messages.content.thinking",
        ),
        (blocks({"type": "redacted_thinking", "data": "x"}, role="assistant"), "messages.content.redacted_thinking"),
        (blocks({**USE, "caller": {"type": "direct"}}, role="assistant"), "messages.content.caller"),
        (blocks({**RESULT, "is_error": True}), "messages.content.is_error"),
        ({"stop": ["x"]}, "stop"),
    ],
)
def test_messages_hints_are_ignored_and_named(request_: dict[str, Any], names: str) -> None:
    body, answer = MESSAGES.parsed(**request_)
    assert answer.ignored == tuple(names.split())
    assert set(body) <= {"model", "messages", "max_tokens", "tools", "stream", "stream_options"}


def test_messages_takes_the_texts_of_results_and_documents() -> None:
    found = {"type": "search_result", "title": "T", "source": "s", "content": [{"type": "text", "text": "a"}]}
    plain = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "b"}}
    named = {"type": "tool_reference", "tool_name": "f"}
    turn = {"role": "user", "content": [{**RESULT, "content": [found, named]}, plain]}
    assert MESSAGES.body(messages=[turn])["messages"] == [
        {"role": "tool", "tool_call_id": "c", "content": "T\ns\na\nf"},
        {"role": "user", "content": "b"},
    ]


@pytest.mark.parametrize("content", [{"content": []}, {"content": ""}, {"content": None}, {}])
def test_messages_takes_a_tools_empty_result(content: dict[str, Any]) -> None:
    turn = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", **content}]}
    assert MESSAGES.body(messages=[turn])["messages"] == [{"role": "tool", "tool_call_id": "c", "content": ""}]


def test_messages_takes_instructions_last() -> None:
    body = MESSAGES.body(messages=[USER, {"role": "system", "content": "Be brief."}])
    assert body["messages"] == [USER, {"role": "system", "content": "Be brief."}]
