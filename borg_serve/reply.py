"""Chat's answers said in OpenAI's Responses and in Anthropic's Messages, whole or as a stream.

It knows the shapes of the three protocols' answers. It does not know requests, nor how a stream may fail: an answer is
only handed on once `stream.Grammar` has passed it.
"""

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["MessagesReply", "ResponsesReply"]

Json = dict[str, Any]


class _Reply:
    """Takes chat's answer apart into parts, a run of text or one tool's call each, for a protocol to say."""

    def __init__(self) -> None:
        self.id = ""
        self.model = ""
        self.created = 0
        self.usage: Json = {}
        self.finish = "stop"
        self.matched: object = None
        """The stop string that ended the answer; for other ends a token id or None."""
        self.parts = 0
        self._part: object = None
        """Of the part that is open: "text", or a call's index."""
        self._pieces: list[str] = []
        self._events: list[bytes] = []

    def document(self, raw: bytes) -> bytes:
        """Return the whole answer for chat's."""
        answer = json.loads(raw)
        for choice in answer["choices"]:
            choice["delta"] = choice["message"]
        self._take(answer)
        self._finish()
        return _dumps(self.whole())

    def feed(self, events: bytes) -> bytes:
        """Return the events for some of chat's; the last are those for its `[DONE]`."""
        self._events = []
        for event in events.split(b"\n\n"):
            if event == b"data: [DONE]":
                self._finish()
            elif event:
                self._take(json.loads(event[6:]))
        return b"".join(self._events)

    def emit(self, event: str, **fields: Any) -> None:
        """Say one event."""
        self._events.append(b"event: %s\ndata: %s\n\n" % (event.encode(), _dumps({"type": event, **fields})))

    def _take(self, chunk: Json) -> None:
        self.usage = chunk.get("usage") or self.usage
        if not self.id:
            self.id = chunk["id"].removeprefix("chatcmpl-")
            self.model, self.created = chunk["model"], chunk["created"]
            self.started()
        for choice in chunk["choices"]:
            if text := choice["delta"].get("content"):
                self._say("text", text, {}, choice.get("logprobs"))
            for position, call in enumerate(choice["delta"].get("tool_calls") or ()):
                function = call.get("function") or {}
                self._say(call.get("index", position), function.get("arguments") or "", {**call, **function})
            self.finish = choice.get("finish_reason") or self.finish
            self.matched = choice.get("stop_reason") or self.matched

    def _say(self, part: object, piece: str, call: Json, logprobs: Json | None = None) -> None:
        if part != self._part:
            self._close(last=False)
            self._part = part
            self.opened(call)
        self._pieces.append(piece)
        if piece:
            self.said(piece, (logprobs or {}).get("content") or [])

    def _close(self, last: bool) -> None:
        if self._part is not None:
            self.closed("".join(self._pieces), last)
            self.parts += 1
            self._part, self._pieces = None, []

    def _finish(self) -> None:
        if self._part is None and not self.parts:
            self._say("text", "", {})  # an empty answer is an empty text
        self._close(last=True)
        self.ended()

    # ---------------------------------------------------------------------------- what a protocol says, and when

    def started(self) -> None:
        raise NotImplementedError

    def opened(self, call: Json) -> None:
        """A part begins: text if `call` is empty."""
        raise NotImplementedError

    def said(self, piece: str, logprobs: list[Json]) -> None:
        raise NotImplementedError

    def closed(self, whole: str, last: bool) -> None:
        raise NotImplementedError

    def ended(self) -> None:
        raise NotImplementedError

    def whole(self) -> Json:
        raise NotImplementedError


class ResponsesReply(_Reply):
    """`echo`: the fields of the request that come back with its answer."""

    def __init__(self, echo: Mapping[str, Any]) -> None:
        super().__init__()
        self._echo = echo
        self._status = "in_progress"
        self._output: list[Json] = []
        self._logprobs: list[Json] = []
        self._sequence = 0

    def emit(self, event: str, **fields: Any) -> None:
        super().emit(event, sequence_number=self._sequence, **fields)
        self._sequence += 1

    def error_event(self, body: Mapping[str, Any]) -> bytes:
        """Return the event that ends a stream with this error body."""
        self._events = []
        error = body["error"]
        self.emit("error", code=error["code"], message=error["message"], param=error["param"])
        return b"".join(self._events)

    def started(self) -> None:
        self.emit("response.created", response=self.whole())
        self.emit("response.in_progress", response=self.whole())

    def opened(self, call: Json) -> None:
        item: Json = {"id": f"{'fc' if call else 'msg'}_{self.id}_{self.parts}", "status": "in_progress"}
        if call:
            item |= {"type": "function_call", "call_id": call["id"], "name": call["name"], "arguments": ""}
        else:
            item |= {"type": "message", "role": "assistant", "content": []}
        self._output.append(item)
        self._logprobs = []
        self.emit("response.output_item.added", output_index=self.parts, item=item)
        if not call:
            self.emit("response.content_part.added", **self._place(), part=_output_text("", []))

    def said(self, piece: str, logprobs: list[Json]) -> None:
        if self._output[-1]["type"] == "message":
            self._logprobs += logprobs
            brief = [_without_bytes(token) for token in logprobs]
            self.emit("response.output_text.delta", **self._place(), delta=piece, logprobs=brief)
        else:
            self.emit("response.function_call_arguments.delta", **self._place(), delta=piece)

    def closed(self, whole: str, last: bool) -> None:
        item = self._output[-1]
        item["status"] = "incomplete" if last and self.finish == "length" else "completed"
        if item["type"] == "message":
            part = _output_text(whole, self._logprobs)
            brief = [_without_bytes(token) for token in self._logprobs]
            self.emit("response.output_text.done", **self._place(), text=whole, logprobs=brief)
            self.emit("response.content_part.done", **self._place(), part=part)
            item["content"] = [part]
        else:
            item["arguments"] = whole
            self.emit("response.function_call_arguments.done", **self._place(), name=item["name"], arguments=whole)
        self.emit("response.output_item.done", output_index=self.parts, item=item)

    def ended(self) -> None:
        self._status = "incomplete" if self.finish == "length" else "completed"
        self.emit(f"response.{self._status}", response=self.whole())

    def whole(self) -> Json:
        """Return the response as it stands. Only fields of ours are in it, whatever chat's answer holds."""
        ended = self._status != "in_progress"
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.created,
            "status": self._status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "model": self.model,
            "output": self._output if ended else [],
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "truncation": "disabled",
            "usage": self._usage() if ended else None,
            **self._echo,
        }

    def _place(self) -> Json:
        item = self._output[-1]
        index = {"content_index": 0} if item["type"] == "message" else {}
        return {"item_id": item["id"], "output_index": self.parts, **index}

    def _usage(self) -> Json:
        return {
            "input_tokens": self.usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": _cached(self.usage), "cache_write_tokens": 0},
            "output_tokens": self.usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.usage["total_tokens"],
        }


def _output_text(text: str, logprobs: list[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _without_bytes(token: Json) -> Json:
    """A token's log-probability as it is in events, where only whole answers have the bytes."""
    top = [{"token": other["token"], "logprob": other["logprob"]} for other in token["top_logprobs"]]
    return {"token": token["token"], "logprob": token["logprob"], "top_logprobs": top}


class MessagesReply(_Reply):
    """The answer as one assistant message of content blocks."""

    REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}  # noqa: RUF012 (never changed)

    def __init__(self) -> None:
        super().__init__()
        self._content: list[Json] = []

    def error_event(self, body: Mapping[str, Any]) -> bytes:
        """Return the event that ends a stream with this error body."""
        return b"event: error\ndata: %s\n\n" % _dumps(body)

    def started(self) -> None:
        # What of the prompt was cached is known at the end; `message_delta` tells it.
        self.emit("message_start", message={**self.whole(), "content": [], "stop_reason": None, "stop_sequence": None})

    def opened(self, call: Json) -> None:
        block: Json = {"type": "text", "text": ""}
        if call:
            block = {"type": "tool_use", "id": call["id"], "name": call["name"], "input": {}}
        self._content.append(block)
        self.emit("content_block_start", index=self.parts, content_block=block)

    def said(self, piece: str, logprobs: list[Json]) -> None:
        delta = {"type": "text_delta", "text": piece}
        if self._content[-1]["type"] == "tool_use":
            delta = {"type": "input_json_delta", "partial_json": piece}
        self.emit("content_block_delta", index=self.parts, delta=delta)

    def closed(self, whole: str, last: bool) -> None:
        block = self._content[-1]
        if block["type"] == "text":
            block["text"] = whole
        else:
            block["input"] = _object(whole)
        self.emit("content_block_stop", index=self.parts)

    def ended(self) -> None:
        reason, sequence = self._stop()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        self.emit("message_delta", delta=delta, usage=self._usage())
        self.emit("message_stop")

    def whole(self) -> Json:
        """Return the message as it stands. Only fields of ours are in it, whatever chat's answer holds."""
        reason, sequence = self._stop()
        return {
            "id": f"msg_{self.id}",
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": self._content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": self._usage(),
        }

    def _stop(self) -> tuple[str, str | None]:
        if self.finish == "stop" and isinstance(self.matched, str):
            return "stop_sequence", self.matched
        if self.finish == "stop" and any(block["type"] == "tool_use" for block in self._content):
            return "tool_use", None  # chat says `stop` after a call of a named tool
        return self.REASONS.get(self.finish, "end_turn"), None

    def _usage(self) -> Json:
        """Cached tokens are not among the input tokens here."""
        cached = _cached(self.usage)
        return {
            "input_tokens": self.usage.get("prompt_tokens", 0) - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self.usage.get("completion_tokens", 0),
        }


def _cached(usage: Json) -> int:
    return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


def _object(arguments: str) -> Json:
    """A call's arguments; `{}` for those that were cut off."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
