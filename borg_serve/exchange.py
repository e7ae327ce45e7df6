"""One request and its answer, from the socket to vLLM's application and back.

It knows ASGI messages, time and the shapes of answers. It does not know routes, keys or what a request means.
"""

import asyncio
import contextlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from borg_serve import tracing
from borg_serve.dialect import CHAT, Dialect, Reply
from borg_serve.protocol import ABORT
from borg_serve.stream import Grammar

__all__ = ["App", "ClientGone", "Exchange", "Message", "Receive", "Refused", "Scope", "Send"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
T = TypeVar("T")
E = TypeVar("E", bound=Exception)

logger = logging.getLogger(__name__)

PATHS = re.compile(r"(?:/[\w.\-]+){2,}|\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b| at 0x[0-9a-f]+")
OVERFLOW = re.compile(r"context length|too long|cannot be greater than max", re.IGNORECASE)


DISCARD_S = 1.0
DISCARD_BYTES = 8 << 20
"""How long, and how much of it, a refused request's body is read before the connection is closed."""
LAST_WORD_S = 1.0
"""How long a client may take to make room for a stream's last event."""


class ClientGone(Exception):
    """The client closed the connection: nobody is left to answer."""


@dataclass
class Refused(Exception):
    """An answer other than success: status, OpenAI-shaped body and headers; `reason` is its label in metrics.

    The client gets the body in its dialect's shape.
    """

    status: int
    reason: str
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        status: int,
        reason: str,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        param: str | None = None,
    ) -> "Refused":
        error = {"message": message, "type": kind, "param": param, "code": code}
        return cls(status, reason, {"error": error}, headers or {})


DEADLINE = Refused.of(504, "deadline", "The request's time ran out.", "server_error", "deadline_exceeded")
STALLED = Refused.of(408, "stalled", "The answer was not read in time.", "server_error", "client_too_slow")
FAILED = Refused.of(500, "error", "The server failed to complete the request.", "server_error", "internal_error")


class Exchange:
    """One HTTP request in progress. `deadline_s` counts from now; errors are told in `dialect`."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        request_id: str,
        deadline_s: float,
        dialect: Dialect = CHAT,
        echo_id: bool = True,
    ) -> None:
        self.scope = scope
        self.dialect = dialect
        self.request_id = request_id
        self.key_name: str | None = None
        self.status: int | None = None
        """Status sent to the client, None as long as nothing was."""
        self.outcome: str | None = None
        self.usage: Mapping[str, Any] = {}
        self.arrived = time.monotonic()
        self._deadline_s = deadline_s
        self._reply: Reply | None = None
        self._receive = receive
        self._send = send
        self._own_headers = [(b"x-request-id", request_id.encode())] if echo_id else []
        self._headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self._body_read = scope["method"] in ("GET", "HEAD")
        self._aborted: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    @property
    def headers(self) -> Mapping[str, str]:
        """The request's headers, names in lower case."""
        return self._headers

    def header(self, name: str) -> str:
        """A request header's value, empty if it was not sent; `name` in lower case."""
        value: str = self._headers.get(name, "")
        return value

    # ---------------------------------------------------------------------------------------- request

    async def read_body(self, limit_bytes: int, limit_s: float) -> bytes:
        """The whole body. Raises Refused (413 before reading, 408 when slow) or ClientGone."""
        too_large = Refused.of(
            413, "body_size", f"The body must not pass {limit_bytes} bytes.", headers={"connection": "close"}
        )
        declared = self.header("content-length")
        if declared.isdecimal() and int(declared) > limit_bytes:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit_bytes:
                        raise too_large
                    if not message.get("more_body", False):
                        self._body_read = True
                        return b"".join(parts)
        except TimeoutError:
            what = f"The body did not arrive within {limit_s:g} s."
            raise Refused.of(408, "body_time", what, headers={"connection": "close"}) from None

    def abort(self, error: Exception) -> None:
        """End the request now, with this answer: whatever waits or generates for it is cancelled."""
        if not self._aborted.done():
            self._aborted.set_result(error)

    async def unless_aborted(self, work: Awaitable[T]) -> T:
        """The result of `work`; if the request is aborted first, `work` is cancelled and the abort's error raised."""
        task = asyncio.ensure_future(work)
        either: set[asyncio.Future[Any]] = {task, self._aborted}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise _anew(self._aborted.result())

    # ----------------------------------------------------------------------------------------- answer

    async def reply(self, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
        """Answer with one JSON document."""
        await self.reply_raw(status, json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode(), headers)

    async def reply_raw(self, status: int, raw: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Answer with a JSON document that is already written."""
        sent = {"content-type": "application/json", "content-length": str(len(raw)), **(headers or {})}
        if not self._body_read:
            sent["connection"] = "close"
        await self._start(status, [(name.encode(), value.encode()) for name, value in sent.items()])
        body = b"" if self.scope["method"] == "HEAD" else raw
        if not self._body_read:
            # The client may be sending still: closing now would reset the connection before it has read the answer.
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
            await self._discard_body()
            body = b""
        await self._send({"type": "http.response.body", "body": body})

    async def _discard_body(self) -> None:
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_S):
                while size < DISCARD_BYTES:
                    message = await self._receive()
                    size += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return

    async def refuse(self, refusal: Refused) -> None:
        """Answer with an error: an error document, or in a stream that has begun an error event and its end."""
        self.outcome = refusal.reason
        body = self.dialect.error_body(refusal.status, refusal.body["error"], self.request_id)
        if self.status is None:
            await self.reply(refusal.status, body, refusal.headers)
            return
        event = self._reply.error_event(body) if self._reply is not None else b""
        try:
            async with asyncio.timeout(0 if refusal is STALLED else LAST_WORD_S):
                await self._send({"type": "http.response.body", "body": event, "more_body": False})
        except TimeoutError:
            # The client does not read: what is unsent would keep the connection open for as long as it likes.
            abort = (self.scope.get("extensions") or {}).get(ABORT)
            if abort is not None:
                abort["call"]()

    async def pass_through(self, app: App) -> None:
        """Hand a request without a body to vLLM's application, and its answer back as it is."""

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                await self._start(message["status"], list(message["headers"]))
            else:
                await self._send(message)

        # vLLM's routes do not know HEAD; the HTTP server leaves the body out.
        await app({**self._inner_scope(0), "method": "GET"}, self._receive, send)

    async def forward(
        self, app: App, body: bytes, reply: Reply, choices: int, keep_usage: bool, stall_s: float
    ) -> None:
        """Hand a chat request to vLLM's application and its answer, checked, back to the client as `reply` says it.

        `choices`: n of the request. `stall_s`: how long the client may leave one chunk unread. Raises Refused or
        ClientGone for every end but success; a stream that has begun then still lacks its error event.
        """
        self._reply = reply
        answer = _Answer(self, reply, Grammar(choices, keep_usage), stall_s)
        given = False

        async def receive() -> Message:
            nonlocal given
            if given:
                await asyncio.shield(self._aborted)
                return {"type": "http.disconnect"}
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            scope = {**self._inner_scope(len(body)), "path": CHAT.path, "raw_path": CHAT.path.encode()}
            await app(scope, receive, answer.send)
            if self._aborted.done():
                raise _anew(self._aborted.result())
            await answer.close()
        finally:
            self.usage = answer.usage

    @asynccontextmanager
    async def alive(self) -> AsyncIterator[None]:
        """From the body's last byte on: abort when the deadline passes or the client leaves."""
        left_s = self.arrived + self._deadline_s - time.monotonic()
        deadline = asyncio.get_running_loop().call_later(left_s, self.abort, DEADLINE)
        listener = asyncio.create_task(self._listen())
        try:
            yield
        finally:
            deadline.cancel()
            listener.cancel()

    async def _listen(self) -> None:
        """Wait for the client to leave."""
        while True:
            if (await self._receive())["type"] == "http.disconnect":
                self.abort(ClientGone())
                return

    def _inner_scope(self, length: int) -> Scope:
        # Nothing of the client's own: there are headers that choose ranks, priorities and sessions.
        headers = [(b"content-type", b"application/json"), (b"content-length", str(length).encode())]
        headers += [(b"x-request-id", self.request_id.encode()), (b"host", b"localhost"), *tracing.headers()]
        # Below ASGI 2.4 Starlette listens for the disconnect that an abort sends; later it would only see send fail.
        asgi = {"version": "3.0", "spec_version": "2.3"}
        return {**self.scope, "headers": headers, "query_string": b"", "asgi": asgi}

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        headers = [*headers, *self._own_headers]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


class _Answer:
    """vLLM's answer on its way to the client: a document is held until it is whole, a stream is checked as it goes."""

    def __init__(self, exchange: Exchange, reply: Reply, grammar: Grammar, stall_s: float) -> None:
        self._exchange = exchange
        self._reply = reply
        self._grammar = grammar
        self._stall_s = stall_s
        self._status = 0
        self._streaming = False
        self._parts: list[bytes] = []
        self.usage: Mapping[str, Any] = {}

    async def send(self, message: Message) -> None:
        if self._exchange._aborted.done():
            return  # what comes now was cancelled, or nobody reads it
        if message["type"] == "http.response.start":
            self._status = message["status"]
            kind = next((value for name, value in message["headers"] if name.lower() == b"content-type"), b"")
            self._streaming = kind.startswith(b"text/event-stream")
        elif not self._streaming:
            self._parts.append(message.get("body", b""))
        elif (
            (chunk := message.get("body", b""))
            and (passed := self._grammar.feed(chunk))
            and (event := self._reply.feed(passed))
        ):
            await self._pass(event)

    async def _pass(self, event: bytes) -> None:
        exchange = self._exchange
        if exchange.status is None:
            # Only now: until the first event an error still gets a status of its own.
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
            await exchange._start(200, headers)
        stalled = asyncio.get_running_loop().call_later(self._stall_s, exchange.abort, STALLED)
        try:
            await exchange._send({"type": "http.response.body", "body": event, "more_body": True})
        finally:
            stalled.cancel()

    async def close(self) -> None:
        """vLLM's application has returned: end the answer. Raises Refused if it was not a success."""
        if self._streaming:
            self._grammar.close()
            self.usage = self._grammar.usage or {}
            if self._grammar.error is not None:
                raise _upstream(500, self._grammar.error, self._exchange)
            await self._exchange._send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        raw = b"".join(self._parts)
        if self._status != 200:
            raise _upstream(self._status, raw.decode(errors="replace"), self._exchange)
        self.usage = json.loads(raw).get("usage") or {}
        await self._exchange.reply_raw(200, self._reply.document(raw))


def _anew(error: E) -> E:
    """The error without the frames it was raised in before: a constant would keep them all, bodies included."""
    return error.with_traceback(None)


def _upstream(status: int, text: str, exchange: Exchange) -> Refused:
    """Our error for one of vLLM's: a client's mistake is explained, a server's is logged and kept from the client."""
    try:
        error = json.loads(text)["error"]
        status, message, param = int(error["code"]), str(error["message"]), error.get("param")
    except (ValueError, KeyError, TypeError):
        message, param = text, None
    if not 400 <= status < 500:
        logger.error("request %s: vLLM answered %d: %s", exchange.request_id, status, message[:500])
        return _anew(FAILED)
    message = PATHS.sub("…", message.splitlines()[0] if message else "The request was refused.")[:500]
    message = message.removesuffix(f" (parameter={param})")  # vLLM says it twice
    code = "context_length_exceeded" if OVERFLOW.search(message) else None
    return Refused.of(400, "invalid", message, code=code, param=exchange.dialect.field(param))
