"""OpenAI's chat protocol: a request's bytes as the body that vLLM gets, or the reason why not.

What fields must be to each other, and the cleaning of messages. It does not know HTTP, vLLM's classes, or which
literals are control tokens: the caller's `neutralise` breaks those.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from borg_serve.api import strict_json
from borg_serve.api.chat_answer import ChatAnswer
from borg_serve.api.chat_models import (
    AssistantMessage,
    ChatRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    Message,
    Sampling,
    SystemMessage,
    Tool,
    ToolCall,
    ToolChoice,
    ToolMessage,
    joined,
)
from borg_serve.api.errors import ApiError, invalid, shown
from borg_serve.api.json_schema import schema_problem
from borg_serve.api.protocol import Bounds, Neutralise
from borg_serve.api.request import Strict, read, validated
from borg_serve.identity.control_tokens import neutralise_json

__all__ = ["PATH", "error_body", "field_name", "gathered", "parse", "translated"]

PATH = "/v1/chat/completions"
GREEDY_BELOW = 0.01
"""Temperatures below this are sent as 0: vLLM would raise them to this value instead of decoding greedily."""
AS_SENT = (*Sampling.model_fields, "n", "logprobs", "top_logprobs")
LENGTHS = ("min_tokens", "max_tokens", "max_completion_tokens")


# -------------------------------------------------------------------------------------------------- protocol


def parse(raw: bytes, bounds: Bounds, neutralise: Neutralise) -> tuple[dict[str, Any], ChatAnswer]:
    """Return the chat request for vLLM, and what makes the client's answer of vLLM's. Raises ApiError.

    The request is bounded, its roles are checked, and every string that can reach the prompt is neutralised.
    Sampling fields that the client left out stay out: vLLM has the server's defaults, and knows the context left.
    """
    request, ignored = read(raw, ChatRequest, bounds)
    body = _body(request, bounds, neutralise)
    if isinstance(form := request.response_format, JsonSchemaFormat) and body["response_format"]["type"] != form.type:
        ignored = (*ignored, "response_format.json_schema.schema")
    return body, ChatAnswer(ignored, gathered(body))


def error_body(status: int, error: Mapping[str, Any], request_id: str) -> dict[str, Any]:
    """Return an error in OpenAI's shape."""
    return {"error": error}


def field_name(chat_field: str) -> str:
    """Return the name of a field."""
    return chat_field


def gathered(body: dict[str, Any]) -> bool:
    """Ask for a stream where a document may hold calls; whether it does.

    Of a call that was cut off, vLLM's documents have the raw text, and its streams the call as far as it came.
    """
    if body.get("stream") or "tools" not in body or body.get("tool_choice") == "none":
        return False
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    return True


def translated(
    chat: Mapping[str, Any], bounds: Bounds, neutralise: Neutralise, name_of: Callable[[str], str]
) -> dict[str, Any]:
    """Return the chat request for vLLM, made from another protocol's request and checked as every chat request is.

    `chat` may hold nulls. Raises ApiError with the other protocol's field, which is `name_of` chat's field.
    """
    try:
        return _body(validated(chat, ChatRequest, bounds)[0], bounds, neutralise)
    except ApiError as error:
        if error.param is None:
            raise
        param = name_of(error.param)
        message = error.message
        if message.startswith(error.param):
            message = f"{param}{message[len(error.param) :]}"
        raise ApiError(error.status, message, error.type, param, error.code) from None


def _body(request: ChatRequest, bounds: Bounds, neutralise: Neutralise) -> dict[str, Any]:
    _check_together(request, bounds)
    _check_conversation(request.messages)
    _check_schemas(request, bounds)
    return {
        "model": bounds.model,
        "messages": _messages(request.messages, neutralise),
        **_sampling(request, bounds),
        **_tools(request, neutralise),
    }


# ---------------------------------------------------------------------------------------------------- checks


def _check_together(request: ChatRequest, bounds: Bounds) -> None:
    """What the fields must be to each other; the OpenAPI document says the same where JSON Schema can."""
    model, most = request.model, request.max_completion_tokens or request.max_tokens
    if model is not None and not bounds.serves(model):
        what = f"The model {shown(model)} does not exist. This server has {shown(bounds.model)}."
        raise ApiError(404, what, param="model", code="model_not_found")
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs", "is allowed only when logprobs is true")
    if most is not None and (request.min_tokens or 0) > most:
        raise invalid("min_tokens", f"must be at most max_tokens ({most}), got {request.min_tokens}")
    if (request.n or 1) > 1 and request.temperature is not None and request.temperature < GREEDY_BELOW:
        # vLLM refuses it too.
        raise invalid(
            "n", f"must be 1 when temperature is below {GREEDY_BELOW} (all would be the same), got {request.n}"
        )
    for index, token_id in enumerate(request.stop_token_ids or ()):
        if token_id >= bounds.vocab_size:
            what = f"must be below {bounds.vocab_size}, the size of the vocabulary, got {shown(token_id)}"
            raise invalid(f"stop_token_ids.{index}", what)
    _check_tool_choice(request)


def _check_tool_choice(request: ChatRequest) -> None:
    choice = request.tool_choice
    if choice in (None, "none", "auto"):
        return
    tools = request.known_tools
    if not tools:
        raise invalid("tool_choice", "is allowed only when tools are given that the client runs")
    if isinstance(choice, ToolChoice) and choice.function.name not in {tool.function.name for tool in tools.values()}:
        raise invalid("tool_choice.function.name", f"must name one of the tools, got {shown(choice.function.name)}")


def _check_conversation(messages: list[Message]) -> None:
    if isinstance(messages[-1], AssistantMessage):
        # Last of all, an assistant's message would be words put into its mouth.
        what = 'must not be "assistant" in the last message, because the assistant speaks next'
        raise invalid(f"messages.{len(messages) - 1}.role", what)


def _is_forced(tool: Tool, choice: Literal["none", "auto", "required"] | ToolChoice | None) -> bool:
    """Whether the answer may have to be a call of this tool."""
    return tool.function.name == choice.function.name if isinstance(choice, ToolChoice) else choice == "required"


def _check_schemas(request: ChatRequest, bounds: Bounds) -> None:
    """Bound the size of every schema, and the cost of those that the engine compiles to hold the answer to them."""
    schemas, compiled = {}, {}
    for index, tool in request.known_tools.items():
        if (schema := tool.function.parameters) is not None:
            where = f"tools.{index}.function.parameters"
            schemas[where] = schema
            if _is_forced(tool, request.tool_choice) or tool.function.strict:
                compiled[where] = schema
    if isinstance(request.response_format, JsonSchemaFormat):
        where, form = "response_format.json_schema.schema", request.response_format.json_schema
        schemas[where] = form.json_schema
        if form.strict is not False:
            compiled[where] = form.json_schema
    for where, schema in schemas.items():
        size = len(json.dumps(schema, ensure_ascii=False).encode())
        if size > bounds.max_schema_bytes:
            raise invalid(where, f"may have {bounds.max_schema_bytes} bytes, got {size}", "invalid_json_schema")
    if problem := schema_problem(compiled):
        where, what = problem
        raise invalid(where, f"is no JSON Schema that can be followed: {what}", "invalid_json_schema")


# --------------------------------------------------------------------------------------------------- forward


def _messages(messages: list[Message], neutralise: Neutralise) -> list[dict[str, Any]]:
    """Leading instructions become one system message; later ones keep their place."""
    said = (index for index, message in enumerate(messages) if not isinstance(message, SystemMessage))
    first = next(said, len(messages))
    texts = [joined(message.content).strip() for message in messages[:first]]
    cleaned = [_message(message, neutralise) for message in messages[first:]]
    if (instructions := "\n\n".join(filter(None, texts))) or not cleaned:
        cleaned.insert(0, {"role": "system", "content": neutralise(instructions)})
    return cleaned


def _message(message: Message, neutralise: Neutralise) -> dict[str, Any]:
    role = "system" if isinstance(message, SystemMessage) else message.role
    text = joined(message.content)
    if isinstance(message, AssistantMessage) and message.content is None:
        text = message.refusal or ""
    cleaned: dict[str, Any] = {"role": role, "content": neutralise(text)}
    if isinstance(message, ToolMessage):
        cleaned["tool_call_id"] = neutralise(message.tool_call_id)
    if isinstance(message, AssistantMessage) and message.tool_calls:
        cleaned["tool_calls"] = [_call(call, neutralise) for call in message.tool_calls]
    return cleaned


def _call(call: ToolCall, neutralise: Neutralise) -> dict[str, Any]:
    name, arguments = call.function.name, call.function.arguments
    function = {"name": neutralise(name), "arguments": _arguments(arguments, neutralise)}
    return {"id": neutralise(call.id), "type": "function", "function": function}


def _arguments(text: str, neutralise: Neutralise) -> str:
    """Neutralise inside the JSON: vLLM decodes it for the template, and `\\u003c` would come out as `<` after us.

    A model's own call may be broken JSON, and refusing it would end the conversation for good: it becomes `{}`.
    """
    try:
        value = strict_json.decode(text.encode(), long_integers=True)
    except ApiError:
        return "{}"
    return json.dumps(neutralise_json(value, neutralise), ensure_ascii=False) if isinstance(value, dict) else "{}"


def _sampling(request: ChatRequest, bounds: Bounds) -> dict[str, Any]:
    cleaned = {name: value for name in AS_SENT if (value := getattr(request, name)) is not None}
    lengths = {name: min(value, bounds.max_tokens) for name in LENGTHS if (value := getattr(request, name)) is not None}
    if "max_completion_tokens" in lengths:
        lengths.pop("max_tokens", None)
    cleaned |= lengths
    if request.temperature is not None and request.temperature < GREEDY_BELOW:
        cleaned["temperature"] = 0.0
    if request.stream and request.stream_options is not None:
        cleaned["stream_options"] = request.stream_options.model_dump(exclude_none=True)
    return cleaned


def _tools(request: ChatRequest, neutralise: Neutralise) -> dict[str, Any]:
    cleaned: dict[str, Any] = {}
    choice = request.tool_choice
    if request.known_tools:
        # vLLM 0.32 holds the arguments of a forced call to their schema only where the tool says `strict`. A forced
        # call follows it whatever the client says; elsewhere `strict: false` says what its absence says.
        cleaned["tools"] = [
            {
                "type": "function",
                "function": {
                    name: value for name, value in _fields(tool.function, neutralise).items() if value is not False
                }
                | ({"strict": True} if _is_forced(tool, choice) else {}),
            }
            for tool in request.known_tools.values()
        ]
    if isinstance(choice, ToolChoice):
        cleaned["tool_choice"] = {"type": "function", "function": _fields(choice.function, neutralise)}
    elif choice is not None and request.known_tools:
        cleaned["tool_choice"] = choice
    form = request.response_format
    if isinstance(form, JsonSchemaFormat):
        sent = form.json_schema
        if sent.strict is False and schema_problem({"": sent.json_schema}):
            form = JsonObjectFormat(type="json_object")  # a wish that the engine cannot hold the answer to
    if isinstance(form, JsonSchemaFormat):
        cleaned["response_format"] = {"type": form.type, "json_schema": _fields(form.json_schema, neutralise)}
    elif form is not None:
        cleaned["response_format"] = {"type": form.type}
    return cleaned


def _fields(sent: Strict, neutralise: Neutralise) -> dict[str, Any]:
    """Return the fields that were sent, with every string in their values neutralised."""
    fields = sent.model_dump(exclude_none=True, by_alias=True)
    return {name: neutralise_json(value, neutralise) for name, value in fields.items()}
