"""One streamed chat answer, line by line with the moment each was read: what it held, when, and whether it is whole.

It knows server-sent events and OpenAI's chat chunks. It does not know sockets or requests.
"""

import json
from typing import Any

from loadtests.generator.records import Outcome

DEADLINES = {"deadline_exceeded"}


class Stream:
    """Feed it every line of an answer with status 200, then ask for `outcome()`."""

    def __init__(self) -> None:
        self.first_us: int | None = None
        self.last_us: int | None = None
        self.itl_us: list[int] = []
        self.text: list[str] = []
        self.usage: dict[str, Any] = {}
        self.finish_reasons: list[str] = []
        self.done = False
        self.error: str | None = None
        """The code of an error event."""
        self.wrong: str | None = None
        """The first thing that no stream may hold."""

    def feed(self, line: bytes, now_us: int) -> None:
        """Take one line, with or without its end."""
        line = line.strip()
        if not line or line.startswith(b":"):
            return
        if self.done or self.error is not None:
            self._blame("something after the end")
        elif line == b"data: [DONE]":
            self.done = True
        elif not line.startswith(b"data:"):
            self._blame("a line that is no data")
        else:
            try:
                event = json.loads(line[5:])
                self._event(event, now_us)
            except (ValueError, TypeError, LookupError, AttributeError):
                self._blame("an event that is no chat chunk")

    def _event(self, event: dict[str, Any], now_us: int) -> None:
        if "error" in event:
            error = event["error"]
            self.error = str(error.get("code") or error.get("type") or error["message"])[:100]
            return
        self.usage = event.get("usage") or self.usage
        for choice in event["choices"]:
            content = choice["delta"].get("content")
            if content:
                if self.last_us is None:
                    self.first_us = now_us
                else:
                    self.itl_us.append(now_us - self.last_us)
                self.last_us = now_us
                self.text.append(content)
            if choice.get("finish_reason"):
                self.finish_reasons.append(choice["finish_reason"])

    def _blame(self, wrong: str) -> None:
        self.wrong = self.wrong or wrong

    def outcome(self, broken: str | None = None) -> tuple[Outcome, str]:
        """How it ended, and why; `broken`: what the connection said if it ended too early."""
        if self.error is not None:
            kind = Outcome.DEADLINE if self.error in DEADLINES else Outcome.SERVER_ERROR
            return kind, self.error
        if broken is not None and not self.done:
            return Outcome.BROKEN, broken
        if self.wrong is not None:
            return Outcome.GRAMMAR, self.wrong
        if not self.done:
            return Outcome.GRAMMAR, "no [DONE]"
        if len(self.finish_reasons) != 1:
            return Outcome.GRAMMAR, f"{len(self.finish_reasons)} finish reasons"
        if "completion_tokens" not in self.usage:
            return Outcome.GRAMMAR, "no usage"
        return Outcome.OK, self.finish_reasons[0]


def refusal(status: int, body: bytes) -> tuple[Outcome, str]:
    """How an answer with another status than 200 is counted, and its error's code."""
    try:
        error = json.loads(body)["error"]
        detail = str(error.get("code") or error.get("type") or error["message"])[:100]
    except (ValueError, TypeError, LookupError, AttributeError):
        detail = body[:100].decode(errors="replace")
    if status in (408, 504) or detail in DEADLINES:
        return Outcome.DEADLINE, detail
    if status in (429, 503):
        return Outcome.REFUSED, detail
    return (Outcome.REJECTED if status < 500 else Outcome.SERVER_ERROR), detail
