"""What is made of vLLM's chat answers has the shape that the OpenAPI document says, and nothing of vLLM's own."""

import json
from typing import Any

import pytest
from vllm.entrypoints.generate.base.protocol import DeltaMessage, FunctionCall, ToolCall
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
    ChatMessage,
)
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.parser.parser_manager import ParserManager

from borg_serve.api import chat
from borg_serve.api.answers import answer_schemas
from borg_serve.api.chat_answer import TOKEN, ChatAnswer
from borg_serve.api.protocol import Bounds
from tests import qwen

jsonschema = pytest.importorskip("jsonschema")
SCHEMAS = answer_schemas()
CALL = ToolCall(function=FunctionCall(name="f", arguments="{}"))


@pytest.mark.parametrize(
    ("message", "finish"),
    [
        (ChatMessage(role="assistant", content="hi"), "stop"),
        (ChatMessage(role="assistant", content=None, tool_calls=[CALL]), "tool_calls"),
    ],
)
def test_chat_completion_of_vllm_becomes_what_is_described(message: ChatMessage, finish: str) -> None:
    choice = ChatCompletionResponseChoice(index=0, message=message, finish_reason=finish, stop_reason=2)
    usage = UsageInfo(prompt_tokens=2, completion_tokens=1, total_tokens=3)
    answer = ChatCompletionResponse(model="m", choices=[choice], usage=usage, system_fingerprint="vllm-0.1")
    said = json.loads(ChatAnswer().document(answer.model_dump_json().encode()))
    jsonschema.Draft202012Validator(SCHEMAS["ChatCompletion"]).validate(said)
    assert said.keys() == {"id", "object", "created", "model", "choices", "usage"}
    assert said["choices"][0].keys() == {"index", "message", "logprobs", "finish_reason"}
    assert said["choices"][0]["message"].keys() - {"tool_calls"} == {"role", "content", "refusal", "annotations"}


def event(delta: DeltaMessage, **more: Any) -> bytes:
    """An event as vLLM's server writes it."""
    fields = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, "token_ids": None, **more}
    choices = [ChatCompletionResponseStreamChoice(**fields)]
    chunk = ChatCompletionStreamResponse(
        id="chatcmpl-a", object="chat.completion.chunk", created=1, choices=choices, model="m"
    )
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n".encode()


@pytest.mark.parametrize("text", ["a", '"\\"', "\n", "é你😀", ',"token_ids":null', ""])
def test_chat_event_of_vllm_that_says_a_token_is_passed_on_without_being_read(text: str) -> None:
    raw = event(DeltaMessage(content=text))
    assert TOKEN.fullmatch(raw)
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
    assert json.loads(ChatAnswer().feed(raw)[6:])["choices"] == [choice]


def test_chat_event_of_vllm_loses_what_is_vllms_own() -> None:
    raw = event(DeltaMessage(content="", reasoning="hm"), finish_reason="stop", stop_reason=2)
    choice = {"index": 0, "delta": {"content": ""}, "logprobs": None, "finish_reason": "stop"}
    assert json.loads(ChatAnswer().feed(raw)[6:])["choices"] == [choice]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
USAGE = b'data: {"id":"a","choices":[],"usage":{"prompt_tokens":2,"completion_tokens":1,"total_tokens":3}}\n\n'


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "f"}}])
@pytest.mark.parametrize(
    ("text", "finish", "arguments"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {"city": "Par', "length", '{"city": "Par'),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "stop", '{"a": 1}'),
        ('<tool_call>\n{"na', "length", None),
    ],
)
def test_chat_document_holds_as_much_of_a_call_as_was_made(
    choice: Any, text: str, finish: str, arguments: str | None
) -> None:
    sent = {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL], "tool_choice": choice}
    body, answer = chat.parse(json.dumps(sent).encode(), Bounds(), str)
    assert answer.gathers
    request: Any = ChatCompletionRequest(**body)
    found = ParserManager.get_parser(tool_parser_name="hermes", reasoning_parser_name=None, enable_auto_tools=True)
    assert found is not None
    tokenizer = qwen.tokenizer("smollm2")
    parser, said = found(tokenizer, request.tools, chat_template_kwargs=None, model_config=None), ""
    ids = tokenizer.encode(text, add_special_tokens=False)
    for index in range(len(ids)):
        before, said, last = said, tokenizer.decode(ids[: index + 1]), index == len(ids) - 1
        delta = parser.parse_delta(said[len(before) :], [ids[index]], request, [1], finished=last)
        answer.feed(event(delta or DeltaMessage(), finish_reason=finish if last else None))
    answer.feed(USAGE)
    (made,) = json.loads(answer.gathered())["choices"]
    calls = [call["function"] for call in made["message"].get("tool_calls", ())]
    assert calls == ([] if arguments is None else [{"name": "f", "arguments": arguments}])
    assert (made["message"]["content"] or "", made["finish_reason"]) == ("", finish)
