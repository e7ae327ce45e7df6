"""The servers that `compare` measures, each ready to be started, paused and ended, with its processes by group.

It knows how each is started with the same checkpoint. It measures nothing but processes.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from borg_serve import engine_arguments
from borg_serve.config import Config
from borg_serve.device import prepare_environment
from loadtests import clusters, servers

__all__ = ["GROUPS", "Contender", "Running", "contenders"]

SETTLE_S = 15.0
"""Serve tells HAProxy of the replica after the first answer; paused amidst that, HAProxy does not come back."""
GROUPS = ("client", "door", "engine", "proxy", "router", "ray")
WORDS = {
    "engine": ("VLLM::", "EngineCore", "loadtests.original"),
    "router": ("LLMRouter", "OpenAiIngress"),
    "proxy": ("ProxyActor", "HAProxyManager", "haproxy"),
    "door": ("ServeReplica", "borg_serve serve", "api_server"),
}
"""What is in the titles of a group's processes; the first that fits counts."""


@dataclass(frozen=True)
class Running:
    """A contender that answers."""

    url: str
    processes: Callable[[], list[psutil.Process]]
    pause: Callable[[], None]
    resume: Callable[[], None]

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds so far by group."""
        found = dict.fromkeys(GROUPS, 0.0)
        for process in self.processes():
            with suppress(psutil.Error):
                times = process.cpu_times()
                found[group(process)] += times.user + times.system
        return found

    def memory_mib(self) -> float:
        """Proportional set size of all its processes: shared pages count once."""
        total = 0.0
        for process in self.processes():
            with suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total / (1 << 20)


def group(process: psutil.Process) -> str:
    """What a process is there for, by its title."""
    return group_of(" ".join(process.cmdline()))


def group_of(title: str) -> str:
    """The group of a process's command line."""
    return next((name for name, words in WORDS.items() if any(word in title for word in words)), "ray")


@dataclass(frozen=True)
class Contender:
    """One way of serving the demo model."""

    name: str
    title: str
    model: str
    sends_identity: bool
    """Whether the client must send the identity as its system message."""
    start: Callable[[], AbstractContextManager[Running]]


def contenders(config: Config, folder: Path, sets: Sequence[str]) -> list[Contender]:
    """All of them, for one profile and these settings of it, which it has already. Logs go to `folder`."""
    name = config.model.served_name
    original = "transformers generate with a streamer, one request after another"
    shared = _original(config, folder)
    return [
        Contender("ours", "borg-serve serve", name, False, _ours(config, folder, sets)),
        Contender("stock", "vLLM's own server at its defaults", name, True, _stock(config, folder)),
        Contender("original", f"the original app's way: {original}", "original", True, shared),
        Contender("original-reused", f"{original}, identity's past reused", "original-reused", True, shared),
        Contender("ray-classic", "Ray Serve LLM, its own OpenAI app", name, True, _classic(config, folder)),
        Contender("ray-ours", "borg-serve on a Ray cluster, HAProxy", name, False, _cluster(config, folder, sets)),
    ]


# ---------------------------------------------------------------------------------------- plain servers


def _plain(
    name: str, words: Callable[[int], list[str]], ready: str, folder: Path, more: dict[str, str] | None = None
) -> Callable[[], Any]:
    @contextmanager
    def start() -> Iterator[Running]:
        port = servers.free_port()
        with servers.running(name, words(port), port, ready, folder / f"{name}.log", more=more) as server:
            yield Running(server.url, lambda: server.processes, server.pause, server.resume)

    return start


def _ours(config: Config, folder: Path, sets: Sequence[str]) -> Callable[[], Any]:
    return _plain(
        "ours",
        lambda port: servers.ours(str(config.file), port, *sets),
        "/ready",
        folder,
    )


def _stock(config: Config, folder: Path) -> Callable[[], Any]:
    """What the model and this machine need, and nothing else: block size, batch and sequences are vLLM's defaults."""
    ours = engine_arguments.build(config, config.model.path, "")
    needed = ("model", "served_model_name", "dtype", "max_model_len", "kv_cache_memory_bytes", "enforce_eager")
    words = engine_arguments.command_line({name: ours[name] for name in needed})
    return _plain("stock", lambda port: servers.stock(words, port), "/health", folder, servers.WITHOUT_OURS)


def _original(config: Config, folder: Path) -> Callable[[], Any]:
    words = [sys.executable, "-m", "loadtests.original", "--model", config.model.path]
    words += ["--identity", str(config.identity.prompt)]
    return _plain("original", lambda port: [*words, f"--port={port}"], "/", folder)


# ---------------------------------------------------------------------------------------- on Ray


def _classic(config: Config, folder: Path) -> Callable[[], Any]:
    kwargs = {name: config.engine[name] for name in ("max_model_len", "kv_cache_memory_bytes", "enforce_eager")}
    model = {"model_id": config.model.served_name, "model_source": config.model.path}
    one = {
        "model_loading_config": model,
        "accelerator_config": {"kind": "cpu"},
        "engine_kwargs": {**kwargs, "dtype": config.model.dtype},
        "deployment_config": {"num_replicas": 1, "max_ongoing_requests": 64},
        "runtime_env": {"env_vars": {"VLLM_TARGET_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}},
    }
    application = {
        "name": "llm",
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [one]},
    }
    return lambda: _ray(
        "ray-classic", application, servers.WITHOUT_OURS, "/v1/models", config.model.served_name, folder
    )


def _cluster(config: Config, folder: Path, sets: Sequence[str]) -> Callable[[], Any]:
    words = (item.split("=", 1) for item in sets)
    cores = len(os.sched_getaffinity(0))  # all of them, as the others have
    changes = {"cluster.cpus": cores, **{key: yaml.safe_load(value) for key, value in words}}
    application = clusters.application(1, changes)
    application["args"]["profile"] = str(config.file)
    return lambda: _ray("ray-ours", application, clusters.direct(), "/ready", "", folder)


@contextmanager
def _ray(
    name: str, application: dict[str, Any], more: dict[str, str], ready: str, naming: str, folder: Path
) -> Iterator[Running]:
    prepare_environment()
    with clusters.running(name, application, folder, more, ready, naming) as server:
        time.sleep(SETTLE_S)

        def pause() -> None:
            for process in clusters.family(server):
                process.suspend()

        def resume() -> None:
            for process in clusters.family(server):
                process.resume()

        try:
            yield Running(server.url, lambda: clusters.family(server), pause, resume)
        finally:
            with suppress(psutil.Error):  # ended already, by the signal that ends this too
                resume()
