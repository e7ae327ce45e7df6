"""The life of one API process or replica: the gate, ready after a probe, the engine watched, drained, stopped.

It does not know how the engine is started, nor sockets: one machine and a replica of the cluster share it.
"""

import asyncio
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from multiprocessing.sharedctypes import RawArray, RawValue
from pathlib import Path
from typing import TYPE_CHECKING, Any

from borg_serve import metrics
from borg_serve.api.errors import ApiError
from borg_serve.api.protocol import Bounds
from borg_serve.config import Config
from borg_serve.engine import memory
from borg_serve.engine.client import heartbeat, probe, warm
from borg_serve.engine.prepare import Preparation
from borg_serve.gate.app import Gate
from borg_serve.gate.budgets import Budgets
from borg_serve.gate.coordinator import Coordinator
from borg_serve.gate.keys import KeyRing
from borg_serve.gate.quota import Quota
from borg_serve.gate.readiness import Phase, Readiness
from borg_serve.gate.remote import RemoteCoordinator
from borg_serve.gate.request import AGAIN
from borg_serve.identity.control_tokens import Neutraliser
from borg_serve.serving import processes
from borg_serve.serving.watchdog import watch
from borg_serve.usage.drain import run
from borg_serve.usage.ledger import Ledger
from borg_serve.usage.spool import Spool, spool_folder, waiting_bytes

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

__all__ = [
    "CLOSING_S",
    "Shared",
    "accounts",
    "fail",
    "log_to_stderr",
    "make_coordinator",
    "make_gate",
    "make_ready",
    "serve_until_stopped",
    "slots",
    "watch_engine",
]

logger = logging.getLogger(__name__)

CLOSING_S = 2.0
"""How long clients may take to receive the last bytes of an answer when the server ends."""


class Shared:
    """State in memory that the `count` API processes of one server share."""

    def __init__(self, count: int) -> None:
        self.phases: Any = RawArray("B", count)
        """One readiness phase for each API process."""
        self.progress: Any = RawValue("d", time.monotonic())
        """Monotonic time of the engine's last step, in seconds."""
        self.pids: Any = RawArray("i", count)
        """Process ids of the API processes."""
        self.root = os.getpid()
        """Process id of the ancestor of the API processes and of the engine's."""
        self.lost: Any = RawValue("B", 0)
        """Set by the parent of several API processes when the engine they share has died."""

    def step(self) -> None:
        """The engine has made a step."""
        self.progress.value = time.monotonic()

    def engine_busy(self) -> bool:
        """Whether a process of the engine runs, wants to, or waits for the disk; not if one is stopped."""
        return processes.at_work(self.root, {self.root, *self.pids})


def log_to_stderr() -> None:
    """Log one line an event on stderr; the line of a request is JSON."""
    stderr = logging.StreamHandler()
    stderr.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name, level in (("borg_serve", logging.INFO), ("uvicorn", logging.WARNING)):
        ours = logging.getLogger(name)
        ours.handlers, ours.propagate = [stderr], False
        ours.setLevel(level)


# -------------------------------------------------------------------------------------------------- start


def make_coordinator(config: Config, quota_url: str | None = None) -> Coordinator:
    """What all API processes of a server share. Raises ConfigError for a ledger or a quota storage that cannot be used.

    `quota_url`: where keys are counted, in this process by default.
    """
    ledger = Ledger(config.usage.url) if config.usage.url is not None else None
    budgets = Budgets() if ledger is not None else None
    storage = {"storage_uri": quota_url} if quota_url else {}
    quota = Quota(**storage, budgets=budgets) if config.server.keys is not None else None
    return Coordinator(config.limits.max_wait_s, quota, ledger)


@asynccontextmanager
async def accounts(config: Config, coordinator: Coordinator | None) -> AsyncIterator[Spool | None]:
    """Keep usage while the block runs: what this process writes reaches the ledger through its `coordinator`.

    Without one another process has it, and only the files are handed over.
    """
    if config.usage.url is None:
        yield None
        return
    folder = spool_folder(config.usage)
    spool = Spool(folder, config.usage.spool_bytes)
    ledger = coordinator.ledger if coordinator is not None else None
    tasks = [asyncio.create_task(run(spool, folder, ledger) if ledger is not None else _hand_over(spool, folder))]
    if coordinator is not None:
        tasks.append(asyncio.create_task(coordinator.keep_budgets()))
    try:
        yield spool
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _hand_over(spool: Spool, folder: Path) -> None:
    try:
        while True:
            await asyncio.sleep(1)
            spool.rotate()
            metrics.USAGE_WAITING.set(waiting_bytes(folder))
    finally:
        spool.close()


def make_gate(
    prepared: Preparation,
    readiness: Readiness,
    coordinator: Coordinator | RemoteCoordinator,
    spool: Spool | None,
    replica: str | None = None,
) -> Gate:
    """The gate of one API process or replica, closed until `Gate.open`."""
    config = prepared.config
    keys = KeyRing(config.server.keys, budgets=config.usage.url is not None) if config.server.keys is not None else None
    metrics.IDENTITY_TOKENS.set(len(prepared.prefix.token_ids))
    return Gate(
        config.limits,
        Bounds(
            config.model.served_name,
            tuple(config.server.model_aliases),
            config.server.unknown_fields,
            max_tokens=min(config.limits.max_tokens, prepared.context - 1),
            vocab_size=prepared.vocab_size,
        ),
        prepared.version() | ({"replica": replica} if replica else {}),
        readiness,
        Neutraliser(prepared.literals),
        coordinator,
        keys,
        spool,
        echo_request_id=replica is None,  # Ray Serve adds the header by itself
    )


async def make_ready(prepared: Preparation, client: "AsyncLLM") -> None:
    """Cache the identity and probe the engine (I4). Raises EngineError, naming what is wrong."""
    config = prepared.config
    cached = await warm(client, prepared.warm_up_ids, len(prepared.prefix.token_ids))
    answer = await probe(client, prepared.probe_ids, config.model.probe)
    logger.info("identity cached: %d of %d tokens; probe answered %r", cached, len(prepared.prefix.token_ids), answer)


def slots(prepared: Preparation, client: "AsyncLLM") -> memory.Slots:
    """What the engine holds at once: its slots come from the KV cache that it really has."""
    config, cache = prepared.config, client.vllm_config.cache_config
    total = client.vllm_config.scheduler_config.max_num_seqs
    seqs = int(config.engine.get("max_num_seqs") or total)
    found = memory.slots(
        config.limits,
        kv_tokens=(cache.num_gpu_blocks or 0) * cache.block_size,
        block_tokens=cache.block_size,
        prefix_tokens=len(prepared.prefix.token_ids),
        max_num_seqs=seqs,
        reserved=total - seqs,
    )
    logger.info("admission: %s", found)
    metrics.SLOTS.set(found.concurrent)
    return found


# ---------------------------------------------------------------------------------------------------- end


async def watch_engine(
    prepared: Preparation,
    client: "AsyncLLM",
    shared: Shared,
    dead: Callable[[], bool] = lambda: False,
    hang_s: float | None = None,
) -> str:
    """Wait until the engine is lost, and return why.

    `dead`: other signs of the loss. `hang_s`: `server.hang_s` by default.
    """
    workers = processes.workers()
    return await watch(
        lambda: shared.progress.value,
        lambda: client.errored or dead() or processes.any_ended(workers),
        lambda: heartbeat(client, prepared.warm_up_ids),
        prepared.config.server.hang_s if hang_s is None else hang_s,
        shared.engine_busy,
    )


async def serve_until_stopped(
    prepared: Preparation, gate: Gate, client: "AsyncLLM", shared: Shared, stop: asyncio.Event, watching: bool
) -> int:
    """Serve until `stop` (drain, 0) or the engine's loss (answer what is in flight, 1).

    `watching`: whether this process looks for hangs. One does; the others learn of it from the phase they share.
    """

    def dead() -> bool:
        return bool(shared.lost.value) or gate.readiness.phase == Phase.FAILED

    known = processes.children()
    stopping = asyncio.create_task(stop.wait())
    watching_s = None if watching else math.inf
    watchdog = asyncio.create_task(watch_engine(prepared, client, shared, dead, watching_s))
    await asyncio.wait({stopping, watchdog}, return_when=asyncio.FIRST_COMPLETED)
    if watchdog.done():
        stopping.cancel()
        await fail(gate, watchdog.result())
        processes.kill(known)
        return 1
    watchdog.cancel()
    await drain(gate, prepared.config.server.drain_s)
    return 0


async def drain(gate: Gate, limit_s: float) -> None:
    """Take no new request; let those in flight end for `limit_s`, then answer them with an error."""
    gate.readiness.set(Phase.DRAINING, "the server is being stopped")
    logger.info("draining %d requests for up to %g s", len(gate.live), limit_s)
    left = await gate.drained(limit_s)
    if left:
        logger.warning("%d requests were cut off after %g s", left, limit_s)
        what = "The server is being stopped."
        over = ApiError(503, what, "server_error", None, "shutting_down", "drain", AGAIN)
        await gate.end_all(over, CLOSING_S)


async def fail(gate: Gate, reason: str) -> None:
    """Report the lost engine on `/ready`, and answer every request in flight with an error."""
    logger.error("engine lost: %s", reason)
    gate.readiness.set(Phase.FAILED, reason)
    what = "The engine was lost. Try again later."
    lost = ApiError(503, what, "server_error", None, "engine_lost", "engine_lost", AGAIN)
    await gate.end_all(lost, CLOSING_S)
