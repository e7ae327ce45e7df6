"""The OpenAPI document says what the code does: what it forbids is refused, and hardly anything that it allows is."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings

from borg_serve.chat import ChatRequest
from borg_serve.openapi import openapi
from borg_serve.refusal import REFUSED
from borg_serve.schema import Bounds, RequestError, parse_chat
from tests.chats import ACCEPTED, BOUNDS, USER, broken

jsonschema = pytest.importorskip("jsonschema")
DOCUMENT = openapi(BOUNDS)
REQUEST = jsonschema.Draft202012Validator({"$ref": "#/components/schemas/ChatRequest", **DOCUMENT})
BEYOND_JSON_SCHEMA = (
    "must be user or tool in the last message",
    "must name one of the tools",
    "must be at most max_tokens",
    "is no JSON Schema that can be followed",
    "may nest",
)
"""What the document states in words only."""


def refusal(request: Any) -> str | None:
    try:
        parse_chat(json.dumps(request).encode(), BOUNDS, str)
    except RequestError as error:
        return error.message
    return None


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from nodes(item)
    elif isinstance(value, list):
        for item in value:
            yield from nodes(item)


@settings(max_examples=30, deadline=None)
@given(ACCEPTED)
def test_openapi_allows_what_is_served(request: dict[str, Any]) -> None:
    assert refusal(request) is None
    REQUEST.validate(request)


@settings(max_examples=80, deadline=None)
@given(broken())
def test_openapi_and_code_agree(request: Any) -> None:
    said = refusal(request)
    if REQUEST.is_valid(request):
        assert said is None or any(reason in said for reason in BEYOND_JSON_SCHEMA)
    else:
        assert said is not None


@pytest.mark.parametrize(
    ("field", "most"),
    [
        ("max_tokens", 8192),
        ("max_completion_tokens", 8192),
        ("min_tokens", 8192),
        ("n", 4),
        ("top_k", 1_000_000),
        ("top_logprobs", 20),
        ("temperature", 2),
        ("top_p", 1),
        ("seed", 2**63 - 1),
    ],
)
def test_openapi_has_the_bounds_of_the_code(field: str, most: int) -> None:
    base = {"messages": [USER], "logprobs": True}
    for request, fits in (({**base, field: most}, True), ({**base, field: most + 1}, False)):
        assert REQUEST.is_valid(request) is fits
        assert (refusal(request) is None) is fits


@pytest.mark.parametrize(
    "request_",
    [
        {"messages": [{"role": "system", "content": ""}]},
        {"messages": [USER], "top_logprobs": 1},
        {"messages": [USER], "tool_choice": "auto"},
        {"messages": [USER], "n": 2, "temperature": 0},
        {"messages": [USER], "stop": ["a"] * 5},
        {"messages": [USER], "stop_token_ids": [49_152]},
        {"messages": [USER], "model": "other"},
        {"messages": [USER], "unknown": 0},
        {"messages": [USER], "echo": True},
    ],
)
def test_openapi_forbids_what_is_refused(request_: dict[str, Any]) -> None:
    assert refusal(request_) is not None
    assert not REQUEST.is_valid(request_)


def test_openapi_names_every_field_accepted_or_refused() -> None:
    fields = DOCUMENT["components"]["schemas"]["ChatRequest"]["properties"]
    assert set(fields) == {*ChatRequest.model_fields, *REFUSED}
    assert fields["logit_bias"]["description"] == f"Refused: {REFUSED['logit_bias'].reason}."


def test_openapi_follows_the_bounds_it_is_given() -> None:
    small = openapi(Bounds(model="m", max_tokens=10, max_messages=3))["components"]["schemas"]["ChatRequest"]
    assert small["properties"]["model"]["enum"] == [None, "m"]
    assert small["properties"]["max_tokens"]["anyOf"][0]["maximum"] == 10
    assert small["properties"]["messages"]["maxItems"] == 3
    assert openapi(BOUNDS) == DOCUMENT


def test_openapi_references_resolve_and_schemas_are_schemas() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    references = {node["$ref"] for node in nodes(DOCUMENT) if isinstance(node.get("$ref"), str)}
    assert references <= {f"#/components/schemas/{name}" for name in schemas}
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_openapi_is_json_and_describes_each_answer() -> None:
    assert json.loads(json.dumps(DOCUMENT)) == DOCUMENT
    operations = [item for path in DOCUMENT["paths"].values() for item in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations) == 9
    for operation in operations:
        assert all(answer["description"] for answer in operation["responses"].values())
        assert operation["responses"]["200"]["content"]


def test_openapi_error_is_the_one_that_clients_get() -> None:
    error = jsonschema.Draft202012Validator({"$ref": "#/components/schemas/Error", **copy.deepcopy(DOCUMENT)})
    error.validate(RequestError(400, "no").body())
    assert not error.is_valid({"error": {"message": "no"}})
