"""The grammar of a streamed answer (I5): what may follow what, and how a stream must end.

It knows vLLM's server-sent events as bytes. It does not know sockets, requests or time.
A stream is data events, then one finish reason for every choice, then `[DONE]`; or data events, then one error event.
"""

import json
from typing import Any

__all__ = ["DONE", "Grammar"]

DONE = b"data: [DONE]\n\n"
_ERROR = b'data: {"error":'
# vLLM writes compact JSON, and a quote inside a JSON string is escaped: these bytes occur as keys and nowhere else.
_FINISH = b'"finish_reason":"'
_ABORTED = (b'"finish_reason":"abort"', b'"finish_reason":"error"')
_USAGE_ONLY = b'"choices":[]'


class Grammar:
    """Checks one stream, event by event.

    `choices`: how many finish reasons it must carry (n of the request). `keep_usage`: whether the client asked for the
    usage event; the gate always does, to count tokens.
    """

    def __init__(self, choices: int, keep_usage: bool) -> None:
        self.choices = choices
        self.keep_usage = keep_usage
        self.finished = 0
        self.usage: dict[str, Any] | None = None
        self.error: str | None = None
        """What vLLM said when the stream failed, for the log only; the client gets an error of ours."""
        self.done = False

    @property
    def ended(self) -> bool:
        """Whether nothing may follow: the stream succeeded or failed."""
        return self.done or self.error is not None

    def feed(self, chunk: bytes) -> bytes:
        """What the client gets for a chunk of whole events; empty once the stream has ended or failed."""
        if self.ended:
            return b""
        if chunk.count(b"\n\n") > 1:
            return b"".join(self.feed(event + b"\n\n") for event in chunk.split(b"\n\n") if event)
        if chunk.startswith(_ERROR):
            self.error = chunk[6:].decode(errors="replace").strip()
            return b""
        if chunk == DONE:
            if self.finished != self.choices:
                self.error = f"[DONE] after {self.finished} of {self.choices} finish reasons"
                return b""
            self.done = True
            return chunk
        finishes = chunk.count(_FINISH)
        if finishes:
            self.finished += finishes
            if self.finished > self.choices or any(reason in chunk for reason in _ABORTED):
                self.error = "the engine gave up the request"
                return b""
        elif _USAGE_ONLY in chunk:
            self.usage = json.loads(chunk[6:]).get("usage")
            return chunk if self.keep_usage else b""
        return chunk

    def close(self) -> None:
        """The server has sent its last chunk: a stream that has not ended by now has failed."""
        if not self.ended:
            self.error = f"the stream ended after {self.finished} of {self.choices} finish reasons"
