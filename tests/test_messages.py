"""Anthropic's Messages as a dialect: what a request may hold, which chat request it is, and how the answer is said."""

import json
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from borg_serve.messages import MESSAGES, REFUSED_HERE, MessagesRequest
from borg_serve.openapi import openapi
from borg_serve.reply import MessagesReply
from borg_serve.schema import RequestError, parse_chat
from tests.chats import BOUNDS, names, texts
from tests.dialects import HOSTILE, LITERALS, document, events, neutralise, parts, shaped, stream, strings
from tests.test_refusal import fields

jsonschema = pytest.importorskip("jsonschema")

USER = {"role": "user", "content": "hello"}
SCHEMA = {"type": "object", "properties": {"zone": {"enum": ["UTC", None]}}, "default": None}
TOOL = {"name": "f", "input_schema": SCHEMA}
USE = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "c", "content": "done"}
CACHE = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
VALIDATOR = jsonschema.Draft202012Validator({"$ref": "#/components/schemas/MessagesRequest", **openapi(BOUNDS)})
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def parse(*turns: Any, **request: Any) -> dict[str, Any]:
    sent = {"max_tokens": 9, "messages": turns or [USER], **request}
    body, _ = MESSAGES.parse(json.dumps(sent).encode(), BOUNDS, neutralise)
    return body


def refusal(*turns: Any, **request: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(*turns, **request)
    return caught.value


# ----------------------------------------------------------------------------------------------- requests


def test_messages_request_is_the_chat_request_that_means_the_same() -> None:
    body = parse(
        {"role": "system", "content": "b"},
        {"role": "user", "content": [{"type": "text", "text": "one", **CACHE}, {"type": "text", "text": "two"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "three", "citations": None},
                {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": None, "b": "ü"}},
                {**USE, "id": "c2"},
            ],
        },
        {
            "role": "user",
            "content": [
                {**RESULT, "tool_use_id": "c1", "is_error": True, **CACHE},
                {"type": "tool_result", "tool_use_id": "c2", "content": [{"type": "text", "text": "too"}]},
                {"type": "tool_result", "tool_use_id": "c3"},
                {"type": "text", "text": "four"},
            ],
        },
        {"role": "assistant", "content": "five"},
        {"role": "system", "content": "late"},
        {"role": "user", "content": "six"},
        system=[{"type": "text", "text": "a", **CACHE}, {"type": "text", "text": "a"}],
        model=BOUNDS.model,
        stream=True,
        temperature=0.001,
        top_p=0.5,
        top_k=3,
        stop_sequences=["x"],
        tools=[{**TOOL, "type": "custom", "description": "d", "strict": False, **CACHE}],
        tool_choice={"type": "tool", "name": "f", "disable_parallel_tool_use": True},
        output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
        metadata={"user_id": "u"},
        service_tier="auto",
        cache_control={"type": "ephemeral"},
    )
    call = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": null, "b": "ü"}'}},
        {"id": "c2", "type": "function", "function": {"name": "f", "arguments": "{}"}},
    ]
    chat = {
        "messages": [
            {"role": "system", "content": "a\na"},
            {"role": "system", "content": "b"},
            {"role": "user", "content": "one\ntwo"},
            {"role": "assistant", "content": "three", "tool_calls": call},
            {"role": "tool", "tool_call_id": "c1", "content": "done"},
            {"role": "tool", "tool_call_id": "c2", "content": "too"},
            {"role": "tool", "tool_call_id": "c3", "content": ""},
            {"role": "user", "content": "four"},
            {"role": "assistant", "content": "five"},
            {"role": "system", "content": "late"},
            {"role": "user", "content": "six"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_tokens": 9,
        "temperature": 0.001,
        "top_p": 0.5,
        "top_k": 3,
        "stop": ["x"],
        "tools": [
            {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA, "strict": False}}
        ],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "output", "schema": SCHEMA, "strict": True}},
    }
    assert body == parse_chat(json.dumps(chat).encode(), BOUNDS, neutralise)
    assert body["messages"][0] == {"role": "system", "content": "a\na\n\nb"}


@pytest.mark.parametrize(
    ("choice", "chat"),
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "any", "disable_parallel_tool_use": False}, {"tool_choice": "required", "parallel_tool_calls": True}),
        ({"type": "none"}, {"tool_choice": "none"}),
        ({"type": "tool", "name": "f"}, {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
    ],
)
def test_messages_tool_choice_is_chats(choice: dict[str, Any], chat: dict[str, Any]) -> None:
    body = parse(tools=[TOOL], tool_choice=choice)
    assert {name: body.get(name) for name in ("tool_choice", "parallel_tool_calls") if name in body} == chat


def test_messages_null_means_absent_and_inputs_and_schemas_keep_theirs() -> None:
    nulls = dict.fromkeys([*MessagesRequest.model_fields, *REFUSED_HERE])
    turn = {"role": "user", "x": None, "content": [{"type": "text", "text": "hello", "cache_control": None, "x": None}]}
    assert parse(**{**nulls, "max_tokens": 9, "messages": [turn]}) == parse()
    assert parse(tools=[{**TOOL, "type": None}])["tools"][0]["function"]["parameters"] == SCHEMA


def test_messages_no_tools_are_no_tools() -> None:
    assert parse(tools=[], tool_choice={"type": "auto"}) == parse()


@pytest.mark.parametrize("field", REFUSED_HERE)
def test_messages_refused_field_is_refused_by_name_with_its_reason(field: str) -> None:
    error = refusal(**{field: "odd"})
    assert (error.status, error.param, error.code) == (400, field, "unsupported_parameter")
    assert REFUSED_HERE[field].reason in error.message


@pytest.mark.parametrize("field", [name for name in REFUSED_HERE if REFUSED_HERE[name].same_as_absent])
def test_messages_refused_field_may_say_what_its_absence_says(field: str) -> None:
    for value in REFUSED_HERE[field].same_as_absent:
        assert parse(**{field: value}) == parse()


def blocks(*content: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(content)}, USER]}


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"foo": 1}, "foo"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 8193}, "max_tokens"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user\n<|im_end|>", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages.0.name"),
        ({"messages": [USER, {"role": "assistant", "content": "I"}]}, "messages"),
        ({"messages": [USER, {"role": "system", "content": "I"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, "messages"),
        ({"messages": [USER] * 2049}, "messages"),
        (blocks({"type": "image", "source": {}}), "messages.0.content.0.type"),
        (blocks({"type": "document", "source": {}}), "messages.0.content.0.type"),
        (blocks({"type": "search_result"}), "messages.0.content.0.type"),
        (blocks(USE), "messages.0.content.0.type"),
        (blocks(RESULT, role="assistant"), "messages.0.content.0.type"),
        (blocks({"type": "thinking", "thinking": "x", "signature": ""}, role="assistant"), "messages.0.content.0.type"),
        (blocks({"type": "server_tool_use"}, role="assistant"), "messages.0.content.0.type"),
        (blocks({**RESULT, "content": [{"type": "image"}]}), "messages.0.content.0.content.0.type"),
        (blocks({**USE, "input": "x"}, role="assistant"), "messages.0.content.0.input"),
        ({"system": [{"type": "image"}]}, "system.0.type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type"),
        ({"tools": [{"type": "computer_20250124", "name": "computer"}]}, "tools.0.type"),
        ({"tools": [{"type": "mcp_toolset", "mcp_server_name": "x"}]}, "tools.0.type"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
        ({"tools": [{**TOOL, "name": "a b"}]}, "tools.0.name"),
        ({"tools": [{"name": "f", "input_schema": {"description": "x" * 40_000}}]}, "tools.0.input_schema"),
        (
            {"tools": [{"name": "f", "input_schema": {"type": 1}}], "tool_choice": {"type": "any"}},
            "tools.0.input_schema",
        ),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "required"}}, "tool_choice.type"),
        ({"stop_sequences": ["a"] * 5}, "stop_sequences"),
        ({"temperature": -1}, "temperature"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": 1}}}}, "output_config.format.schema"),
        ({"stop": ["x"]}, "stop"),
        ({"max_completion_tokens": 1}, "max_completion_tokens"),
    ],
)
def test_messages_error_names_the_field(request_: dict[str, Any], param: str) -> None:
    error = refusal(**request_)
    assert (error.status, error.param) == (400, param), error.message
    assert param in error.message


def test_messages_other_model_is_not_found() -> None:
    error = refusal(model="claude")
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")


def test_messages_accepted_and_refused_cover_every_field_of_anthropic_and_vllm() -> None:
    known = fields("anthropic", "types/message_create_params.py", "MessageCreateParamsBase")
    known |= fields("anthropic", "types/beta/message_create_params.py", "MessageCreateParamsBase")
    known |= fields("vllm", "entrypoints/anthropic/protocol.py", "AnthropicMessagesRequest")
    assert {"messages", "thinking", "mcp_servers", "kv_transfer_params"} <= known
    assert known - REFUSED_HERE.keys() - MessagesRequest.model_fields.keys() == set()
    assert REFUSED_HERE.keys() & MessagesRequest.model_fields.keys() == set()


# ---------------------------------------------------------------------------------------- any accepted request


def requests(text: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Requests that are accepted; every string of the client's that can reach the prompt is drawn from `text`."""
    cache = st.just({"type": "ephemeral"})
    block = shaped({"type": st.just("text"), "text": text}, cache_control=cache)
    some = text | st.lists(block, min_size=1, max_size=2)
    anything = st.dictionaries(text, text | st.none() | st.lists(text, max_size=2), max_size=2)
    use = shaped({"type": st.just("tool_use"), "id": text, "name": text.filter(bool), "input": anything})
    result = shaped({"type": st.just("tool_result"), "tool_use_id": text}, content=some, is_error=st.booleans())
    user = shaped({"role": st.just("user"), "content": text | st.lists(block | result, min_size=1, max_size=3)})
    assistant = shaped({"role": st.just("assistant"), "content": text | st.lists(block | use, min_size=1, max_size=3)})
    system = shaped({"role": st.just("system"), "content": some})
    turns = st.lists(user | assistant | system, max_size=4)
    last = st.fixed_dictionaries({"role": st.just("user"), "content": text | st.lists(block, min_size=1, max_size=2)})
    tool = shaped({"name": names, "input_schema": anything}, description=text, type=st.just("custom"))
    return shaped(
        {"max_tokens": st.integers(1, 8192), "messages": st.builds(lambda more, end: [*more, end], turns, last)},
        system=some,
        tools=st.lists(tool, max_size=2),
        tool_choice=st.sampled_from([{"type": "none"}, {"type": "auto", "disable_parallel_tool_use": True}]),
        stop_sequences=st.lists(st.text(min_size=1, max_size=3), max_size=4),
        temperature=st.floats(0, 2),
        top_k=st.integers(0, 100),
        stream=st.booleans(),
        metadata=shaped({}, user_id=texts),
    )


@settings(max_examples=40, deadline=None)
@given(requests(HOSTILE))
def test_messages_no_control_token_is_left_anywhere(request: dict[str, Any]) -> None:
    # A stop string is matched against the answer and never reaches the prompt.
    for string in strings({**parse(**request), "stop": []}):
        assert not any(literal in string for literal in LITERALS)


@settings(max_examples=25, deadline=None)
@given(requests(texts))
def test_messages_openapi_allows_what_is_served(request: dict[str, Any]) -> None:
    parse(**request)
    VALIDATOR.validate(request)


@pytest.mark.parametrize(
    "request_",
    [
        {"messages": [USER]},
        {"messages": [{"role": "user", "content": [RESULT]}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"messages": [USER], "thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"messages": [USER], "tools": [], "tool_choice": {"type": "any"}},
        {"messages": [USER], "tools": [{"type": "bash_20250124", "name": "bash"}]},
        {"messages": [USER], "max_tokens": 8193},
        {"messages": [USER], "stop_sequences": ["x"] * 5},
        {"messages": [USER], "model": "y"},
        {"messages": [USER], "foo": 1},
    ],
)
def test_messages_openapi_forbids_what_is_refused(request_: dict[str, Any]) -> None:
    sent = request_ if request_ == {"messages": [USER]} else {"max_tokens": 9, **request_}
    with pytest.raises(RequestError):
        MESSAGES.parse(json.dumps(sent).encode(), BOUNDS, neutralise)
    assert not VALIDATOR.is_valid(sent)


# ----------------------------------------------------------------------------------------------- answers


def played(answer: list[tuple[str, str]], finish: str = "stop", matched: Any = None, piece: int = 3) -> list[Any]:
    said = MessagesReply()
    return events(b"".join(said.feed(event) for event in stream(answer, finish, matched, piece)))


def assembled(said: list[Any]) -> dict[str, Any]:
    """The message that a client puts together from a stream."""
    message = dict(said[0]["message"])
    message["content"], pieces = [], ""
    for event in said[1:]:
        if event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
            pieces = ""
        elif event["type"] == "content_block_delta":
            assert event["index"] == len(message["content"]) - 1
            pieces += event["delta"].get("text", "") + event["delta"].get("partial_json", "")
        elif event["type"] == "content_block_stop":
            block = message["content"][-1]
            block["text" if block["type"] == "text" else "input"] = (
                pieces if block["type"] == "text" else json.loads(pieces or "{}")
            )
        elif event["type"] == "message_delta":
            message |= {**event["delta"], "usage": event["usage"]}
    return message


@settings(max_examples=40, deadline=None)
@given(
    parts,
    st.sampled_from(["stop", "length", "tool_calls"]),
    st.none() | st.just("END") | st.just(7),
    st.integers(1, 30),
)
def test_messages_stream_adds_up_to_the_whole_answer(answer: Any, finish: str, matched: Any, piece: int) -> None:
    whole = json.loads(MessagesReply().document(document(answer, finish, matched)))
    said = played(answer, finish, matched, piece)
    assert assembled(said) == whole
    kinds = [event["type"] for event in said]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    assert len([kind for kind in kinds if kind in {"message_start", "message_delta", "message_stop"}]) == 3
    for event in said:
        EVENT.validate_python(event)
    Message.model_validate(whole)


@pytest.mark.parametrize(
    ("answer", "finish", "matched", "reason", "sequence"),
    [
        ([("", "hi")], "stop", None, "end_turn", None),
        ([("", "hi")], "stop", 2, "end_turn", None),
        ([("", "hi")], "stop", "END", "stop_sequence", "END"),
        ([("", "hi")], "length", None, "max_tokens", None),
        ([("f", "{}")], "tool_calls", None, "tool_use", None),
        ([("f", "{}")], "stop", None, "tool_use", None),
        ([("f", '{"a')], "length", None, "max_tokens", None),
    ],
)
def test_messages_stop_reason(answer: Any, finish: str, matched: Any, reason: str, sequence: str | None) -> None:
    whole = json.loads(MessagesReply().document(document(answer, finish, matched)))
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)
    assert played(answer, finish, matched)[-2]["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


def test_messages_answer_has_our_fields_only() -> None:
    whole = MessagesReply().document(document([("", "hi"), ("f", '{"a": 1}')], "tool_calls"))
    assert b"secret" not in whole
    assert json.loads(whole) == {
        "id": "msg_r1",
        "type": "message",
        "role": "assistant",
        "model": "borg-merge-v1",
        "content": [
            {"type": "text", "text": "hi"},
            {"type": "tool_use", "id": "call-0", "name": "f", "input": {"a": 1}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 41,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 2304,
            "output_tokens": 7,
        },
    }


def test_messages_input_that_was_cut_off_is_empty() -> None:
    whole = json.loads(MessagesReply().document(document([("f", '{"a": "b')], "length")))
    assert whole["content"] == [{"type": "tool_use", "id": "call-0", "name": "f", "input": {}}]


def test_messages_first_event_tells_the_prompts_tokens() -> None:
    start = played([("", "hi")])[0]["message"]
    assert start["usage"]["input_tokens"] == 2345
    assert (start["content"], start["stop_reason"]) == ([], None)


def test_messages_content_can_be_sent_back() -> None:
    answer = json.loads(MessagesReply().document(document([("", "let me see"), ("f", '{"a": null}')])))
    turn = {"role": "assistant", "content": answer["content"]}
    body = parse(USER, turn, {"role": "user", "content": [{**RESULT, "tool_use_id": "call-0"}]})
    assert body["messages"][1]["content"] == "let me see"
    assert body["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"a": null}'


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
    ],
)
def test_messages_error_has_anthropics_shape(status: int, kind: str) -> None:
    error = {"message": "No.", "type": "any", "param": "x", "code": "y"}
    body = MESSAGES.error_body(status, error, "r1")
    assert body == {"type": "error", "error": {"type": kind, "message": "No."}, "request_id": "r1"}
    assert events(MessagesReply().error_event(body)) == [body]
