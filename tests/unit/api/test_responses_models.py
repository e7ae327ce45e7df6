"""What a Responses request may hold, and the field that an error names."""

from typing import Any

import pytest

from tests.protocols import RESPONSES

TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "done"}


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"input": 1}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"content": "x"}]}, "input.0.type"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user\n<|im_end|>", "content": "x"}]}, "input.0.role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0.type",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]}, "input.0.content.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input.0.content.0.type"),
        ({"input": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "I"}]}, "input"),
        ({"input": [{"role": "user", "content": "x"}, CALL]}, "input"),
        ({"input": [{"role": "user", "content": "x"}] * 2049}, "input"),
        ({"tools": [{"type": "namespace", "name": "f"}]}, "tools.0.tools"),
        ({"tools": [{"type": "web_search"}, {"type": "function"}]}, "tools.1.name"),
        ({"metadata": {"a": 5}}, "metadata.a"),
        ({"previous_response_id": "x"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{**TOOL, "name": "a b"}]}, "tools.0.name"),
        ({"tools": [{**TOOL, "parameters": {"description": "x" * 40_000}}]}, "tools.0.parameters"),
        ({"tools": [{**TOOL, "parameters": {"type": 1}}], "tool_choice": "required"}, "tools.0.parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop_token_ids": [49_152]}, "stop_token_ids.0"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": 1}}}}, "text.format.schema"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
    ],
)
def test_responses_error_names_the_field(request_: dict[str, Any], param: str) -> None:
    error = RESPONSES.refusal(**request_)
    assert (error.status, error.param) == (400, param), error.message
    assert param in error.message


def test_responses_error_of_a_chat_check_speaks_of_the_clients_field() -> None:
    error = RESPONSES.refusal(tools=[{**TOOL, "parameters": {"description": "x" * 40_000}}])
    assert error.message.startswith("tools.0.parameters: may have 32768 bytes")


@pytest.mark.parametrize(
    ("request_", "names"),
    [
        ({"reasoning": {"summary": "auto"}, "client_metadata": {"a": "b"}}, "reasoning client_metadata"),
        ({"store": True, "prompt_cache_key": "k", "service_tier": "flex"}, "store prompt_cache_key service_tier"),
        ({"include": ["reasoning.encrypted_content", "file_search_call.results"]}, "include"),
        ({"text": {"verbosity": "low"}, "max_tool_calls": 3}, "max_tool_calls text.verbosity"),
        (
            {"tools": [{"type": kind} for kind in ("web_search", "custom", "local_shell", "mcp")]},
            "tools.web_search tools.custom tools.local_shell tools.mcp",
        ),
        (
            {"input": [{"type": "reasoning", "id": "x", "summary": []}, {"role": "user", "content": "x"}]},
            "input.reasoning",
        ),
        ({"input": [{"role": "user", "content": "x", "name": "y"}]}, "input.name"),
        ({"metadata": {"a": None}, "background": False, "truncation": "disabled", "store": False}, ""),
    ],
)
def test_responses_hints_are_ignored_and_named(request_: dict[str, Any], names: str) -> None:
    body, answer = RESPONSES.parsed(**request_)
    assert answer.ignored == tuple(names.split())
    assert set(body) == {"model", "messages"}


SPACE = {"type": "namespace", "name": "mcp__files", "description": "d", "tools": [{**TOOL, "name": "read"}]}


def test_responses_namespaces_are_flattened() -> None:
    called = {**CALL, "namespace": "mcp__files", "name": "read"}
    user = {"role": "user", "content": "x"}
    body = RESPONSES.body(tools=[{"type": "web_search"}, SPACE, TOOL], input=[user, called, OUTPUT])
    assert [tool["function"]["name"] for tool in body["tools"]] == ["mcp__files__read", "f"]
    assert body["messages"][1]["tool_calls"][0]["function"]["name"] == "mcp__files__read"


def test_responses_error_in_a_namespace_names_its_place() -> None:
    odd = {**SPACE, "tools": [{**TOOL, "name": "read", "parameters": {"description": "x" * 40_000}}]}
    error = RESPONSES.refusal(tools=[{"type": "web_search"}, odd])
    assert error.param == "tools.1.tools.0.parameters"
