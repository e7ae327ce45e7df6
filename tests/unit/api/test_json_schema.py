"""Schemas that the engine compiles: real ones pass, and those that are wrong, point outside or cost too much do not."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from borg_serve.api import chat, responses
from borg_serve.api.json_schema import schema_problem
from tests.chats import BOUNDS, USER, values

jsonschema = pytest.importorskip("jsonschema")


def problem(schema: Any) -> str | None:
    found = schema_problem({"here": schema})
    return found and found[1]


class Step(BaseModel):
    explanation: str
    output: str | None = None
    parts: list["Step"] = []


class Answer(BaseModel):
    steps: list[Step] = Field(min_length=1, max_length=20)
    unit: str = Field(pattern=r"^[a-z]{1,16}$")
    note: str = Field("", max_length=200)
    score: float = Field(ge=0, le=1)


ANSWER = Answer.model_json_schema()


def test_schema_of_a_pydantic_model_passes() -> None:
    assert problem(ANSWER) is None
    assert problem(Step.model_json_schema()) is None


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": ["string", "null"]},
        {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object", "additionalProperties": False},
        {"properties": {"a": True, "b": {"$ref": "#/properties/a~1b"}, "a/b": {}}},
        {"properties": {"$ref": {"type": "string"}, "maxLength": {"type": "integer"}}},
        {"definitions": {"a": {"enum": [1, None, "x"]}}, "items": {"$ref": "#/definitions/a"}},
        {"properties": {"child": {"$ref": "#"}}},
        {"allOf": [{"$ref": "#/allOf/1"}, {"const": {"$ref": "anything"}}]},
        {"x-unknown": {"$ref": "https://elsewhere"}},
        {"type": "string", "pattern": r"^\d{3}-\d{4}$"},
        {"type": "integer", "minimum": -(2**63), "multipleOf": 0.5},
    ],
)
def test_schema_passes(schema: dict[str, Any]) -> None:
    assert problem(schema) is None


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (True, "#: must be an object"),
        ([], "#: must be an object"),
        ({"type": "objekt"}, "#: `type` must be one or more of array"),
        ({"type": ["string", "string"]}, "#: `type` must be"),
        ({"type": []}, "#: `type` must be"),
        ({"properties": []}, "#: `properties` must be an object of schemas"),
        ({"properties": {"a": 5}}, "#/properties/a: must be an object or a boolean"),
        ({"properties": {"a": {"minLength": -1}}}, "#/properties/a: `minLength` must be an integer from 0 on"),
        ({"maxItems": True}, "`maxItems` must be an integer"),
        ({"maxItems": 2**63}, "`maxItems` must be an integer"),
        ({"minimum": "1"}, "`minimum` must be a number"),
        ({"multipleOf": 0}, "`multipleOf` must be more than 0"),
        ({"required": ["a", "a"]}, "`required` must be an array of different strings"),
        ({"required": "a"}, "`required` must be an array of different strings"),
        ({"dependentRequired": {"a": [1]}}, "`dependentRequired` must be"),
        ({"anyOf": []}, "`anyOf` must be a non-empty array"),
        ({"items": [{}]}, "#/items: must be an object"),
        ({"enum": {}}, "`enum` must be an array"),
        ({"uniqueItems": 1}, "`uniqueItems` must be true or false"),
        ({"title": 1}, "`title` must be a string"),
        ({"$ref": "#/$defs/a"}, "`$ref` must point to a schema inside"),
        ({"$ref": "https://example.org/a.json"}, "`$ref` must point to a schema inside"),
        ({"$ref": "file:///etc/passwd"}, "`$ref` must point to a schema inside"),
        ({"$ref": "#/x-hidden", "x-hidden": {}}, "`$ref` must point to a schema inside"),
        ({"$ref": "#/enum/0", "enum": [{}]}, "`$ref` must point to a schema inside"),
        ({"$dynamicRef": "#a"}, "`$dynamicRef` is not supported"),
        ({"$anchor": "a"}, "`$anchor` is not supported"),
        ({"type": "object", "pattern": "("}, "#: `pattern` cannot be enforced: unclosed group"),
        ({"items": {"enum": [1], "patternProperties": {"a)": {}}}}, "#/items: `patternProperties` cannot be enforced"),
    ],
)
def test_schema_that_is_wrong_is_refused_by_place(schema: Any, says: str) -> None:
    assert says in (problem(schema) or "")


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


def members(count: int, **schema: Any) -> dict[str, Any]:
    return {"properties": {f"p{index}": {"type": "string", **schema} for index in range(count)}}


@pytest.mark.parametrize(
    ("most", "too_much", "says"),
    [
        (nested(32), nested(33), "schemas may nest 32 deep"),
        (members(256), members(257), "256 properties in all, got 257"),
        ({"anyOf": [{}] * 128}, {"anyOf": [{}] * 129}, "128 branches in all, got 129"),
        ({"enum": list(range(1024))}, {"enum": list(range(1025))}, "1024 enum values in all, got 1025"),
        ({"pattern": "a" * 256}, {"pattern": "a" * 257}, "256 characters, got 257"),
        ({"pattern": "a{128}"}, {"pattern": "a{129}"}, "repeat 128 times"),
        ({"pattern": "a{0,128}"}, {"pattern": "a{0,129}"}, "repeat 128 times"),
        ({"pattern": "(a{16}){8}"}, {"pattern": "(a{16}){9}"}, "repeat 128 times"),
        ({"pattern": "a{7,}"}, {"pattern": "a{" + "9" * 200 + "}"}, "repeat 128 times"),
        ({"patternProperties": {"a{128}": {}}}, {"patternProperties": {"a{129}": {}}}, "repeat 128 times"),
        ({"maxItems": 10**9}, members(5, maxItems=10**9), "sizes of arrays and objects may add up to 4096"),
        (members(4, maxProperties=1024), members(5, minItems=1000), "sizes of arrays and objects may add up to 4096"),
        ({"multipleOf": 9990}, {"allOf": [{"multipleOf": 997}, {"multipleOf": 0.11}]}, "multiply to 10000, got 10967"),
        (members(16, pattern="a{128}"), members(17, pattern="a{128}"), "repeats may add up to 2048"),
        (members(128, format="uri"), members(129, format="uri"), "repeats may add up to 2048 (16 for a format)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_schema_cost_is_bounded(most: dict[str, Any], too_much: dict[str, Any], says: str) -> None:
    assert problem(most) is None
    assert says in (problem(too_much) or "")


def test_schemas_compiled_together_share_one_bound() -> None:
    assert schema_problem({"a": members(128, maxLength=10**6), "b": members(128)}) is None
    assert schema_problem({"a": members(128), "b": members(129)}) == (
        "b",
        "#: may have 256 properties in all, got 257",
    )


@pytest.mark.parametrize(("schema", "kind"), [({"type": "object"}, "json_schema"), ({"not": {}}, "json_object")])
def test_format_that_is_a_wish_is_followed_where_it_can_be(schema: dict[str, Any], kind: str) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "strict": False, "schema": schema}}
    body, answer = chat.parse(json.dumps({"messages": [USER], "response_format": form}).encode(), BOUNDS, str)
    assert body["response_format"]["type"] == kind
    text = {"format": {"type": "json_schema", **form["json_schema"]}}
    same, response = responses.parse(json.dumps({"input": "a", "text": text}).encode(), BOUNDS, str)
    assert same["response_format"] == body["response_format"]
    named = [()] if kind == "json_schema" else [("response_format.json_schema.schema",), ("text.format.schema",)]
    assert {answer.ignored, response.ignored} == set(named)


def test_schema_problem_is_short_whatever_the_schema() -> None:
    assert len(problem({"properties": {"k" * 9999: {"properties": {"j" * 9999: 5}}}}) or "") < 300
    assert len(problem({"k" * 9999: 1, "type": "x" * 9999}) or "") < 300


KEYWORDS = [
    *("type", "properties", "required", "items", "enum", "anyOf", "pattern", "minLength", "maximum", "multipleOf"),
    *("additionalProperties", "uniqueItems", "title", "$defs", "dependentRequired", "patternProperties", "prefixItems"),
    *("not", "if", "format", "examples", "propertyNames", "minContains", "readOnly", "$comment"),
]
odd = values | st.sampled_from(["string", ["string", 5], {"a": {}}, {"a": 5}, [{}], ["a", "a"], -1, 0, 1.5, "(", "#"])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_schema_that_jsonschema_refuses_is_refused(data: st.DataObject) -> None:
    schema = copy.deepcopy(ANSWER)
    for _ in range(data.draw(st.integers(1, 3))):
        objects = [schema, schema["$defs"]["Step"], schema["properties"]["unit"], schema["properties"]["steps"]]
        place = data.draw(st.sampled_from([place for place in objects if isinstance(place, dict)]))
        place[data.draw(st.sampled_from(KEYWORDS))] = data.draw(odd)
        if not isinstance(schema.get("$defs"), dict) or not isinstance(schema["$defs"].get("Step"), dict):
            break
        if not isinstance(schema.get("properties"), dict) or not {"unit", "steps"} <= schema["properties"].keys():
            break
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError:
        assert problem(schema) is not None


@settings(deadline=None)
@given(values)
def test_schema_problem_never_raises(value: Any) -> None:
    problem(value)
    problem({"properties": {"a": value}, "allOf": [value], "$ref": value})
