"""Anthropic's Messages : which chat request a request is, and how the answer is written."""

import json
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from borg_serve.api import messages as protocol
from borg_serve.api.messages import MessagesAnswer
from borg_serve.api.progress import Progress
from tests.chats import BOUNDS
from tests.protocols import CHAT, MESSAGES, document, events, parts, stream

USER = {"role": "user", "content": "hello"}
SCHEMA = {"type": "object", "properties": {"zone": {"enum": ["UTC", None]}}, "default": None}
TOOL = {"name": "f", "input_schema": SCHEMA}
USE = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "c", "content": "done"}
CACHE = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def parse(*turns: Any, **request: Any) -> dict[str, Any]:
    return MESSAGES.body(**{"messages": turns or [USER], **request})


# ----------------------------------------------------------------------------------------------- requests


CALLS = [
    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": null, "b": "ü"}'}},
    {"id": "c2", "type": "function", "function": {"name": "f", "arguments": "{}"}},
]
AS_CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "a\na"},
        {"role": "system", "content": "b"},
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": "three", "tool_calls": CALLS},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
        {"role": "tool", "tool_call_id": "c2", "content": "too"},
        {"role": "tool", "tool_call_id": "c3", "content": ""},
        {"role": "user", "content": "four"},
        {"role": "assistant", "content": "five"},
        {"role": "system", "content": "late"},
        {"role": "user", "content": "six"},
    ],
    "stream": True,
    "stream_options": {"include_usage": True},
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
    assert body == CHAT.body(**AS_CHAT)
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
    turn = {"role": "user", "x": None, "content": [{"type": "text", "text": "hello", "cache_control": None, "x": None}]}
    assert parse(turn) == parse()
    assert parse(tools=[{**TOOL, "type": None}])["tools"][0]["function"]["parameters"] == SCHEMA


def test_messages_no_tools_are_no_tools() -> None:
    assert parse(tools=[], tool_choice={"type": "auto"}) == parse()


# ----------------------------------------------------------------------------------------------- answers


def played(answer: list[tuple[str, str]], finish: str = "stop", matched: Any = None, piece: int = 3) -> list[Any]:
    said = MessagesAnswer()
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
    whole = json.loads(MessagesAnswer().document(document(answer, finish, matched)))
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
    whole = json.loads(MessagesAnswer().document(document(answer, finish, matched)))
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)
    assert played(answer, finish, matched)[-2]["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


def test_messages_answer_has_our_fields_only() -> None:
    whole = MessagesAnswer().document(document([("", "hi"), ("f", '{"a": 1}')], "tool_calls"))
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
    whole = json.loads(MessagesAnswer().document(document([("f", '{"a": "b')], "length")))
    assert whole["content"] == [{"type": "tool_use", "id": "call-0", "name": "f", "input": {}}]


def test_messages_first_event_tells_the_prompts_tokens() -> None:
    answer = MessagesAnswer()
    answer.progress = Progress(2345, 2304)
    start = events(answer.feed(stream([("", "hi")])[0]))[0]["message"]
    assert (start["usage"]["input_tokens"], start["usage"]["cache_read_input_tokens"]) == (41, 2304)
    assert (start["content"], start["stop_reason"]) == ([], None)


def test_messages_begins_once_when_the_prompts_tokens_are_known() -> None:
    answer = MessagesAnswer()
    assert answer.begin("r1", "m") == b""
    answer.progress = Progress(2345, 2304)
    (start,) = events(answer.begin("r1", "m"))
    assert start["message"]["id"] == "msg_r1"
    assert answer.begin("r1", "m") == b""
    said = [one["type"] for piece in stream([("", "hi")]) for one in events(answer.feed(piece))]
    assert said[0] == "content_block_start"


def test_messages_content_can_be_sent_back() -> None:
    answer = json.loads(MessagesAnswer().document(document([("", "let me see"), ("f", '{"a": null}')])))
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
    body = protocol.error_body(status, error, "r1")
    assert body == {"type": "error", "error": {"type": kind, "message": "No."}, "request_id": "r1"}
    assert events(MessagesAnswer().error_event(body)) == [body]
