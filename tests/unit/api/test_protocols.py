"""What all three protocols do alike with a request."""

import codecs
import gzip
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from borg_serve.api.errors import ApiError
from borg_serve.api.fields import NEUTRAL
from tests.chats import BOUNDS, texts
from tests.protocols import CASES, HOSTILE, LITERALS, Case, neutralise, strings

every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in CASES for field in CASES[name].model.REFUSED])
def test_request_with_a_refused_field_is_refused_unless_it_changes_nothing(name: str, field: str) -> None:
    case = CASES[name]
    error = case.refusal(**{field: "odd"})
    assert (error.status, error.param, error.code) == (400, field, "unsupported_parameter")
    assert error.message == f"{field}: is refused: {case.model.REFUSED[field]}. Leave it out."
    for same in (None, NEUTRAL.get(field, False)):
        assert case.body(**{field: same}) == case.body()


@every
def test_request_null_means_absent(case: Case) -> None:
    nulls = dict.fromkeys([*case.model.model_fields, *case.model.REFUSED, "never_heard_of"])
    assert case.body(**{**nulls, **case.plain}) == case.body()


@every
def test_request_with_an_unknown_field_is_served_and_names_it(case: Case) -> None:
    body, answer = case.parsed(temprature=1, thinking={"type": "adaptive"}, store=False)
    assert body == case.body()
    assert answer.ignored == ("temprature", "thinking"), "what says nothing is not named"


@every
def test_request_with_an_unknown_field_is_refused_by_its_name_where_that_is_set(case: Case) -> None:
    strict = replace(case, bounds=replace(BOUNDS, unknown_fields="refuse"))
    assert strict.parsed(thinking={"type": "adaptive"}, user="u")[1].ignored == ("thinking", "user")
    error = strict.refusal(temprature=1)
    assert (error.status, error.param, error.code) == (400, "temprature", "unknown_parameter")
    error = strict.refusal(**{"x" * 99: 1})
    assert error.param == "x" * 40
    assert error.message == "Unrecognized request argument supplied: " + "x" * 40
    assert strict.refusal(tools=[{"type": "odd"}]).param == "tools.0.odd"


@every
@settings(max_examples=10)
@given(data=st.data())
def test_request_gives_the_engine_nothing_of_what_is_ignored(case: Case, data: st.DataObject) -> None:
    request = data.draw(case.requests(texts))

    def sprinkled(value: Any) -> Any:
        if isinstance(value, list):
            return [sprinkled(item) for item in value]
        if not isinstance(value, dict):
            return value
        own = ("parameters", "schema", "input_schema", "metadata", *(("input",) if case is CASES["messages"] else ()))
        return {name: item if name in own else sprinkled(item) for name, item in value.items()} | {
            "odd": {"a": "secret"}
        }

    body = case.body(**request)
    with_more, answer = case.parsed(**sprinkled(request))
    assert with_more == body
    assert "odd" in answer.ignored


@every
def test_request_for_an_alias_is_answered_by_the_served_model(case: Case) -> None:
    aliased = replace(case, bounds=replace(BOUNDS, model_aliases=("claude-*", "gpt-5")))
    for name in ("claude-opus-4-5", "gpt-5", BOUNDS.model):
        assert aliased.body(model=name)["model"] == BOUNDS.model
    assert aliased.refusal(model="gpt-5-mini").status == 404


@every
def test_request_for_another_model_is_404(case: Case) -> None:
    error = case.refusal(model="gpt-5")
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")


@every
@pytest.mark.parametrize("raw", [b"[]", b"5", b"null", b'"x"'])
def test_request_that_is_no_object_is_refused(case: Case, raw: bytes) -> None:
    with pytest.raises(ApiError, match="body: must be a JSON object"):
        case.protocol.parse(raw, BOUNDS, neutralise)


@every
@settings(max_examples=40)
@given(data=st.data())
def test_request_leaves_no_control_token_in_what_reaches_the_prompt(case: Case, data: st.DataObject) -> None:
    request = data.draw(case.requests(HOSTILE))
    # A stop string is matched against the answer and never reaches the prompt.
    for string in strings({**case.body(**request), "stop": []}):
        assert not any(literal in string for literal in LITERALS)


@every
@settings(max_examples=80)
@given(raw=st.binary(max_size=80))
def test_request_of_any_bytes_raises_nothing_but_api_error(case: Case, raw: bytes) -> None:
    with pytest.raises(ApiError):
        case.protocol.parse(raw, BOUNDS, neutralise)


@every
def test_request_nests_64_deep_and_no_deeper(case: Case) -> None:
    def nested(depth: int) -> Any:
        return json.loads("[" * depth + "]" * depth)

    assert case.body(odd=nested(63)) == case.body()
    assert "may nest 64 deep" in case.refusal(odd=nested(64)).message


@every
def test_request_may_begin_with_a_byte_order_mark_and_is_not_compressed(case: Case) -> None:
    raw = json.dumps(case.plain).encode()
    assert case.protocol.parse(codecs.BOM_UTF8 + raw, BOUNDS, neutralise)[0] == case.body()
    with pytest.raises(ApiError, match="Send it without compression"):
        case.protocol.parse(gzip.compress(raw), BOUNDS, neutralise)
