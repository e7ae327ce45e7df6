"""The schemas of answers are true of the answers that clients get."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from borg_serve.api.answers import answer_schemas
from tests.protocols import CASES, Case, document, parts

jsonschema = pytest.importorskip("jsonschema")
SCHEMAS = answer_schemas()
NAMES = {"chat": "ChatCompletion", "responses": "Response", "messages": "Message"}
ERROR = {"message": "No.", "type": "invalid_request_error", "param": None, "code": "invalid_value"}


def valid(name: str, value: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(SCHEMAS[name]).is_valid(value))


@pytest.mark.parametrize(("name", "case"), CASES.items(), ids=CASES)
@settings(max_examples=25)
@given(answer=parts, finish=st.sampled_from(["stop", "length", "tool_calls"]))
def test_answer_has_the_shape_that_its_schema_says(name: str, case: Case, answer: Any, finish: str) -> None:
    _, said = case.parsed()
    whole = json.loads(said.document(document(answer, finish)))
    jsonschema.Draft202012Validator(SCHEMAS[NAMES[name]]).validate(whole)


@pytest.mark.parametrize(("name", "case"), CASES.items(), ids=CASES)
def test_answer_schema_needs_what_every_answer_has(name: str, case: Case) -> None:
    _, said = case.parsed()
    whole = json.loads(said.document(document([("", "hi"), ("f", "{}")])))
    for field in SCHEMAS[NAMES[name]]["required"]:
        assert not valid(NAMES[name], {key: value for key, value in whole.items() if key != field})
    for field in ("choices", "output", "content"):
        if field in whole:
            assert not valid(NAMES[name], {**whole, field: []})
            assert not valid(NAMES[name], {**whole, field: [{"type": "other", "text": "x"}]})
    usage = dict.fromkeys(whole["usage"], -1)
    assert not valid(NAMES[name], {**whole, "usage": usage})


@pytest.mark.parametrize(("name", "case"), CASES.items(), ids=CASES)
def test_answer_schema_of_an_error_is_true_of_it(name: str, case: Case) -> None:
    schema = "MessagesError" if name == "messages" else "Error"
    body = case.protocol.error_body(400, ERROR, "r1")
    assert valid(schema, body)
    assert not valid(schema, {**body, "error": {"message": "no"}})
