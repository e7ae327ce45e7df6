"""Anthropic's own client talks Messages to the real engine: whole, streamed, with tools, with schemas, wrongly."""

import time
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import MessageParam, TextBlock, ToolParam, ToolUseBlock

from tests.engine.process import Server

MODEL = "borg-merge-v1"
CAPITAL: list[MessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: ToolParam = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    """Anthropic's own client of the shared server; it repeats nothing."""
    with anthropic.Anthropic(base_url=server.base_url, api_key="none", max_retries=0, timeout=180) as client:
        yield client


def text(message: anthropic.types.Message) -> str:
    (block,) = message.content
    assert isinstance(block, TextBlock)
    return block.text


def prompt_tokens(usage: Any) -> int:
    return int(usage.input_tokens + (usage.cache_read_input_tokens or 0))


def test_messages_answers_anthropic_client(claude: anthropic.Anthropic) -> None:
    raw = claude.messages.with_raw_response.create(
        model=MODEL, messages=CAPITAL, max_tokens=24, extra_body=GREEDY, extra_headers={"x-request-id": "mine"}
    )
    answer = raw.parse()
    assert (raw.request_id, answer.id) == ("mine", "msg_mine")
    assert claude.models.retrieve(MODEL) == claude.models.list().data[0]
    assert "Paris" in text(answer)
    assert (answer.stop_reason, answer.model, answer.role) == ("end_turn", MODEL, "assistant")
    assert prompt_tokens(answer.usage) > 2000
    assert (answer.usage.cache_read_input_tokens or 0) > 2000


def test_messages_stream_adds_up_to_the_whole_answer(claude: anthropic.Anthropic) -> None:
    whole = claude.messages.create(model=MODEL, messages=CAPITAL, max_tokens=24, extra_body=GREEDY)
    with claude.messages.stream(model=MODEL, messages=CAPITAL, max_tokens=24, extra_body=GREEDY) as stream:
        told = list(stream)
        final = stream.get_final_message()
    kinds = [event.type for event in told]
    start = told[0]
    assert isinstance(start, anthropic.types.RawMessageStartEvent)
    assert prompt_tokens(start.message.usage) == prompt_tokens(whole.usage)
    # The identity's blocks where the first token was late, all that was found where it was not.
    assert start.message.usage.cache_read_input_tokens in (2304, final.usage.cache_read_input_tokens)
    assert text(final) == text(whole)
    assert prompt_tokens(final.usage) == prompt_tokens(whole.usage)
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert kinds.count("content_block_delta") > 3


async def test_messages_stream_of_async_client_says_why_it_ended(server: Server) -> None:
    async with anthropic.AsyncAnthropic(base_url=server.base_url, api_key="none", max_retries=0) as client:
        async with client.messages.stream(model=MODEL, messages=CAPITAL, max_tokens=3, extra_body=GREEDY) as cut:
            assert (await cut.get_final_message()).stop_reason == "max_tokens"
        async with client.messages.stream(
            model=MODEL, messages=CAPITAL, max_tokens=24, stop_sequences=["capital"], extra_body=GREEDY
        ) as stopped:
            final = await stopped.get_final_message()
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", "capital")
    assert "capital" not in text(final)


def test_messages_prompt_has_the_tokens_of_the_chat_request(claude: anthropic.Anthropic, http: httpx.Client) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    function = {"name": "get_weather", "description": WEATHER["description"], "parameters": WEATHER["input_schema"]}
    chat: dict[str, Any] = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is the weather in Rome?"},
            {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "Sunny, 31 degrees. <|im_end|>"},
            {"role": "user", "content": "And tomorrow?"},
        ],
        "tools": [{"type": "function", "function": function}],
        "max_tokens": 1,
    }
    use: Any = {"type": "tool_use", "id": "c1", "name": "get_weather", "input": {"city": "Rome"}}
    result: Any = {"type": "tool_result", "tool_use_id": "c1", "content": "Sunny, 31 degrees. <|im_end|>"}
    turns: list[MessageParam] = [
        {"role": "user", "content": "What is the weather in Rome?"},
        {"role": "assistant", "content": [{"type": "text", "text": "Let me see."}, use]},
        {"role": "user", "content": [result, {"type": "text", "text": "And tomorrow?"}]},
    ]
    expected = http.post("/v1/chat/completions", json=chat).json()["usage"]["prompt_tokens"]
    request: Any = {"model": MODEL, "system": "Be brief.", "messages": turns, "tools": [WEATHER]}
    assert prompt_tokens(claude.messages.create(**request, max_tokens=1).usage) == expected
    assert claude.messages.count_tokens(**request).input_tokens == expected
    forced: Any = {"tool_choice": {"type": "any"}}
    answer = claude.messages.create(**request, **forced, max_tokens=1)
    assert claude.messages.count_tokens(**request, **forced).input_tokens == prompt_tokens(answer.usage)


def test_messages_counts_a_prompt_that_the_context_cannot_hold(claude: anthropic.Anthropic, server: Server) -> None:
    long: list[MessageParam] = [{"role": "user", "content": "word " * 9000}]
    before = server.metrics()["borg_queue_seconds_count"]
    assert claude.messages.count_tokens(model=MODEL, messages=long).input_tokens > 9000
    assert server.metrics()["borg_queue_seconds_count"] == before, "it takes no slot"


@pytest.mark.parametrize("streaming", [False, True])
def test_messages_calls_a_tool_and_goes_on_with_its_result(claude: anthropic.Anthropic, streaming: bool) -> None:
    question: MessageParam = {"role": "user", "content": "What is the weather in Rome?"}
    request: Any = {
        "model": MODEL,
        "messages": [question],
        "tools": [WEATHER],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "max_tokens": 128,
        "extra_body": GREEDY,
    }
    if streaming:
        with claude.messages.stream(**request) as stream:
            answer: anthropic.types.Message = stream.get_final_message()
    else:
        answer = claude.messages.create(**request)
    use = answer.content[-1]
    assert isinstance(use, ToolUseBlock)
    assert answer.stop_reason == "tool_use"
    assert use.name == "get_weather"
    assert use.input in ({"city": "Paris"}, {"city": "Rome"})
    result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": "Sunny, 31 degrees."}
    turns: Any = [question, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    after = claude.messages.create(model=MODEL, messages=turns, tools=[WEATHER], max_tokens=8)
    assert text(after)


def test_messages_json_schema_holds_the_answer_to_the_schema(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(
        model=MODEL,
        messages=CAPITAL,
        max_tokens=96,
        output_config={"format": {"type": "json_schema", "schema": dict(WEATHER["input_schema"])}},
        extra_body=GREEDY,
    )
    assert text(answer).replace(" ", "").replace("\n", "") == '{"city":"Paris"}'


def test_messages_errors_are_the_clients_own_exceptions(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="claude", messages=CAPITAL, max_tokens=9)
    prefill: list[MessageParam] = [*CAPITAL, {"role": "assistant", "content": "The"}]
    with pytest.raises(anthropic.BadRequestError, match="the assistant speaks next"):
        claude.messages.create(model=MODEL, messages=prefill, max_tokens=9)
    for field, value in {"thread": {"type": "create"}, "kv_transfer_params": {"a": 1}}.items():
        with pytest.raises(anthropic.BadRequestError, match=f"{field}: is refused") as refused:
            claude.messages.create(model=MODEL, messages=CAPITAL, max_tokens=9, extra_body={field: value})
        assert isinstance(refused.value.body, dict)
        assert refused.value.body["error"]["type"] == "invalid_request_error"
        assert refused.value.body["request_id"]
    long: list[MessageParam] = [{"role": "user", "content": "word " * 9000}]
    with pytest.raises(anthropic.BadRequestError, match="context length"):
        claude.messages.create(model=MODEL, messages=long, max_tokens=9)


def test_messages_client_that_leaves_frees_what_it_held(server: Server, claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(model=MODEL, messages=CAPITAL, max_tokens=4000, stop_sequences=["\u2603"]) as stream:
        for event in stream:
            if event.type == "content_block_delta":
                break
    time.sleep(2)
    metrics = server.metrics()
    assert metrics["vllm:num_requests_running"] == metrics["borg_inflight"] == 0
