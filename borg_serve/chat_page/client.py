"""The chat page's client of the API: it turns a history into a chat request, and a stream into text and notes.

It does not know Gradio. Between two calls it keeps only the list of sessions that wait for a full server.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from borg_serve.errors import ConfigError, Problem

__all__ = ["ChatOptions", "Client", "Update", "read_key", "turns"]

GREEDY = 0.01  # below this temperature the server takes the most likely token
WAIT_S = 120.0  # how long a message waits for a full server
TIMEOUT = httpx.Timeout(300.0, connect=5.0)  # a stream may be silent until the server's deadline, which is shorter
BROKEN = "The connection broke. The answer is incomplete."
REFUSED = {
    "busy": "The server is full.",
    "context_length_exceeded": "This conversation is longer than the model can read. Start a new one.",
}
CUT = {
    "deadline_exceeded": "The answer took longer than the server allows. It is incomplete.",
    "engine_lost": "The server lost its engine and restarts it. The answer is incomplete. Try again in a minute.",
    "client_too_slow": "The page read too slowly. The answer is incomplete.",
}
"""What to tell the user when the API refuses a request, and when it cuts an answer, by the error's code."""


@dataclass(frozen=True)
class ChatOptions:
    """What a user may set."""

    instructions: str = ""
    max_tokens: int = 4096
    temperature: float = 0.7
    top_p: float = 0.9


@dataclass(frozen=True)
class Update:
    """What the page shows of an answer: the text so far, and a note below it."""

    text: str
    note: str = ""
    trouble: bool = False  # the note says why the answer is missing or incomplete
    waiting: bool = False  # more updates follow


def read_key(path: Path) -> str:
    """Read the API key from a file that holds nothing else. Raises ConfigError."""
    try:
        key = path.read_text(encoding="utf-8").strip()
        what = "must hold one key and nothing else" if len(key.split()) != 1 or not key.isascii() else ""
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot be read ({error})"
    if what:
        cure = "Put the key that `borg-serve key new` printed there."
        raise ConfigError([Problem("--key-file", what, str(path), cure)])
    return key


def turns(history: Sequence[Any]) -> list[dict[str, str]]:
    """Convert a history of role/content mappings or (user, assistant) pairs to messages of the API.

    Empty assistant messages and the page's own notes (messages with a `metadata` title) are left out.
    """
    messages: list[dict[str, Any]] = []
    for turn in history:
        if not isinstance(turn, dict):
            user, assistant = turn
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        elif not (turn.get("metadata") or {}).get("title"):
            messages.append(turn)
    texts = [{"role": message["role"], "content": _text(message.get("content"))} for message in messages]
    return [message for message in texts if message["content"] or message["role"] == "user"]


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def request(history: Sequence[Any], message: str, options: ChatOptions) -> dict[str, Any]:
    """Build the chat request for a new message after a history."""
    instructions = options.instructions.strip()
    system = [{"role": "system", "content": instructions}] if instructions else []
    # The API refuses top_p 0. It keeps only the most likely token, which temperature 0 does too.
    greedy = options.temperature < GREEDY or options.top_p <= 0
    return {
        "messages": [*system, *turns(history), {"role": "user", "content": message}],
        "max_tokens": options.max_tokens,
        "temperature": 0 if greedy else options.temperature,
        "top_p": 1 if greedy else options.top_p,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


class _Stream:
    """One streamed answer while it grows."""

    def __init__(self) -> None:
        self.text = ""
        self._times_s = [time.monotonic()]  # of the request, and of each piece of text
        self._tokens = 0
        self._finish: str | None = None
        self._done = False
        self._error: dict[str, Any] | None = None

    def read(self, data: str) -> None:
        """Take the data of one event."""
        if data == "[DONE]":
            self._done = True
            return
        event = json.loads(data)
        self._error = event.get("error") or self._error
        self._tokens = (event.get("usage") or {}).get("completion_tokens", self._tokens)
        for choice in event.get("choices") or []:
            if piece := choice["delta"].get("content"):
                self.text += piece
                self._times_s.append(time.monotonic())
            self._finish = choice.get("finish_reason") or self._finish

    def end(self) -> Update:
        """Return the last update: the whole text, and its figures or what went wrong."""
        if self._error is not None:
            note = CUT.get(self._error.get("code") or "", "The server could not finish the answer.")
        elif not self._done:
            note = BROKEN
        elif self._finish == "length":
            note = f"Cut at {self._tokens} tokens. Ask to go on, or raise the maximum of new tokens."
        else:
            return Update(self.text, self._figures())
        return Update(self.text, note, trouble=True)

    def _figures(self) -> str:
        """Return the number of tokens, the time to the first one, and the tokens per second after it."""
        if not self.text or not self._tokens:
            return ""
        begun_s, first_s, last_s = self._times_s[0], self._times_s[1], self._times_s[-1]
        figures = f"{self._tokens} token{'s' * (self._tokens > 1)} · first after {first_s - begun_s:.2f} s"
        if self._tokens > 1 and last_s > first_s:
            figures += f" · {(self._tokens - 1) / (last_s - first_s):.1f} tokens/s"
        return figures


class Client:
    """A client of one API for all sessions of a page. `key` is sent to the API and to nobody else."""

    def __init__(self, api: str, key: str | None = None) -> None:
        self.api = api
        headers = {"authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        self._http = httpx.AsyncClient(base_url=api, headers=headers, timeout=TIMEOUT, limits=limits)
        self._waiting: dict[object, None] = {}  # in the order of their arrival

    async def trouble(self) -> str:
        """Say why nobody can be answered now; empty if the server is ready."""
        try:
            answer = await self._http.get("/ready", timeout=TIMEOUT.connect)
            if answer.status_code == 200:
                return ""
            reason = str(answer.json().get("reason") or "it is starting")
        except (httpx.TransportError, ValueError):
            return f"No server answers at {self.api}. The page continues by itself when one does."
        return f"The server is not ready: {reason}. The page continues by itself when it is."

    async def ask(
        self, history: Sequence[Any], message: str, options: ChatOptions, session: str = ""
    ) -> AsyncIterator[Update]:
        """Send a message and yield what to show, the end last. Closing the iterator ends the request on the server too.

        `session` is the same for all turns of a conversation, so that a cluster sends them to the replica that has
        them cached.
        """
        body = request(history, message, options)
        headers = {"x-session-id": session} if session else {}
        give_up_s = time.monotonic() + WAIT_S
        ticket = object()
        try:
            while True:
                stream = _Stream()
                async with self._http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
                    if response.status_code == 200:
                        self._waiting.pop(ticket, None)
                        async for line in response.aiter_lines():
                            if line.startswith("data: "):
                                stream.read(line[6:])
                                yield Update(stream.text, waiting=True)
                        yield stream.end()
                        return
                    code, note, retry_after_s = await _error(response)
                if code == "context_length_exceeded" and body.pop("max_tokens", None):
                    continue  # the server then allows what the context has left
                if code != "busy" or time.monotonic() + retry_after_s > give_up_s:
                    yield Update("", note, trouble=True)
                    return
                async for update in self._wait(ticket, retry_after_s):
                    yield update
        except httpx.TransportError:
            yield Update(stream.text, BROKEN if stream.text else f"No server at {self.api}.", trouble=True)
        finally:
            self._waiting.pop(ticket, None)

    async def _wait(self, ticket: object, seconds: float) -> AsyncIterator[Update]:
        """Wait before the next attempt, and say each second which of the waiting sessions this one is."""
        self._waiting.setdefault(ticket)
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0:
            number = list(self._waiting).index(ticket) + 1
            note = f"The server is full. You are number {number} of {len(self._waiting)} waiting here; asking again"
            yield Update("", f"{note} in {left_s:.0f} s.", trouble=True, waiting=True)
            await asyncio.sleep(min(1.0, left_s))


async def _error(response: httpx.Response) -> tuple[str, str, float]:
    """Read an error answer: its code, what to tell the user, and after how many seconds to try again."""
    retry_after = response.headers.get("retry-after", "")
    retry_after_s = float(retry_after) if retry_after.isdecimal() else 0.0
    try:
        error = json.loads(await response.aread())["error"]
        code, note = str(error.get("code")), str(error["message"])
    except (AttributeError, KeyError, TypeError, ValueError):  # another server's answer, a proxy's for example
        code, note = "", f"The server answered {response.status_code}."
    if response.status_code in (401, 403):
        note = "The page's key is not accepted by the server. Tell who runs this page."
    again = f" Try again in {retry_after_s:.0f} s." if retry_after_s else ""
    return code, REFUSED.get(code, note) + again, retry_after_s
