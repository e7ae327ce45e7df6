"""Tools and JSON Schemas with an OpenAI client on the real engine: what is forced is followed."""

import json
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionFunctionToolParam, ChatCompletionMessageParam

from tests.engine.test_chat import CAPITAL, MODEL, text

WEATHER: ChatCompletionFunctionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
TIME: ChatCompletionFunctionToolParam = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"enum": ["CET", "UTC"]}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("name", ["get_weather", "get_time"])
def test_chat_named_tool_is_called_with_arguments_of_its_schema(client: openai.OpenAI, name: str) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=CAPITAL,
        tools=[WEATHER, TIME],
        tool_choice={"type": "function", "function": {"name": name}},
        temperature=0,
        max_tokens=96,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    (call,) = calls
    assert call.type == "function"
    assert call.function.name == name
    check_arguments(name, call.function.arguments)


def test_chat_required_tool_is_called_in_a_stream(client: openai.OpenAI) -> None:
    names, arguments, finishes = [], "", []
    with client.chat.completions.create(
        model=MODEL,
        messages=CAPITAL,
        tools=[WEATHER, TIME],
        tool_choice="required",
        temperature=0,
        max_tokens=128,
        stream=True,
    ) as stream:
        for chunk in stream:
            finishes += [choice.finish_reason for choice in chunk.choices if choice.finish_reason]
            for call in chunk.choices[0].delta.tool_calls or ():
                assert call.function is not None
                assert call.index == 0
                names += [call.function.name] if call.function.name else []
                arguments += call.function.arguments or ""
    assert len(names) == 1
    check_arguments(names[0], arguments)
    assert finishes == ["tool_calls"]


def test_chat_forced_call_that_is_cut_off_is_the_part_that_was_made(client: openai.OpenAI) -> None:
    """In documents as in streams; vLLM's documents have its raw text instead. `strict: False` changes nothing."""
    loose: Any = {"type": "function", "function": {**WEATHER["function"], "strict": False}}
    answer = client.chat.completions.create(
        model=MODEL, messages=CAPITAL, tools=[loose], tool_choice="required", temperature=0, max_tokens=16
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert not choice.message.content
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_chat_goes_on_after_a_tool_result(client: openai.OpenAI) -> None:
    call: Any = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    messages: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": "What is the weather in Rome?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "Sunny, 31 degrees."},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER], max_tokens=8)
    assert text(answer)


def test_chat_tool_choice_none_calls_nothing(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=CAPITAL, tools=[WEATHER], tool_choice="none", temperature=0, max_tokens=24
    )
    assert not answer.choices[0].message.tool_calls
    assert "Paris" in text(answer)


def test_chat_json_schema_holds_the_answer_to_the_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {
            "capital": {"type": "string", "enum": ["Paris", "Rome"]},
            "rivers": {"type": "array", "items": {"enum": ["Seine", "Tiber"]}, "minItems": 2, "maxItems": 2},
            "departments": {"allOf": [{"minimum": 90, "maximum": 99}, {"type": "integer", "multipleOf": 8}]},
        },
        "required": ["capital", "rivers", "departments"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL,
        messages=CAPITAL,
        temperature=0,
        max_tokens=96,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": schema}},
    )
    document = json.loads(text(answer))
    assert set(document) == {"capital", "rivers", "departments"}
    assert document["departments"] == 96  # vLLM's xgrammar would let any value through
    assert document["capital"] == "Paris"
    assert len(document["rivers"]) == 2


def test_chat_json_object_gives_json(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Give me a JSON object with one key, a, that holds 1."}],
        temperature=0,
        max_tokens=16,
        response_format={"type": "json_object"},
    )
    assert text(answer).lstrip().startswith("{")


def check_arguments(name: str, arguments: str) -> None:
    document = json.loads(arguments)
    if name == "get_weather":
        assert set(document) == {"city", "days"}
        assert document["city"] in {"Paris", "Rome"}
        assert isinstance(document["days"], int)
    else:
        assert document in ({"zone": "CET"}, {"zone": "UTC"})


# -------------------------------------------------------------------------------------------------- messages
