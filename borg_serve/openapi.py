"""The OpenAPI 3.1 document of what the gate serves, made from the same models and tables that check a request.

It does not know which routes a process has turned off, nor values of a running server but the bounds it is given.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic.json_schema import models_json_schema

from borg_serve import __version__, messages, responses
from borg_serve.chat import Bounds, ChatRequest
from borg_serve.messages import MessagesRequest
from borg_serve.refusal import REFUSED, RefusedField
from borg_serve.responses import ResponsesRequest
from borg_serve.schema import GREEDY_BELOW

__all__ = ["openapi"]

DESCRIPTION = """\
Every prompt begins with the server's identity; a request adds to it and cannot remove it.

Beyond what the schema can say: the last message is of the user or a tool; a named `tool_choice` names one of `tools`;
`min_tokens` is at most `max_tokens`; a schema that the answer must follow (`response_format`, a forcing `tool_choice`,
`strict`) is valid, refers only to itself and is cheap to compile; objects nest 64 deep at most."""

LIKE_CHAT = """\
Answered as `/v1/chat/completions` answers the chat request that means the same, under the same bounds. Beyond what the
schema can say: the last {last}; a tool that must be called is one of `tools`; a schema that the answer must follow is
valid, refers only to itself and is cheap to compile; objects nest 63 deep at most."""

# Elsewhere in a request nulls are dropped before it is checked, whatever their names.
NULLS_KEPT = (
    "ChosenFunction",
    "JsonObjectFormat",
    "JsonSchema",
    "JsonSchemaFormat",
    "SchemaFormat",
    "StreamOptions",
    "TextConfig",
    "TextFormat",
    "Tool",
    "ToolChoice",
    "ToolFunction",
)
NULL = {"type": "null"}
USER: dict[str, Any] = {"type": "object", "required": ["role"], "properties": {"role": {"const": "user"}}}
SOME = {"type": "array", "minItems": 1}

ERRORS = {
    400: "The request is malformed, out of bounds, refused, or does not fit into the context.",
    401: "The API key is missing or unknown.",
    404: "There is no such route or model.",
    405: "The route takes another method.",
    408: "The body, or the reading of the answer, was too slow.",
    413: "The body is too large.",
    415: "The body must be application/json.",
    429: "The key is over its rate or its number of requests at once. `Retry-After` says when to come back.",
    500: "The server failed.",
    503: "The server is busy, not ready, or stopping. `Retry-After` says when to come back.",
    504: "The request's time ran out.",
}
GETS = (401, 404, 405, 429, 500, 503)


def openapi(bounds: Bounds | None = None) -> dict[str, Any]:
    """Return the document for these bounds, as JSON."""
    bounds = bounds or Bounds()
    chat = _generate(
        "createChatCompletion", "Answer a conversation", DESCRIPTION, "ChatRequest", "ChatCompletion",
        "events that end with `[DONE]` or one error event",
    )  # fmt: skip
    response = _generate(
        "createResponse", "Answer in OpenAI's Responses protocol",
        LIKE_CHAT.format(last="item is a user's message or a function's output"), "ResponsesRequest", "Response",
        "events that end with `response.completed`, `response.incomplete` or `error`",
    )  # fmt: skip
    message = _generate(
        "createMessage", "Answer in Anthropic's Messages protocol",
        LIKE_CHAT.format(last="turn is the user's"), "MessagesRequest", "Message",
        "events that end with `message_stop` or `error`", error="MessagesError",
    )  # fmt: skip
    message["post"]["security"] = [{}, {"key": []}, {"x-api-key": []}]
    ready = _get("ready", "Whether requests are served.", _ref("Ready"), errors=(405, 500), open_to_all=True)
    ready["get"]["responses"]["503"] = {
        "description": "Not ready, and why.",
        "headers": {"retry-after": {"schema": {"type": "string"}}},
        "content": {"application/json": {"schema": _ref("Ready")}},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "borg-serve", "version": __version__},
        "security": [{}, {"key": []}],
        "paths": {
            "/v1/chat/completions": chat,
            "/v1/responses": response,
            "/v1/messages": message,
            "/v1/models": _get("listModels", "The model that is served.", _ref("ModelList")),
            "/health": _get("health", "The process is alive.", _ref("Health"), errors=(405, 500), open_to_all=True),
            "/ready": ready,
            "/metrics": _get("metrics", "Prometheus metrics.", {"type": "string"}, "text/plain"),
            "/version": _get("version", "What runs here.", _ref("Version")),
            "/openapi.json": _get("openapi", "This document.", {"type": "object"}),
        },
        "components": {
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
            "schemas": {**_request_schemas(bounds), **ANSWERS},
        },
    }


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _get(
    operation: str,
    summary: str,
    schema: dict[str, Any],
    media: str = "application/json",
    errors: tuple[int, ...] = GETS,
    open_to_all: bool = False,
) -> dict[str, Any]:
    answer = {"description": summary, "content": {media: {"schema": schema}}}
    get = {"operationId": operation, "summary": summary, "responses": {"200": answer, **_errors(errors)}}
    return {"get": {**get, "security": []} if open_to_all else get}


def _generate(
    operation: str, summary: str, description: str, request: str, answer: str, stream: str, error: str = "Error"
) -> dict[str, Any]:
    answers = {"application/json": {"schema": _ref(answer)}, "text/event-stream": {"schema": {"type": "string"}}}
    success = {
        "description": f"The answer; with `stream: true`, {stream}.",
        "headers": {"x-request-id": {"schema": {"type": "string"}}},
        "content": answers,
    }
    post = {
        "operationId": operation,
        "summary": f"{summary}, whole or as a stream of server-sent events.",
        "description": description,
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(request)}}},
        "responses": {"200": success, **_errors(tuple(ERRORS), error)},
    }
    return {"post": post}


def _errors(statuses: tuple[int, ...], schema: str = "Error") -> dict[str, Any]:
    content = {"application/json": {"schema": _ref(schema)}}
    retry = {"headers": {"retry-after": {"schema": {"type": "string"}}}}
    return {
        str(status): {"description": ERRORS[status], "content": content, **(retry if status in (429, 503) else {})}
        for status in statuses
    }


# ---------------------------------------------------------------------------------------------------- request


def _request_schemas(bounds: Bounds) -> dict[str, Any]:
    requests = (ChatRequest, ResponsesRequest, MessagesRequest)
    inputs = [(model, "validation") for model in requests]
    _, document = models_json_schema(inputs, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas: dict[str, Any] = document["$defs"]
    for name in schemas.keys() - set(NULLS_KEPT):
        schemas[name]["additionalProperties"] = NULL
    _chat(schemas["ChatRequest"], bounds)
    _responses(schemas, bounds)
    _messages(schemas["MessagesRequest"], bounds)
    return schemas


def _bound(
    request: dict[str, Any], bounds: Bounds, refused: Mapping[str, RefusedField], limits: Iterable[tuple[str, str, int]]
) -> dict[str, Any]:
    """Add what the models leave to tables and to the configuration; return the fields."""
    fields: dict[str, Any] = request["properties"]
    for name, field in refused.items():
        fields[name] = {"enum": [None, *field.same_as_absent], "description": f"Refused: {field.reason}."}
    for name, keyword, limit in limits:
        kind = "array" if keyword == "maxItems" else "integer"
        _branch(fields[name], kind)[keyword] = limit
    fields["model"] = {"enum": [None, bounds.model], "description": "The only model; may be left out."}
    return fields


def _chat(request: dict[str, Any], bounds: Bounds) -> None:
    fields = _bound(request, bounds, REFUSED, bounds.limits())
    _branch(fields["stop_token_ids"], "array")["items"]["maximum"] = bounds.vocab_size - 1
    fields["messages"]["contains"] = USER
    # Three are what Schemathesis can still turn into examples.
    request["allOf"] = [
        _implies({"top_logprobs": {"type": "integer", "minimum": 1}}, {"logprobs": {"const": True}}),
        _implies({"tool_choice": {"not": {"enum": [None, "none"]}}}, {"tools": {"type": "array"}}),
        _implies(
            {"n": {"type": "integer", "minimum": 2}, "temperature": {"type": "number"}},
            {"temperature": {"minimum": GREEDY_BELOW}},
        ),
    ]


def _responses(schemas: dict[str, Any], bounds: Bounds) -> None:
    request = schemas["ResponsesRequest"]
    fields = _bound(request, bounds, responses.REFUSED_HERE, responses.limits(bounds))
    items = _branch(fields["input"], "array")
    items["contains"] = USER
    del items["items"]["discriminator"]  # a message need not say its type
    for name in ("SystemItem", "UserItem", "AssistantItem"):
        schemas[name]["required"].remove("type")
        schemas[name]["properties"]["type"] = {"enum": [None, "message"]}
    logprobs = {"include": {"type": "array", "contains": {"const": "message.output_text.logprobs"}}}
    request["allOf"] = [
        _implies({"top_logprobs": {"type": "integer", "minimum": 1}}, logprobs),
        _implies({"tool_choice": {"not": {"enum": [None, "none", "auto"]}}}, {"tools": SOME}),
    ]


def _messages(request: dict[str, Any], bounds: Bounds) -> None:
    fields = _bound(request, bounds, messages.REFUSED_HERE, messages.limits(bounds))
    text = {"required": ["type"], "properties": {"type": {"const": "text"}}}
    says = {"content": {"if": {"type": "array"}, "then": {"contains": text}}}
    fields["messages"]["contains"] = {**USER, "properties": {**USER["properties"], **says}}
    forced = {"type": "object", "required": ["type"], "properties": {"type": {"enum": ["any", "tool"]}}}
    request["allOf"] = [_implies({"tool_choice": forced}, {"tools": SOME})]


def _branch(schema: dict[str, Any], kind: str) -> dict[str, Any]:
    """The branch of an optional field's schema that has this type."""
    branches: list[dict[str, Any]] = [schema, *schema.get("anyOf", ())]
    return next(branch for branch in branches if branch.get("type") == kind)


def _implies(given: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    """If the fields given are there and as described, so are the others."""
    return {
        "if": {"required": list(given), "properties": given},
        "then": {"required": list(then), "properties": then},
    }


# ---------------------------------------------------------------------------------------------------- answers


def _object(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties}


_TEXT, _COUNT, _OPTIONAL_TEXT = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": ["string", "null"]}
_ERROR = _object(
    "message", "type", "param", "code", message=_TEXT, type=_TEXT, param=_OPTIONAL_TEXT, code=_OPTIONAL_TEXT
)
_CALL = _object(
    "id", "type", "function",
    id=_TEXT, type={"const": "function"}, function=_object("name", "arguments", name=_TEXT, arguments=_TEXT),
)  # fmt: skip
_MESSAGE = _object(
    "role", role={"const": "assistant"}, content=_OPTIONAL_TEXT, tool_calls={"type": "array", "items": _CALL}
)
_CHOICE = _object(
    "index", "message", "finish_reason",
    index=_COUNT, message=_MESSAGE, logprobs={"type": ["object", "null"]},
    finish_reason={"enum": ["stop", "length", "tool_calls"]},
)  # fmt: skip
_USAGE = _object(
    "prompt_tokens", "completion_tokens", "total_tokens",
    prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT,
    prompt_tokens_details={"anyOf": [_object(cached_tokens={"type": ["integer", "null"]}), NULL]},
)  # fmt: skip
_MODEL = _object("id", "object", id=_TEXT, object={"const": "model"}, max_model_len={"type": ["integer", "null"]})

_DETAILS = _object("cached_tokens", cached_tokens=_COUNT)
_RESPONSE_USAGE = _object(
    "input_tokens", "input_tokens_details", "output_tokens", "total_tokens",
    input_tokens=_COUNT, input_tokens_details=_DETAILS, output_tokens=_COUNT, total_tokens=_COUNT,
)  # fmt: skip
_OUTPUT_TEXT = _object("type", "text", type={"const": "output_text"}, text=_TEXT)
_ITEM = {
    "oneOf": [
        _object(
            "id", "type", "role", "content", "status",
            id=_TEXT, type={"const": "message"}, role={"const": "assistant"}, status=_TEXT,
            content={"type": "array", "items": _OUTPUT_TEXT},
        ),
        _object(
            "id", "type", "call_id", "name", "arguments", "status",
            id=_TEXT, type={"const": "function_call"}, call_id=_TEXT, name=_TEXT, arguments=_TEXT, status=_TEXT,
        ),
    ]
}  # fmt: skip
_BLOCK = {
    "oneOf": [
        _object("type", "text", type={"const": "text"}, text=_TEXT),
        _object(
            "type", "id", "name", "input", type={"const": "tool_use"}, id=_TEXT, name=_TEXT, input={"type": "object"}
        ),
    ]
}
_MESSAGE_USAGE = _object(
    "input_tokens", "cache_read_input_tokens", "output_tokens",
    input_tokens=_COUNT, cache_read_input_tokens=_COUNT, output_tokens=_COUNT,
)  # fmt: skip

ANSWERS: dict[str, Any] = {
    "Error": _object("error", error=_ERROR),
    "MessagesError": _object(
        "type", "error", "request_id",
        type={"const": "error"}, error=_object("type", "message", type=_TEXT, message=_TEXT), request_id=_TEXT,
    ),
    "Response": _object(
        "id", "object", "created_at", "status", "model", "output", "usage", "incomplete_details", "error",
        id=_TEXT, object={"const": "response"}, created_at=_COUNT, status={"enum": ["completed", "incomplete"]},
        model=_TEXT, output={"type": "array", "minItems": 1, "items": _ITEM}, usage=_RESPONSE_USAGE,
        incomplete_details={"type": ["object", "null"]}, error=NULL,
    ),
    "Message": _object(
        "id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage",
        id=_TEXT, type={"const": "message"}, role={"const": "assistant"}, model=_TEXT,
        content={"type": "array", "minItems": 1, "items": _BLOCK}, stop_sequence=_OPTIONAL_TEXT, usage=_MESSAGE_USAGE,
        stop_reason={"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
    ),
    "ChatCompletion": _object(
        "id", "object", "created", "model", "choices", "usage",
        id=_TEXT, object={"const": "chat.completion"}, created=_COUNT, model=_TEXT,
        choices={"type": "array", "minItems": 1, "items": _CHOICE}, usage=_USAGE,
    ),
    "ModelList": _object("object", "data", object={"const": "list"}, data={"type": "array", "items": _MODEL}),
    "Health": _object("status", status={"const": "alive"}),
    "Ready": _object("status", status=_TEXT, reason=_TEXT),
    "Version": _object(
        "borg_serve", "vllm", "model", "identity", "checkpoint",
        borg_serve=_TEXT, vllm=_TEXT, ray=_OPTIONAL_TEXT, model=_TEXT,
        identity=_object("sha256", "tokens", sha256=_TEXT, tokens=_COUNT),
        checkpoint=_object("root", root=_OPTIONAL_TEXT),
    ),
}  # fmt: skip
