"""Ray Serve: the same door, guard and checks on every replica, behind HAProxy, straight to the replica's own app.

`build` is a typed application builder: Ray's `serve run` calls it with what a deploy file says. It knows Ray Serve LLM,
and vLLM through it. What a replica is made from, and how a request passes, is the single machine's code.
"""
# ruff: noqa: E402  # Ray's LLM modules import vLLM, whose environment must be set by then

import asyncio
import json
import os
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any, cast

import ray
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.context import _get_global_client
from ray.serve.deployment import Application

from borg_serve import capacity, engine, engine_arguments, family, guard, identity, mirror, report
from borg_serve.admission import Admission
from borg_serve.config import Config, load
from borg_serve.device import device, prepare_environment
from borg_serve.errors import CheckpointError, ConfigError, EngineError, Problem

prepare_environment()

from ray.llm._internal.serve.core.ingress.builder import _build_direct_streaming_llm_deployment
from ray.llm._internal.serve.core.ingress.router import LLMRouter
from ray.llm._internal.serve.core.server.llm_server import LLMServer
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm import LLMConfig, ModelLoadingConfig

from borg_serve.gate import Gate
from borg_serve.keys import Quota
from borg_serve.preparation import Preparation, prepare
from borg_serve.readiness import Phase, Readiness
from borg_serve.server import (
    CLOSING_S,
    Shared,
    admission,
    answer_for_lost_engine,
    log,
    make_gate,
    make_ready,
    set_defaults,
)
from borg_serve.watchdog import watch

__all__ = ["Arguments", "BorgEngine", "BorgServer", "application", "build", "compose", "options", "serve_config"]

ENVIRONMENT = (
    "VLLM_TARGET_DEVICE",
    "VLLM_NO_USAGE_STATS",
    "VLLM_WORKER_MULTIPROC_METHOD",
    "DO_NOT_TRACK",
    "HF_HUB_OFFLINE",
    "TOKENIZERS_PARALLELISM",
)
"""What vLLM reads before any code of ours runs in a replica."""
OWN = ("model", "served_model_name", "chat_template")
"""vLLM arguments that Ray takes elsewhere, or that only a replica knows: the template is in its checkpoint."""
DEFAULT_SEQS = 256
"""`max_num_seqs` of vLLM's server where a profile names none."""
FLUSH_S = 0.1
"""For the last bytes of the answers to leave the process; until it ends, it refuses what still reaches it."""
QUIET = {"enable_access_log": False}
"""Serve's logging: the gate writes a line for every request already."""
LOOK_S = 2.0
"""How often Serve asks a replica for its health: a lost engine has ended its replica by itself long before."""
STATS_S = 0.5
"""How often the router learns of each replica's load, where Serve's control loop is as quick. With 1 s, replicas that
were all but full refused some requests while another one had a place (docs/results/multi-gpu.md)."""


class Arguments(BaseModel):
    """`args` of an application in a deploy file."""

    model_config = ConfigDict(extra="forbid")

    profile: str
    """A profile's path, the same on every node."""
    set: dict[str, Any] = {}
    """Changes to it, by dotted key, as with `--set`."""


def build(args: Arguments) -> Application:
    """The Ray Serve application of a profile. Raises ConfigError; starts nothing."""
    sets = [f"{key}={json.dumps(value)}" for key, value in args.set.items()]
    sets.append("server.processes=1")  # a replica is one API process: all places of its engine are its own
    return compose(load(Path(args.profile), sets, engine_arguments.field_problems), BorgServer)


def compose(config: Config, replica: "type[BorgServer]") -> Application:
    """The application of a configuration, with this class for its replicas."""
    text = identity.load(config.identity.prompt)
    server = _build_direct_streaming_llm_deployment(
        serve_config(config, config.model.path, options(config)),
        name_prefix="",
        bind_kwargs={"config": config, "identity_sha256": text.sha256},
        deployment_cls=replica,
    )
    # The new router is there before the old one goes: without one nothing can be routed.
    surge = serve.deployment(
        max_ongoing_requests=1000, max_surge_percent=100, ray_actor_options={"num_cpus": 0}, logging_config=QUIET
    )
    router = surge(LLMRouter).bind(server=server)
    return server._with_ingress_request_router(router)


def serve_config(
    config: Config,
    model: str,
    deployment: dict[str, Any],
    chat_template: str | None = None,
    prefix_tokens: int | None = None,
) -> LLMConfig:
    """Ray's form of a profile. `model`: a directory or hub id. `deployment`: Serve's options, which a replica does not
    need; the template and what it begins with are known in the replica only.
    """
    arguments = engine_arguments.build(config, model, chat_template or "", prefix_tokens)
    kwargs = {name: value for name, value in arguments.items() if name not in OWN and value is not None}
    if chat_template is not None:
        kwargs["chat_template"] = chat_template
    on_cpu = device() == "cpu"
    worker = {"CPU": config.cluster.cpus} if on_cpu else {"CPU": config.cluster.cpus, "GPU": 1}
    # Tensor parallelism talks at every layer: its workers share a node. Pipeline stages may be apart.
    strategy = "STRICT_PACK" if kwargs.get("pipeline_parallel_size", 1) == 1 else "PACK"
    return LLMConfig(
        model_loading_config=ModelLoadingConfig(model_id=config.model.served_name, model_source=model),
        engine_kwargs=kwargs,
        accelerator_config={"kind": "cpu" if on_cpu else "gpu"},
        placement_group_config={"bundle_per_worker": worker, "strategy": strategy},
        deployment_config=deployment,
        log_engine_metrics=False,  # mirror.py shows them
        runtime_env={"env_vars": environment(config)},
    )


def environment(config: Config) -> dict[str, str]:
    """Variables of a replica's process."""
    found = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    if device() == "cpu":
        # By itself vLLM pins every engine of a machine to the same cores, beginning with the first: two replicas on two
        # cores would share one. Unpinned, each has the threads that its part of the machine is for.
        threads = max(1, int(config.cluster.cpus))
        found |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    return found


def application(config: Config) -> dict[str, Any]:
    """What `build` hands to Ray Serve, for a person to read before a start (I7)."""
    ours = serve_config(config, config.model.path, options(config))
    router = ours.deployment_config["request_router_config"].model_dump(mode="json", exclude_unset=True)
    return {
        "deployment": {**ours.deployment_config, "request_router_config": router},
        "placement_group": ours.placement_group_config,
        "environment": environment(config),
        "engine": ours.engine_kwargs,
    }


def options(config: Config) -> dict[str, Any]:
    """Serve's options for a profile: every bound comes from what one engine's KV cache holds."""
    cluster, places = config.cluster, _places(config)
    chosen: dict[str, Any] = {
        # The gate answers 503 with the time to try again; Serve's own bounds, behind it, are never met first.
        "max_ongoing_requests": 2 * (places.concurrent + places.queued) + 16,
        "max_queued_requests": 2 * (places.concurrent + places.queued) + 16,
        "health_check_period_s": LOOK_S,
        "health_check_timeout_s": 10,
        "graceful_shutdown_timeout_s": config.server.drain_s + 10,
        "graceful_shutdown_wait_loop_s": 1,
        "ray_actor_options": {"num_cpus": 0},
        "logging_config": QUIET,
        "request_router_config": RequestRouterConfig.model_validate(
            {
                "request_router_class": "borg_serve.routing:ConversationRouter",
                "request_routing_stats_period_s": STATS_S,
            }
        ),
    }
    if cluster.max_replicas is None:
        return {**chosen, "num_replicas": cluster.replicas}
    return {
        **chosen,
        "autoscaling_config": {
            "min_replicas": cluster.replicas,
            "initial_replicas": cluster.replicas,
            "max_replicas": cluster.max_replicas,
            # A replica takes a minute to start: another one comes before this one is full.
            "target_ongoing_requests": max(1, round(0.7 * places.concurrent)),
            "upscale_delay_s": 10,
            # Longer than a start: Serve ends first what has not started yet, so a dip in the load would undo the start.
            "downscale_delay_s": 300,
        },
    }


def _places(config: Config) -> capacity.Slots:
    """Places of one replica, from the memory plan where the checkpoint is here, else from `max_num_seqs` alone."""
    memory = report.effective(config)["memory"]
    seqs = int(config.engine.get("max_num_seqs", DEFAULT_SEQS))
    return capacity.slots(
        config.limits,
        kv_tokens=memory["kv_tokens"] if memory else seqs * capacity.OWN_TOKENS,
        block_tokens=memory["block_tokens"] if memory else 1,
        prefix_tokens=memory["identity_tokens"] if memory else 0,
        max_num_seqs=seqs,
        processes=1,
    )


class BorgEngine(VLLMEngine):
    """Ray's vLLM engine with the guard on its client from the first moment."""

    def __init__(self, llm_config: LLMConfig, prepared: Preparation, shared: Shared) -> None:
        super().__init__(llm_config)
        self._prepared, self._shared = prepared, shared
        self.client: Any = None
        """vLLM's engine client, once started."""

    def _start_async_llm_engine(self, args: Any, config: Any, *more: Any) -> Any:
        executor = self.llm_config.engine_kwargs.get("distributed_executor_backend")
        if executor is not None:  # Ray puts its own choice in place of the profile's on a CPU
            config.parallel_config.distributed_executor_backend = executor
        self.client = client = cast(Any, super()._start_async_llm_engine(args, config, *more))
        guard.install(client, self._prepared.prefix.token_ids)
        client.logger_manager.stat_loggers.append(engine.step_logger(self._shared.step)(client.vllm_config))
        return client


class BorgServer(LLMServer):
    """One replica: the checks of a single machine's start, its gate around vLLM's own app, its watchdog."""

    _engine: BorgEngine | None = None
    _admission: Admission | None = None
    _tasks: "Sequence[asyncio.Task[None]]" = ()

    async def __init__(self, llm_config: LLMConfig, config: Config, identity_sha256: str) -> None:  # type: ignore[misc]
        """Start the engine. Serve awaits this; what it raises is why the replica did not start."""
        log()
        _check_open(config)
        prepared = await asyncio.to_thread(prepare, config)
        if prepared.identity.sha256 != identity_sha256:
            where = f"{config.identity.prompt}: is not the identity that was deployed ({identity_sha256})"
            cure = "Put the same file on every node, and deploy again."
            raise CheckpointError(f"{where}, got {prepared.identity.sha256}. {cure}")
        self._prepared, self._shared = prepared, Shared.of(1)
        self._shared.pids[0] = os.getpid()
        engine.prepare_cpu(config.engine)
        # For the engine's own process. vLLM names the cluster to it only where it had to choose spawning by itself.
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        tokens = len(prepared.prefix.token_ids)
        full = serve_config(config, str(prepared.directory), {}, prepared.chat_template, tokens)
        # The checkpoint is here, and verified; Ray would start a process of its own on every node to look for it.
        cast(Any, full.get_or_create_callback()).ctx.run_init_node = False
        self._engine = BorgEngine(full, prepared, self._shared)
        await super().__init__(full, engine_cls=cast(Any, lambda _: self._engine))
        if self._engine.client is None:
            raise EngineError("cluster: Ray moved VLLMEngine._start_async_llm_engine, got none. Use the pinned Ray.")

    async def _start_engine(self) -> None:
        """Without Ray's report of who serves what, for which it keeps one more process in the cluster."""
        await cast(Any, self.engine).start()

    async def __serve_build_asgi_app__(self) -> Gate:
        """The gate around vLLM's application, open: Serve sends nothing before."""
        prepared, started = self._prepared, cast(Any, self._engine)
        client = started.client
        readiness = Readiness()
        url, replica = prepared.config.cluster.quota_url, str(serve.get_replica_context().replica_id.unique_id)
        gate = make_gate(prepared, readiness, Quota(url) if url else None, replica=replica)
        engine.share_tokens(client, prepared.prefix)
        await make_ready(prepared, gate, client)
        app = await started.build_asgi_app()
        set_defaults(prepared.config.limits, app)
        self._admission = admission(prepared, client)
        gate.open(app, self._admission)
        self._shared.step()
        readiness.set(Phase.READY)
        self._tasks = [asyncio.create_task(self._watch(gate, client)), asyncio.create_task(mirror.run(replica))]
        return gate

    async def _watch(self, gate: Gate, client: Any) -> None:
        """End this replica when its engine is lost, after an answer to whatever is in flight; Serve starts another."""
        prepared, shared = self._prepared, self._shared
        everyone, crew = family.children(), family.crew()
        reason = await watch(
            lambda: shared.progress.value,
            lambda: bool(client.errored) or family.ended(crew),
            lambda: engine.heartbeat(client, prepared.warm_up_ids),
            prepared.config.server.hang_s,
            shared.engine_busy,
        )
        await answer_for_lost_engine(gate, reason)
        await asyncio.sleep(FLUSH_S)
        family.end(everyone)
        os._exit(1)

    async def record_routing_stats(self) -> dict[str, Any]:
        """What the router decides by: requests here, places for them, and how many have come so far."""
        if self._admission is None:
            return {}
        places = self._admission
        load, arrived = places.running + places.waiting, places.begun + places.waiting
        return {"load": load, "places": places.concurrent, "arrived": arrived}

    async def __del__(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._engine is not None and self._engine.client is not None:
            self._engine.client.shutdown(timeout=CLOSING_S)
        family.end()


def _check_open(config: Config) -> None:
    """Without keys a replica is for this machine only, as a single server is."""
    host = str(cast(Any, _get_global_client()).http_config.host)
    if config.server.keys is None and not (host == "localhost" or ip_address(host).is_loopback):
        cure = "Make one with `borg-serve key new NAME`, or set http_options.host to 127.0.0.1 in the deploy file."
        what = f"is missing, and {host} is open to others"
        raise ConfigError([Problem(f"{config.file}: server.keys", what, None, cure)])
