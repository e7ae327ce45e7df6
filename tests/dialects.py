"""What the tests of the dialects share: hostile text, and chat's answers as vLLM writes them, whole and as a stream."""

import json
import re
from typing import Any

from hypothesis import strategies as st

Part = tuple[str, str]
"""("", a piece of text) or (a tool's name, its arguments)."""

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
calls = st.tuples(st.sampled_from(["get_time", "f"]), st.dictionaries(texts, texts, max_size=2).map(json.dumps))
parts = st.builds(
    lambda text, tools: [("", text)] * bool(text) + tools, st.just("") | texts, st.lists(calls, max_size=3)
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
            function = {"name": name, "arguments": ""}
            deltas.append({"tool_calls": [{"index": index, "id": f"call-{index}", "type": "function"}]})
            deltas[-1]["tool_calls"][0]["function"] = function
            deltas += [{"tool_calls": [{"index": index, "function": {"arguments": some}}]} for some in pieces]
        else:
            deltas += [{"content": some} for some in pieces]
    choices: list[dict[str, Any]] = [
        {"index": 0, "delta": delta, "logprobs": logprobs if "role" not in delta else None, "finish_reason": None}
        for delta in deltas
    ]
    choices.append({"index": 0, "delta": {}, "finish_reason": finish, "stop_reason": stop_reason})
    bare = {name: USAGE[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    chunks = [{**HEAD, **INNER, "choices": [choice], "usage": bare} for choice in choices]
    chunks.append({**HEAD, "choices": [], "usage": USAGE})
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
