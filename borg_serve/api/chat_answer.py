"""vLLM's chat answer as OpenAI writes it: its own fields are left out, whatever they hold.

It does not know the request, nor how a stream may fail: the gate passes on only what its grammar accepts.
"""

import re
from typing import Any

import jiter

from borg_serve.api.events import compact, data_event
from borg_serve.api.protocol import Answer

__all__ = ["ChatAnswer"]

Json = dict[str, Any]

HEAD = ("id", "object", "created", "model")
COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")
DONE = b"data: [DONE]"
TOKEN = re.compile(
    rb'data: \{"id":"[\w.-]*","object":"chat\.completion\.chunk","created":\d+,"model":"[^"\\]*",'
    rb'"choices":\[\{"index":\d+,"delta":\{"content":"[^"\\]*(?:\\.[^"\\]*)*"\},"logprobs":null,"finish_reason":null(,"token_ids":null)?\}\]\}\n\n'
)
"""An event that says a piece of text and nothing else, as nearly all do: it is passed on without being read."""


class ChatAnswer(Answer):
    """`gathers`: a document was asked for, and is put together from a stream."""

    def __init__(self, ignored: tuple[str, ...] = (), gathers: bool = False) -> None:
        self.ignored = ignored
        self.gathers = gathers
        self._whole: Json = {}
        self._choices: dict[int, Json] = {}

    def document(self, raw: bytes) -> bytes:
        answer = jiter.from_json(raw)
        choices = [
            {"index": choice["index"], **_message(choice["message"]), **_end(choice)} for choice in answer["choices"]
        ]
        return compact({**_head(answer), "choices": choices, "usage": _usage(answer["usage"])})

    def feed(self, events: bytes) -> bytes:
        if not self.gathers and (plain := TOKEN.fullmatch(events)):
            start, end = plain.span(1)
            return events if start < 0 else events[:start] + events[end:]
        return b"".join(self._event(event) for event in events.split(b"\n\n") if event)

    def _event(self, event: bytes) -> bytes:
        if event == DONE:
            return event + b"\n\n"
        chunk = jiter.from_json(event[6:])
        if self.gathers:
            self._gather(chunk)
            return b""
        usage = {"usage": _usage(chunk["usage"])} if chunk.get("usage") else {}
        choices = [
            {"index": choice["index"], "delta": _delta(choice["delta"]), **_end(choice)} for choice in chunk["choices"]
        ]
        return data_event({**_head(chunk), "choices": choices, **usage})

    # ------------------------------------------------------------------------------------ documents from streams

    def gathered(self) -> bytes:
        for choice in self._choices.values():
            choice["message"]["tool_calls"] = list(choice["calls"].values())
        choices = [choice for _, choice in sorted(self._choices.items())]
        return self.document(compact({**self._whole, "object": "chat.completion", "choices": choices}))

    def _gather(self, chunk: Json) -> None:
        self._whole |= {name: value for name, value in chunk.items() if value is not None}
        for part in chunk["choices"]:
            fresh: Json = {"index": part["index"], "message": {"content": ""}, "calls": {}, "logprobs": None}
            choice = self._choices.setdefault(part["index"], fresh)
            choice["message"]["content"] += part["delta"].get("content") or ""
            for call in _calls(part["delta"]):
                known = choice["calls"].setdefault(call["index"], call)
                if known is not call:
                    known["function"]["arguments"] += call["function"]["arguments"]
            if logprobs := part.get("logprobs"):
                choice["logprobs"] = choice["logprobs"] or {"content": []}
                choice["logprobs"]["content"] += logprobs["content"] or ()
            choice["finish_reason"] = part.get("finish_reason")


def _head(answer: Json) -> Json:
    return {name: answer[name] for name in HEAD if name in answer}


def _end(choice: Json) -> Json:
    return {"logprobs": choice.get("logprobs"), "finish_reason": choice.get("finish_reason")}


def _usage(usage: Json) -> Json:
    details = usage.get("prompt_tokens_details") or {}
    cached = {"prompt_tokens_details": {"cached_tokens": details.get("cached_tokens") or 0}} if details else {}
    return {**{name: usage[name] for name in COUNTS}, **cached}


def _message(message: Json) -> Json:
    calls = [
        {
            "id": call["id"],
            "type": "function",
            "function": {name: call["function"][name] for name in ("name", "arguments")},
        }
        for call in message.get("tool_calls") or ()
    ]
    content = message.get("content")
    said: Json = {
        "role": "assistant",
        "content": content or None if calls else content or "",
        "refusal": None,
        "annotations": [],
    }
    return {"message": said | ({"tool_calls": calls} if calls else {})}


def _delta(delta: Json) -> Json:
    said = {name: delta[name] for name in ("role", "content") if name in delta}
    return said | ({"tool_calls": calls} if (calls := _calls(delta)) else {})


def _calls(delta: Json) -> list[Json]:
    """A delta's calls. Clients add up `arguments`, so each has some; the first of a call has all else, too."""
    return [
        {name: call[name] for name in ("index", "id", "type") if call.get(name) is not None}
        | {"function": {"arguments": "", **{name: said for name, said in (call.get("function") or {}).items() if said}}}
        for call in delta.get("tool_calls") or ()
    ]
