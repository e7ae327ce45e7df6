"""Whatever is answered, the official clients can send back as history, in each way that they have (I9)."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from tests.chats import BOUNDS
from tests.closure import Server
from tests.protocols import Part, parts

USER = {"role": "user", "content": "hello"}
PARAMETERS = {"type": "object", "properties": {}}

SERVER = Server()


def answer(request: httpx2.Request) -> httpx2.Response:
    status, kind, raw = SERVER.answer(request.url.path, request.read())
    return httpx2.Response(status, content=raw, headers={"content-type": kind})


HTTP = httpx2.Client(transport=httpx2.MockTransport(answer))
OPENAI: Any = openai.OpenAI(api_key="x", base_url="http://borg/v1", http_client=HTTP)
ANTHROPIC: Any = anthropic.Anthropic(api_key="x", base_url="http://borg", http_client=HTTP)


class Anything(BaseModel):
    model_config = ConfigDict(extra="allow")


def forms(model: BaseModel) -> Iterator[Any]:
    """An answer's part as a client may send it on."""
    yield model
    yield model.model_dump(warnings=False)
    yield model.model_dump(exclude_none=True, warnings=False)
    yield json.loads(model.model_dump_json(exclude_unset=True, warnings=False))


# ------------------------------------------------------------------------------ the ways to an answer and back


def chat_create(**more: Any) -> Iterator[Any]:
    yield from forms(OPENAI.chat.completions.create(model=BOUNDS.model, messages=[USER], **more).choices[0].message)


def chat_stream(**more: Any) -> Iterator[Any]:
    with OPENAI.chat.completions.stream(model=BOUNDS.model, messages=[USER], **more) as events:
        for _ in events:
            pass
        yield from forms(events.get_final_completion().choices[0].message)


def chat_parse(**more: Any) -> Iterator[Any]:
    yield from forms(OPENAI.chat.completions.parse(model=BOUNDS.model, messages=[USER], **more).choices[0].message)


def chat_back(turn: Any) -> None:
    OPENAI.chat.completions.create(model=BOUNDS.model, messages=[USER, turn, USER])


def responses_create(**more: Any) -> Iterator[Any]:
    yield from together(OPENAI.responses.create(model=BOUNDS.model, input="hello", **more).output)


def responses_stream(**more: Any) -> Iterator[Any]:
    with OPENAI.responses.stream(model=BOUNDS.model, input="hello", **more) as events:
        for _ in events:
            pass
        yield from together(events.get_final_response().output)


def responses_parse(**more: Any) -> Iterator[Any]:
    yield from together(OPENAI.responses.parse(model=BOUNDS.model, input="hello", **more).output)


def responses_back(items: Any) -> None:
    OPENAI.responses.create(model=BOUNDS.model, input=[USER, *items, USER])


def messages_create(**more: Any) -> Iterator[Any]:
    yield from together(ANTHROPIC.messages.create(model=BOUNDS.model, max_tokens=9, messages=[USER], **more).content)


def messages_stream(**more: Any) -> Iterator[Any]:
    with ANTHROPIC.messages.stream(model=BOUNDS.model, max_tokens=9, messages=[USER], **more) as events:
        yield from together(events.get_final_message().content)


def messages_beta(**more: Any) -> Iterator[Any]:
    answer = ANTHROPIC.beta.messages.create(model=BOUNDS.model, max_tokens=9, messages=[USER], **more)
    yield from together(answer.content)


def messages_back(blocks: Any) -> None:
    turns = [USER, {"role": "assistant", "content": blocks}, USER]
    ANTHROPIC.messages.create(model=BOUNDS.model, max_tokens=9, messages=turns)


def together(items: Any) -> Iterator[Any]:
    """The items of an answer in each form that a client may send them on in."""
    yield from map(list, zip(*map(forms, items), strict=True))


CHAT_TOOLS = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("get_time", "f")]
FLAT_TOOLS = [{"type": "function", "name": name, "parameters": PARAMETERS} for name in ("get_time", "f")]
CLAUDE_TOOLS = [{"name": name, "input_schema": PARAMETERS} for name in ("get_time", "f")]
WAYS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "chat": (chat_create, chat_back, {}),
    "chat with tools": (chat_create, chat_back, {"tools": CHAT_TOOLS}),
    "chat with logprobs": (chat_create, chat_back, {"logprobs": True}),
    "chat stream": (chat_stream, chat_back, {"tools": CHAT_TOOLS}),
    "chat parse": (chat_parse, chat_back, {"tools": [openai.pydantic_function_tool(Anything, name="f")]}),
    "responses": (responses_create, responses_back, {"include": ["message.output_text.logprobs"]}),
    "responses with tools": (responses_create, responses_back, {"tools": FLAT_TOOLS}),
    "responses stream": (responses_stream, responses_back, {"tools": FLAT_TOOLS}),
    "responses parse": (responses_parse, responses_back, {"tools": FLAT_TOOLS}),
    "messages": (messages_create, messages_back, {}),
    "messages with tools": (messages_create, messages_back, {"tools": CLAUDE_TOOLS}),
    "messages stream": (messages_stream, messages_back, {"tools": CLAUDE_TOOLS}),
    "messages beta": (messages_beta, messages_back, {"tools": CLAUDE_TOOLS}),
}
"""What a client's helper asks -> how its answer goes back, and what it asks with."""


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=5, deadline=None)
@given(said=parts, finish=st.sampled_from(["stop", "length"]))
def test_closure_an_answer_goes_back_as_history(way: str, said: list[Part], finish: str) -> None:
    ask, back, more = WAYS[way]
    finish = finish if back is messages_back or ask in (chat_create, responses_create) else "stop"  # others raise
    SERVER.said, SERVER.finish = said, finish
    text = "".join(piece for name, piece in said if not name)
    for form in ask(**more):
        back(form)
        assert SERVER.understood() == [("", text), *((name, json.loads(arguments)) for name, arguments in said if name)]


def test_closure_parsed_objects_go_back() -> None:
    SERVER.said, SERVER.finish = [("", '{"a": 5}')], "stop"
    for form in chat_parse(response_format=Anything):
        chat_back(form)
    for form in responses_parse(text_format=Anything):
        responses_back(form)
    assert ANTHROPIC.messages.parse(
        model=BOUNDS.model, max_tokens=9, messages=[USER], output_format=Anything
    ).parsed_output == Anything(a=5)


def test_closure_anthropics_tool_runner_goes_on_by_itself() -> None:
    @anthropic.beta_tool
    def f(a: int) -> str:
        """Add one."""
        SERVER.said = [("", "done")]
        return str(a + 1)

    SERVER.said, SERVER.finish = [("", "let me see"), ("f", '{"a": 1}')], "tool_calls"
    runner = ANTHROPIC.beta.messages.tool_runner(model=BOUNDS.model, max_tokens=9, messages=[USER], tools=[f])
    assert [block.text for block in runner.until_done().content if block.type == "text"] == ["done"]
    assert SERVER.bodies[-1]["messages"][-1] == {"role": "tool", "tool_call_id": "call-0", "content": "2"}


def test_closure_a_streamed_call_has_arguments_from_the_first() -> None:
    SERVER.said, SERVER.finish = [("f", '{"a": 1}')], "tool_calls"
    chunks = OPENAI.chat.completions.create(model=BOUNDS.model, messages=[USER], tools=CHAT_TOOLS, stream=True)
    calls = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    assert all(call.function is not None and isinstance(call.function.arguments, str) for call in calls)
