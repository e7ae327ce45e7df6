"""A chat request's bytes -> the body that vLLM gets, or the reason why not.

Strict JSON, the models of `chat`, what fields must be to each other, and the cleaning of messages. It does not know
HTTP, vLLM's classes, or which literals are control tokens: the caller's `neutralise` breaks those.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import ValidationError

from borg_serve import strict_json
from borg_serve.chat import (
    AssistantMessage,
    Bounds,
    ChatRequest,
    JsonSchemaFormat,
    Message,
    RefusalPart,
    ResponseFormat,
    SystemMessage,
    TextPart,
    Tool,
    ToolChoice,
    ToolMessage,
    UserMessage,
)
from borg_serve.grammar import schema_problem
from borg_serve.refusal import REFUSED, RequestError, shown, translate

__all__ = ["Bounds", "RequestError", "parse_chat"]

GREEDY_BELOW = 0.01
"""Temperatures below this are sent as 0: vLLM would raise them to this value instead of decoding greedily."""

AS_SENT = (
    "stream",
    "min_tokens",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "n",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "logprobs",
    "top_logprobs",
    "parallel_tool_calls",
)
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier", "session_id")
"""Accepted because clients send them; they change nothing here and go no further."""

Neutralise = Callable[[str], str]


# --------------------------------------------------------------------------------------------------- parsing


def parse_chat(raw: bytes, bounds: Bounds, neutralise: Neutralise) -> dict[str, Any]:
    """Return the body to forward to vLLM: bounded, roles checked, every string that can reach the prompt neutralised.

    Sampling fields that the client left out stay out: vLLM has the server's defaults, and knows the context left.
    Raises RequestError with the field, the bound and the value, shortened.
    """
    body = _object(strict_json.decode(raw, strict_json.BODY))
    _check_names(body)
    _check_limits(body, bounds)
    try:
        request = ChatRequest.model_validate(body)
    except ValidationError as error:
        raise translate(error, body) from None
    _check_together(request, bounds)
    _check_conversation(request.messages)
    _check_schemas(request, bounds)
    return {
        "model": bounds.model,
        "messages": _messages(request.messages, neutralise),
        **_sampling(request),
        **_tools(request, neutralise),
    }


def _object(value: Any) -> dict[str, Any]:
    """The body without its nulls, at the top and inside messages."""
    if not isinstance(value, dict):
        raise RequestError(400, f"body: must be a JSON object, got {shown(value)}.", code="invalid_type")
    body = {name: item for name, item in value.items() if item is not None}
    if isinstance(body.get("messages"), list):
        body["messages"] = [_without_nulls(message) for message in body["messages"]]
    return body


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


# ---------------------------------------------------------------------------------------------------- checks


def _error(param: str, what: str, code: str = "invalid_value") -> RequestError:
    return RequestError(400, f"{param}: {what}.", param=param, code=code)


def _check_names(body: dict[str, Any]) -> None:
    for name in [name for name in body if name not in ChatRequest.model_fields]:
        if name not in REFUSED:
            what = f"Unrecognized request argument supplied: {name[:40]}"
            raise RequestError(400, what, param=name[:40], code="unknown_parameter")
        refused = REFUSED[name]
        value = body.pop(name)
        if not any(
            isinstance(value, bool) == isinstance(same, bool) and value == same for same in refused.same_as_absent
        ):
            raise _error(name, f"is refused: {refused.reason}. Leave it out", "unsupported_parameter")


def _check_limits(body: dict[str, Any], bounds: Bounds) -> None:
    for name, keyword, limit in bounds.limits():
        value = body.get(name)
        if keyword == "maximum" and isinstance(value, int | float) and value > limit:
            raise _error(name, f"must be at most {limit}, got {shown(value)}")
        if keyword == "maxItems" and isinstance(value, list) and len(value) > limit:
            raise _error(name, f"may have {limit} items, got {shown(value)}")


def _check_together(request: ChatRequest, bounds: Bounds) -> None:
    """What the fields must be to each other; the OpenAPI document says the same where JSON Schema can."""
    model, most = request.model, request.max_completion_tokens or request.max_tokens
    if model is not None and model != bounds.model:
        what = f"The model {shown(model)} does not exist. This server has {shown(bounds.model)}."
        raise RequestError(404, what, param="model", code="model_not_found")
    if request.top_logprobs and not request.logprobs:
        raise _error("top_logprobs", "is allowed only when logprobs is true")
    if most is not None and (request.min_tokens or 0) > most:
        raise _error("min_tokens", f"must be at most max_tokens ({most}), got {request.min_tokens}")
    if (request.n or 1) > 1 and request.temperature is not None and request.temperature < GREEDY_BELOW:
        # vLLM refuses it too.
        raise _error(
            "n", f"must be 1 when temperature is below {GREEDY_BELOW} (all would be the same), got {request.n}"
        )
    for index, token_id in enumerate(request.stop_token_ids or ()):
        if token_id >= bounds.vocab_size:
            what = f"must be below {bounds.vocab_size}, the size of the vocabulary, got {shown(token_id)}"
            raise _error(f"stop_token_ids.{index}", what)
    _check_tool_choice(request)


def _check_tool_choice(request: ChatRequest) -> None:
    choice = request.tool_choice
    if choice in (None, "none"):
        return
    if request.tools is None:
        raise _error("tool_choice", "is allowed only when tools are given")
    if isinstance(choice, ToolChoice) and choice.function.name not in {tool.function.name for tool in request.tools}:
        raise _error("tool_choice.function.name", f"must name one of the tools, got {shown(choice.function.name)}")


def _check_conversation(messages: list[Message]) -> None:
    if not any(isinstance(message, UserMessage) for message in messages):
        raise _error("messages", "must have a message of the user: chat templates need one")
    last = messages[-1]
    if not isinstance(last, UserMessage | ToolMessage):
        # Last of all, an assistant's message would be words put into its mouth.
        what = f"must be user or tool in the last message, because the assistant speaks next, got {shown(last.role)}"
        raise _error(f"messages.{len(messages) - 1}.role", what)


def _check_schemas(request: ChatRequest, bounds: Bounds) -> None:
    """Bound the size of every schema, and the cost of those that the engine compiles to hold the answer to them."""
    choice = request.tool_choice
    chosen = choice.function.name if isinstance(choice, ToolChoice) else None
    schemas, compiled = {}, {}
    for index, tool in enumerate(request.tools or ()):
        if (schema := tool.function.parameters) is not None:
            where = f"tools.{index}.function.parameters"
            schemas[where] = schema
            if choice == "required" or tool.function.name == chosen or tool.function.strict:
                compiled[where] = schema
    if isinstance(request.response_format, JsonSchemaFormat):
        where = "response_format.json_schema.schema"
        schemas[where] = compiled[where] = request.response_format.json_schema.json_schema
    for where, schema in schemas.items():
        size = len(json.dumps(schema, ensure_ascii=False).encode())
        if size > bounds.max_schema_bytes:
            raise _error(where, f"may have {bounds.max_schema_bytes} bytes, got {size}", "invalid_json_schema")
    if problem := schema_problem(compiled):
        where, what = problem
        raise _error(where, f"is no JSON Schema that can be followed: {what}", "invalid_json_schema")


# --------------------------------------------------------------------------------------------------- forward


def _messages(messages: list[Message], neutralise: Neutralise) -> list[dict[str, Any]]:
    """Leading instructions become one system message; later ones keep their place."""
    first = next(index for index, message in enumerate(messages) if not isinstance(message, SystemMessage))
    texts = [_text(message.content).strip() for message in messages[:first]]
    cleaned = [_message(message, neutralise) for message in messages[first:]]
    if instructions := "\n\n".join(filter(None, texts)):
        cleaned.insert(0, {"role": "system", "content": neutralise(instructions)})
    return cleaned


def _message(message: Message, neutralise: Neutralise) -> dict[str, Any]:
    role = "system" if isinstance(message, SystemMessage) else message.role
    text = _text(message.content)
    if isinstance(message, AssistantMessage) and message.content is None:
        text = message.refusal or ""
    cleaned: dict[str, Any] = {"role": role, "content": neutralise(text)}
    if isinstance(message, ToolMessage):
        cleaned["tool_call_id"] = neutralise(message.tool_call_id)
    if isinstance(message, AssistantMessage) and message.tool_calls:
        cleaned["tool_calls"] = [
            {
                "id": neutralise(call.id),
                "type": "function",
                "function": {
                    "name": neutralise(call.function.name),
                    "arguments": _arguments(call.function.arguments, neutralise),
                },
            }
            for call in message.tool_calls
        ]
    return cleaned


def _text(content: str | Iterable[TextPart | RefusalPart] | None) -> str:
    """Parts joined by line ends, as vLLM joins them."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


def _arguments(text: str, neutralise: Neutralise) -> str:
    """Neutralise inside the JSON: vLLM decodes it for the template, and `\\u003c` would come out as `<` after us.

    A model's own call may be broken JSON, and refusing it would end the conversation for good: it becomes `{}`.
    """
    try:
        value = strict_json.decode(text.encode(), strict_json.LONG_INTEGERS)
    except (RequestError, ValueError):
        return "{}"
    return json.dumps(_clean(value, neutralise), ensure_ascii=False) if isinstance(value, dict) else "{}"


def _clean(value: Any, neutralise: Neutralise) -> Any:
    if isinstance(value, str):
        return neutralise(value)
    if isinstance(value, dict):
        return {neutralise(name): _clean(item, neutralise) for name, item in value.items()}
    if isinstance(value, list):
        return [_clean(item, neutralise) for item in value]
    return value


def _sampling(request: ChatRequest) -> dict[str, Any]:
    cleaned = {name: value for name in AS_SENT if (value := getattr(request, name)) is not None}
    if request.max_completion_tokens is not None:
        cleaned["max_completion_tokens"] = request.max_completion_tokens
    elif request.max_tokens is not None:
        cleaned["max_tokens"] = request.max_tokens
    if request.temperature is not None:
        cleaned["temperature"] = request.temperature if request.temperature >= GREEDY_BELOW else 0.0
    if request.stream and request.stream_options is not None:
        cleaned["stream_options"] = request.stream_options.model_dump(exclude_none=True)
    return cleaned


def _tools(request: ChatRequest, neutralise: Neutralise) -> dict[str, Any]:
    cleaned: dict[str, Any] = {}
    if request.tools is not None:
        cleaned["tools"] = [_tool(tool, neutralise) for tool in request.tools]
    if isinstance(request.tool_choice, ToolChoice):
        name = neutralise(request.tool_choice.function.name)
        cleaned["tool_choice"] = {"type": "function", "function": {"name": name}}
    elif request.tool_choice is not None:
        cleaned["tool_choice"] = request.tool_choice
    if request.response_format is not None:
        cleaned["response_format"] = _format(request.response_format, neutralise)
    return cleaned


def _tool(tool: Tool, neutralise: Neutralise) -> dict[str, Any]:
    sent = tool.function
    function: dict[str, Any] = {"name": neutralise(sent.name)}
    if sent.description is not None:
        function["description"] = neutralise(sent.description)
    if sent.parameters is not None:
        function["parameters"] = _clean(sent.parameters, neutralise)
    if sent.strict is not None:
        function["strict"] = sent.strict
    return {"type": "function", "function": function}


def _format(sent: ResponseFormat, neutralise: Neutralise) -> dict[str, Any]:
    if not isinstance(sent, JsonSchemaFormat):
        return {"type": sent.type}
    schema = sent.json_schema
    cleaned: dict[str, Any] = {
        "name": neutralise(schema.name),
        "schema": _clean(schema.json_schema, neutralise),
    }
    if schema.description is not None:
        cleaned["description"] = neutralise(schema.description)
    if schema.strict is not None:
        cleaned["strict"] = schema.strict
    return {"type": sent.type, "json_schema": cleaned}
