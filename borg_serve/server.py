"""One machine: vLLM's own application behind the gate, its engine behind the guard, on uvicorn.

It owns the life of the processes: start, readiness, watching, draining, the exit status. With `server.processes` > 1
every API process runs `serve_process` over one shared engine, the way vLLM's `api_server_count` does.
"""

import asyncio
import contextlib
import logging
import logging.config
import math
import os
import signal
import socket
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray, RawValue
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import uvicorn

from borg_serve import capacity, engine, family, guard, metrics
from borg_serve.admission import Admission
from borg_serve.config import Config, Limits
from borg_serve.errors import BorgServeError, EngineError, ServerError
from borg_serve.exchange import Refused
from borg_serve.gate import Gate, Settings
from borg_serve.keys import KeyRing, Quota
from borg_serve.neutralise import Neutraliser
from borg_serve.preparation import Preparation
from borg_serve.protocol import BoundedHttpProtocol
from borg_serve.readiness import Phase, Readiness
from borg_serve.schema import Bounds
from borg_serve.watchdog import watch

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

__all__ = ["bind", "log", "serve"]

logger = logging.getLogger(__name__)

CLOSING_S = 2.0
"""How long clients may take to receive the last bytes of an answer when the server ends."""
SEND_BYTES = 64 * 1024
"""The kernel's send buffer of a connection. By itself it grows to megabytes, and hides for long that nobody reads."""
UNREAD_MS = 30_000
"""A connection whose peer acknowledges nothing for so long is reset by the kernel."""


@dataclass
class Shared:
    """What the API processes of one server share: one phase each, and the monotonic time of the engine's last step."""

    phases: Any
    progress: Any
    pids: Any
    """Of the API processes themselves."""
    root: int
    """Process id of the ancestor of them all and of the engine's processes."""
    lost: Any
    """Set by the parent of several API processes when the engine they share has died."""

    @classmethod
    def of(cls, processes: int) -> "Shared":
        return cls(
            phases=RawArray("B", processes),
            progress=RawValue("d", time.monotonic()),
            pids=RawArray("i", processes),
            root=os.getpid(),
            lost=RawValue("B", 0),
        )

    def step(self) -> None:
        """The engine has made a step."""
        self.progress.value = time.monotonic()

    def engine_busy(self) -> bool:
        """Whether a process of the engine runs, wants to, or waits for the disk; not if one is stopped."""
        ours = {self.root, *self.pids}
        states = set()
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.root).children(recursive=True):
                if process.pid not in ours:
                    states.add(process.status())
        return psutil.STATUS_STOPPED not in states and bool(states & {psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP})


def log() -> None:
    """One line an event on stderr; a request's line is JSON."""
    line = {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}
    ours = {"handlers": ["stderr"], "propagate": False}
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"line": line},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
            "loggers": {"borg_serve": {**ours, "level": "INFO"}, "uvicorn": {**ours, "level": "WARNING"}},
        }
    )


def bind(config: Config) -> socket.socket:
    """Take the address before anything heavy is loaded. Raises ServerError if it is taken or not ours."""
    host, port = config.server.host, config.server.port
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
    except OSError as error:
        cure = "Set server.host to an address of this machine."
        raise ServerError(f"server.host: {error.strerror}, got {host!r}. {cure}") from None
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_MS)
    try:
        sock.bind(address)
        sock.listen(1024)  # an address in use shows here, not at bind, when another server reuses addresses too
    except OSError as error:
        sock.close()
        cure = "Choose another with --set server.port=PORT."
        raise ServerError(f"server.port: {error.strerror}, got {host}:{port}. {cure}") from None
    sock.set_inheritable(True)
    return sock


def serve(prepared: Preparation, sock: socket.socket) -> int:
    """Serve until SIGTERM or the engine's loss; the exit status: 0 after a drain, 1 after a loss."""
    import uvloop

    processes = prepared.config.server.processes
    shared = Shared.of(processes)
    if processes == 1:
        return uvloop.run(serve_process(prepared, sock, shared))
    from borg_serve.frontends import supervise

    return supervise(prepared, sock, shared)


async def serve_process(
    prepared: Preparation, sock: socket.socket, shared: Shared, client_config: dict[str, Any] | None = None
) -> int:
    """Run one API process to its end; its exit status. `client_config`: vLLM's, when the engine is shared."""
    index = client_config["client_index"] if client_config else 0
    shared.pids[index] = os.getpid()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    readiness = Readiness(shared.phases, index)
    gate = make_gate(prepared, readiness, share=prepared.config.server.processes)
    async with http(gate, sock):
        try:
            async with engine_client(prepared, shared, client_config, stop) as client:
                if client is None:
                    return 0
                await make_ready(prepared, gate, client)
                async with vllm_app(prepared, client) as app:
                    gate.open(app, admission(prepared, client))
                    shared.step()
                    readiness.set(Phase.READY)
                    logger.info("ready on http://%s:%d", *sock.getsockname()[:2])
                    return await until_stopped(prepared, gate, client, shared, stop, watching=index == 0)
        except BorgServeError as error:
            readiness.set(Phase.FAILED, "the engine could not be started")
            logger.error("%s", error)
            return 1


def make_gate(
    prepared: Preparation, readiness: Readiness, quota: Quota | None = None, share: int = 1, replica: str | None = None
) -> Gate:
    """The gate of one API process or replica, closed until `open`.

    `quota`: where keys are counted, this process by default; `share`: how many processes count for themselves.
    """
    config = prepared.config
    limits = config.limits
    settings = Settings(
        bounds=Bounds(model=config.model.served_name, max_tokens=limits.max_tokens, vocab_size=prepared.vocab_size),
        deadline_s=limits.deadline_s,
        body_bytes=limits.body_bytes,
        body_s=limits.body_s,
        stall_s=limits.stall_s,
        version=prepared.version() | ({"replica": replica} if replica else {}),
        echo_request_id=replica is None,  # Serve echoes it by itself
    )
    keys = KeyRing(config.server.keys, share=share) if config.server.keys is not None else None
    metrics.IDENTITY_TOKENS.set(len(prepared.prefix.token_ids))
    quota = (quota or Quota()) if keys is not None else None
    return Gate(settings, readiness, Neutraliser(prepared.literals), keys, quota)


# ------------------------------------------------------------------------------------------------- phases


@contextlib.asynccontextmanager
async def http(gate: Gate, sock: socket.socket) -> AsyncIterator[None]:
    """Answer on the socket while the block runs: `/health` and `/ready` do from the very start."""
    config = uvicorn.Config(
        gate,
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
    """The engine's client, guarded, and its end; None if `stop` came while the engine was starting.

    The engine starts in a thread, so that the gate can say meanwhile that it does.
    """

    starting = asyncio.ensure_future(asyncio.to_thread(engine.start, prepared.args, client_config, shared.step))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not starting.done():
        # A thread cannot be cancelled; without its processes the start fails by itself.
        family.end()
        with contextlib.suppress(TimeoutError, EngineError):
            await asyncio.wait_for(starting, CLOSING_S)
        yield None
        return
    client = starting.result()
    try:
        guard.install(client, prepared.prefix.token_ids)
        engine.share_tokens(client, prepared.prefix)
        yield client
    finally:
        # In a thread: whoever asks meanwhile is told that the server is being stopped.
        await asyncio.to_thread(client.shutdown, timeout=CLOSING_S)


async def make_ready(prepared: Preparation, gate: Gate, client: "AsyncLLM") -> None:
    """Cache the identity and probe the engine (I4). Raises EngineError, naming what is wrong."""
    config = prepared.config
    cached = await engine.warm(client, prepared.warm_up_ids, len(prepared.prefix.token_ids))
    answer = await engine.probe(client, prepared.probe_ids, config.model.probe)
    logger.info("identity cached: %d of %d tokens; probe answered %r", cached, len(prepared.prefix.token_ids), answer)


@contextlib.asynccontextmanager
async def vllm_app(prepared: Preparation, client: "AsyncLLM") -> AsyncIterator[Any]:
    """vLLM's own OpenAI application over this client, with the contract's sampling defaults."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    args: Namespace = prepared.args
    tasks = await client.get_supported_tasks()
    app = build_app(args, tasks, client.model_config)
    await init_app_state(client, app.state, args, tasks)
    # vLLM's handler of a dead engine's errors ends the server it finds here; ours ends by its watchdog.
    app.state.server = SimpleNamespace(should_exit=False)
    set_defaults(prepared.config.limits, app)
    async with app.router.lifespan_context(app):
        yield app


def set_defaults(limits: Limits, app: Any) -> None:
    """Give vLLM's application the contract's sampling defaults, and let it show no path."""
    # A client's own value goes before these; vLLM caps max_tokens by the context that is left.
    app.state.openai_serving_chat.default_sampling_params |= {
        "temperature": limits.temperature,
        "top_p": limits.top_p,
        "max_tokens": limits.default_max_tokens,
    }
    for card in app.state.openai_serving_models.base_model_paths:
        card.model_path = card.name  # `/v1/models` shows it, and a path is nobody's business


def admission(prepared: Preparation, client: "AsyncLLM") -> Admission:
    """Places in the engine for this API process, from the KV cache it really has."""
    cache = client.vllm_config.cache_config
    slots = capacity.slots(
        prepared.config.limits,
        kv_tokens=(cache.num_gpu_blocks or 0) * cache.block_size,
        block_tokens=cache.block_size,
        prefix_tokens=len(prepared.prefix.token_ids),
        max_num_seqs=client.vllm_config.scheduler_config.max_num_seqs,
        processes=prepared.config.server.processes,
    )
    logger.info("admission: %s", slots)
    return Admission(slots.concurrent, slots.queued, slots.queued_bytes)


async def until_stopped(
    prepared: Preparation, gate: Gate, client: "AsyncLLM", shared: Shared, stop: asyncio.Event, watching: bool
) -> int:
    """Serve until `stop` (drain, 0) or the engine's loss (answer what is in flight, 1)."""
    server = prepared.config.server

    async def heartbeat() -> None:
        await engine.heartbeat(client, prepared.warm_up_ids)

    def dead() -> bool:
        lost = client.errored or shared.lost.value or gate.readiness.phase == Phase.FAILED
        return bool(lost) or family.ended(crew)

    everyone, crew = family.children(), family.crew()
    stopping = asyncio.create_task(stop.wait())
    # One process watches for a hang; the others learn of it from the phase they share.
    watchdog = asyncio.create_task(
        watch(
            lambda: shared.progress.value, dead, heartbeat, server.hang_s if watching else math.inf, shared.engine_busy
        )
    )
    await asyncio.wait({stopping, watchdog}, return_when=asyncio.FIRST_COMPLETED)
    if watchdog.done():
        stopping.cancel()
        reason = watchdog.result()
        await answer_for_lost_engine(gate, reason)
        family.end(everyone)
        return 1
    watchdog.cancel()
    gate.readiness.set(Phase.DRAINING, "the server is being stopped")
    logger.info("draining %d requests for up to %g s", len(gate.live), server.drain_s)
    left = await gate.drained(server.drain_s)
    if left:
        logger.warning("%d requests were cut off after %g s", left, server.drain_s)
        over = Refused.of(503, "drain", "The server is being stopped.", "server_error", "shutting_down")
        await gate.end_all(over, CLOSING_S)
    return 0


async def answer_for_lost_engine(gate: Gate, reason: str) -> None:
    """Say that the engine is lost, to whoever asks and to whatever is in flight."""
    logger.error("engine lost: %s", reason)
    gate.readiness.set(Phase.FAILED, reason)
    lost = Refused.of(503, "engine_lost", "The engine was lost. Try again later.", "server_error", "engine_lost")
    await gate.end_all(lost, CLOSING_S)
