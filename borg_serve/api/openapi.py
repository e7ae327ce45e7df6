"""The OpenAPI 3.1 document of what the gate serves, made from the same models and tables that check a request.

It does not know which routes a process has turned off, nor values of a running server but the bounds it is given.
"""

from typing import Any

from pydantic.json_schema import models_json_schema

from borg_serve import __version__
from borg_serve.api.answers import answer_schemas
from borg_serve.api.chat import GREEDY_BELOW
from borg_serve.api.chat_models import ChatRequest
from borg_serve.api.fields import NEUTRAL
from borg_serve.api.messages_models import MessagesRequest
from borg_serve.api.protocol import Bounds
from borg_serve.api.request import Request
from borg_serve.api.responses_models import ResponsesRequest

__all__ = ["openapi"]

DESCRIPTION = """\
Every prompt begins with the server's identity; a request adds to it and cannot remove it.

Fields that are not described here are ignored, and named in the header `x-borg-ignored`.
Beyond what the schema can say: the last message is not the assistant's; a named `tool_choice` names one of `tools`;
`min_tokens` is at most `max_tokens`; a schema that the answer must follow (`response_format`, a forcing `tool_choice`,
`strict`) is valid, refers only to itself and is cheap to compile; objects nest 64 deep at most."""

LIKE_CHAT = """\
Answered as `/v1/chat/completions` answers the chat request that means the same, under the same bounds. Fields that are
not described here are ignored, and named in the header `x-borg-ignored`. Beyond what the schema can say: the last
{last} is not the assistant's; a tool that must be called is one of `tools`; a schema that the answer must follow is
valid, refers only to itself and is cheap to compile; objects nest 64 deep at most."""

SOME = {"type": "array", "minItems": 1}

ERRORS = {
    400: "The request is malformed, out of bounds, refused, or does not fit into the context.",
    401: "The API key is missing or unknown.",
    403: "The key may not read metrics.",
    404: "There is no such route or model.",
    405: "The route takes another method.",
    408: "The body, or the reading of the answer, was too slow.",
    413: "The body is too large.",
    415: "The body must be application/json.",
    429: "The key is over its rate, its number of requests at once or its budget. `Retry-After` says for how long.",
    500: "The server failed.",
    503: "The server is busy, not ready, or stopping. `Retry-After` says when to come back.",
    504: "The request's time ran out.",
}
GETS = (401, 404, 405, 429, 500, 503)
USED = (400, *GETS)
POSTS = tuple(status for status in ERRORS if status != 403)
DATE = {"type": "string", "format": "date"}
PERIOD = [
    {"name": name, "in": "query", "description": what, "schema": schema}
    for name, what, schema in (
        ("since", "A day in UTC, or an hour such as 2026-11-01T13; by default the first of this month.", DATE),
        ("until", "The day or the hour after the last.", DATE),
        ("by", "What each row adds up.", {"enum": ["day", "hour", "month"]}),
    )
]


def openapi(bounds: Bounds | None = None) -> dict[str, Any]:
    """Return the document for these bounds, as JSON."""
    bounds = bounds or Bounds()
    chat = _generate(
        "createChatCompletion", "Answer a conversation", DESCRIPTION, "ChatRequest", "ChatCompletion",
        "events that end with `[DONE]` or one error event",
    )  # fmt: skip
    response = _generate(
        "createResponse", "Answer in OpenAI's Responses protocol",
        LIKE_CHAT.format(last="item"), "ResponsesRequest", "Response",
        "events that end with `response.completed`, `response.incomplete` or `error`",
    )  # fmt: skip
    message = _generate(
        "createMessage", "Answer in Anthropic's Messages protocol",
        LIKE_CHAT.format(last="turn"), "MessagesRequest", "Message",
        "events that end with `message_stop` or `error`", error="MessagesError",
    )  # fmt: skip
    message["post"]["security"] = [{}, {"key": []}, {"x-api-key": []}]
    ready = _get("ready", "Whether requests are served.", _ref("Ready"), errors=(405, 500), open_to_all=True)
    ready["get"]["responses"]["503"] = {
        "description": "Not ready, and why.",
        "headers": {"retry-after": {"schema": {"type": "string"}}},
        "content": {"application/json": {"schema": _ref("Ready")}},
    }
    name = {"name": "id", "in": "path", "required": True, "schema": {"const": bounds.model}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "borg-serve", "version": __version__},
        "security": [{}, {"key": []}],
        "paths": {
            "/v1/chat/completions": chat,
            "/v1/responses": response,
            "/v1/messages": message,
            "/v1/responses/input_tokens": _count("countInputTokens", "ResponsesRequest", "ResponseInputTokens"),
            "/v1/messages/count_tokens": _count("countTokens", "MessagesRequest", "MessageTokens", "MessagesError"),
            "/v1/models": _get("listModels", "The model that is served.", _ref("ModelList")),
            "/v1/models/{id}": {"parameters": [name], **_get("getModel", "One model.", _ref("Model"))},
            "/v1/usage": {"parameters": PERIOD, **_get("usage", "What the key has used.", _ref("Usage"), errors=USED)},
            "/health": _get("health", "The process is alive.", _ref("Health"), errors=(405, 500), open_to_all=True),
            "/ready": ready,
            "/metrics": _get("metrics", "Prometheus metrics.", {"type": "string"}, "text/plain", (403, *GETS)),
            "/version": _get("version", "What runs here.", _ref("Version")),
            "/openapi.json": _get("openapi", "This document.", {"type": "object"}),
        },
        "components": {
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
            "schemas": {**_request_schemas(bounds), **answer_schemas()},
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
        "responses": {"200": success, **_errors(POSTS, error)},
    }
    return {"post": post}


def _count(operation: str, request: str, answer: str, error: str = "Error") -> dict[str, Any]:
    summary = "How many tokens the prompt of a request has, as its answer's usage would tell."
    body = {"required": True, "content": {"application/json": {"schema": _ref(request)}}}
    post = _get(operation, summary, _ref(answer), errors=POSTS)["get"]
    post["responses"] |= _errors(POSTS, error)
    return {"post": {**post, "requestBody": body}}


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
    _chat(schemas["ChatRequest"], bounds)
    _responses(schemas, bounds)
    _messages(schemas["MessagesRequest"], bounds)
    return schemas


def _bound(request: dict[str, Any], model: type[Request], bounds: Bounds) -> dict[str, Any]:
    """Add what the models leave to tables and to the configuration; return the fields."""
    fields: dict[str, Any] = request["properties"]
    for name, reason in model.REFUSED.items():
        neutral = [NEUTRAL[name]] if name in NEUTRAL else [False, "", [], {}]
        fields[name] = {"enum": [None, *neutral], "description": f"Refused: {reason}."}
    for name, (keyword, bound) in model.LIMITS.items():
        kind = "array" if keyword == "maxItems" else "integer"
        _branch(fields[name], kind)[keyword] = getattr(bounds, bound)
    if "stop_token_ids" in fields:
        _branch(fields["stop_token_ids"], "array")["items"]["maximum"] = bounds.vocab_size - 1
    fields["model"] = {"enum": [None, bounds.model], "description": "The only model; may be left out."}
    if bounds.model_aliases:
        names = f"{bounds.model}, or a name such as {', '.join(bounds.model_aliases)}"
        fields["model"] = {"type": ["string", "null"], "description": f"{names}; may be left out."}
    return fields


def _chat(request: dict[str, Any], bounds: Bounds) -> None:
    _bound(request, ChatRequest, bounds)
    # Three are what Schemathesis can still turn into examples.
    request["allOf"] = [
        _implies({"top_logprobs": {"type": "integer", "minimum": 1}}, {"logprobs": {"const": True}}),
        _implies({"tool_choice": {"not": {"enum": [None, "none", "auto"]}}}, {"tools": SOME}),
        _implies(
            {"n": {"type": "integer", "minimum": 2}, "temperature": {"type": "number"}},
            {"temperature": {"minimum": GREEDY_BELOW}},
        ),
    ]


def _responses(schemas: dict[str, Any], bounds: Bounds) -> None:
    request = schemas["ResponsesRequest"]
    fields = _bound(request, ResponsesRequest, bounds)
    items = _branch(fields["input"], "array")
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
    _bound(request, MessagesRequest, bounds)
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
