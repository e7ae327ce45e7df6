"""Anthropic's Messages as a dialect: what a request may hold, and the chat request that means the same.

It does not know how chat requests are checked or cleaned.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from borg_serve.chat import WHOLE, Bounds, Id, Label, StopString, Strict, ToolName
from borg_serve.dialect import Dialect, Limit, as_chat, read
from borg_serve.refusal import REFUSED, RefusedField
from borg_serve.reply import MessagesReply
from borg_serve.schema import Neutralise

__all__ = ["MESSAGES", "REFUSED_HERE", "MessagesRequest", "limits"]


class CacheControl(Strict):
    """Accepted and ignored: every prompt is cached as far as it is known."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Block(Strict):
    cache_control: CacheControl | None = None


class TextBlock(Block):
    type: Literal["text"]
    text: str


class ToolUseBlock(Block):
    type: Literal["tool_use"]
    id: Id
    name: Annotated[str, Field(min_length=1, max_length=256)]
    input: dict[str, Any]


Texts = str | Annotated[list[TextBlock], Field(min_length=1, max_length=1024, fail_fast=True)]


class ToolResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: Id
    content: Texts | None = None
    is_error: bool | None = None
    """Ignored: chat templates know no such thing, and the content says what went wrong."""


UserBlock = Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[TextBlock | ToolUseBlock, Field(discriminator="type")]


class SystemTurn(Strict):
    role: Literal["system"]
    content: Texts


class UserTurn(Strict):
    role: Literal["user"]
    content: str | Annotated[list[UserBlock], Field(min_length=1, max_length=1024, fail_fast=True)]


class AssistantTurn(Strict):
    role: Literal["assistant"]
    content: str | Annotated[list[AssistantBlock], Field(min_length=1, max_length=1024, fail_fast=True)]


Turn = Annotated[SystemTurn | UserTurn | AssistantTurn, Field(discriminator="role")]


class ClientTool(Block):
    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    """JSON Schema; its cost is bounded when the answer must follow it (`strict`, or a `tool_choice` that forces it)."""
    strict: bool | None = None


class ToolChoiceAny(Strict):
    type: Literal["auto", "any"]
    disable_parallel_tool_use: bool | None = None


class ToolChoiceNone(Strict):
    type: Literal["none"]


class ToolChoiceTool(Strict):
    type: Literal["tool"]
    name: ToolName
    disable_parallel_tool_use: bool | None = None


class JsonFormat(Strict):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    format: JsonFormat | None = None


class Metadata(Strict):
    user_id: Label | None = None


class MessagesRequest(Strict):
    """Body of POST /v1/messages. `null` anywhere in it, schemas and inputs of tools apart, means absent."""

    max_tokens: Annotated[int, Field(ge=1), WHOLE]
    messages: Annotated[list[Turn], Field(min_length=1, fail_fast=True)]
    model: str | None = None
    system: Texts | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000), WHOLE] | None = None
    stop_sequences: list[StopString] | None = None
    tools: Annotated[list[ClientTool], Field(fail_fast=True)] | None = None
    tool_choice: Annotated[ToolChoiceAny | ToolChoiceNone | ToolChoiceTool, Field(discriminator="type")] | None = None
    output_config: OutputConfig | None = None

    # Accepted because clients send them; they change nothing here.
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    cache_control: CacheControl | None = None


ANTHROPIC = "it belongs to a service that this server does not have"
REFUSED_HERE = {
    **{name: field for name, field in REFUSED.items() if name not in MessagesRequest.model_fields},
    "thinking": RefusedField("this is not a reasoning model", ({"type": "disabled"},)),
    "betas": RefusedField("none is known here", ([],)),
    "container": RefusedField("no code is run here"),
    "mcp_servers": RefusedField("tools are called by the client, never by the server", ([],)),
    "context_management": RefusedField("it edits the prompt, and every prompt begins with the identity"),
    "compaction": RefusedField("it edits the prompt, and every prompt begins with the identity"),
    "thread": RefusedField("nothing is stored here; send the whole conversation as messages"),
    "billing_policy": RefusedField(ANTHROPIC),
    "fallback_credit_token": RefusedField(ANTHROPIC),
    "diagnostics": RefusedField(ANTHROPIC),
    "fallbacks": RefusedField("there is one model", ([],)),
    "inference_geo": RefusedField(ANTHROPIC),
    "speed": RefusedField(ANTHROPIC, ("standard",)),
    "user_profile_id": RefusedField(ANTHROPIC),
    "workspace_id": RefusedField(ANTHROPIC),
}
"""Fields of Anthropic's and vLLM's Messages requests that are not in the model."""


OPAQUE = ("input", "input_schema", "schema")


def limits(bounds: Bounds) -> Iterable[Limit]:
    """Yield (field, JSON Schema keyword, limit), for the check and for the OpenAPI document alike."""
    yield "max_tokens", "maximum", bounds.max_tokens
    yield "messages", "maxItems", bounds.max_messages
    yield "stop_sequences", "maxItems", bounds.max_stop
    yield "tools", "maxItems", bounds.max_tools


ERRORS: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def _error_body(status: int, error: Mapping[str, Any], request_id: str) -> dict[str, Any]:
    kind = ERRORS.get(status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error["message"]}, "request_id": request_id}


def _parse(raw: bytes, bounds: Bounds, neutralise: Neutralise) -> tuple[dict[str, Any], MessagesReply]:
    request = read(raw, MessagesRequest, REFUSED_HERE, limits(bounds), OPAQUE)
    return as_chat(_chat(request), bounds, neutralise, MESSAGES), MessagesReply()


MESSAGES = Dialect(
    path="/v1/messages",
    parse=_parse,
    error_body=_error_body,
    names=(
        (r"^messages\b.*", "messages"),
        (r"^stop\b", "stop_sequences"),
        (r"^response_format(\.json_schema)?", "output_config.format"),
        (r"\.function\.parameters\b", ".input_schema"),
        (r"\.function\b", ""),
    ),
)


# ------------------------------------------------------------------------------------------------------- chat


def _chat(request: MessagesRequest) -> dict[str, Any]:
    return {
        "messages": _messages(request),
        "model": request.model,
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "stop": request.stop_sequences,
        "stream": request.stream,
        # The first event tells the prompt's tokens already.
        "stream_options": {"include_usage": True, "continuous_usage_stats": True} if request.stream else None,
        **_tools(request),
        "response_format": _format(request.output_config),
    }


def _messages(request: MessagesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if request.system is not None:
        messages.append({"role": "system", "content": _text(request.system)})
    for turn in request.messages:
        if isinstance(turn, AssistantTurn):
            messages.append(_assistant(turn))
        elif isinstance(turn, UserTurn):
            messages += _user(turn.content)
        else:
            messages.append({"role": "system", "content": _text(turn.content)})
    return messages


def _user(content: str | list[TextBlock | ToolResultBlock]) -> list[dict[str, Any]]:
    """Results of tools are messages of their own; the text between them stays together."""
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    messages: list[dict[str, Any]] = []
    for block in content:
        if isinstance(block, ToolResultBlock):
            result = _text(block.content or "")
            messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": result})
        elif messages and messages[-1]["role"] == "user":
            messages[-1]["content"] += f"\n{block.text}"
        else:
            messages.append({"role": "user", "content": block.text})
    return messages


def _assistant(turn: AssistantTurn) -> dict[str, Any]:
    if isinstance(turn.content, str):
        return {"role": "assistant", "content": turn.content}
    texts = [block for block in turn.content if isinstance(block, TextBlock)]
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": json.dumps(block.input)}}
        for block in turn.content
        if isinstance(block, ToolUseBlock)
    ]
    return {"role": "assistant", "content": _text(texts), "tool_calls": calls or None}


def _text(content: str | list[TextBlock]) -> str:
    """Blocks joined by line ends, as chat joins parts."""
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _tools(request: MessagesRequest) -> dict[str, Any]:
    tools = [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.input_schema,
                "strict": tool.strict,
            },
        }
        for tool in request.tools or ()
    ]
    choice = request.tool_choice
    named: Any = None
    if isinstance(choice, ToolChoiceTool):
        named = {"type": "function", "function": {"name": choice.name}}
    elif isinstance(choice, ToolChoiceAny):
        named = "required" if choice.type == "any" else "auto" if tools else None
    elif choice is not None:
        named = "none"
    alone = None if choice is None or isinstance(choice, ToolChoiceNone) else choice.disable_parallel_tool_use
    return {"tools": tools or None, "tool_choice": named, "parallel_tool_calls": None if alone is None else not alone}


def _format(config: OutputConfig | None) -> dict[str, Any] | None:
    if config is None or config.format is None:
        return None
    named = {"name": "output", "schema": config.format.json_schema, "strict": True}
    return {"type": "json_schema", "json_schema": named}
