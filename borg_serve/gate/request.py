"""One client's request: its headers, its body bounded in size and time, and how it is aborted.

It knows ASGI messages and time. It does not know routes, keys, or what a request means.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, TypeVar
from uuid import uuid4

from borg_serve.api.errors import ApiError

__all__ = ["AGAIN", "NO_RETRY", "App", "ClientGone", "Message", "Receive", "Request", "Scope", "Send"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
T = TypeVar("T")

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
AGAIN = {"retry-after": "5"}
"""For clients of a server that is not ready or ends: a cluster has other replicas, and a supervisor starts it again."""
NO_RETRY = {"x-should-retry": "false"}
"""Tells OpenAI's and Anthropic's clients, which repeat a 5xx twice, that the same would cost as much and fail again."""
DISCARD_S = 1.0
DISCARD_BYTES = 8 << 20
"""How long, and how much of it, a refused request's body is read before the connection is closed."""


class ClientGone(Exception):
    """The client closed the connection: nobody is left to answer."""


class Request:
    """One HTTP request in progress."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        """Names are in lower case."""
        sent_id = self.headers.get("x-request-id", "")
        self.id: str = sent_id if REQUEST_ID.fullmatch(sent_id) else uuid4().hex
        """The client's `x-request-id` if it is harmless, else a new one."""
        self.arrived = time.monotonic()
        self.body_read = self.method in ("GET", "HEAD")
        self.receive = receive
        self._aborted: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    async def body(self, limit_bytes: int, limit_s: float) -> bytes:
        """Return the whole body. Raises ApiError (413 before reading it, 408 when it is slow) or ClientGone."""
        what = f"The body must not pass {limit_bytes} bytes."
        too_large = ApiError(413, what, reason="body_size", headers={"connection": "close"})
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(limit_s):
                while not self.body_read:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    body += message.get("body", b"")
                    if len(body) > limit_bytes:
                        raise too_large
                    self.body_read = not message.get("more_body", False)
        except TimeoutError:
            what = f"The body did not arrive within {limit_s:g} s."
            raise ApiError(408, what, reason="body_time", headers={"connection": "close"}) from None
        return bytes(body)

    async def discard_body(self) -> None:
        """Read what the client is still sending, within bounds, and drop it."""
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_S):
                while size < DISCARD_BYTES:
                    message = await self.receive()
                    size += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return

    def receive_for_vllm(self, body: bytes) -> Receive:
        """Return what vLLM's application reads from: this body, then a disconnect once the request is aborted."""
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await asyncio.shield(self._aborted)
            return {"type": "http.disconnect"}

        return receive

    @contextlib.asynccontextmanager
    async def alive(self, deadline_s: float) -> AsyncIterator[None]:
        """Abort when `deadline_s` since the arrival have passed or the client leaves, while the block runs.

        To be entered once the body has been read.
        """
        what = "The request's time ran out."
        late = ApiError(504, what, "server_error", None, "deadline_exceeded", "deadline", NO_RETRY)
        left_s = self.arrived + deadline_s - time.monotonic()
        deadline = asyncio.get_running_loop().call_later(left_s, self.abort, late)
        listener = asyncio.create_task(self._abort_when_client_leaves())
        try:
            yield
        finally:
            deadline.cancel()
            listener.cancel()

    async def _abort_when_client_leaves(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.abort(ClientGone())

    def abort(self, error: Exception) -> None:
        """End the request now, with this error: whatever waits or generates for it is cancelled."""
        if not self._aborted.done():
            self._aborted.set_result(error)

    @property
    def aborted(self) -> bool:
        return self._aborted.done()

    def raise_if_aborted(self) -> None:
        """Raise the error that the request was aborted with."""
        if self._aborted.done():
            # Several requests may be aborted with one error: it must not collect the frames of all of them.
            raise self._aborted.result().with_traceback(None)

    async def unless_aborted(self, work: Awaitable[T]) -> T:
        """Return the result of `work`. If the request is aborted first, cancel `work` and raise the abort's error."""
        task = asyncio.ensure_future(work)
        either: set[asyncio.Future[Any]] = {task, self._aborted}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self.raise_if_aborted()
        return task.result()
