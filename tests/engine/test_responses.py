"""OpenAI's own client talks Responses to the real engine: whole, streamed, with tools, with schemas, wrongly."""

import json
import time
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import (
    FunctionToolParam,
    Response,
    ResponseFunctionToolCall,
    ResponseInputParam,
    ResponseOutputMessage,
    ResponseOutputText,
)

from tests.engine.process import Server

MODEL = "borg-merge-v1"
CAPITAL = "What is the capital of France?"
SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: FunctionToolParam = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": SCHEMA,
    "strict": True,
}


def only_call(response: Response) -> ResponseFunctionToolCall:
    (item,) = response.output
    assert isinstance(item, ResponseFunctionToolCall)
    return item


def test_responses_answers_openai_client(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input=CAPITAL, temperature=0, max_output_tokens=24)
    assert "Paris" in answer.output_text
    assert (answer.status, answer.model, answer.model_extra) == ("completed", MODEL, {"store": False})
    assert answer.usage is not None
    assert answer.usage.input_tokens > 2000
    assert answer.usage.input_tokens_details.cached_tokens > 2000


def test_responses_stream_ends_with_what_chat_answers(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": CAPITAL}], temperature=0, max_tokens=24
    )
    pieces, kinds = [], []
    with client.responses.stream(model=MODEL, input=CAPITAL, temperature=0, max_output_tokens=24) as stream:
        for event in stream:
            kinds.append(event.type)
            if event.type == "response.output_text.delta":
                pieces.append(event.delta)
        final = stream.get_final_response()
    assert "".join(pieces) == final.output_text == chat.choices[0].message.content
    assert len(pieces) > 3
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"


async def test_responses_stream_of_async_client_says_when_it_is_cut(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.responses.create(
            model=MODEL, input="Tell me a story.", max_output_tokens=4, stream=True, extra_body={"ignore_eos": True}
        )
        events = [event async for event in stream]
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details is not None
    assert last.response.incomplete_details.reason == "max_output_tokens"
    assert last.response.usage is not None
    assert last.response.usage.output_tokens == 4
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_responses_prompt_has_the_tokens_of_the_chat_request(client: openai.OpenAI, http: httpx.Client) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    tool = {"type": "function", "function": {name: value for name, value in WEATHER.items() if name != "type"}}
    chat: dict[str, Any] = {
        "messages": [
            {"role": "system", "content": "Be brief.\n\nUse metric units."},
            {"role": "user", "content": "What is the weather in Rome?"},
            {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "Sunny, 31 degrees. <|im_end|>"},
            {"role": "user", "content": "And tomorrow?"},
        ],
        "tools": [tool],
        "max_tokens": 1,
    }
    said: ResponseInputParam = [
        {"role": "developer", "content": "Use metric units."},
        {"role": "user", "content": "What is the weather in Rome?"},
        {"role": "assistant", "content": "Let me see."},
        {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "Sunny, 31 degrees. <|im_end|>"},
        {"role": "user", "content": [{"type": "input_text", "text": "And tomorrow?"}]},
    ]
    expected = http.post("/v1/chat/completions", json=chat).json()["usage"]["prompt_tokens"]
    request: Any = {"model": MODEL, "instructions": "Be brief.", "input": said, "tools": [WEATHER]}
    answer = client.responses.create(**request, max_output_tokens=1)
    assert answer.usage is not None
    assert answer.usage.input_tokens == expected
    assert client.responses.input_tokens.count(**request).input_tokens == expected


def test_responses_has_the_sampling_defaults_of_the_contract(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> str:
        answer: Response = client.responses.create(
            model=MODEL, input="Tell me a story.", max_output_tokens=12, extra_body={"seed": 7}, **more
        )
        return answer.output_text

    assert ask() == ask(temperature=0.7, top_p=0.9) != ask(temperature=1.9, top_p=1)


@pytest.mark.parametrize("streaming", [False, True])
def test_responses_calls_a_tool_and_goes_on_with_its_output(client: openai.OpenAI, streaming: bool) -> None:
    request: Any = {
        "model": MODEL,
        "input": "What is the weather in Rome?",
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "name": "get_weather"},
        "temperature": 0,
        "max_output_tokens": 96,
    }
    if streaming:
        with client.responses.stream(**request) as stream:
            arguments = "".join(
                event.delta for event in stream if event.type == "response.function_call_arguments.delta"
            )
            answer: Response = stream.get_final_response()
        assert arguments == only_call(answer).arguments
    else:
        answer = client.responses.create(**request)
    call = only_call(answer)
    assert call.name == "get_weather"
    assert json.loads(call.arguments)["city"] in {"Paris", "Rome"}
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny, 31 degrees."}
    turns: Any = [{"role": "user", "content": request["input"]}, *answer.output, output]
    after = client.responses.create(model=MODEL, input=turns, tools=[WEATHER], max_output_tokens=8)
    assert after.output_text


def test_responses_json_schema_holds_the_answer_to_the_schema(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model=MODEL,
        input=CAPITAL,
        temperature=0,
        max_output_tokens=96,
        text={"format": {"type": "json_schema", "name": "city", "schema": SCHEMA, "strict": True}},
    )
    assert json.loads(answer.output_text) == {"city": "Paris"}


def test_responses_logprobs_come_when_included(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model=MODEL,
        input=CAPITAL,
        temperature=0,
        max_output_tokens=4,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    (message,) = answer.output
    assert isinstance(message, ResponseOutputMessage)
    (part,) = message.content
    assert isinstance(part, ResponseOutputText)
    assert part.logprobs
    assert "".join(token.token for token in part.logprobs) == part.text
    assert all(len(token.top_logprobs) == 2 for token in part.logprobs)


def test_responses_errors_are_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.responses.create(model="other", input=CAPITAL)
    assert unknown.value.code == "model_not_found"
    for more in (
        {"previous_response_id": "resp_1"},
        {"background": True},
        {"conversation": "conv_1"},
        {"truncation": "auto"},
        {"prompt": {"id": "pmpt_1"}},
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model=MODEL, input=CAPITAL, **more)
        assert refused.value.param == next(iter(more))
    with pytest.raises(openai.BadRequestError) as overflow:
        client.responses.create(model=MODEL, input="word " * 9000, max_output_tokens=9)
    assert overflow.value.code == "context_length_exceeded"
    assert overflow.value.param == "input"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_1")


def test_responses_client_that_leaves_frees_what_it_held(server: Server, client: openai.OpenAI) -> None:
    with client.responses.create(
        model=MODEL, input=CAPITAL, max_output_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                break
    time.sleep(2)
    metrics = server.metrics()
    assert metrics["vllm:num_requests_running"] == metrics["borg_inflight"] == 0
