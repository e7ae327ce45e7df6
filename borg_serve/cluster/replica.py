"""One replica: the checks of a single machine's start, its gate around vLLM's own application, its watchdog.

It knows Ray Serve LLM, and vLLM through it. How a request is handled is the single machine's code.
"""

import asyncio
import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from ipaddress import ip_address
from typing import Any, cast

from borg_serve.cluster import ray_metrics
from borg_serve.config import Config
from borg_serve.engine import arguments
from borg_serve.engine.client import client_class, prepare_cpu, step_logger
from borg_serve.engine.environment import device, prepare_environment
from borg_serve.engine.prepare import Preparation, prepare
from borg_serve.errors import CheckpointError, ConfigError, Problem
from borg_serve.gate.app import Gate, with_cors
from borg_serve.gate.coordinator import Coordinator
from borg_serve.gate.readiness import Phase, Readiness
from borg_serve.gate.request import App
from borg_serve.serving import lifecycle, processes, single
from borg_serve.serving.lifecycle import Shared
from borg_serve.upstream import moved, pinned, require

prepare_environment()  # Ray's LLM modules import vLLM, which reads it

with pinned("cluster"):
    import ray
    from ray import serve
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine, _clear_current_platform_cache
    from ray.serve.context import _get_global_client
    from ray.serve.llm import LLMConfig, ModelLoadingConfig
    from ray.serve.llm.deployment import LLMServer

__all__ = ["BorgEngine", "BorgServer", "environment", "ray_config"]

require("cluster", VLLMEngine, "_start_async_llm_engine", "build_asgi_app")
require("cluster", LLMServer, "__serve_build_asgi_app__", "_start_engine", "record_routing_stats", "__del__")
require("cluster", LLMConfig, "get_or_create_callback")

GIVEN_ELSEWHERE = ("model", "served_model_name", "chat_template")
"""vLLM arguments that Ray takes outside `engine_kwargs`, or that only a replica knows (the template)."""
FLUSH_S = 0.1
"""Time for the last bytes of the answers to leave the process before it ends."""


def ray_config(
    config: Config,
    model: str,
    deployment_options: dict[str, Any],
    chat_template: str | None = None,
    prefix_tokens: int | None = None,
) -> LLMConfig:
    """Ray's form of a profile. `model` is a directory or a hub id.

    `deployment_options` are Serve's; a replica needs none. `chat_template` and `prefix_tokens` are known in a replica.
    """
    known = arguments.build(config, model, chat_template or "", prefix_tokens)
    kwargs = {name: value for name, value in known.items() if name not in GIVEN_ELSEWHERE and value is not None}
    if kwargs.get("distributed_executor_backend") == arguments.SEVERAL_PROCESSES:
        del kwargs["distributed_executor_backend"]  # Ray places several workers itself
    if chat_template is not None:
        kwargs["chat_template"] = chat_template
    on_cpu = device() == "cpu"
    worker = {"CPU": config.cluster.cpus} if on_cpu else {"CPU": config.cluster.cpus, "GPU": 1}
    # Tensor parallelism communicates at every layer, so its workers share a node. Pipeline stages may be apart.
    strategy = "STRICT_PACK" if kwargs.get("pipeline_parallel_size", 1) == 1 else "PACK"
    return LLMConfig(
        model_loading_config=ModelLoadingConfig(model_id=config.model.served_name, model_source=model),
        engine_kwargs=kwargs,
        accelerator_config={"kind": "cpu" if on_cpu else "gpu"},
        placement_group_config={"bundle_per_worker": worker, "strategy": strategy},
        deployment_config=deployment_options,
        log_engine_metrics=False,  # ray_metrics.py exports them
        runtime_env={"env_vars": environment(config)},
    )


def environment(config: Config) -> dict[str, str]:
    """Environment variables of a replica's process, set before any code of this package runs there."""
    found = prepare_environment()
    if device() == "cpu":
        # vLLM pins every CPU engine of a machine to the same first cores. Unpinned, each replica gets as many threads
        # as the CPUs that its placement group reserves.
        threads = max(1, int(config.cluster.cpus))
        found |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    return found


class BorgEngine(VLLMEngine):
    """Ray's vLLM engine, with the guard on its client from the start."""

    def __init__(self, llm_config: LLMConfig, prepared: Preparation, shared: Shared) -> None:
        super().__init__(llm_config)
        self._prepared, self._shared = prepared, shared
        self.client: Any = None
        """vLLM's engine client, once started."""

    def _start_async_llm_engine(self, args: Any, config: Any, placement_group: Any) -> Any:
        """What Ray's own does, with the guarded client instead of vLLM's."""
        config.parallel_config.placement_group = placement_group
        executor = self.llm_config.engine_kwargs.get("distributed_executor_backend")
        if executor is not None:  # on a CPU, Ray replaces the profile's choice by its own
            config.parallel_config.distributed_executor_backend = executor
        _clear_current_platform_cache()  # type: ignore[no-untyped-call]
        self.client = client_class(self._prepared.prefix).from_vllm_config(
            config,
            stat_loggers=[step_logger(self._shared.step)],
            enable_log_requests=args.enable_log_requests,
            disable_log_stats=args.disable_log_stats,
        )
        return self.client


class BorgServer(LLMServer):
    """The deployment's class. Serve makes one in each replica's process."""

    _engine: BorgEngine | None = None
    _coordinator: Coordinator | None = None
    _tasks: "Sequence[asyncio.Task[None]]" = ()

    async def __init__(self, llm_config: LLMConfig, config: Config, identity_sha256: str) -> None:  # type: ignore[misc]
        """Start the engine. Serve awaits this, and reports what it raises as the reason for not starting."""
        self._accounts = AsyncExitStack()
        lifecycle.log_to_stderr()
        _check_open(config)
        prepared = await asyncio.to_thread(prepare, config)
        if prepared.identity.sha256 != identity_sha256:
            where = f"{config.identity.prompt}: is not the identity that was deployed ({identity_sha256})"
            cure = "Put the same file on every node, and deploy again."
            raise CheckpointError(f"{where}, got {prepared.identity.sha256}. {cure}")
        self._prepared, self._shared = prepared, Shared(1)
        self._shared.pids[0] = os.getpid()
        prepare_cpu(config.engine)
        # For the engine's own process: vLLM tells it the cluster's address only if it switched to spawning by itself.
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        tokens = len(prepared.prefix.token_ids)
        full = ray_config(config, str(prepared.directory), {}, prepared.chat_template, tokens)
        # The checkpoint is on this node and verified. Ray would start a process on every node to fetch it.
        cast(Any, full.get_or_create_callback()).ctx.run_init_node = False
        self._engine = BorgEngine(full, prepared, self._shared)
        await super().__init__(full, engine_cls=cast(Any, lambda _: self._engine))
        if self._engine.client is None:
            raise moved("cluster", "ray", "the call of VLLMEngine._start_async_llm_engine")

    async def _start_engine(self) -> None:
        """Start the engine without Ray's usage report, which keeps one more process in the cluster."""
        await cast(Any, self.engine).start()

    async def __serve_build_asgi_app__(self) -> App:
        """The gate around vLLM's application, already open: Serve sends no request before it has this."""
        prepared, started = self._prepared, cast(Any, self._engine)
        client = started.client
        readiness = Readiness()
        replica = str(serve.get_replica_context().replica_id.unique_id)
        self._coordinator = lifecycle.make_coordinator(prepared.config, prepared.config.cluster.quota_url)
        spool = await self._accounts.enter_async_context(lifecycle.accounts(prepared.config, self._coordinator))
        gate = lifecycle.make_gate(prepared, readiness, self._coordinator, spool, replica)
        await lifecycle.make_ready(prepared, client)
        app = await started.build_asgi_app()
        single.set_default_max_tokens(prepared.config.limits, app)
        await self._coordinator.open(lifecycle.slots(prepared, client))
        gate.open(app, client.model_config.max_model_len)
        self._shared.step()
        readiness.set(Phase.READY)
        self._tasks = [asyncio.create_task(self._watch(gate, client)), asyncio.create_task(ray_metrics.run(replica))]
        return with_cors(gate, prepared.config.server.cors_origins)

    async def _watch(self, gate: Gate, client: Any) -> None:
        """End this replica when its engine is lost, after answering the requests in flight. Serve starts another."""
        started = processes.children()
        await lifecycle.fail(gate, await lifecycle.watch_engine(self._prepared, client, self._shared))
        await asyncio.sleep(FLUSH_S)
        processes.kill(started)
        os._exit(1)

    async def record_routing_stats(self) -> dict[str, Any]:
        """What the router decides by: requests here, slots for them, and how many requests have come so far."""
        if self._coordinator is None or (admission := self._coordinator.admission) is None:
            return {}
        load, arrived = admission.running + admission.waiting, admission.begun + admission.waiting
        # Where the KV cache is full there is no slot, whatever the number of sequences.
        return {"load": load, "slots": load if admission.full else admission.slots.concurrent, "arrived": arrived}

    async def __del__(self) -> None:
        await self._accounts.aclose()
        for task in self._tasks:
            task.cancel()
        if self._engine is not None and self._engine.client is not None:
            self._engine.client.shutdown(timeout=lifecycle.CLOSING_S)
        processes.kill()


def _check_open(config: Config) -> None:
    """Without keys a replica serves this machine only, like a single server. Raises ConfigError."""
    host = str(cast(Any, _get_global_client()).http_config.host)
    if config.server.keys is None and not (host == "localhost" or ip_address(host).is_loopback):
        cure = "Make one with `borg-serve key new NAME`, or set http_options.host to 127.0.0.1 in the deploy file."
        what = f"is missing, and {host} is open to others"
        raise ConfigError([Problem(f"{config.file}: server.keys", what, None, cure)])
