"""A server of known timing in a process of its own: `python -m loadtests.generator.known --port 8123 --ttft-ms 200`.

It speaks just enough HTTP and OpenAI's chat stream to be measured, and keeps when it read each request and wrote each
event, on the clock that all processes of this machine share: `GET /log`. What it sends is no text.
"""

import argparse
import asyncio
import json
import time
from typing import Any

import uvloop

READY = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"


def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
    document = {"object": "chat.completion.chunk", "choices": choices, **more}
    return _chunk(b"data: " + json.dumps(document, separators=(",", ":")).encode())  # as servers write it


def delta(finish_reason: str | None = None, **content: str) -> bytes:
    return event([{"index": 0, "delta": content, "finish_reason": finish_reason}])


def _chunk(data: bytes) -> bytes:
    data += b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


ROLE, CONTENT, FINISH = delta(role="assistant", content=""), delta(content=" word"), delta("stop", content="")
DONE, END = _chunk(b"data: [DONE]"), b"0\r\n\r\n"


class Known:
    """Streams with a fixed time to the first token and a fixed gap, and the moments when they were written."""

    def __init__(self, ttft_s: float, gap_s: float, fault: str | None) -> None:
        self.ttft_s, self.gap_s, self.fault = ttft_s, gap_s, fault
        self.log: dict[str, dict[str, Any]] = {}

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            read_us = time.monotonic_ns() // 1000
            if head.startswith(b"POST"):
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                request = json.loads(await reader.readexactly(length))
                await self.stream(writer, request, read_us)
            elif head.startswith(b"GET /log"):
                log = json.dumps(self.log).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(log) + log)
            else:
                writer.write(READY)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def stream(self, writer: asyncio.StreamWriter, request: dict[str, Any], read_us: int) -> None:
        loop = asyncio.get_running_loop()
        tokens = request["max_tokens"]
        writer.write(HEAD + ROLE)
        written: list[int] = []
        self.log[request["messages"][-1]["content"]] = {"read_us": read_us, "written_us": written}
        due = loop.time() + self.ttft_s
        for number in range(tokens):
            await asyncio.sleep(due - loop.time())
            due += self.gap_s
            written.append(time.monotonic_ns() // 1000)
            writer.write(CONTENT)
            if self.fault == "break" and number == 2:
                writer.transport.abort()
                return
            if self.fault == "cut" and number == 2:
                return
        if self.fault == "silent":
            writer.write(END)
            return
        usage = {"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": 10 + tokens}
        writer.write(FINISH + event([], usage=usage) + DONE + END)


async def serve(port: int, known: Known) -> None:
    server = await asyncio.start_server(known.answer, "127.0.0.1", port, backlog=4096)
    async with server:
        await server.serve_forever()


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ttft-ms", type=float, default=200.0)
    parser.add_argument("--gap-ms", type=float, default=20.0)
    parser.add_argument("--fault", choices=["break", "cut", "silent"], help="end every stream wrongly")
    arguments = parser.parse_args()
    uvloop.run(serve(arguments.port, Known(arguments.ttft_ms / 1e3, arguments.gap_ms / 1e3, arguments.fault)))


if __name__ == "__main__":
    main()
