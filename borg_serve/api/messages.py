"""Anthropic's Messages protocol: a request as the chat request that means the same, and chat's answer as a message.

It does not know how chat requests are checked or cleaned.
"""

import json
from collections.abc import Mapping
from typing import Any

import jiter

from borg_serve.api.chat import gathered, translated
from borg_serve.api.chat_models import joined
from borg_serve.api.events import named_event
from borg_serve.api.messages_models import (
    AssistantTurn,
    ClientTool,
    MessagesRequest,
    OutputConfig,
    TextBlock,
    ToolChoiceAny,
    ToolChoiceNone,
    ToolChoiceTool,
    ToolResultBlock,
    ToolUseBlock,
    UserBlock,
    UserTurn,
)
from borg_serve.api.protocol import Bounds, Neutralise
from borg_serve.api.request import read, renamed
from borg_serve.api.translated_answer import Json, TranslatedAnswer, cached_tokens

__all__ = ["PATH", "MessagesAnswer", "error_body", "field_name", "parse"]

PATH = "/v1/messages"
NAMES = (
    (r"^messages\b.*", "messages"),
    (r"^stop\b", "stop_sequences"),
    (r"^response_format(\.json_schema)?", "output_config.format"),
    (r"\.function\.parameters\b", ".input_schema"),
    (r"\.function\b", ""),
)
"""Regular expressions for names of chat's fields, and their names here."""
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
"""Anthropic's error types by HTTP status."""


def parse(raw: bytes, bounds: Bounds, neutralise: Neutralise) -> tuple[dict[str, Any], "MessagesAnswer"]:
    """Return the chat request for vLLM, and what makes a message of chat's answer. Raises ApiError."""
    request, ignored = read(raw, MessagesRequest, bounds)
    body = translated(_chat(request), bounds, neutralise, field_name)
    return body, MessagesAnswer(ignored, gathered(body))


def error_body(status: int, error: Mapping[str, Any], request_id: str) -> dict[str, Any]:
    """Return an error in Anthropic's shape."""
    fields: dict[str, Any] = {"type": ERRORS.get(status, "invalid_request_error"), "message": error["message"]}
    if error.get("param") == "thread":
        # Anthropic's tool runner asks for a thread by default, and goes on without one when it reads this.
        fields["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    return {"type": "error", "error": fields, "request_id": request_id}


def field_name(chat_field: str) -> str:
    """Return the name here for a field of chat."""
    return renamed(chat_field, NAMES)


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
        "stream_options": {"include_usage": True} if request.stream else None,
        **_tools(request),
        "response_format": _format(request.output_config),
    }


def _messages(request: MessagesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if request.system is not None:
        messages.append({"role": "system", "content": joined(request.system)})
    for turn in request.messages:
        if isinstance(turn, AssistantTurn):
            messages.append(_assistant(turn))
        elif isinstance(turn, UserTurn):
            messages += _user(turn.content)
        else:
            messages.append({"role": "system", "content": joined(turn.content)})
    return messages


def _user(content: str | list[UserBlock]) -> list[dict[str, Any]]:
    """Results of tools are messages of their own; the text between them stays together."""
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    messages: list[dict[str, Any]] = []
    for block in content:
        if isinstance(block, ToolResultBlock):
            result = joined(block.content)
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
    return {"role": "assistant", "content": joined(texts), "tool_calls": calls or None}


def _tools(request: MessagesRequest) -> dict[str, Any]:
    # Chat drops what is dropped here: each tool keeps its place for errors.
    tools = [_tool(tool) if isinstance(tool, ClientTool) else {"type": "custom"} for tool in request.tools or ()]
    choice = request.tool_choice
    named: Any = None
    if isinstance(choice, ToolChoiceTool):
        named = {"type": "function", "function": {"name": choice.name}}
    elif isinstance(choice, ToolChoiceAny):
        named = "required" if choice.type == "any" else "auto"
    elif choice is not None:
        named = "none"
    alone = None if choice is None or isinstance(choice, ToolChoiceNone) else choice.disable_parallel_tool_use
    return {"tools": tools or None, "tool_choice": named, "parallel_tool_calls": None if alone is None else not alone}


def _tool(tool: ClientTool) -> dict[str, Any]:
    sent = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema, "strict": tool.strict}
    return {"type": "function", "function": sent}


def _format(config: OutputConfig | None) -> dict[str, Any] | None:
    if config is None or config.format is None:
        return None
    named = {"name": "output", "schema": config.format.json_schema, "strict": True}
    return {"type": "json_schema", "json_schema": named}


# ----------------------------------------------------------------------------------------------------- answer


class MessagesAnswer(TranslatedAnswer):
    """The answer as one assistant message of content blocks."""

    REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}  # noqa: RUF012 (never changed)

    PING = named_event("ping", {"type": "ping"})

    def __init__(self, ignored: tuple[str, ...] = (), gathers: bool = False) -> None:
        super().__init__(ignored, gathers)
        self._content: list[Json] = []

    def begin(self, request_id: str, model: str) -> bytes:
        self._events = []
        if self.progress.prompt_tokens and not self.id:
            self.id, self.model = request_id, model
            self.started()
        return b"".join(self._events)

    def error_event(self, body: Mapping[str, Any]) -> bytes:
        return named_event("error", body)

    def started(self) -> None:
        if not self.usage:  # a stream of chat tells it at its end only
            progress = self.progress.now()
            details = {"cached_tokens": progress.cached_tokens}
            self.usage = {"prompt_tokens": progress.prompt_tokens, "prompt_tokens_details": details}
        self.emit("message_start", message={**self.whole(), "content": [], "stop_reason": None, "stop_sequence": None})

    def opened(self, call: Json) -> None:
        block: Json = {"type": "text", "text": ""}
        if call:
            block = {"type": "tool_use", "id": call["id"], "name": call["name"], "input": {}}
        self._content.append(block)
        self.emit("content_block_start", index=self.parts, content_block=block)

    def said(self, piece: str, logprobs: list[Json]) -> None:
        delta = {"type": "text_delta", "text": piece}
        if self._content[-1]["type"] == "tool_use":
            delta = {"type": "input_json_delta", "partial_json": piece}
        self.emit("content_block_delta", index=self.parts, delta=delta)

    def closed(self, whole: str, last: bool) -> None:
        block = self._content[-1]
        if block["type"] == "text":
            block["text"] = whole
        else:
            block["input"] = _object(whole)
        self.emit("content_block_stop", index=self.parts)

    def ended(self) -> None:
        reason, sequence = self._stop()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        self.emit("message_delta", delta=delta, usage=self._usage())
        self.emit("message_stop")

    def whole(self) -> Json:
        """Return the message as it stands. Only fields of ours are in it, whatever chat's answer holds."""
        reason, sequence = self._stop()
        return {
            "id": f"msg_{self.id}",
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": self._content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": self._usage(),
        }

    def _stop(self) -> tuple[str, str | None]:
        if self.finish == "stop" and isinstance(self.matched, str):
            return "stop_sequence", self.matched
        if self.finish == "stop" and any(block["type"] == "tool_use" for block in self._content):
            return "tool_use", None  # chat says `stop` after a call of a named tool
        return self.REASONS.get(self.finish, "end_turn"), None

    def _usage(self) -> Json:
        """Cached tokens are not among the input tokens here."""
        cached = cached_tokens(self.usage)
        return {
            "input_tokens": self.usage.get("prompt_tokens", 0) - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self.usage.get("completion_tokens", 0),
        }


def _object(arguments: str) -> Json:
    """A call's arguments; of those that were cut off, what Anthropic's client makes of them in a stream."""
    try:
        value = jiter.from_json(arguments.encode(), partial_mode=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
