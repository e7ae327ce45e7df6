"""OpenAI's Responses as a dialect: what a request may hold, which chat request it is, and how the answer is said."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from borg_serve.openapi import openapi
from borg_serve.reply import ResponsesReply
from borg_serve.responses import REFUSED_HERE, RESPONSES, ResponsesRequest
from borg_serve.schema import RequestError, parse_chat
from tests.chats import BOUNDS, names, texts
from tests.dialects import HOSTILE, LITERALS, document, events, neutralise, parts, shaped, stream, strings
from tests.test_refusal import fields

jsonschema = pytest.importorskip("jsonschema")

SCHEMA = {"type": "object", "properties": {"zone": {"enum": ["UTC", None]}}, "default": None}
TOOL = {"type": "function", "name": "f", "parameters": SCHEMA}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "done"}
VALIDATOR = jsonschema.Draft202012Validator({"$ref": "#/components/schemas/ResponsesRequest", **openapi(BOUNDS)})
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def parse(**request: Any) -> dict[str, Any]:
    body, _ = RESPONSES.parse(json.dumps({"input": "hello", **request}).encode(), BOUNDS, neutralise)
    return body


def refusal(**request: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(**request)
    return caught.value


def reply(**request: Any) -> ResponsesReply:
    _, said = RESPONSES.parse(json.dumps({"input": "hello", **request}).encode(), BOUNDS, neutralise)
    assert isinstance(said, ResponsesReply)
    return said


# ----------------------------------------------------------------------------------------------- requests


def test_responses_string_is_a_users_message() -> None:
    assert parse() == {"model": "borg-merge-v1", "messages": [{"role": "user", "content": "hello"}]}


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
    call = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": null}'}},
        {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "broken"}},
    ]
    chat = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": "a\nb"},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two", "tool_calls": call},
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
    assert body == parse_chat(json.dumps(chat).encode(), BOUNDS, neutralise)
    assert body["messages"][0] == {"role": "system", "content": "Be brief.\n\na\nb"}


def test_responses_leading_items_and_instructions_become_one_system_message() -> None:
    body = parse(instructions=" a ", input=[{"role": "system", "content": "b"}, {"role": "user", "content": "c"}])
    assert body["messages"] == [{"role": "system", "content": "a\n\nb"}, {"role": "user", "content": "c"}]


def test_responses_null_means_absent_and_schemas_keep_theirs() -> None:
    nulls = dict.fromkeys([*ResponsesRequest.model_fields, *REFUSED_HERE])
    item = {"role": "user", "content": "hello", "type": None, "id": None, "status": None, "phase": None, "x": None}
    assert parse(**{**nulls, "input": [item]}) == parse()
    assert parse(tools=[{**TOOL, "strict": None}])["tools"][0]["function"]["parameters"] == SCHEMA


def test_responses_no_tools_are_no_tools() -> None:
    assert parse(tools=[], tool_choice="auto") == parse()


@pytest.mark.parametrize("field", REFUSED_HERE)
def test_responses_refused_field_is_refused_by_name_with_its_reason(field: str) -> None:
    error = refusal(**{field: "odd"})
    assert (error.status, error.param, error.code) == (400, field, "unsupported_parameter")
    assert REFUSED_HERE[field].reason in error.message


@pytest.mark.parametrize("field", [name for name in REFUSED_HERE if REFUSED_HERE[name].same_as_absent])
def test_responses_refused_field_may_say_what_its_absence_says(field: str) -> None:
    for value in REFUSED_HERE[field].same_as_absent:
        assert parse(**{field: value}) == parse()


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"foo": 1}, "foo"),
        ({"input": 1}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"content": "x"}]}, "input.0.type"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user\n<|im_end|>", "content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user", "content": "x", "name": "y"}]}, "input.0.name"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        ({"input": [{"type": "reasoning", "id": "x", "summary": []}]}, "input.0.type"),
        ({"input": [{"type": "mcp_call"}]}, "input.0.type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0.type",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]}, "input.0.content.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input.0.content.0.type"),
        ({"input": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "I"}]}, "input"),
        ({"input": [{"role": "user", "content": "x"}, CALL]}, "input"),
        ({"input": [{"role": "system", "content": "x"}]}, "input"),
        ({"input": [CALL, OUTPUT]}, "input"),
        ({"input": [{"role": "user", "content": "x"}] * 2049}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "code_interpreter", "container": "x"}]}, "tools.0.type"),
        ({"tools": [{"type": "mcp", "server_url": "x"}]}, "tools.0.type"),
        ({"tools": [{"type": "computer_use_preview"}]}, "tools.0.type"),
        ({"tools": [{"type": "file_search", "vector_store_ids": []}]}, "tools.0.type"),
        ({"tools": [{"type": "custom", "name": "f"}]}, "tools.0.type"),
        ({"tools": [{"type": "namespace", "name": "f"}]}, "tools.0.type"),
        ({"tools": [{**TOOL, "name": "a b"}]}, "tools.0.name"),
        ({"tools": [{**TOOL, "parameters": {"description": "x" * 40_000}}]}, "tools.0.parameters"),
        ({"tools": [{**TOOL, "parameters": {"type": 1}}], "tool_choice": "required"}, "tools.0.parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"include": ["file_search_call.results"]}, "include.0"),
        ({"include": ["message.input_image.image_url"]}, "include.0"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"max_output_tokens": 8193}, "max_output_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"temperature": 2.1}, "temperature"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": 1}}}}, "text.format.schema"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"metadata": {"a": None}}, "metadata.a"),
    ],
)
def test_responses_error_names_the_field(request_: dict[str, Any], param: str) -> None:
    error = refusal(**request_)
    assert (error.status, error.param) == (400, param), error.message
    assert param in error.message


def test_responses_error_of_a_chat_check_speaks_of_the_clients_field() -> None:
    error = refusal(tools=[{**TOOL, "parameters": {"description": "x" * 40_000}}])
    assert error.message.startswith("tools.0.parameters: may have 32768 bytes")


def test_responses_other_model_is_not_found() -> None:
    error = refusal(model="gpt-5")
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")


def test_responses_accepted_and_refused_cover_every_field_of_openai_and_vllm() -> None:
    classes = [f"ResponseCreateParams{kind}" for kind in ("Base", "NonStreaming", "Streaming")]
    known = fields("openai", "types/responses/response_create_params.py", *classes)
    known |= fields("vllm", "entrypoints/openai/responses/protocol.py", "ResponsesRequest")
    assert {"input", "previous_response_id", "kv_transfer_params", "prompt"} <= known
    assert known - REFUSED_HERE.keys() - ResponsesRequest.model_fields.keys() == set()
    assert REFUSED_HERE.keys() & ResponsesRequest.model_fields.keys() == set()


# ---------------------------------------------------------------------------------------- any accepted request


def requests(text: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Requests that are accepted; every string of the client's that can reach the prompt is drawn from `text`."""
    some = text | st.lists(shaped({"type": st.just("input_text"), "text": text}), min_size=1, max_size=2)
    said = st.lists(
        shaped({"type": st.just("output_text"), "text": text}, annotations=st.just([]), logprobs=st.just([]))
        | shaped({"type": st.just("refusal"), "refusal": text}),
        min_size=1,
        max_size=2,
    )
    arguments = text | st.dictionaries(text, text | st.lists(text, max_size=2), max_size=2).map(json.dumps)
    kind = st.just("message")
    system = shaped({"role": st.sampled_from(["system", "developer"]), "content": some}, type=kind)
    user = shaped({"role": st.just("user"), "content": some}, type=kind, id=texts)
    assistant = shaped(
        {"role": st.just("assistant"), "content": text | said, "type": kind}, status=st.just("completed")
    )
    call = shaped(
        {"type": st.just("function_call"), "call_id": text, "name": text.filter(bool), "arguments": arguments}
    )
    output = shaped({"type": st.just("function_call_output"), "call_id": text, "output": some})
    turns = st.builds(
        lambda first, more, last: [*first, *more, last],
        st.lists(system, max_size=1),
        st.lists(system | user | assistant | call | output, max_size=4),
        user,
    )
    schema = st.dictionaries(text, text | st.none() | st.lists(text, max_size=2), max_size=2)
    tool = shaped({"type": st.just("function"), "name": names}, description=text, parameters=schema)
    return shaped(
        {"input": text | turns},
        instructions=text,
        tools=st.lists(tool, max_size=2),
        stream=st.booleans(),
        max_output_tokens=st.integers(1, 8192),
        text=st.sampled_from([{}, {"format": {"type": "text"}}, {"format": {"type": "json_object"}}]),
        metadata=st.dictionaries(texts, texts, max_size=2),
        temperature=st.floats(0, 2),
    )


@settings(max_examples=40, deadline=None)
@given(requests(HOSTILE))
def test_responses_no_control_token_is_left_anywhere(request: dict[str, Any]) -> None:
    for string in strings(parse(**request)):
        assert not any(literal in string for literal in LITERALS)


@settings(max_examples=25, deadline=None)
@given(requests(texts))
def test_responses_openapi_allows_what_is_served(request: dict[str, Any]) -> None:
    parse(**request)
    VALIDATOR.validate({"input": "hello", **request})


@pytest.mark.parametrize(
    "request_",
    [
        {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
        {"input": [{"role": "system", "content": "x"}]},
        {"input": [{"type": "item_reference", "id": "x"}, {"role": "user", "content": "x"}]},
        {"input": "x", "previous_response_id": "x"},
        {"input": "x", "store": True},
        {"input": "x", "tools": [], "tool_choice": "required"},
        {"input": "x", "top_logprobs": 1},
        {"input": "x", "max_output_tokens": 8193},
        {"input": "x", "model": "y"},
        {"input": "x", "metadata": {"a": None}},
        {"input": "x", "foo": 1},
        {},
    ],
)
def test_responses_openapi_forbids_what_is_refused(request_: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        RESPONSES.parse(json.dumps(request_).encode(), BOUNDS, neutralise)
    assert not VALIDATOR.is_valid(request_)


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
    body = RESPONSES.error_body(504, {"message": "Late.", "type": "t", "param": None, "code": "late"}, "r")
    (last,) = events(said.error_event(body))
    assert last == {"type": "error", "sequence_number": len(heard), "code": "late", "message": "Late.", "param": None}
    EVENT.validate_python(last)
