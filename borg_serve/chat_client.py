"""The chat page's client of our own HTTP API: a history becomes a request, a stream becomes text and notes.

It knows the chat route and how it refuses. It does not know Gradio, and keeps nothing between two calls but who waits.
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from borg_serve.errors import ConfigError, Problem

__all__ = ["Client", "Settings", "Update", "read_key", "turns"]

GREEDY = 0.01
"""Temperatures below it mean greedy, as they do on the server."""
WAIT_S = 120.0
"""How long a message waits for a server that is full before it is given up."""
CONNECT_S = 5.0
SILENT_S = 300.0
"""No server of ours is silent for so long: its deadline is shorter."""
WHITE = re.compile(r"\s+")


@dataclass(frozen=True)
class Settings:
    """What a user may set; the identity is the server's and not among it."""

    instructions: str = ""
    max_tokens: int = 4096
    temperature: float = 0.7
    top_p: float = 0.9


@dataclass(frozen=True)
class Update:
    """What the page shows of an answer now: its text so far, and a note below it.

    `trouble`: the note says why there is no answer, or only a part of one. `waiting`: there is more to come.
    """

    text: str
    note: str = ""
    trouble: bool = False
    waiting: bool = False


def read_key(path: Path) -> str:
    """The API key in a file, on a line of its own. Raises ConfigError."""
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong_key_file(f"cannot be read ({error})", path) from None
    if not key or WHITE.search(key) or not key.isascii():
        raise _wrong_key_file("must hold one key and nothing else", path)
    return key


def _wrong_key_file(what: str, path: Path) -> ConfigError:
    return ConfigError([Problem("--key-file", what, str(path), "Put the key that `borg-serve key new` printed there.")])


def turns(history: Sequence[Any]) -> list[dict[str, str]]:
    """A history as messages of the API. It may hold role/content mappings or (user, assistant) pairs.

    Empty assistant halves are left out, and so are the page's own notes (messages with a `metadata` title).
    """
    messages: list[dict[str, str]] = []
    for turn in history:
        if isinstance(turn, dict):
            if not (turn.get("metadata") or {}).get("title"):
                messages.append({"role": str(turn["role"]), "content": _text(turn.get("content"))})
        else:
            user, assistant = turn
            messages += [
                {"role": "user", "content": _text(user)},
                {"role": "assistant", "content": _text(assistant)},
            ]
    return [message for message in messages if message["content"] or message["role"] == "user"]


def _text(content: Any) -> str:
    """Content as text: a string, or the text parts of a list of parts."""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def request(history: Sequence[Any], message: str, settings: Settings) -> dict[str, Any]:
    """The chat request for a new message after a history."""
    instructions = settings.instructions.strip()
    system = [{"role": "system", "content": instructions}] if instructions else []
    # top_p 0 keeps the most likely token only: greedy, which the API says by temperature 0.
    greedy = settings.temperature < GREEDY or settings.top_p <= 0
    return {
        "messages": [*system, *turns(history), {"role": "user", "content": message}],
        "max_tokens": int(settings.max_tokens),
        "temperature": 0 if greedy else settings.temperature,
        "top_p": 1 if greedy else settings.top_p,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@dataclass
class _Answer:
    """One streamed answer while it grows; times are of a monotonic clock."""

    begun_s: float
    text: str = ""
    first_s: float | None = None
    last_s: float = 0.0
    tokens: int | None = None
    finish: str | None = None
    done: bool = False
    error: dict[str, Any] | None = None

    def read(self, data: str, now_s: float) -> None:
        """Take one event's data."""
        if data == "[DONE]":
            self.done = True
            return
        event = json.loads(data)
        self.error = event.get("error") or self.error
        if event.get("usage"):
            self.tokens = event["usage"]["completion_tokens"]
        for choice in event.get("choices") or []:
            if piece := choice["delta"].get("content"):
                self.text += piece
                self.first_s = self.first_s or now_s
                self.last_s = now_s
            self.finish = choice.get("finish_reason") or self.finish

    def end(self, max_tokens: int) -> Update:
        """What to show at the end."""
        if self.error is not None:
            return Update(self.text, _cut(self.error.get("code")), trouble=True)
        if not self.done:
            return Update(self.text, "The connection broke: this is what had come.", trouble=True)
        if self.finish == "length":
            note = f"Cut at {self.tokens or max_tokens} tokens. Ask to go on, or raise the maximum of new tokens."
            return Update(self.text, note, trouble=True)
        return Update(self.text, self.figures())

    def figures(self) -> str:
        """Tokens, time to the first one, and tokens a second after it."""
        if not self.tokens or self.first_s is None:
            return ""
        parts = [f"{self.tokens} token{'s' * (self.tokens > 1)}", f"first after {self.first_s - self.begun_s:.2f} s"]
        if self.tokens > 1 and self.last_s > self.first_s:
            parts.append(f"{(self.tokens - 1) / (self.last_s - self.first_s):.1f} tokens/s")
        return " · ".join(parts)


CUTS = {
    "deadline_exceeded": "The answer took longer than the server allows: this is what had come.",
    "engine_lost": "The server lost its engine and starts it again: this is what had come. Try again in a minute.",
    "client_too_slow": "The page did not read fast enough: this is what had come.",
}


def _cut(code: str | None) -> str:
    return CUTS.get(code or "", "The server could not finish the answer: this is what had come.")


@dataclass
class Client:
    """A client of one API for all sessions of a page. `key`: sent to the API and nowhere else."""

    api: str
    key: str | None = None
    _waiting: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        timeout = httpx.Timeout(SILENT_S, connect=CONNECT_S)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        self._http = httpx.AsyncClient(base_url=self.api, headers=headers, timeout=timeout, limits=limits)

    async def trouble(self) -> str:
        """Why nobody can be answered now; empty if the server is ready."""
        try:
            answer = await self._http.get("/ready", timeout=CONNECT_S)
            if answer.status_code == 200:
                return ""
            reason = str(answer.json().get("reason") or "it is starting")
        except (httpx.TransportError, ValueError):
            return f"No server answers at {self.api}. This page goes on by itself when one does."
        return f"The server is not ready: {reason}. This page goes on by itself when it is."

    async def ask(
        self, history: Sequence[Any], message: str, settings: Settings, session: str = ""
    ) -> AsyncIterator[Update]:
        """Ask, and yield what to show, the end last. Closing the iterator ends the request on the server too.

        `session`: the same for all turns of a conversation; it stays where its cache is.
        """
        body = request(history, message, settings)
        headers = {"x-session-id": session} if session else {}
        give_up_s = time.monotonic() + WAIT_S
        me = object()
        try:
            while True:
                answer = _Answer(time.monotonic())
                async with self._http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
                    if response.status_code == 200:
                        self._leave(me)
                        async for line in response.aiter_lines():
                            if line.startswith("data: "):
                                answer.read(line[6:], time.monotonic())
                                yield Update(answer.text, waiting=True)
                        yield answer.end(settings.max_tokens)
                        return
                    refusal = await _refusal(response)
                if refusal.code == "context_length_exceeded" and body.pop("max_tokens", None):
                    continue  # the server then gives what the context has left
                if refusal.code != "busy" or time.monotonic() + refusal.retry_after_s > give_up_s:
                    yield Update("", refusal.note(), trouble=True)
                    return
                async for update in self._wait(me, refusal.retry_after_s):
                    yield update
        except httpx.TransportError:
            what = "The connection broke: this is what had come." if answer.text else f"No server at {self.api}."
            yield Update(answer.text, what, trouble=True)
        finally:
            self._leave(me)

    async def _wait(self, me: object, seconds: float) -> AsyncIterator[Update]:
        """Wait before asking again, and say which place this session has among those of the page that wait."""
        if me not in self._waiting:
            self._waiting.append(me)
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0:
            place = self._waiting.index(me) + 1
            note = f"The server is full. You are number {place} of {len(self._waiting)} waiting here; asking again"
            yield Update("", f"{note} in {left_s:.0f} s.", trouble=True, waiting=True)
            await asyncio.sleep(min(1.0, left_s))

    def _leave(self, me: object) -> None:
        if me in self._waiting:
            self._waiting.remove(me)


@dataclass(frozen=True)
class _Refusal:
    """A refused request; `retry_after_s` is what the server asked for."""

    status: int
    code: str | None
    message: str
    retry_after_s: float

    def note(self) -> str:
        """What to tell the user."""
        again = f" Try again in {self.retry_after_s:.0f} s." if self.retry_after_s else ""
        if self.code == "context_length_exceeded":
            return "This conversation is longer than the model can read. Start a new one."
        if self.status in (401, 403):
            return "The page's key is not accepted by the server. Tell who runs this page."
        if self.code == "busy":
            return f"The server is full.{again}"
        return f"{self.message}{again}"


async def _refusal(response: httpx.Response) -> _Refusal:
    retry_after = response.headers.get("retry-after", "")
    seconds = float(retry_after) if retry_after.isdecimal() else 0.0
    raw = await response.aread()
    try:
        error = json.loads(raw)["error"]
        return _Refusal(response.status_code, error.get("code"), str(error["message"]), seconds)
    except (ValueError, KeyError, TypeError):
        return _Refusal(response.status_code, None, f"The server answered {response.status_code}.", seconds)
