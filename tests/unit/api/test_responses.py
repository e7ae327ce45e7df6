"""OpenAI's Responses : which chat request a request is, and how the answer is written."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from borg_serve.api import responses as protocol
from borg_serve.api.responses import ResponsesAnswer
from tests.chats import BOUNDS
from tests.protocols import CHAT, RESPONSES, document, events, parts, stream

SCHEMA = {"type": "object", "properties": {"zone": {"enum": ["UTC", None]}}, "default": None}
TOOL = {"type": "function", "name": "f", "parameters": SCHEMA}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "done"}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def parse(**request: Any) -> dict[str, Any]:
    return RESPONSES.body(**request)


def reply(**request: Any) -> ResponsesAnswer:
    _, said = RESPONSES.parsed(**request)
    assert isinstance(said, ResponsesAnswer)
    return said


# ----------------------------------------------------------------------------------------------- requests


def test_responses_string_is_a_users_message() -> None:
    assert parse() == {"model": "borg-merge-v1", "messages": [{"role": "user", "content": "hello"}]}


CALLS = [
    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": null}'}},
    {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "broken"}},
]
AS_CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "a\nb"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two", "tool_calls": CALLS},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
        {"role": "tool", "tool_call_id": "c2", "content": "too"},
        {"role": "assistant", "content": "no"},
        {"role": "system", "content": "late"},
        {"role": "user", "content": "three"},
    ],
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_completion_tokens": 9,
    "temperature": 0.001,
    "top_p": 0.5,
    "seed": 1,
    "stop": ["x"],
    "logprobs": True,
    "top_logprobs": 2,
    "tools": [
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA, "strict": False}}
    ],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "parallel_tool_calls": False,
    "response_format": {"type": "json_schema", "json_schema": {"name": "out", "schema": SCHEMA, "strict": True}},
}


def test_responses_request_is_the_chat_request_that_means_the_same() -> None:
    text = {"type": "json_schema", "name": "out", "schema": SCHEMA, "strict": True}
    body = parse(
        model=BOUNDS.model,
        instructions="Be brief.",
        input=[
            {
                "role": "developer",
                "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
            },
            {"role": "user", "content": "one"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "two"}]},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": null}'},
            {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "broken"},
            {"type": "function_call_output", "call_id": "c1", "output": "done"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "too"}]},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"role": "system", "content": "late"},
            {"role": "user", "content": "three"},
        ],
        stream=True,
        max_output_tokens=9,
        temperature=0.001,
        top_p=0.5,
        seed=1,
        stop=["x"],
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        tools=[{**TOOL, "description": "d", "strict": False}],
        tool_choice={"type": "function", "name": "f"},
        parallel_tool_calls=False,
        text={"format": text},
        metadata={"a": "b"},
        user="u",
        service_tier="auto",
    )
    assert body == CHAT.body(**AS_CHAT)
    assert body["messages"][0] == {"role": "system", "content": "Be brief.\n\na\nb"}


def test_responses_leading_items_and_instructions_become_one_system_message() -> None:
    body = parse(instructions=" a ", input=[{"role": "system", "content": "b"}, {"role": "user", "content": "c"}])
    assert body["messages"] == [{"role": "system", "content": "a\n\nb"}, {"role": "user", "content": "c"}]


def test_responses_null_means_absent_and_schemas_keep_theirs() -> None:
    item = {"role": "user", "content": "hello", "type": None, "id": None, "status": None, "phase": None, "x": None}
    assert parse(input=[item]) == parse()
    assert parse(tools=[{**TOOL, "strict": None}])["tools"][0]["function"]["parameters"] == SCHEMA


def test_responses_sampling_fields_of_vllm_are_chats() -> None:
    fields = {"min_p": 0.1, "stop_token_ids": [5], "top_k": 3, "repetition_penalty": 1.5, "ignore_eos": True}
    assert parse(**fields) == {**parse(), **fields}


def test_responses_no_tools_are_no_tools() -> None:
    assert parse(tools=[], tool_choice="auto") == parse()


# ----------------------------------------------------------------------------------------------- answers


def played(answer: list[tuple[str, str]], finish: str = "stop", piece: int = 3, **request: Any) -> list[dict[str, Any]]:
    said = reply(**request)
    return events(b"".join(said.feed(event) for event in stream(answer, finish, piece=piece)))


@settings(max_examples=40, deadline=None)
@given(parts, st.sampled_from(["stop", "length", "tool_calls"]), st.integers(1, 30))
def test_responses_stream_ends_with_the_whole_answer(answer: Any, finish: str, piece: int) -> None:
    whole = json.loads(reply().document(document(answer, finish)))
    said = played(answer, finish, piece)
    assert said[-1] == {
        "type": "response.incomplete" if finish == "length" else "response.completed",
        "sequence_number": len(said) - 1,
        "response": whole,
    }
    terminal = {"response.completed", "response.incomplete", "response.failed", "error"}
    assert [event["type"] for event in said if event["type"] in terminal] == [said[-1]["type"]]
    assert [event["sequence_number"] for event in said] == list(range(len(said)))
    assert [event["item"] for event in said if event["type"] == "response.output_item.done"] == whole["output"]
    assert [event["type"] for event in said[:2]] == ["response.created", "response.in_progress"]
    for event in said:
        EVENT.validate_python(event)
    Response.model_validate(whole)


@settings(max_examples=25, deadline=None)
@given(parts, st.integers(1, 30))
def test_responses_deltas_add_up_to_each_item(answer: Any, piece: int) -> None:
    said, open_item = played(answer, piece=piece), None
    pieces: dict[str, str] = {}
    for event in said:
        if event["type"] == "response.output_item.added":
            assert open_item is None, "one item at a time"
            open_item = event["item"]["id"]
            pieces[open_item] = ""
        elif event["type"].endswith(".delta"):
            assert event["item_id"] == open_item
            pieces[open_item] += event["delta"]
        elif event["type"] == "response.output_item.done":
            item, open_item = event["item"], None
            whole = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
            assert pieces[item["id"]] == whole
    assert open_item is None
    assert len(pieces) == max(1, len(answer))


def test_responses_answer_has_our_fields_only_and_what_the_client_said() -> None:
    said = reply(instructions="<|im_end|>", metadata={"a": "b"}, max_output_tokens=7, tools=[TOOL], temperature=0)
    whole = json.loads(said.document(document([("", "hi")], "length")))
    assert "secret" not in json.dumps(whole)
    assert whole == {
        "id": "resp_r1",
        "object": "response",
        "created_at": 1_700_000_000,
        "status": "incomplete",
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"},
        "model": "borg-merge-v1",
        "output": [
            {
                "id": "msg_r1_0",
                "type": "message",
                "role": "assistant",
                "status": "incomplete",
                "content": [{"type": "output_text", "text": "hi", "annotations": [], "logprobs": []}],
            }
        ],
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "truncation": "disabled",
        "usage": {
            "input_tokens": 2345,
            "input_tokens_details": {"cached_tokens": 2304, "cache_write_tokens": 0},
            "output_tokens": 7,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 2352,
        },
        "instructions": "<|im_end|>",
        "max_output_tokens": 7,
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "temperature": 0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [TOOL],
        "top_logprobs": 0,
        "top_p": None,
    }


def test_responses_output_can_be_sent_back() -> None:
    answer = json.loads(reply().document(document([("", "let me see"), ("f", "{}"), ("g", '{"a": 1}')])))
    body = parse(input=[{"role": "user", "content": "hello"}, *answer["output"], {**OUTPUT, "call_id": "call-0"}])
    _, assistant, _ = body["messages"]
    assert assistant["content"] == "let me see"
    assert [call["id"] for call in assistant["tool_calls"]] == ["call-0", "call-1"]


def test_responses_logprobs_are_in_deltas_without_bytes_and_in_the_whole_with_them() -> None:
    token = {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}],
    }
    brief = {"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "a", "logprob": -0.5}]}
    said = reply(include=["message.output_text.logprobs"], top_logprobs=1)
    chunks = stream([("", "aaaa")], piece=2, logprobs={"content": [token]})
    heard = events(b"".join(said.feed(chunk) for chunk in chunks))
    assert [event["logprobs"] for event in heard if event["type"] == "response.output_text.delta"] == [[brief], [brief]]
    assert heard[-1]["response"]["output"][0]["content"][0]["logprobs"] == [token, token]
    assert heard[-1]["response"]["top_logprobs"] == 1


def test_responses_error_event_goes_on_counting() -> None:
    said = reply()
    heard = events(b"".join(said.feed(event) for event in stream([("", "hello")])[:2]))
    body = protocol.error_body(504, {"message": "Late.", "type": "t", "param": None, "code": "late"}, "r")
    (last,) = events(said.error_event(body))
    assert last == {"type": "error", "sequence_number": len(heard), "code": "late", "message": "Late.", "param": None}
    EVENT.validate_python(last)
