"""The shapes of what coding agents and frameworks send by default, in our own words, are served."""

import json
from dataclasses import replace
from typing import Any

import pytest

from borg_serve.api.chat import translated
from tests.chats import BOUNDS
from tests.protocols import CHAT, MESSAGES, RESPONSES, Case

PARAMETERS = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {"command": {"type": "string"}, "timeout": {"type": "number", "default": None}},
    "required": ["command"],
    "additionalProperties": False,
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "run", "arguments": '{"command":"ls"}'}}
CHAT_TOOL = {"type": "function", "function": {"name": "run", "description": "Run it.", "parameters": PARAMETERS}}
CACHE: dict[str, Any] = {"cache_control": {"type": "ephemeral"}}
CLAUDE_TOOL = {"name": "run", "description": "Run it.", "input_schema": PARAMETERS}
USE = {"type": "tool_use", "id": "toolu_1", "name": "run", "input": {"command": "ls"}}


def text(said: str, kind: str = "text", **more: Any) -> dict[str, Any]:
    return {"type": kind, "text": said, **more}


CLAUDE_CODE = {
    "model": "claude-sonnet-4-5",
    "max_tokens": 64_000,
    "stream": True,
    "system": [text("a header of its own"), text("You are a coding agent.", **CACHE)],
    "messages": [
        {"role": "user", "content": [text("<system-reminder>now</system-reminder>"), text("hi", **CACHE)]},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "", "signature": "s"}, {**USE, "caller": {"type": "direct"}}],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "", "is_error": False, **CACHE}],
        },
        {"role": "system", "content": "Today is Monday."},
    ],
    "tools": [
        {**CLAUDE_TOOL, "eager_input_streaming": True, "defer_loading": True},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
    ],
    "metadata": {"user_id": json.dumps({"device": "d" * 600})},
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
}
CODEX = {
    "model": "gpt-5-codex",
    "instructions": "You are a coding agent.",
    "input": [
        {"type": "message", "role": "developer", "content": [text("Sandboxed.", "input_text")]},
        {"type": "message", "role": "user", "content": [text("hi", "input_text")]},
        {"type": "reasoning", "summary": [], "content": None, "encrypted_content": "x"},
        {
            "type": "message",
            "role": "assistant",
            "content": [text("Let me see.", "output_text")],
            "phase": "commentary",
        },
        {"type": "function_call", "name": "read", "namespace": "mcp__files", "arguments": "{}", "call_id": "c1"},
        {"type": "function_call_output", "call_id": "c1", "output": "Exit code: 0"},
    ],
    "tools": [
        {"type": "function", "name": "exec_command", "description": "d", "strict": False, "parameters": PARAMETERS},
        {
            "type": "custom",
            "name": "apply_patch",
            "description": "d",
            "format": {"type": "grammar", "syntax": "lark", "definition": "x"},
        },
        {"type": "web_search", "external_web_access": False},
        {
            "type": "namespace",
            "name": "mcp__files",
            "description": "d",
            "tools": [{"type": "function", "name": "read", "strict": False, "parameters": PARAMETERS}],
        },
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "k",
    "text": {"verbosity": "low"},
    "client_metadata": {"installation": "i"},
}
OPENCODE = {
    "model": "claude-sonnet-4-5",
    "max_tokens": 32_000,
    "messages": [
        {"role": "system", "content": "You are a coding agent."},
        {"role": "user", "content": [text("hi")]},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [{**CALL, "index": 0}]},
        {"role": "tool", "tool_call_id": "call_1", "content": ""},
    ],
    "tools": [CHAT_TOOL],
    "tool_choice": "auto",
    "stream": True,
    "stream_options": {"include_usage": True},
    "reasoning_effort": "medium",
}
AI_SDK = {
    "model": "claude-sonnet-4-5",
    "max_tokens": 4096,
    "messages": [
        {"role": "user", "content": [text("hi")]},
        {"role": "assistant", "content": [text("Let me see."), USE]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("done")]}]},
    ],
    "tools": [{**CLAUDE_TOOL, "eager_input_streaming": True}],
    "tool_choice": {"type": "auto"},
    "stream": True,
}
PYDANTIC_AI = AI_SDK | {"max_tokens": 16_384, "stream": False, "tools": [{**CLAUDE_TOOL, "strict": None}]}
LLAMA_INDEX = {
    "model": "gpt-5",
    "messages": [{"role": "user", "content": "hi"}],
    "tools": [{**CHAT_TOOL, "function": {**CHAT_TOOL["function"], "strict": False}}],  # type: ignore[dict-item]
    "tool_choice": {"type": "function", "function": {"name": "run"}},
    "parallel_tool_calls": False,
    "stream": False,
    "temperature": 0.1,
}
LANGCHAIN = {
    "model": "gpt-5",
    "n": 1,
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi", "name": "ada"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "function_call": None, "refusal": None},
        {"role": "tool", "tool_call_id": "call_1", "content": [text("done")], "name": "run"},
    ],
    "tools": [CHAT_TOOL],
    "stream": True,
    "stream_options": {"include_usage": True},
    "store": True,
    "verbosity": "low",
}
CLIENTS: dict[str, tuple[Case, dict[str, Any], str]] = {
    "Claude Code": (
        MESSAGES,
        CLAUDE_CODE,
        "metadata thinking context_management system.cache_control messages.content.cache_control "
        "messages.content.thinking messages.content.caller tools.eager_input_streaming tools.defer_loading "
        "tools.web_search output_config.effort",
    ),
    "Codex": (
        RESPONSES,
        CODEX,
        "reasoning prompt_cache_key client_metadata input.reasoning input.phase tools.custom tools.web_search "
        "text.verbosity include",
    ),
    "opencode": (CHAT, OPENCODE, "reasoning_effort messages.reasoning_content"),
    "AI SDK": (MESSAGES, AI_SDK, "tools.eager_input_streaming"),
    "pydantic-ai": (MESSAGES, PYDANTIC_AI, ""),
    "LlamaIndex": (CHAT, LLAMA_INDEX, ""),
    "LangChain": (CHAT, LANGCHAIN, "store verbosity messages.name"),
}


@pytest.mark.parametrize("unknown_fields", ["ignore", "refuse"])
@pytest.mark.parametrize("client", CLIENTS)
def test_client_is_served_and_told_what_is_ignored(client: str, unknown_fields: Any) -> None:
    case, request, names = CLIENTS[client]
    bounds = replace(BOUNDS, model_aliases=("claude-*", "gpt-5*"), unknown_fields=unknown_fields)
    body, answer = replace(case, plain={}, bounds=bounds).parsed(**request)
    assert set(answer.ignored) == set(names.split())
    assert body["model"] == BOUNDS.model
    assert body.get("max_tokens", 1) <= BOUNDS.max_tokens
    assert body == translated(body, bounds, str, str), "the engine gets what every chat request may hold"


def test_client_llama_index_gets_arguments_that_follow_the_schema() -> None:
    body = replace(CHAT, bounds=replace(BOUNDS, model_aliases=("gpt-*",))).body(**LLAMA_INDEX)
    assert body["tools"][0]["function"]["strict"] is True
