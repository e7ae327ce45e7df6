"""The coordinator in another process: the API processes of a server call their parent's over a socket pair.

A line of JSON each way: `[number, method, arguments]`, then `[number, result, error]`. It knows which methods the
coordinator has, and not what they do.
"""

import asyncio
import json
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import count
from typing import Any

from borg_serve.api.errors import ApiError
from borg_serve.engine.memory import Slots
from borg_serve.gate.admission import Demand, Grant
from borg_serve.gate.coordinator import Coordinator
from borg_serve.gate.keys import Key
from borg_serve.gate.telemetry import Spent

__all__ = ["RemoteCoordinator", "serve"]

logger = logging.getLogger(__name__)

LINE_BYTES = 1 << 20
ERROR = ("status", "message", "type", "param", "code", "reason", "headers")


class RemoteCoordinator:
    """A coordinator's methods, each of which its own process runs."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._numbers = count()
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._listening = asyncio.create_task(self._listen(reader))

    @classmethod
    async def connect(cls, channel: socket.socket) -> "RemoteCoordinator":
        """Use one end of a socket pair; `serve` has the other."""
        return cls(*await asyncio.open_unix_connection(sock=channel, limit=LINE_BYTES))

    def close(self) -> None:
        """Give back whatever this process holds."""
        self._writer.close()
        self._listening.cancel()

    async def open(self, slots: Slots) -> None:
        """See Coordinator."""
        await self._call("open", asdict(slots))

    async def begin(self, key: Key | None, generates: bool) -> dict[str, str]:
        """See Coordinator."""
        headers: dict[str, str] = await self._call("begin", key and asdict(key), generates)
        return headers

    async def acquire(self, key: Key | None, demand: Demand) -> Grant:
        """See Coordinator."""
        number = next(self._numbers)
        try:
            granted = await self._call("acquire", key and asdict(key), asdict(demand), number=number)
            return Grant(**granted | {"number": number})
        except asyncio.CancelledError:
            self._send(number, "leave")
            raise

    async def end(self, key: Key | None, grant: Grant | None, spent: Spent) -> None:
        """See Coordinator."""
        self._send(next(self._numbers), "end", key and asdict(key), grant and asdict(grant), asdict(spent))

    async def usage(self, key: str, since: str, until: str | None, by: str) -> list[dict[str, Any]]:
        """See Coordinator."""
        rows: list[dict[str, Any]] = await self._call("usage", key, since, until, by)
        return rows

    def _send(self, number: int, method: str, *arguments: Any) -> None:
        self._writer.write(json.dumps([number, method, arguments]).encode() + b"\n")

    async def _call(self, method: str, *arguments: Any, number: int | None = None) -> Any:
        number = next(self._numbers) if number is None else number
        answer = self._pending[number] = asyncio.get_running_loop().create_future()
        self._send(number, method, *arguments)
        try:
            return await answer
        finally:
            del self._pending[number]

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            number, result, error = json.loads(line)
            answer = self._pending.get(number)
            if answer is None or answer.done():
                continue  # whoever asked has left
            if error is None:
                answer.set_result(result)
            else:
                answer.set_exception(ApiError(**error))


async def serve(coordinator: Coordinator, channels: Sequence[socket.socket]) -> None:
    """Answer calls at these ends of socket pairs until all of them are closed."""
    await asyncio.gather(*(_Server(coordinator).serve(channel) for channel in channels))


class _Server:
    """Calls of one API process."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._granted: dict[int, Grant] = {}

    async def serve(self, channel: socket.socket) -> None:
        """Answer until the other end is closed; what it was granted is given back then."""
        reader, self._writer = await asyncio.open_unix_connection(sock=channel, limit=LINE_BYTES)
        while line := await reader.readline():
            number, method, arguments = json.loads(line)
            if method == "leave":
                await self._leave(number)
            else:
                task = self._calls[number] = asyncio.create_task(self._call(number, method, arguments))
                task.add_done_callback(lambda _, number=number: self._calls.pop(number, None))  # type: ignore[misc]
        for number in [*self._calls, *self._granted]:
            await self._leave(number)

    async def _leave(self, number: int) -> None:
        if grant := self._granted.pop(number, None):
            await self._coordinator.end(None, grant, Spent())
        elif call := self._calls.get(number):
            call.cancel()

    async def _call(self, number: int, method: str, arguments: Sequence[Any]) -> None:
        given = zip(METHODS[method], arguments, strict=True)
        values = [value if value is None else kind(value) for kind, value in given]
        try:
            if method == "end" and values[1] is not None:
                self._granted.pop(values[1].number, None)
            result = await getattr(self._coordinator, method)(*values)
        except ApiError as error:
            self._answer(number, None, {name: getattr(error, name) for name in ERROR})
        except Exception:
            logger.exception("the coordinator failed")
            self._answer(number, None, {"status": 500, "message": "The server failed.", "type": "server_error"})
        else:
            if isinstance(result, Grant):
                self._granted[number] = result
                result = asdict(result)
            self._answer(number, result, None)

    def _answer(self, number: int, result: Any, error: Any) -> None:
        self._writer.write(json.dumps([number, result, error]).encode() + b"\n")


def _of(kind: type) -> Callable[[dict[str, Any]], Any]:
    return lambda fields: kind(**fields)


def _same(value: Any) -> Any:
    return value


METHODS: Mapping[str, Sequence[Callable[[Any], Any]]] = {
    "open": (_of(Slots),),
    "begin": (_of(Key), _same),
    "acquire": (_of(Key), _of(Demand)),
    "end": (_of(Key), _of(Grant), _of(Spent)),
    "usage": (_same, _same, _same, _same),
}
"""What may be called, and how its arguments are read."""
