"""uvicorn's HTTP protocol with bounds on heads, trailers and pipelines, and errors in JSON.

The only module that touches uvicorn's internals. It does not know routes; `request` bounds bodies.
"""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from borg_serve.api.errors import ApiError

__all__ = ["ABORT", "FIRST_S", "HEAD_BYTES", "HEAD_S", "PIPELINED", "BoundedHttpProtocol"]

HEAD_BYTES = 32 * 1024
"""Request line and headers together; also the bound on a body's framing that comes without a byte of the body."""
HEAD_S = 10.0
"""From the connection, or from a request's first byte, to the end of its head."""
FIRST_S = 1.0
"""When the server ends, how long a connection that has sent no request yet may take to send one."""
PIPELINED = 16
"""Pipelined requests that may wait behind the one being answered; one read could hold ten thousand."""
ABORT = "borg_serve.abort"
"""Name of the ASGI scope extension that closes the connection at once, unsent bytes or not."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. It is closed if a head is too long, too slow, or never comes."""

    _head_bytes = 0
    _framing_bytes = 0
    _in_head = True
    _begun = False
    _reading_stopped = False
    _asked = False
    _ending = False
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._reading_stopped:
            return
        if self._in_head:
            # Counts whole reads, so a head that ends in this read may be charged with the body behind it: the bound is
            # on what is buffered before the head ends, and a read is at most 256 KiB.
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES and b"\r\n\r\n" not in data:
                self._refuse(431, "Request Header Fields Too Large", f"The head must not pass {HEAD_BYTES} bytes.")
                return
        else:
            # Endless trailers would be kept, as headers are.
            self._framing_bytes += len(data)
            if self._framing_bytes > HEAD_BYTES + len(data):
                self._refuse(400, "Bad Request", f"A body's framing must not pass {HEAD_BYTES} bytes.")
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun = True
        if not self._in_head:
            self._expect_head()
        self.scope["extensions"] = {ABORT: {"call": self.transport.abort}}

    def on_header(self, name: bytes, value: bytes) -> None:
        # A trailer is no header: neither a proxy nor the gate has seen it when it looked at the head.
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._reading_stopped:
            return
        if sum(len(name) + len(value) + 4 for name, value in self.headers) + len(self.url) > HEAD_BYTES:
            self._refuse(431, "Request Header Fields Too Large", f"The head must not pass {HEAD_BYTES} bytes.")
            return
        self._head_arrived()
        if len(self.pipeline) >= PIPELINED:
            self._stop_reading()
            return
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            _end_by_closing(self.cycle)
        self._asked = True
        if self._ending:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._framing_bytes = 0
        if not self._reading_stopped:
            super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "Bad Request", "The request is not valid HTTP.")

    def shutdown(self) -> None:
        self._ending = True
        if not self._asked:
            # Its first request may be on its way already. Closing now would reset the connection without a reason.
            self.loop.call_later(FIRST_S, self._close_unasked)
        else:
            super().shutdown()

    def _close_unasked(self) -> None:
        if not self._asked:
            self.transport.close()

    def _expect_head(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._framing_bytes = 0
        self._head_timer = self.loop.call_later(HEAD_S, self._head_overdue)

    def _head_arrived(self) -> None:
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_overdue(self) -> None:
        if self._begun:
            self._refuse(408, "Request Timeout", f"The head did not arrive within {HEAD_S:g} s.")
        else:
            self.transport.close()

    def _stop_reading(self) -> None:
        """Read no more, answer what was read, and close (RFC 9112, 9.3.2: the client may repeat the rest)."""
        self._reading_stopped = True
        self.cycle.keep_alive = False

    def _refuse(self, status: int, phrase: str, message: str) -> None:
        """Answer without the application, and close; never instead of another request's answer or in its middle."""
        next_request = self._in_head
        self._head_arrived()
        if self.cycle is not None and not self.cycle.response_complete:
            if next_request:
                self._stop_reading()
                return
            if self.cycle.response_started or self.pipeline:
                self.transport.close()
                return
        body = json.dumps({"error": ApiError(status, message).fields()}).encode()
        if not self.transport.is_closing():
            head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
            self.transport.close()


def _end_by_closing(cycle: Any) -> None:
    """Make the end of a body of unknown length the connection's: HTTP/1.0 has no chunks, and uvicorn sends them."""
    send, cycle.chunked_encoding = cycle.send, False

    async def unframed(message: Any) -> None:
        cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = unframed
