"""A stand-in for the API that gives every answer the chat page must handle, the rare ones included.

The last user message chooses the answer. Every request is kept. Tests use the real server wherever it gives the answer.
"""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

HOSTILE = '<img src="x" onerror="document.title=\'owned\'"> <script>document.title="owned"</script> **bold**'
PICTURE = "![picture](http://127.0.0.1:9/leak.png) here"


@dataclass
class Api:
    """What the page sent, and how the API behaves."""

    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    ready: bool = True
    refusals: int = 0
    """How many of the next requests that begin with `busy` are refused."""
    gone: int = 0
    """How many endless streams were closed."""

    async def answer_ready(self, _: Request) -> Response:
        if self.ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "draining", "reason": "the server is being replaced"}, 503)

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        said = body["messages"][-1]["content"]
        if said.startswith("busy") and self.refusals:
            self.refusals -= 1
            return _error(503, "busy", {"retry-after": "1"})
        if said.startswith("too long") and "max_tokens" in body:
            return _error(400, "context_length_exceeded")
        if said.startswith("forbidden"):
            return _error(401, "invalid_api_key")
        return StreamingResponse(self._stream(request, said), media_type="text/event-stream")

    async def _stream(self, request: Request, said: str) -> AsyncIterator[bytes]:
        text = {"html": HOSTILE, "picture": PICTURE}.get(said, f"You said: {said}.")
        words = [f"word{number} " for number in range(5000)] if said.startswith("endless") else text.split(" ")
        try:
            for word in words:
                yield _event(content=word if said.startswith("endless") else f"{word} ")
                await asyncio.sleep(0.02)
        finally:
            self.gone += said.startswith("endless")
        if said.startswith("break"):
            raise ConnectionResetError
        if said.startswith("deadline"):
            yield b'data: {"error":{"message":"out of time","code":"deadline_exceeded"}}\n\n'
            return
        yield _event(finish_reason="length" if said.startswith("cut") else "stop")
        yield b'data: {"choices":[],"usage":{"completion_tokens":%d}}\n\n' % len(words)
        yield b"data: [DONE]\n\n"


def _event(finish_reason: str | None = None, **delta: str) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return f"data: {json.dumps({'choices': [choice]})}\n\n".encode()


def _error(status: int, code: str, headers: dict[str, str] | None = None) -> Response:
    error = {"message": "No.", "type": "server_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers)


@contextmanager
def running() -> Iterator[Api]:
    """Serve on a free port while the block runs."""
    api = Api()
    routes = [
        Route("/ready", api.answer_ready),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
    ]
    config = uvicorn.Config(Starlette(routes=routes), host="127.0.0.1", port=0, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    api.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield api
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
