"""The response to one request: documents, errors, and vLLM's answer, held until it is whole or streamed as it comes.

It knows ASGI messages and the shapes of answers. It does not know routes, keys, or what a request means.
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext
from typing import Any

from borg_serve import metrics
from borg_serve.api import chat, messages
from borg_serve.api.errors import ApiError
from borg_serve.api.events import compact
from borg_serve.api.fields import counted
from borg_serve.api.progress import CURRENT, Progress
from borg_serve.api.protocol import Answer, ClientProtocol
from borg_serve.gate import tracing
from borg_serve.gate.http import ABORT
from borg_serve.gate.request import NO_RETRY, App, Message, Request, Scope, Send
from borg_serve.gate.sse import Grammar

__all__ = ["Response", "failure"]

logger = logging.getLogger(__name__)

PATHS = re.compile(r"(?:/[\w.\-]+){2,}|\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b| at 0x[0-9a-f]+")
OVERFLOW = re.compile(r"context length|too long|cannot be greater than max", re.IGNORECASE)
LAST_WORD_S = 1.0
"""How long a client may take to make room for a stream's last event."""
BEGIN_S = 1.0
"""How long a stream that can wait for its first token with a status still open does so."""
PING_S = 5.0
"""Silence after which a ping is due, where the protocol has one."""


def failure() -> ApiError:
    """Return the error for a failure of ours, without a word about it. A new one each time: it keeps frames alive."""
    what = "The server failed to complete the request."
    return ApiError(500, what, "server_error", None, "internal_error", "error", NO_RETRY)


class Response:
    """The HTTP response to `request`. Errors are written in `protocol`."""

    def __init__(self, request: Request, send: Send, protocol: ClientProtocol, echo_id: bool = True) -> None:
        self.protocol = protocol
        self.status: int | None = None
        """Status sent to the client, None as long as nothing was sent."""
        self.outcome = "ok"
        """How the request ended: `ok`, `gone` or an error's reason."""
        self.usage: Mapping[str, Any] = {}
        """vLLM's, once the answer is whole."""
        self.progress = Progress()
        self.first_event_at = 0.0
        """Monotonic time of a stream's first event."""
        self.succeeding: Callable[[], None] = lambda: None
        """Called before the client gets what tells it that the answer is whole."""
        self.key_name: str | None = None
        """Whose key the request was made with."""
        self._request = request
        self._send = send
        names = ("x-request-id",) * echo_id + ("request-id",) * (protocol is messages)  # Anthropic's clients read this
        self._own_headers = [(name.encode(), request.id.encode()) for name in names]
        self._answer = Answer()
        self._said_at = 0.0
        self._sending = asyncio.Lock()

    def answers(self, answer: Answer) -> None:
        """Answer in the way of `answer`, and name the fields of the request that it ignores."""
        self._answer = answer
        if answer.ignored:
            self._own_headers.append((b"x-borg-ignored", ",".join(answer.ignored).encode()))
        for name in answer.ignored:
            metrics.IGNORED.labels(counted(name)).inc()

    def headers(self, headers: Mapping[str, str]) -> None:
        """Send these with whatever is answered."""
        self._own_headers += [(name.encode(), value.encode()) for name, value in headers.items()]

    async def document(self, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
        """Send one JSON document."""
        await self._whole(status, compact(body), headers)

    async def error(self, error: ApiError) -> None:
        """Send an error: a document, or if a stream has begun an error event and its end."""
        self.outcome = error.reason
        body = self.protocol.error_body(error.status, error.fields(), self._request.id)
        if self.status is None:
            await self.document(error.status, body, error.headers)
            return
        try:
            async with asyncio.timeout(0 if error.reason == "stalled" else LAST_WORD_S):
                await self._send_body(self._answer.error_event(body), more=False)
        except TimeoutError:
            # The client does not read. Unsent bytes would keep the connection open for as long as it likes.
            abort = (self._request.scope.get("extensions") or {}).get(ABORT)
            if abort is not None:
                abort["call"]()

    async def pass_through(self, app: App) -> None:
        """Hand a request without a body to vLLM's application, and send its answer as it is."""

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                await self._start(message["status"], list(message["headers"]))
            else:
                await self._send(message)

        # vLLM's routes do not know HEAD; the HTTP server leaves the body out.
        scope = self._scope_for_vllm("GET", self._request.path, 0)
        await app(scope, self._request.receive, send)

    async def count(self, app: App, body: Mapping[str, Any], more: Mapping[str, str]) -> None:
        """Answer with how many tokens the prompt of a chat request has, and with `more`. The engine does nothing.

        vLLM counts by rendering the prompt as it does for an answer. Raises as `forward` does.
        """
        raw = json.dumps({name: body[name] for name in ("model", "messages", "tools") if name in body}).encode()
        parts: list[bytes] = []
        status = 0

        async def send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            parts.append(message.get("body", b""))

        await app(self._scope_for_vllm("POST", "/tokenize", len(raw)), self._request.receive_for_vllm(raw), send)
        self._request.raise_if_aborted()
        document = b"".join(parts)
        if status != 200:
            raise self._upstream_error(status, document.decode(errors="replace"))
        await self.document(200, {**more, "input_tokens": json.loads(document)["count"]})

    async def forward(self, app: App, body: Mapping[str, Any], stall_s: float) -> None:
        """Hand a chat request to vLLM's application; check its answer and send it as the protocol writes it.

        `stall_s`: how long the client may leave one chunk unread. Raises ApiError or ClientGone for every end but
        success; a stream that has begun then still lacks its error event.
        """
        answer, options = self._answer, body.get("stream_options") or {}
        if body.get("stream"):
            # The gate counts tokens by the usage event; the client sees the event only if it asked for it.
            body = {**body, "stream_options": {**options, "include_usage": True}}
        raw = json.dumps(body).encode()
        grammar = Grammar(body.get("n") or 1, keep_usage=bool(options.get("include_usage")))
        upstream_status, streaming, parts = 0, False, []

        async def send(message: Message) -> None:
            nonlocal upstream_status, streaming
            if self._request.aborted:
                return  # what comes now was cancelled, or nobody reads it
            if message["type"] == "http.response.start":
                upstream_status = message["status"]
                kind = next((value for name, value in message["headers"] if name.lower() == b"content-type"), b"")
                streaming = kind.startswith(b"text/event-stream")
            elif not streaming:
                parts.append(message.get("body", b""))
            elif passed := grammar.feed(message.get("body", b"")):
                if grammar.done:
                    self._succeed(grammar.usage)
                if (event := answer.feed(passed)) and not answer.gathers:
                    await self._event(event, stall_s)

        scope = self._scope_for_vllm("POST", chat.PATH, len(raw))
        pings = body.get("stream") and answer.PING and not answer.gathers
        answer.progress = self.progress
        token = CURRENT.set(self.progress)
        try:
            async with self._awake(body["model"], stall_s) if pings else nullcontext():
                await app(scope, self._request.receive_for_vllm(raw), send)
        finally:
            CURRENT.reset(token)
        self._request.raise_if_aborted()
        if streaming:
            await self._end_stream(grammar, answer)
        else:
            await self._held(upstream_status, b"".join(parts), answer)

    @asynccontextmanager
    async def _awake(self, model: str, stall_s: float) -> AsyncIterator[None]:
        """While the block runs, begin the stream if its first token is late, and ping when nothing else is said."""
        pinging = asyncio.create_task(self._ping(model, stall_s))
        try:
            yield
        finally:
            pinging.cancel()
            await asyncio.gather(pinging, return_exceptions=True)

    async def _ping(self, model: str, stall_s: float) -> None:
        answer = self._answer
        while True:
            await asyncio.sleep(BEGIN_S)
            if self.status is not None and time.monotonic() - self._said_at >= PING_S:
                await self._event(answer.PING, stall_s)
            elif self.status is None and (event := answer.begin(self._request.id, model)):
                await self._event(event, stall_s)

    async def _end_stream(self, grammar: Grammar, answer: Answer) -> None:
        grammar.close()
        if grammar.error is not None:
            raise self._upstream_error(500, grammar.error)
        if answer.gathers:
            await self._whole(200, answer.gathered())
        else:
            await self._send_body(b"", more=False)

    async def _held(self, status: int, raw: bytes, answer: Answer) -> None:
        if status != 200:
            raise self._upstream_error(status, raw.decode(errors="replace"))
        document = answer.document(raw)
        self._succeed(json.loads(raw).get("usage"))
        await self._whole(200, document)

    def _succeed(self, usage: Mapping[str, Any] | None) -> None:
        self.usage = usage or {}
        self.succeeding()

    def _scope_for_vllm(self, method: str, path: str, length: int) -> Scope:
        # Nothing of the client's own: there are headers that choose ranks, priorities and sessions.
        headers = [(b"content-type", b"application/json"), (b"content-length", str(length).encode())]
        headers += [(b"x-request-id", self._request.id.encode()), (b"host", b"localhost"), *tracing.headers()]
        # Below ASGI 2.4 Starlette listens for the disconnect that an abort sends; later it would only see send fail.
        asgi = {"version": "3.0", "spec_version": "2.3"}
        ours = {"method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
        return {**self._request.scope, **ours, "headers": headers, "asgi": asgi}

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        headers = [*headers, *self._own_headers]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _send_body(self, body: bytes, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _whole(self, status: int, raw: bytes, headers: Mapping[str, str] | None = None) -> None:
        request = self._request
        sent = {"content-type": "application/json", "content-length": str(len(raw)), **(headers or {})}
        if not request.body_read:
            sent["connection"] = "close"
        await self._start(status, [(name.encode(), value.encode()) for name, value in sent.items()])
        body = b"" if request.method == "HEAD" else raw
        if not request.body_read:
            # The client may be sending still: closing now would reset the connection before it has read the answer.
            await self._send_body(body, more=True)
            await request.discard_body()
            body = b""
        await self._send_body(body, more=False)

    async def _event(self, event: bytes, stall_s: float) -> None:
        async with self._sending:  # pings come from another task
            if self.status is None:
                # Only now: until the first event an error still gets a status of its own.
                headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
                await self._start(200, headers)
                self.first_event_at = time.monotonic()
            stalled = asyncio.get_running_loop().call_later(stall_s, self._abort_stalled)
            try:
                await self._send_body(event, more=True)
            finally:
                stalled.cancel()
            self._said_at = time.monotonic()

    def _abort_stalled(self) -> None:
        what = "The answer was not read in time."
        self._request.abort(ApiError(408, what, "server_error", None, "client_too_slow", "stalled"))

    def _upstream_error(self, status: int, text: str) -> ApiError:
        """Our error for one of vLLM's. The client is told of its own mistakes; those of the server are logged."""
        try:
            error = json.loads(text)["error"]
            status, message, field = int(error["code"]), str(error["message"]), error.get("param")
        except (ValueError, KeyError, TypeError):
            message, field = text, None
        if not 400 <= status < 500:
            logger.error("request %s: vLLM answered %d: %s", self._request.id, status, message[:500])
            return failure()
        message = PATHS.sub("…", message.splitlines()[0] if message else "The request was refused.")[:500]
        message = message.removesuffix(f" (parameter={field})")  # vLLM says it twice
        code = "context_length_exceeded" if OVERFLOW.search(message) else None
        param = self.protocol.field_name(field) if field is not None else None
        return ApiError(400, message, param=param, code=code)
