"""Several API processes over one engine (`server.processes` > 1): their parent.

It starts vLLM's engine and vLLM's manager of API processes, watches them all, and ends them together. It answers no
requests itself.
"""

import asyncio
import contextlib
import signal
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Coroutine, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any

import psutil

from borg_serve.config import Config
from borg_serve.engine.client import configure
from borg_serve.engine.environment import prepare_environment
from borg_serve.engine.prepare import Preparation
from borg_serve.gate import remote
from borg_serve.gate.coordinator import Coordinator
from borg_serve.gate.readiness import Phase
from borg_serve.serving import processes
from borg_serve.serving.lifecycle import CLOSING_S, Shared, accounts, log_to_stderr, make_coordinator
from borg_serve.upstream import pinned
from borg_serve.vllm_plugin.lifetime import end_with_parent

__all__ = ["supervise"]


def supervise(
    prepared: Preparation, sock: socket.socket, shared: Shared, serve: Callable[..., Coroutine[Any, Any, int]]
) -> int:
    """Start the engine and its API processes; return the exit status when all of them have ended.

    An API process runs `serve(prepared, sock, shared, client_config, channel)`: how to reach the engine, and the
    coordinator, which is here.
    """
    with pinned("serving"):
        from vllm.v1.engine.utils import bind_engine_zmq_listeners, launch_core_engines
        from vllm.v1.executor import Executor
        from vllm.v1.metrics.prometheus import setup_multiprocess_prometheus
        from vllm.v1.utils import APIServerProcessManager

    count = prepared.config.server.processes
    ends, channels = zip(*(socket.socketpair() for _ in range(count)), strict=True)
    setup_multiprocess_prometheus()  # type: ignore[no-untyped-call]
    stopping = _Stopping()
    coordinator = make_coordinator(prepared.config)
    coordinating = Thread(
        target=lambda: asyncio.run(_coordinate(coordinator, prepared.config, ends)), name="coordinator", daemon=True
    )
    config = configure(prepared.args, count, index=-1)
    started: list[psutil.Process] = []
    try:
        listeners = bind_engine_zmq_listeners(config, count)
        stats = not prepared.args.disable_log_stats
        with launch_core_engines(config, Executor.get_class(config), stats, listeners.addresses) as launch:
            manager = APIServerProcessManager(
                listen_address="",
                sock=sock,
                args=Namespace(**vars(prepared.args), prepared=prepared, shared=shared, serve=serve, channels=channels),
                num_servers=count,
                input_listeners=listeners.inputs,
                output_listeners=listeners.outputs,
                target_server_fn=_run,
                tensor_queue=launch.tensor_queue,
            )
            launch.watched_frontend_processes = manager.processes
        for channel in channels:
            channel.close()  # so that the last API process's end is the last one's
        coordinating.start()
        engines: Any = launch.engine_manager
        started = processes.children()
        status = _wait(prepared, manager.processes, engines.processes, shared, stopping, coordinating)
        engines.shutdown(timeout=CLOSING_S)
    except _Stop:
        status = 0
    except RuntimeError:
        status = 1  # an API process has said why
    finally:
        processes.kill(started)
    if coordinating.is_alive():
        coordinating.join(CLOSING_S)
    return status


async def _coordinate(coordinator: Coordinator, config: Config, ends: Sequence[socket.socket]) -> None:
    """Decide for the API processes at the other ends, until all of them have ended."""
    async with accounts(config, coordinator):
        await remote.serve(coordinator, ends)


class _Stop(Exception):
    """SIGTERM came while the engine was starting."""


class _Stopping:
    """Turns SIGTERM and SIGINT into an exception while starting, and into a flag once `armed`."""

    def __init__(self) -> None:
        self.asked = False
        self.armed = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, *_: object) -> None:
        self.asked = True
        if not self.armed:
            raise _Stop


def _wait(
    prepared: Preparation,
    servers: list[BaseProcess],
    engines: list[BaseProcess],
    shared: Shared,
    stopping: _Stopping,
    coordinating: Thread,
) -> int:
    """Wait until a process ends or a signal comes; end the others, and return the exit status of them all."""
    stopping.armed = True
    workers = processes.workers()
    while not stopping.asked:
        ended = connection.wait([process.sentinel for process in (*servers, *engines)], timeout=0.25)
        engine_lost = processes.any_ended(workers) or any(engine.sentinel in ended for engine in engines)
        if engine_lost:
            shared.lost.value = True  # the servers answer what is in flight, and end
        elif ended or not coordinating.is_alive():  # the thread has said why
            shared.phases[0] = Phase.FAILED
        else:
            continue
        _join(servers, CLOSING_S + 1)
        _end(servers, CLOSING_S + 1)
        return 1
    _end(servers, prepared.config.server.drain_s + 2 * CLOSING_S)
    return 0 if all(server.exitcode == 0 for server in servers) else 1


def _end(servers: Sequence[BaseProcess], limit_s: float) -> None:
    for server in servers:
        server.terminate()
    _join(servers, limit_s)


def _join(servers: Sequence[BaseProcess], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    for server in servers:
        server.join(max(0.0, end - time.monotonic()))


def _run(_: str, sock: socket.socket, args: Namespace, client_config: dict[str, Any]) -> None:
    """One API process, in a fresh interpreter."""
    import uvloop

    end_with_parent()
    prepare_environment()
    log_to_stderr()
    with contextlib.suppress(asyncio.CancelledError):
        for index, channel in enumerate(args.channels):
            if index != client_config["client_index"]:
                channel.close()
        channel = args.channels[client_config["client_index"]]
        sys.exit(uvloop.run(args.serve(args.prepared, sock, args.shared, client_config, channel)))
