"""What a chat request may hold, what becomes of it, and how it is refused."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from borg_serve.chat import ChatRequest
from borg_serve.refusal import REFUSED
from borg_serve.schema import AS_SENT, IGNORED, Bounds, RequestError, parse_chat
from tests.chats import BOUNDS, USER, broken, contents, formats, messages, requests, texts, tools, values

LITERALS = ("<|im_start|>", "<|im_end|>", "<tool_call>")
TOOL = {"type": "function", "function": {"name": "f"}}


def neutralise(text: str) -> str:
    return re.sub("|".join(re.escape(literal) for literal in LITERALS), lambda m: m[0][0] + "\u200b" + m[0][1:], text)


def parse(request: Any, bounds: Bounds = BOUNDS) -> dict[str, Any]:
    return parse_chat(json.dumps(request).encode(), bounds, neutralise)


def chat(*turns: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [dict(turn) for turn in turns or [USER]], **fields}


def refusal(request: Any, bounds: Bounds = BOUNDS) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(request, bounds)
    return caught.value


def outcome(request: Any) -> dict[str, Any]:
    """The cleaned body, or the error's."""
    try:
        return parse(request)
    except RequestError as error:
        return error.body()


def cleaned(*turns: dict[str, Any]) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = parse(chat(*turns))["messages"]
    return result


# ------------------------------------------------------------------------------------------------- accepted


def test_parse_chat_forwards_a_plain_request_with_the_served_model_and_no_defaults() -> None:
    assert parse(chat()) == {"model": "borg-merge-v1", "messages": [USER]}


@pytest.mark.parametrize(
    "fields",
    [
        # vllm bench serve
        {
            "model": "borg-merge-v1",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "max_completion_tokens": 128,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "repetition_penalty": 1.0,
            "temperature": 0.0,
            "top_k": -1,
            "min_p": 0,
        },
        # GuideLLM
        {
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "max_completion_tokens": 64,
            "stop": None,
            "ignore_eos": True,
        },
        # AIPerf
        {"model": "borg-merge-v1", "stream": False, "max_tokens": 9, "min_tokens": 9, "ignore_eos": True},
        # OpenAI's clients and what wraps them
        {
            "model": "borg-merge-v1",
            "n": 2,
            "seed": -1,
            "logprobs": True,
            "top_logprobs": 20,
            "presence_penalty": -2,
            "frequency_penalty": 2.0,
            "user": "u",
            "metadata": {"a": "b"},
            "store": False,
            "service_tier": "auto",
            "modalities": ["text"],
            "parallel_tool_calls": True,
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "response_format": {"type": "json_object"},
            "safety_identifier": "s",
            "prompt_cache_key": "p",
            "logit_bias": None,
            "audio": None,
            "never_heard_of": None,
        },
    ],
    ids=["vllm", "guidellm", "aiperf", "openai"],
)
def test_parse_chat_takes_what_real_clients_send(fields: dict[str, Any]) -> None:
    parse({"messages": [USER], **fields})


def test_parse_chat_takes_back_its_own_answer_as_clients_echo_it() -> None:
    call = {"id": "call-1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    empty = {"refusal": None, "annotations": None, "audio": None, "function_call": None, "reasoning": None}
    echoed = {"role": "assistant", "content": None, "tool_calls": [call], **empty}
    result = {"role": "tool", "tool_call_id": "call-1", "content": "42", "name": "f"}
    assert cleaned(USER, echoed, result) == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "call-1"},
    ]


def test_parse_chat_forwards_each_accepted_field_or_ignores_it_on_purpose() -> None:
    handled = {"messages", "model", "max_tokens", "max_completion_tokens", "temperature", "stream_options"}
    handled |= {"tools", "tool_choice", "response_format"}
    assert set(ChatRequest.model_fields) == {*AS_SENT, *IGNORED, *handled}
    assert len(ChatRequest.model_fields) == len(AS_SENT) + len(IGNORED) + len(handled)
    labels = {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "p", "session_id": "x"}
    assert parse(chat(**labels, service_tier="default")) == parse(chat())


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
        ({"tool_choice": "none"}, {"tool_choice": "none"}),
    ],
)
def test_parse_chat_forwards(fields: dict[str, Any], forwarded: dict[str, Any]) -> None:
    body = parse(chat(**fields))
    assert body == {**parse(chat()), **forwarded}
    assert json.dumps({name: body[name] for name in forwarded}) == json.dumps(forwarded)


# -------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("name", REFUSED)
def test_parse_chat_refuses_a_known_field_with_its_reason_but_takes_its_absence(name: str) -> None:
    error = refusal(chat(**{name: "x"}))
    assert (error.status, error.param, error.code) == (400, name, "unsupported_parameter")
    assert error.message == f"{name}: is refused: {REFUSED[name].reason}. Leave it out."
    for same in (None, *REFUSED[name].same_as_absent):
        assert parse(chat(**{name: same})) == parse(chat())


@pytest.mark.parametrize(
    ("name", "value"),
    [("echo", True), ("echo", 0), ("add_generation_prompt", 1), ("best_of", True), ("priority", False), ("store", "")],
)
def test_parse_chat_tells_a_default_from_what_only_equals_it(name: str, value: object) -> None:
    assert refusal(chat(**{name: value})).param == name


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"temperature": 2.1}, "temperature", "must be at most 2, got 2.1"),
        ({"temperature": -0.1}, "temperature", "must be at least 0, got -0.1"),
        ({"temperature": "1"}, "temperature", 'must be a number, got "1"'),
        ({"temperature": True}, "temperature", "must be a number, got true"),
        ({"top_p": 0}, "top_p", "must be more than 0, got 0"),
        ({"top_p": 1.01}, "top_p", "must be at most 1"),
        ({"top_k": -2}, "top_k", "must be at least -1"),
        ({"top_k": 10**6 + 1}, "top_k", "must be at most 1000000"),
        ({"min_p": 1.5}, "min_p", "must be at most 1"),
        ({"presence_penalty": 2.5}, "presence_penalty", "must be at most 2"),
        ({"frequency_penalty": -2.5}, "frequency_penalty", "must be at least -2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "must be at least 0.01"),
        ({"max_tokens": 0}, "max_tokens", "must be at least 1, got 0"),
        ({"max_tokens": 8193}, "max_tokens", "must be at most 8192, got 8193"),
        ({"max_tokens": 8193.0}, "max_tokens", "must be at most 8192"),
        ({"max_tokens": 1.5}, "max_tokens", "must be an integer"),
        ({"max_completion_tokens": 8193}, "max_completion_tokens", "must be at most 8192"),
        ({"min_tokens": 8193}, "min_tokens", "must be at most 8192"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens", "must be at most max_tokens (5), got 6"),
        ({"min_tokens": 6, "max_tokens": 9, "max_completion_tokens": 5}, "min_tokens", "max_tokens (5), got 6"),
        ({"seed": 2**63}, "seed", "must be at most 9223372036854775807"),
        ({"seed": -1e30}, "seed", "must be at least -9223372036854775808"),
        ({"n": 5}, "n", "must be at most 4, got 5"),
        ({"n": 0}, "n", "must be at least 1"),
        ({"n": True}, "n", "must be an integer"),
        ({"n": 2, "temperature": 0}, "n", "must be 1 when temperature is below 0.01"),
        ({"stop": ""}, "stop", "must have at least 1 characters"),
        ({"stop": ["a"] * 5}, "stop", "may have 4 items, got an array of 5 items"),
        ({"stop": ["a", 5]}, "stop.1", "must be a string, got 5"),
        ({"stop": 5}, "stop", "must be a string or an array, got 5"),
        ({"stop": "a" * 257}, "stop", "may have 256 characters"),
        ({"stop_token_ids": [0, 49_152]}, "stop_token_ids.1", "must be below 49152"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0", "must be at least 0"),
        ({"stop_token_ids": [1] * 17}, "stop_token_ids", "may have 16 items"),
        ({"logprobs": 1}, "logprobs", "must be true or false, got 1"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "must be at most 20"),
        ({"top_logprobs": 1}, "top_logprobs", "is allowed only when logprobs is true"),
        ({"stream": "true"}, "stream", "must be true or false"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "Unrecognized request argument supplied"),
        ({"tools": []}, "tools", "must have at least 1 items"),
        ({"tools": [TOOL] * 129}, "tools", "may have 128 items"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools.0.type", "must be 'function', got \"custom\""),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "is required"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "must match"),
        ({"tools": [{"type": "function", "function": {"name": "a\n"}}]}, "tools.0.function.name", "must match"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "tools.0.defer_loading", "Unrecognized"),
        ({"tool_choice": "auto"}, "tool_choice", "is allowed only when tools are given"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice", "must be 'none', 'auto' or 'required' or an object"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function", "is required"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice.function.name",
            'must name one of the tools, got "g"',
        ),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type", "must be one of 'text'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is required"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "is required",
        ),
        ({"metadata": {"a": 1}}, "metadata.a", "must be a string"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "may have 16 items"),
        ({"user": "u" * 513}, "user", "may have 512 characters"),
        ({"service_tier": "flex"}, "service_tier", "must be 'auto' or 'default'"),
        ({"model": 5}, "model", "must be a string"),
        ({"temprature": 1}, "temprature", "Unrecognized request argument supplied: temprature"),
        ({"x" * 99: 1}, "x" * 40, "Unrecognized request argument supplied: " + "x" * 40),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_parse_chat_refuses_by_name_bound_and_value(fields: dict[str, Any], param: str, says: str) -> None:
    error = refusal(chat(**fields))
    assert (error.status, error.param) == (400, param)
    assert says in error.message
    assert error.code is not None


def test_parse_chat_unknown_model_is_404() -> None:
    error = refusal(chat(model="gpt-5"))
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")


def test_parse_chat_follows_the_bounds() -> None:
    small = Bounds(model="m", max_tokens=10, max_n=1, max_messages=1, max_tools=1, max_stop=1, max_schema_bytes=20)
    assert parse(chat(model="m", max_tokens=10), small)["model"] == "m"
    wide = {"type": "function", "function": {"name": "f", "parameters": {"description": "x" * 20}}}
    for fields in ({"max_tokens": 11}, {"n": 2}, {"tools": [TOOL] * 2}, {"stop": ["a"] * 2}, {"tools": [wide]}):
        assert refusal(chat(**fields), small).status == 400
    assert "may have 1 items" in refusal(chat(USER, USER), small).message


@pytest.mark.parametrize("raw", [b"[]", b"5", b"null", b'"x"'])
def test_parse_chat_refuses_what_is_no_object(raw: bytes) -> None:
    with pytest.raises(RequestError, match="body: must be a JSON object"):
        parse_chat(raw, BOUNDS, neutralise)


# ------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("turns", "param", "says"),
    [
        ("x", "messages", "must be an array"),
        ([], "messages", "must have at least 1 items"),
        ([5], "messages.0", "must be an object, got 5"),
        ([{}], "messages.0.role", "is required"),
        ([{"role": "robot", "content": ""}], "messages.0.role", "must be one of 'system', 'developer', 'user'"),
        ([{"role": "system\nX<|im_end|>", "content": ""}], "messages.0.role", "must be one of"),
        ([{"role": "function", "name": "f", "content": ""}], "messages.0.role", "must be one of"),
        ([{"role": "user"}], "messages.0.content", "is required"),
        ([USER, {"role": "user", "content": None}], "messages.1.content", "is required"),
        ([{"role": "user", "content": 5}], "messages.0.content", "must be a string or an array, got 5"),
        ([{"role": "user", "content": []}], "messages.0.content", "must have at least 1 items"),
        ([{"role": "user", "content": ["a"]}], "messages.0.content.0", "must be an object"),
        ([{**USER, "tool_call_id": "x"}], "messages.0.tool_call_id", "Unrecognized request argument"),
        ([{**USER, "name": "n" * 257}], "messages.0.name", "may have 256 characters"),
        ([USER, {"role": "tool", "content": "x"}], "messages.1.tool_call_id", "is required"),
        ([USER, {"role": "assistant", "content": "x"}], "messages.1.role", "the assistant speaks next"),
        ([USER, {"role": "system", "content": "x"}], "messages.1.role", 'got "system"'),
        ([{"role": "system", "content": "x"}], "messages", "must have a message of the user"),
        ([USER] * 2049, "messages", "may have 2048 items"),
        (
            [USER, {"role": "assistant", "tool_calls": [{"id": "1", "type": "function"}]}, USER],
            "messages.1.tool_calls.0.function",
            "is required",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parse_chat_refuses_messages_by_place(turns: Any, param: str, says: str) -> None:
    error = refusal({"messages": turns})
    assert (error.status, error.param) == (400, param)
    assert says in error.message


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url", "prompt_embeds", "thinking", ""])
@pytest.mark.parametrize("role", ["user", "assistant", "tool", "system"])
def test_parse_chat_refuses_parts_that_are_no_text_and_names_them(role: str, kind: str) -> None:
    turn = {"role": role, "content": [{"type": "text", "text": "a"}, {"type": kind, kind: {"url": "data:"}}]}
    error = refusal({"messages": [turn | ({"tool_call_id": "1"} if role == "tool" else {}), USER]})
    assert error.param == "messages.0.content.1.type"
    assert f'got "{kind}"' in error.message


def test_parse_chat_joins_parts_by_line_ends() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": None}]
    assert cleaned({"role": "user", "content": parts}) == [{"role": "user", "content": "a\nb"}]


def test_parse_chat_reads_a_refusal_as_what_the_assistant_said() -> None:
    part = {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "no"}]}
    field = {"role": "assistant", "content": None, "refusal": "no"}
    empty = {"role": "assistant"}
    assert [turn["content"] for turn in cleaned(part, field, empty, USER)] == ["a\nno", "no", "", "hello"]


def test_parse_chat_folds_leading_instructions_and_keeps_later_ones_in_place() -> None:
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


def test_parse_chat_drops_blank_instructions() -> None:
    assert cleaned({"role": "system", "content": " \n"}, USER) == [USER]


def test_parse_chat_breaks_a_literal_that_parts_or_folding_join() -> None:
    joined = "<|im\n_end|>"

    def break_joined(text: str) -> str:
        return text.replace(joined, "broken")

    parts = {"role": "user", "content": [{"type": "text", "text": "<|im"}, {"type": "text", "text": "_end|>"}]}
    body = parse_chat(json.dumps(chat(parts)).encode(), BOUNDS, break_joined)
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
def test_parse_chat_turns_arguments_that_are_no_object_into_an_empty_one(arguments: str, forwarded: Any) -> None:
    function = {"name": "f", "arguments": arguments}
    turn = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    (call,) = cleaned(turn, USER)[0]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == forwarded


# -------------------------------------------------------------------------------------------------- schemas


def strict(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


def tool(parameters: Any, name: str = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **function}}


def test_parse_chat_refuses_a_response_schema_that_cannot_be_followed() -> None:
    error = refusal(chat(response_format=strict({"type": "objekt"})))
    assert (error.param, error.code) == ("response_format.json_schema.schema", "invalid_json_schema")
    assert "#: `type` must be one or more of" in error.message


def test_parse_chat_checks_a_tools_schema_only_when_the_answer_must_follow_it() -> None:
    odd, sound = tool({"required": True}), tool({"type": "object"}, "g")
    named = {"type": "function", "function": {"name": "f"}}
    parse(chat(tools=[odd, sound]))
    parse(chat(tools=[odd, sound], tool_choice="auto"))
    parse(chat(tools=[odd, sound], tool_choice={"type": "function", "function": {"name": "g"}}))
    for fields in ({"tool_choice": "required"}, {"tool_choice": named}):
        error = refusal(chat(tools=[sound, odd], **fields))
        assert (error.param, error.code) == ("tools.1.function.parameters", "invalid_json_schema")
    assert refusal(chat(tools=[tool({"required": True}, strict=True)])).param == "tools.0.function.parameters"


def test_parse_chat_bounds_the_cost_of_all_forced_tools_together() -> None:
    half: dict[str, Any] = {"properties": {f"p{index}": {} for index in range(128)}}
    parse(chat(tools=[tool(half)] * 2, tool_choice="required"))
    error = refusal(chat(tools=[tool(half)] * 3, tool_choice="required"))
    assert "256 properties in all, got 384" in error.message


def test_parse_chat_bounds_a_schemas_size_in_bytes() -> None:
    room = BOUNDS.max_schema_bytes - len('{"title": ""}')
    for text, sent in (("a" * room, True), ("a" * (room + 1), False), ("é" * (room // 2), True), ("é" * room, False)):
        for request in (chat(response_format=strict({"title": text})), chat(tools=[tool({"title": text})])):
            if sent:
                parse(request)
            else:
                assert f"may have {BOUNDS.max_schema_bytes} bytes" in refusal(request).message


def test_parse_chat_keeps_nulls_inside_schemas() -> None:
    schema = {"properties": {"a": {"default": None, "enum": [None, "x"]}}}
    body = parse(chat(tools=[tool(schema)], response_format=strict(schema)))
    assert body["tools"][0]["function"]["parameters"] == schema
    assert body["response_format"]["json_schema"]["schema"] == schema


# ----------------------------------------------------------------------------------------------- properties

few = settings(max_examples=40, deadline=None)
"""A conversation takes milliseconds to draw."""
hostile = st.lists(
    st.sampled_from([*LITERALS, "<|im_", "end|>", "<", "|im_end|>", "\\u003c|im_end|>", '"', "\\", " ", "a", "{}"]),
    max_size=4,
).map("".join)


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value as a template comes to see it: vLLM decodes the arguments of calls."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings(json.loads(item) if key == "arguments" and isinstance(item, str) else item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


@few
@given(requests(hostile))
def test_parse_chat_lets_no_control_token_through(request: dict[str, Any]) -> None:
    body = parse(request)
    for text in strings({name: body.get(name) for name in ("messages", "tools", "tool_choice", "response_format")}):
        assert not any(literal in text for literal in LITERALS)


@few
@given(messages(hostile), tools(hostile), formats(hostile))
def test_parse_chat_hands_every_string_to_neutralise(turns: Any, given_tools: Any, response_format: Any) -> None:
    request = chat(*turns, tools=given_tools, response_format=response_format)
    body = parse_chat(json.dumps(request).encode(), BOUNDS, lambda text: f"={text}")
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
def test_parse_chat_is_idempotent(request: dict[str, Any]) -> None:
    body = parse(request)
    assert parse(body) == body


@few
@given(requests())
def test_parse_chat_is_indifferent_to_nulls(request: dict[str, Any]) -> None:
    nulls = {"logit_bias": None, "kv_transfer_params": None, "unheard_of": None}
    turns = [{**turn, "reasoning": None, "audio": None} for turn in request["messages"]]
    assert parse({**nulls, **request, "messages": turns}) == parse(request)


@few
@given(broken() | values | st.fixed_dictionaries({"messages": values | st.lists(values)}))
def test_parse_chat_raises_nothing_but_request_error(request: Any) -> None:
    body = outcome(request)
    text = json.dumps(body, allow_nan=False, ensure_ascii=False).encode()
    if "error" in body:
        assert len(text) < 600
    else:
        assert body["messages"][-1]["role"] in ("user", "tool")


@settings(deadline=None)
@given(st.binary(max_size=80))
def test_parse_chat_raises_nothing_but_request_error_on_bytes(raw: bytes) -> None:
    with pytest.raises(RequestError):
        parse_chat(raw, BOUNDS, neutralise)


SECRET = "sesame" * 10


@settings(deadline=None)
@given(st.data())
def test_parse_chat_never_echoes_more_than_forty_characters(data: st.DataObject) -> None:
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
def test_parse_chat_keeps_text_without_control_tokens(content: Any) -> None:
    text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
    assert cleaned({"role": "user", "content": content}) == [{"role": "user", "content": neutralise(text)}]
