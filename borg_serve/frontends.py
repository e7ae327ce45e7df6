"""Several API processes over one engine (`server.processes` > 1): their parent.

It starts vLLM's engine processes and its API process manager, whose processes run `server.serve_process`, and sees to
it that they live and end together. It answers no requests itself. Part of `server` by what it may import.
"""

import asyncio
import contextlib
import signal
import socket
import time
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import psutil

from borg_serve import engine, family
from borg_serve.device import prepare_environment
from borg_serve.preparation import Preparation
from borg_serve.readiness import Phase
from borg_serve.server import CLOSING_S, Shared, log, serve_process

__all__ = ["supervise"]


def supervise(prepared: Preparation, sock: socket.socket, shared: Shared) -> int:
    """Start the engine and its API processes; return the exit status when all of them have ended."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.utils import get_engine_zmq_addresses, launch_core_engines
    from vllm.v1.executor import Executor
    from vllm.v1.metrics.prometheus import setup_multiprocess_prometheus
    from vllm.v1.utils import APIServerProcessManager

    count = prepared.config.server.processes
    setup_multiprocess_prometheus()  # type: ignore[no-untyped-call]
    stopping = _Stopping()
    engine.prepare_cpu(vars(prepared.args))
    engine_args = AsyncEngineArgs.from_cli_args(prepared.args)
    engine_args._api_process_count, engine_args._api_process_rank = count, -1
    config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    addresses = get_engine_zmq_addresses(config, count, defer_api_server_ports=True)
    everyone: list[psutil.Process] = []
    try:
        executor, stats = Executor.get_class(config), not engine_args.disable_log_stats
        with launch_core_engines(config, executor, stats, addresses) as launch:
            manager = APIServerProcessManager(
                listen_address="",
                sock=sock,
                args=(prepared, shared),  # type: ignore[arg-type]  # only handed on to _run
                num_servers=count,
                input_addresses=launch.addresses.inputs,
                output_addresses=launch.addresses.outputs,
                target_server_fn=_run,
                tensor_queue=launch.tensor_queue,
            )
            launch.addresses.inputs, launch.addresses.outputs = manager.gather_actual_addresses()
            launch.watched_frontend_processes = manager.processes
        engines: Any = launch.engine_manager
        everyone = family.children()
        status = _wait(prepared, manager.processes, engines.processes, shared, stopping)
        engines.shutdown(timeout=CLOSING_S)
    except _Stop:
        status = 0
    except RuntimeError:
        status = 1  # an API process has said why
    finally:
        family.end(everyone)
    return status


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
    prepared: Preparation, workers: list[BaseProcess], engines: list[BaseProcess], shared: Shared, stopping: _Stopping
) -> int:
    """Until the first process ends or a signal comes; then end the others, and say how it went."""
    stopping.armed = True
    crew = family.crew()
    while not stopping.asked:
        ended = connection.wait([process.sentinel for process in (*workers, *engines)], timeout=0.25)
        lost = family.ended(crew)
        if not ended and not lost:
            continue
        if lost or any(process.sentinel in ended for process in engines):
            shared.lost.value = True  # they answer what is in flight, and end
        else:
            shared.phases[0] = Phase.FAILED
        _join(workers, CLOSING_S + 1)
        _terminate(workers)
        _join(workers, CLOSING_S + 1)
        return 1
    _terminate(workers)
    _join(workers, prepared.config.server.drain_s + 2 * CLOSING_S)
    return 0 if all(process.exitcode == 0 for process in workers) else 1


def _terminate(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.terminate()


def _join(processes: list[BaseProcess], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))


def _run(_: str, sock: socket.socket, given: tuple[Preparation, Shared], client_config: dict[str, Any]) -> None:
    """One API process, in a fresh interpreter."""
    import sys

    import uvloop

    prepared, shared = given
    prepare_environment()
    log()
    with contextlib.suppress(asyncio.CancelledError):
        sys.exit(uvloop.run(serve_process(prepared, sock, shared, client_config)))
