"""What the tests of the three protocols share: a case for each, requests, and chat's answers as vLLM writes them."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import strategies as st

from borg_serve.api import chat, messages, responses
from borg_serve.api.chat_models import ChatRequest
from borg_serve.api.errors import ApiError
from borg_serve.api.messages_models import MessagesRequest
from borg_serve.api.protocol import Answer, Bounds, ClientProtocol
from borg_serve.api.request import Request
from borg_serve.api.responses_models import ResponsesRequest
from tests import chats
from tests.chats import BOUNDS, USER, names, texts

Part = tuple[str, str]
"""("", a piece of text) or (a tool's name, its arguments)."""

small = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
calls = st.tuples(st.sampled_from(["get_time", "f"]), st.dictionaries(small, small, max_size=2).map(json.dumps))
parts = st.builds(
    lambda text, tools: [("", text)] * bool(text) + tools, st.just("") | small, st.lists(calls, max_size=3)
)
"""What a chat answer can hold: text or none, then calls."""

LITERALS = ("<|im_start|>", "<|im_end|>", "<tool_call>")
HOSTILE = st.lists(st.sampled_from([*LITERALS, "<", "|im_end|>", "a", "\\u003c"]), max_size=3).map("".join)
"""Text full of control tokens, in halves too."""

USAGE = {
    "prompt_tokens": 2345,
    "completion_tokens": 7,
    "total_tokens": 2352,
    "prompt_tokens_details": {"cached_tokens": 2304},
}
HEAD = {"id": "chatcmpl-r1", "created": 1_700_000_000, "model": "borg-merge-v1"}
INNER = {"system_fingerprint": "vllm-0.29-secret", "kv_transfer_params": {"secret": 1}, "prompt_token_ids": [1, 2]}
"""What vLLM knows and no client of another protocol is told."""


def neutralise(text: str) -> str:
    """Break the literals as the gate's neutraliser breaks a tokenizer's."""
    return re.sub("|".join(re.escape(literal) for literal in LITERALS), lambda m: m[0][0] + "\u200b" + m[0][1:], text)


def shaped(required: dict[str, Any], **optional: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with these fields; an optional one may be null or absent."""
    return st.fixed_dictionaries(required, optional={name: st.none() | value for name, value in optional.items()})


def document(answer: list[Part], finish: str = "stop", stop_reason: Any = None, logprobs: Any = None) -> bytes:
    """A whole answer."""
    text = "".join(piece for name, piece in answer if not name)
    named = [part for part in answer if part[0]]
    message = {
        "role": "assistant",
        "content": text or None,
        "tool_calls": [
            {"id": f"call-{index}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for index, (name, arguments) in enumerate(named)
        ],
    }
    choice = {
        "index": 0,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": finish,
        "stop_reason": stop_reason,
        "token_ids": [1],
    }
    return json.dumps({**HEAD, "object": "chat.completion", "choices": [choice], "usage": USAGE, **INNER}).encode()


def stream(
    answer: list[Part], finish: str = "stop", stop_reason: Any = None, piece: int = 3, logprobs: Any = None
) -> list[bytes]:
    """The events of a stream, texts and arguments in pieces of so many characters."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    index = -1
    for name, whole in answer:
        pieces = [whole[start : start + piece] for start in range(0, len(whole), piece)]
        if name:
            index += 1
            first = {"index": index, "id": f"call-{index}", "type": "function", "function": {"name": name}}
            deltas.append({"tool_calls": [first]})
            deltas += [{"tool_calls": [{"index": index, "function": {"arguments": some}}]} for some in pieces]
        else:
            deltas += [{"content": some} for some in pieces]
    choices: list[dict[str, Any]] = [
        {"index": 0, "delta": delta, "logprobs": logprobs if "role" not in delta else None, "finish_reason": None}
        for delta in deltas
    ]
    choices.append({"index": 0, "delta": {}, "finish_reason": finish, "stop_reason": stop_reason})
    head = {**HEAD, "object": "chat.completion.chunk"}
    chunks = [{**head, **INNER, "choices": [choice]} for choice in choices]
    chunks.append({**head, "choices": [], "usage": USAGE})
    return [event(chunk) for chunk in chunks] + [b"data: [DONE]\n\n"]


def event(chunk: Any) -> bytes:
    """One server-sent event, as compact as vLLM writes it."""
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def events(raw: bytes) -> list[dict[str, Any]]:
    """The data of named events; each must be named as its data is typed."""
    found = []
    for block in raw.decode().split("\n\n"):
        if block:
            name, data = block.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found


def strings(value: Any) -> list[str]:
    """Every string in a chat request, those inside the JSON of arguments too, as a template gets them."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [found for child in value for found in strings(child)]
    if not isinstance(value, dict):
        return []
    children = [json.loads(child) if name == "arguments" else child for name, child in value.items()]
    return [*value, *strings(children)]


# ------------------------------------------------------------------------------------------------- requests


def responses_requests(text: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Responses requests that are accepted; every string that can reach the prompt is drawn from `text`."""
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


def messages_requests(text: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Messages requests that are accepted; every string that can reach the prompt is drawn from `text`."""
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


@dataclass(frozen=True)
class Case:
    """One protocol: its module, its request's model, its smallest request, and requests that are accepted."""

    protocol: ClientProtocol
    model: type[Request]
    plain: dict[str, Any]
    requests: Callable[[st.SearchStrategy[str]], st.SearchStrategy[dict[str, Any]]]
    bounds: Bounds = BOUNDS

    def parsed(self, **fields: Any) -> tuple[dict[str, Any], Answer]:
        """Return what the protocol makes of its smallest request with these fields."""
        return self.protocol.parse(json.dumps({**self.plain, **fields}).encode(), self.bounds, neutralise)

    def body(self, **fields: Any) -> dict[str, Any]:
        """Return the chat request that vLLM gets."""
        return self.parsed(**fields)[0]

    def refusal(self, **fields: Any) -> ApiError:
        """Return the error that the request is refused with."""
        with pytest.raises(ApiError) as caught:
            self.body(**fields)
        return caught.value


CHAT = Case(chat, ChatRequest, {"messages": [USER]}, chats.requests)
RESPONSES = Case(responses, ResponsesRequest, {"input": "hello"}, responses_requests)
MESSAGES = Case(messages, MessagesRequest, {"messages": [USER], "max_tokens": 9}, messages_requests)
CASES = {"chat": CHAT, "responses": RESPONSES, "messages": MESSAGES}
