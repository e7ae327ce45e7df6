"""Take chat's answer apart into parts, a run of text or one tool's call each, for another protocol to write.

It does not know that protocol, nor how a stream may fail: the gate passes on only what its grammar accepts.
"""

from typing import Any

import jiter

from borg_serve.api.events import compact, named_event
from borg_serve.api.protocol import Answer

__all__ = ["Json", "TranslatedAnswer", "cached_tokens"]

Json = dict[str, Any]


class TranslatedAnswer(Answer):
    """An answer whose protocol says, in the methods at the end, what it writes when a part begins, goes on and ends."""

    def __init__(self, ignored: tuple[str, ...] = (), gathers: bool = False) -> None:
        self.ignored = ignored
        self.gathers = gathers
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
        answer = jiter.from_json(raw)
        for choice in answer["choices"]:
            choice["delta"] = choice["message"]
        self._take(answer)
        self._finish()
        return compact(self.whole())

    def gathered(self) -> bytes:
        return compact(self.whole())

    def feed(self, events: bytes) -> bytes:
        self._events = []
        for event in events.split(b"\n\n"):
            if event == b"data: [DONE]":
                self._finish()
            elif event:
                self._take(jiter.from_json(event[6:]))
        return b"".join(self._events)

    def emit(self, event: str, **fields: Any) -> None:
        """Say one event."""
        self._events.append(named_event(event, {"type": event, **fields}))

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


def cached_tokens(usage: Json) -> int:
    return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
