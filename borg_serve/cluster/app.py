"""The typed application builder that `serve run` calls with the arguments of a deploy file.

It knows Serve's options, and how Serve puts replicas and their router together. It does not know what a replica does.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from borg_serve.cluster.replica import BorgServer, environment, ray_config
from borg_serve.config import Config, load
from borg_serve.engine import arguments, memory, report
from borg_serve.identity.text import load_identity
from borg_serve.upstream import pinned, require

with pinned("cluster"):
    from ray import serve
    from ray.llm._internal.serve.core.ingress.router import LLMRouter
    from ray.serve.config import RequestRouterConfig
    from ray.serve.deployment import Application
    from ray.serve.llm import build_llm_deployment

__all__ = ["Arguments", "application", "build", "compose"]

require("cluster", Application, "_with_ingress_request_router")

DEFAULT_SEQS = 256
"""`max_num_seqs` of vLLM's server where a profile does not set it."""
NO_ACCESS_LOG = {"enable_access_log": False}
"""Serve's logging options: the gate writes a line for every request already."""
MOST_REQUESTS = 10_000
"""Serve's own bound of a replica's requests. The gate refuses with 503 and Retry-After long before it is reached."""
HEALTH_PERIOD_S = 2.0
"""How often Serve asks a replica for its health. A replica whose engine is lost ends by itself long before."""
ROUTING_STATS_PERIOD_S = 0.5
"""How often the router gets each replica's load, if Serve's control loop is as quick. With 1 s, replicas that were
almost full refused requests while others had free slots (docs/results/multi-gpu.md)."""


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
    sets.append("server.processes=1")  # a replica has one API process, which owns all slots of its engine
    return compose(load(Path(args.profile), sets, arguments.field_problems), BorgServer)


def compose(config: Config, replica: type[BorgServer]) -> Application:
    """The application of a configuration, with this class for its replicas."""
    server = build_llm_deployment(
        ray_config(config, config.model.path, deployment(config)),
        name_prefix="",
        bind_kwargs={"config": config, "identity_sha256": load_identity(config.identity.prompt).sha256},
        deployment_cls=serve.ingress()(replica),  # HAProxy sends requests to the replica's own ASGI application
    )
    # A new router starts before the old one ends: without a router, no request reaches a replica.
    surge = serve.deployment(
        max_ongoing_requests=1000,
        max_surge_percent=100,
        ray_actor_options={"num_cpus": 0},
        logging_config=NO_ACCESS_LOG,
    )
    return server._with_ingress_request_router(surge(LLMRouter).bind(server=server))


def application(config: Config) -> dict[str, Any]:
    """What `build` gives to Ray Serve, as JSON for `borg-serve check --ray` (I7)."""
    found = ray_config(config, config.model.path, deployment(config))
    router = found.deployment_config["request_router_config"].model_dump(mode="json", exclude_unset=True)
    return {
        "deployment": {**found.deployment_config, "request_router_config": router},
        "placement_group": found.placement_group_config,
        "environment": environment(config),
        "engine": found.engine_kwargs,
    }


def deployment(config: Config) -> dict[str, Any]:
    """Serve's options for the replicas of a profile."""
    cluster = config.cluster
    router = {
        "request_router_class": "borg_serve.cluster.router:ConversationRouter",
        "request_routing_stats_period_s": ROUTING_STATS_PERIOD_S,
    }
    chosen: dict[str, Any] = {
        "max_ongoing_requests": MOST_REQUESTS,
        "max_queued_requests": MOST_REQUESTS,
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": 10,
        "graceful_shutdown_timeout_s": config.server.drain_s + 10,
        "graceful_shutdown_wait_loop_s": 1,
        "ray_actor_options": {"num_cpus": 0},
        "logging_config": NO_ACCESS_LOG,
        "request_router_config": RequestRouterConfig.model_validate(router),
    }
    if cluster.max_replicas is None:
        return {**chosen, "num_replicas": cluster.replicas}
    scaling = {
        "min_replicas": cluster.replicas,
        "initial_replicas": cluster.replicas,
        "max_replicas": cluster.max_replicas,
        # A replica takes a minute to start, so the next one starts before this one is full.
        "target_ongoing_requests": max(1, round(0.7 * _at_once(config))),
        "upscale_delay_s": 10,
        # Longer than a start: Serve ends starting replicas first, so a short dip in the load would undo the start.
        "downscale_delay_s": 300,
    }
    return {**chosen, "autoscaling_config": scaling}


def _at_once(config: Config) -> int:
    """Requests that one replica likely holds: by the memory plan if the checkpoint is here, else by `max_num_seqs`."""
    if config.limits.concurrent != "auto":
        return config.limits.concurrent
    seqs, plan = int(config.engine.get("max_num_seqs", DEFAULT_SEQS)), report.effective(config)["memory"]
    return max(1, min(seqs, (plan["kv_tokens"] - plan["identity_tokens"]) // memory.OWN_TOKENS) if plan else seqs)
