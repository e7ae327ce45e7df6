"""One machine: bind the address, start the engine, serve vLLM's application behind the gate on uvicorn.

With `server.processes` > 1 every API process runs `serve_process` over one shared engine, the way vLLM's
`api_server_count` does. What happens between start and exit is `lifecycle`.
"""

import asyncio
import contextlib
import errno
import logging
import math
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import uvicorn

from borg_serve.config import Config, Limits
from borg_serve.engine.client import start
from borg_serve.engine.prepare import Preparation
from borg_serve.errors import BorgServeError, EngineError, ServerError
from borg_serve.gate.app import Gate, with_cors
from borg_serve.gate.http import BoundedHttpProtocol
from borg_serve.gate.readiness import Phase, Readiness
from borg_serve.gate.remote import RemoteCoordinator
from borg_serve.gate.request import App
from borg_serve.serving import processes
from borg_serve.serving.api_processes import supervise
from borg_serve.serving.lifecycle import (
    CLOSING_S,
    Shared,
    accounts,
    make_coordinator,
    make_gate,
    make_ready,
    serve_until_stopped,
    slots,
)
from borg_serve.upstream import pinned

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

__all__ = ["bind", "check_address", "serve"]

logger = logging.getLogger(__name__)

SEND_BYTES = 64 * 1024
"""Send buffer of a connection. The kernel would let it grow to megabytes, which hides that a client does not read."""
UNREAD_MS = 30_000
"""A connection whose peer acknowledges nothing for so long is reset by the kernel."""


class AddressTakenError(ServerError):
    """Another process listens there now."""


def check_address(config: Config) -> None:
    """Raise ServerError if this machine could not listen there, even when nobody else does."""
    with contextlib.suppress(AddressTakenError):
        bind(config).close()


def bind(config: Config) -> socket.socket:
    """Take the address before anything heavy is loaded. Raises ServerError if it is taken or not ours."""
    host, port = config.server.host, config.server.port
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        cure = "Set server.host to an address of this machine."
        raise ServerError(f"server.host: {error.strerror}, got {host!r}. {cure}") from None
    try:
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        sock = socket.create_server(address, family=family, backlog=1024, dualstack_ipv6=both)
    except OSError as error:
        cure = "Choose another with --set server.port=PORT."
        kind = AddressTakenError if error.errno == errno.EADDRINUSE else ServerError
        raise kind(f"server.port: {os.strerror(error.errno or 0)}, got {host}:{port}. {cure}") from None
    sock.set_inheritable(True)
    # Connections inherit what is set before they are accepted.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_MS)
    return sock


def serve(prepared: Preparation, sock: socket.socket) -> int:
    """Serve until SIGTERM or the engine's loss; the exit status: 0 after a drain, 1 after a loss."""
    import uvloop

    count = prepared.config.server.processes
    shared = Shared(count)
    if count == 1:
        return uvloop.run(serve_process(prepared, sock, shared))
    return supervise(prepared, sock, shared, serve_process)


async def serve_process(
    prepared: Preparation,
    sock: socket.socket,
    shared: Shared,
    client_config: dict[str, Any] | None = None,
    channel: socket.socket | None = None,
) -> int:
    """Run one API process to its end; its exit status.

    `client_config`: vLLM's, when the engine is shared. `channel`: to the coordinator in another process.
    """
    index = client_config["client_index"] if client_config else 0
    shared.pids[index] = os.getpid()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    own = make_coordinator(prepared.config) if channel is None else None
    coordinator = own or await RemoteCoordinator.connect(cast(socket.socket, channel))
    readiness = Readiness(shared.phases, index)
    async with accounts(prepared.config, own) as spool:
        gate = make_gate(prepared, readiness, coordinator, spool)
        async with http(with_cors(gate, prepared.config.server.cors_origins), sock):
            try:
                return await _serve(prepared, gate, sock, shared, client_config, stop)
            except BorgServeError as error:
                readiness.set(Phase.FAILED, "the engine could not be started")
                logger.error("%s", error)
                return 1


async def _serve(
    prepared: Preparation,
    gate: Gate,
    sock: socket.socket,
    shared: Shared,
    client_config: dict[str, Any] | None,
    stop: asyncio.Event,
) -> int:
    async with engine_client(prepared, shared, client_config, stop) as client:
        if client is None:
            return 0
        await make_ready(prepared, client)
        async with vllm_app(prepared, client) as app:
            await gate.coordinator.open(slots(prepared, client))
            gate.open(app, client.model_config.max_model_len)
            shared.step()
            gate.readiness.set(Phase.READY)
            logger.info("ready on http://%s:%d", *sock.getsockname()[:2])
            watching = client_config is None or client_config["client_index"] == 0
            return await serve_until_stopped(prepared, gate, client, shared, stop, watching)


@contextlib.asynccontextmanager
async def http(app: App, sock: socket.socket) -> AsyncIterator[None]:
    """Answer on the socket while the block runs: `/health` and `/ready` do from the very start."""
    config = uvicorn.Config(
        app,
        http=BoundedHttpProtocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=math.ceil(CLOSING_S),
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: SIGTERM drains first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def engine_client(
    prepared: Preparation, shared: Shared, client_config: dict[str, Any] | None, stop: asyncio.Event
) -> "AsyncIterator[AsyncLLM | None]":
    """The engine's client, and its end; None if `stop` came while the engine was starting.

    The engine starts in a thread, so that the gate can say meanwhile that it does.
    """
    starting = asyncio.ensure_future(
        asyncio.to_thread(start, prepared.args, prepared.prefix, client_config, shared.step)
    )
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not starting.done():
        # A thread cannot be cancelled; without its processes the start fails by itself.
        processes.kill()
        with contextlib.suppress(TimeoutError, EngineError):
            await asyncio.wait_for(starting, CLOSING_S)
        yield None
        return
    client = starting.result()
    try:
        yield client
    finally:
        # In a thread, so that the gate can answer meanwhile that the server is being stopped.
        await asyncio.to_thread(client.shutdown, timeout=CLOSING_S)


@contextlib.asynccontextmanager
async def vllm_app(prepared: Preparation, client: "AsyncLLM") -> AsyncIterator[Any]:
    """vLLM's own OpenAI application over this client."""
    with pinned("serving"):
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

    tasks = await client.get_supported_tasks()
    app = build_app(prepared.args, tasks, client.model_config)
    await init_app_state(client, app.state, prepared.args, tasks)
    # vLLM's handler of a dead engine's errors ends the server it finds here; ours ends by its watchdog.
    app.state.server = SimpleNamespace(should_exit=False)
    set_default_max_tokens(prepared.config.limits, app)
    async with app.router.lifespan_context(app):
        yield app


def set_default_max_tokens(limits: Limits, app: Any) -> None:
    """Give vLLM's application the `max_tokens` of requests that name none. vLLM caps it by the context that is left.

    As an argument (`max_new_tokens` of `override_generation_config`) it would cap what a client names, too.
    """
    app.state.openai_serving_chat.default_sampling_params["max_tokens"] = limits.default_max_tokens
