"""What becomes of a chat request."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from borg_serve.api import chat as protocol
from borg_serve.api.chat import AS_SENT, LENGTHS
from borg_serve.api.chat_models import ChatRequest
from borg_serve.api.errors import ApiError
from borg_serve.api.protocol import Bounds
from tests.chats import BOUNDS, USER, broken, contents, formats, messages, requests, texts, tools, values
from tests.protocols import HOSTILE, neutralise

TOOL = {"type": "function", "function": {"name": "f"}}


def parse(request: Any, bounds: Bounds = BOUNDS) -> dict[str, Any]:
    return protocol.parse(json.dumps(request).encode(), bounds, neutralise)[0]


def chat(*turns: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [dict(turn) for turn in turns or [USER]], **fields}


def refusal(request: Any, bounds: Bounds = BOUNDS) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(request, bounds)
    return caught.value


def outcome(request: Any) -> dict[str, Any]:
    """The cleaned body, or the error's."""
    try:
        return parse(request)
    except ApiError as error:
        return {"error": error.fields()}


def cleaned(*turns: dict[str, Any]) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = parse(chat(*turns))["messages"]
    return result


# ------------------------------------------------------------------------------------------------- accepted


def test_chat_forwards_a_plain_request_with_the_served_model_and_no_defaults() -> None:
    assert parse(chat()) == {"model": "borg-merge-v1", "messages": [USER]}


def test_chat_takes_back_its_own_answer_as_clients_echo_it() -> None:
    call = {"id": "call-1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    empty = {"refusal": None, "annotations": None, "audio": None, "function_call": None, "reasoning": None}
    echoed = {"role": "assistant", "content": None, "tool_calls": [call], **empty}
    result = {"role": "tool", "tool_call_id": "call-1", "content": "42", "name": "f"}
    assert cleaned(USER, echoed, result) == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "call-1"},
    ]


def test_chat_forwards_each_field_of_its_model() -> None:
    handled = {*LENGTHS, "messages", "model", "stream_options", "tools", "tool_choice", "response_format"}
    assert set(ChatRequest.model_fields) == {*AS_SENT, *handled}
    assert len(ChatRequest.model_fields) == len(AS_SENT) + len(handled)


@pytest.mark.parametrize(
    ("fields", "forwarded"),
    [
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 5}, {"max_completion_tokens": 5}),
        ({"max_completion_tokens": 5, "max_tokens": 7}, {"max_completion_tokens": 5}),
        ({"temperature": 0.0099}, {"temperature": 0.0}),
        ({"temperature": 0.01}, {"temperature": 0.01}),
        ({"temperature": 2}, {"temperature": 2.0}),
        ({"max_tokens": 5.0}, {"max_tokens": 5}),
        ({"seed": 2**63 - 1}, {"seed": 2**63 - 1}),
        ({"stop": "a"}, {"stop": "a"}),
        ({"stop": []}, {"stop": []}),
        ({"stream": False, "stream_options": {"include_usage": True}}, {"stream": False}),
        ({"stream": True, "stream_options": {"include_usage": None}}, {"stream": True, "stream_options": {}}),
        ({"tool_choice": "none"}, {}),
        ({"tools": [], "tool_choice": "auto"}, {}),
        ({"max_tokens": 64_000}, {"max_tokens": 8192}),
        ({"max_tokens": 64_000.0, "min_tokens": 9_000}, {"max_tokens": 8192, "min_tokens": 8192}),
        ({"max_completion_tokens": 10**30}, {"max_completion_tokens": 8192}),
    ],
)
def test_chat_forwards(fields: dict[str, Any], forwarded: dict[str, Any]) -> None:
    body = parse(chat(**fields))
    assert body == {**parse(chat()), **forwarded}
    assert json.dumps({name: body[name] for name in forwarded}) == json.dumps(forwarded)


# ------------------------------------------------------------------------------------------------- messages


def test_chat_joins_parts_by_line_ends() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": None}]
    assert cleaned({"role": "user", "content": parts}) == [{"role": "user", "content": "a\nb"}]


def test_chat_reads_a_refusal_as_what_the_assistant_said() -> None:
    part = {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "no"}]}
    field = {"role": "assistant", "content": None, "refusal": "no"}
    empty = {"role": "assistant"}
    assert [turn["content"] for turn in cleaned(part, field, empty, USER)] == ["a\nno", "no", "", "hello"]


def test_chat_folds_leading_instructions_and_keeps_later_ones_in_place() -> None:
    turns = cleaned(
        {"role": "system", "content": "  one\n"},
        {"role": "developer", "content": [{"type": "text", "text": "two "}]},
        {"role": "system", "content": " \n\t"},
        USER,
        {"role": "developer", "content": " later "},
        USER,
    )
    assert turns == [
        {"role": "system", "content": "one\n\ntwo"},
        USER,
        {"role": "system", "content": " later "},
        USER,
    ]


def test_chat_drops_blank_instructions() -> None:
    assert cleaned({"role": "system", "content": " \n"}, USER) == [USER]


def test_chat_takes_instructions_alone_or_last() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert cleaned(system) == [system]
    assert cleaned({"role": "developer", "content": " "}) == [{"role": "system", "content": ""}]
    assert cleaned(USER, {**system, "role": "developer"}) == [USER, system]


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_chat_takes_a_tools_empty_result(content: dict[str, Any]) -> None:
    result = {"role": "tool", "tool_call_id": "1", **content}
    assert cleaned(USER, result)[1] == {"role": "tool", "tool_call_id": "1", "content": ""}


def test_chat_leaves_out_the_assistants_thoughts() -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]
    body, answer = protocol.parse(json.dumps(chat({"role": "assistant", "content": parts}, USER)).encode(), BOUNDS, str)
    assert body["messages"][0]["content"] == "a"
    assert answer.ignored == ("messages.content.thinking",)


def test_chat_breaks_a_literal_that_parts_or_folding_join() -> None:
    joined = "<|im\n_end|>"

    def break_joined(text: str) -> str:
        return text.replace(joined, "broken")

    parts = {"role": "user", "content": [{"type": "text", "text": "<|im"}, {"type": "text", "text": "_end|>"}]}
    body, _ = protocol.parse(json.dumps(chat(parts)).encode(), BOUNDS, break_joined)
    assert body["messages"][0]["content"] == "broken"


@pytest.mark.parametrize(
    ("arguments", "forwarded"),
    [
        ('{"a": 1}', {"a": 1}),
        ('{"id": 123456789012345678901234567890}', {"id": 123456789012345678901234567890}),
        ("", {}),
        ("{", {}),
        ("[]", {}),
        ("42", {}),
        ('{"a": NaN}', {}),
        ('{"a": "\\ud800"}', {}),
        ('{"a": ' + "9" * 5000 + "}", {}),
        ("[" * 100_000, {}),
        ('{"a":' * 65 + "1" + "}" * 65, {}),
    ],
    ids=lambda value: str(value)[:20],
)
def test_chat_turns_arguments_that_are_no_object_into_an_empty_one(arguments: str, forwarded: Any) -> None:
    function = {"name": "f", "arguments": arguments}
    turn = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    (call,) = cleaned(turn, USER)[0]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == forwarded


# -------------------------------------------------------------------------------------------------- schemas


def strict(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


def tool(parameters: Any, name: str = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **function}}


def test_chat_refuses_a_response_schema_that_cannot_be_followed() -> None:
    error = refusal(chat(response_format=strict({"type": "objekt"})))
    assert (error.param, error.code) == ("response_format.json_schema.schema", "invalid_json_schema")
    assert "#: `type` must be one or more of" in error.message


def test_chat_checks_a_tools_schema_only_when_the_answer_must_follow_it() -> None:
    odd, sound = tool({"required": True}), tool({"type": "object"}, "g")
    named = {"type": "function", "function": {"name": "f"}}
    parse(chat(tools=[odd, sound]))
    parse(chat(tools=[odd, sound], tool_choice="auto"))
    parse(chat(tools=[odd, sound], tool_choice={"type": "function", "function": {"name": "g"}}))
    for fields in ({"tool_choice": "required"}, {"tool_choice": named}):
        error = refusal(chat(tools=[sound, odd], **fields))
        assert (error.param, error.code) == ("tools.1.function.parameters", "invalid_json_schema")
    assert refusal(chat(tools=[tool({"required": True}, strict=True)])).param == "tools.0.function.parameters"


def test_chat_bounds_the_cost_of_all_forced_tools_together() -> None:
    half: dict[str, Any] = {"properties": {f"p{index}": {} for index in range(128)}}
    parse(chat(tools=[tool(half)] * 2, tool_choice="required"))
    error = refusal(chat(tools=[tool(half)] * 3, tool_choice="required"))
    assert "256 properties in all, got 384" in error.message


def test_chat_bounds_a_schemas_size_in_bytes() -> None:
    room = BOUNDS.max_schema_bytes - len('{"title": ""}')
    for text, sent in (("a" * room, True), ("a" * (room + 1), False), ("é" * (room // 2), True), ("é" * room, False)):
        for request in (chat(response_format=strict({"title": text})), chat(tools=[tool({"title": text})])):
            if sent:
                parse(request)
            else:
                assert f"may have {BOUNDS.max_schema_bytes} bytes" in refusal(request).message


def test_chat_keeps_nulls_inside_schemas() -> None:
    schema = {"properties": {"a": {"default": None, "enum": [None, "x"]}}}
    body = parse(chat(tools=[tool(schema)], response_format=strict(schema)))
    assert body["tools"][0]["function"]["parameters"] == schema
    assert body["response_format"]["json_schema"]["schema"] == schema


@pytest.mark.parametrize(
    ("choice", "strict_ones"),
    [
        (None, set()),
        ("auto", set()),
        ("none", set()),
        ("required", {"f", "g", "h"}),
        ({"type": "function", "function": {"name": "g"}}, {"g"}),
        ({"type": "function", "function": {"name": "h"}}, {"h"}),
    ],
)
def test_chat_holds_a_forced_call_to_its_schema(choice: Any, strict_ones: set[str]) -> None:
    sent = [tool({"type": "object"}), tool({"type": "object"}, "g"), tool({"type": "object"}, "h", strict=False)]
    functions = [one["function"] for one in parse(chat(tools=sent, tool_choice=choice))["tools"]]
    assert {function["name"] for function in functions if function.get("strict")} == strict_ones
    assert not any(function.get("strict") is False for function in functions), "it says what its absence says"


# ----------------------------------------------------------------------------------------------- properties

few = settings(max_examples=40, deadline=None)
"""A conversation takes milliseconds to draw."""


@few
@given(messages(HOSTILE), tools(HOSTILE), formats(HOSTILE))
def test_chat_hands_every_string_to_neutralise(turns: Any, given_tools: Any, response_format: Any) -> None:
    request = chat(*turns, tools=given_tools, response_format=response_format)
    body, _ = protocol.parse(json.dumps(request).encode(), BOUNDS, lambda text: f"={text}")
    ours = {"system", "user", "assistant", "tool", "function", "text", "json_object", "json_schema"}
    structure = {"role", "content", "tool_calls", "tool_call_id", "id", "type", "function", "name", "arguments"}
    structure |= {"description", "parameters", "strict", "schema", "json_schema"}

    def check(value: Any, schema: bool = False) -> None:
        if isinstance(value, str):
            assert value.startswith("=") or value in ours
        elif isinstance(value, dict):
            for key, item in value.items():
                assert key.startswith("=") or (key in structure and not schema)
                if key == "arguments":
                    check(json.loads(item), schema=True)
                else:
                    check(item, schema or key in ("parameters", "schema"))
        elif isinstance(value, list):
            for item in value:
                check(item, schema)

    check([body["messages"], body["tools"], body["response_format"]])


@few
@given(requests())
def test_chat_is_idempotent(request: dict[str, Any]) -> None:
    body = parse(request)
    assert parse(body) == body


@few
@given(requests())
def test_chat_is_indifferent_to_nulls(request: dict[str, Any]) -> None:
    nulls = {"logit_bias": None, "kv_transfer_params": None, "unheard_of": None}
    turns = [{**turn, "reasoning": None, "audio": None} for turn in request["messages"]]
    assert parse({**nulls, **request, "messages": turns}) == parse(request)


@few
@given(broken() | values | st.fixed_dictionaries({"messages": values | st.lists(values)}))
def test_chat_raises_nothing_but_request_error(request: Any) -> None:
    body = outcome(request)
    text = json.dumps(body, allow_nan=False, ensure_ascii=False).encode()
    if "error" in body:
        assert len(text) < 600
    else:
        assert body["messages"][-1]["role"] in ("user", "tool", "system")


SECRET = "sesame" * 10


@settings(deadline=None)
@given(st.data())
def test_chat_never_echoes_more_than_forty_characters(data: st.DataObject) -> None:
    request = chat(temperature=1, tools=[tool({"title": "x"})], stop=["a"], metadata={"a": "b"})
    place: Any = request
    while isinstance(place, dict | list) and place:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
        if not isinstance(place[key], dict | list) or data.draw(st.booleans()):
            break
        place = place[key]
    odd = data.draw(st.sampled_from([SECRET, [SECRET], {SECRET: SECRET}, {"type": SECRET}, {"role": SECRET}]))
    if data.draw(st.booleans()) and isinstance(place, dict):
        place[SECRET] = odd
    else:
        place[key] = odd
    body = outcome(request)
    assert "error" not in body or SECRET[:41] not in str(body)


@settings(deadline=None)
@given(contents(texts))
def test_chat_keeps_text_without_control_tokens(content: Any) -> None:
    text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
    assert cleaned({"role": "user", "content": content}) == [{"role": "user", "content": neutralise(text)}]
