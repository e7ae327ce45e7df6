"""The OpenAPI document says what the code does: what it forbids is refused, and hardly anything that it allows is."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from borg_serve.api.errors import ApiError
from borg_serve.api.openapi import openapi
from borg_serve.api.protocol import Bounds
from tests.chats import BOUNDS, USER, broken, texts
from tests.protocols import CASES, CHAT, MESSAGES, RESPONSES, Case

jsonschema = pytest.importorskip("jsonschema")
DOCUMENT = openapi(BOUNDS)
BEYOND_JSON_SCHEMA = (
    "in the last message",
    "only when tools are given that the client runs",
    "must name one of the tools",
    "must be at most max_tokens",
    "is no JSON Schema that can be followed",
    "may nest",
)
"""What the document states in words only."""


def validator(case: Case) -> Any:
    return jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{case.model.__name__}", **DOCUMENT})


def refusal(case: Case, request: Any) -> str | None:
    try:
        case.protocol.parse(json.dumps(request).encode(), BOUNDS, str)
    except ApiError as error:
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


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@settings(max_examples=30)
@given(data=st.data())
def test_openapi_allows_what_is_served(case: Case, data: st.DataObject) -> None:
    request = {**case.plain, **data.draw(case.requests(texts))}
    assert refusal(case, request) is None
    validator(case).validate(request)


@settings(max_examples=80)
@given(broken())
def test_openapi_and_code_agree(request: Any) -> None:
    said = refusal(CHAT, request)
    if validator(CHAT).is_valid(request):
        assert said is None or any(reason in said for reason in BEYOND_JSON_SCHEMA)
    else:
        assert said is not None


@pytest.mark.parametrize(
    ("field", "most"),
    [
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
        assert validator(CHAT).is_valid(request) is fits
        assert (refusal(CHAT, request) is None) is fits


FORBIDDEN: list[tuple[Case, dict[str, Any]]] = [
    (CHAT, {"messages": [USER], "top_logprobs": 1}),
    (CHAT, {"messages": [USER], "n": 2, "temperature": 0}),
    (CHAT, {"messages": [USER], "stop": ["a"] * 5}),
    (CHAT, {"messages": [USER], "stop_token_ids": [49_152]}),
    (CHAT, {"messages": [USER], "model": "other"}),
    (CHAT, {"messages": [USER], "echo": True}),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
    (RESPONSES, {"input": [{"type": "item_reference", "id": "x"}, {"role": "user", "content": "x"}]}),
    (RESPONSES, {"input": "x", "previous_response_id": "x"}),
    (RESPONSES, {"input": "x", "tools": [], "tool_choice": "required"}),
    (RESPONSES, {"input": "x", "top_logprobs": 1}),
    (RESPONSES, {"input": "x", "stop_token_ids": [49_152]}),
    (RESPONSES, {"input": "x", "model": "y"}),
    (RESPONSES, {}),
    (MESSAGES, {"max_tokens": 9, "messages": [{"role": "user", "content": [{"type": "image"}]}]}),
    (MESSAGES, {"max_tokens": 9, "messages": [USER], "tools": [], "tool_choice": {"type": "any"}}),
    (MESSAGES, {"max_tokens": 9, "messages": [USER], "stop_sequences": ["x"] * 5}),
    (MESSAGES, {"max_tokens": 9, "messages": [USER], "model": "y"}),
]


@pytest.mark.parametrize(("case", "request_"), FORBIDDEN)
def test_openapi_forbids_what_is_refused(case: Case, request_: dict[str, Any]) -> None:
    assert refusal(case, request_) is not None
    assert not validator(case).is_valid(request_)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_openapi_names_every_field_accepted_or_refused(case: Case) -> None:
    fields = DOCUMENT["components"]["schemas"][case.model.__name__]["properties"]
    assert set(fields) == {*case.model.model_fields, *case.model.REFUSED}
    assert fields["logit_bias"]["description"] == f"Refused: {case.model.REFUSED['logit_bias']}."


def test_openapi_follows_the_bounds_it_is_given() -> None:
    small = openapi(Bounds(model="m", max_messages=3))["components"]["schemas"]["ChatRequest"]
    assert small["properties"]["model"]["enum"] == [None, "m"]
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
    operations = [path[method] for path in DOCUMENT["paths"].values() for method in ("get", "post") if method in path]
    assert len({operation["operationId"] for operation in operations}) == len(operations) == 13
    for operation in operations:
        assert all(answer["description"] for answer in operation["responses"].values())
        assert operation["responses"]["200"]["content"]


def test_openapi_error_is_the_one_that_clients_get() -> None:
    error = jsonschema.Draft202012Validator({"$ref": "#/components/schemas/Error", **copy.deepcopy(DOCUMENT)})
    error.validate({"error": ApiError(400, "no").fields()})
    assert not error.is_valid({"error": {"message": "no"}})
