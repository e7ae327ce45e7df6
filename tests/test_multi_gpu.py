"""The script for a host with several GPUs, as far as can be told without one, and what it measures with."""

import itertools
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from borg_serve.config import Config, load
from loadtests import servers, throughput

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    """The commands of a dry run for eight GPUs, by name of the measurement: the server's, then the client's."""
    folder = tmp_path_factory.mktemp("dry")
    done = subprocess.run(
        ["bash", "loadtests/multi_gpu.sh", "--dry-run"],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "MODEL": "/no/such/model",
            "OUT": str(folder),
            "GPUS": "8",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, list[list[str]]] = {}
    for line in done.stdout.splitlines():
        name, _, command = line.removeprefix("+ ").partition(": ")
        found.setdefault(name, []).append(shlex.split(command))
    assert [path.name for path in folder.iterdir() if path.suffix != ".yaml"] == [], "a dry run starts nothing"
    return found


def profile(command: list[str]) -> Config:
    """The configuration that a server's command ends up with."""
    if command[0] == "serve":
        (application,) = yaml.safe_load(Path(command[2]).read_text())["applications"]
        assert application["import_path"] == "borg_serve.cluster:build"
        arguments: dict[str, Any] = application["args"]
        return load(
            ROOT / arguments["profile"], [f"{key}={yaml.dump(value)}" for key, value in arguments["set"].items()]
        )
    assert command[:4] == ["python3", "-m", "borg_serve", "serve"]
    sets = [word for before, word in itertools.pairwise(command) if before == "--set"]
    return load(ROOT / command[command.index("--config") + 1], sets)


def test_multi_gpu_measures_tensor_parallelism_and_replicas(listed: dict[str, list[list[str]]]) -> None:
    expected = {f"tp{tp}-{attention}" for tp in (1, 2, 4) for attention in ("stock", "shared")}
    expected |= {f"ray-tp{tp}" for tp in (1, 2, 4)} | {f"replicas-{count}" for count in (2, 4, 8)}
    assert set(listed) == expected
    for name, (server, client) in listed.items():
        config = profile(server)
        assert config.model.path == "/no/such/model"
        assert config.server.keys is None
        assert config.engine.get("tensor_parallel_size", 1) == (int(name.partition("tp")[2][:1]) if "tp" in name else 1)
        assert client[:3] == ["python3", "-m", "loadtests.throughput"]
        if name.startswith("tp"):
            assert config.identity.attention == name.partition("-")[2]
        else:
            assert config.cluster.max_replicas is None
            assert config.cluster.replicas == (int(name.partition("-")[2]) if "replicas" in name else 1)


def test_throughput_counts_what_was_answered(tmp_path: Path) -> None:
    port = servers.free_port()
    words = [sys.executable, "-m", "loadtests.known", "--port", str(port), "--ttft-ms", "20", "--gap-ms", "1"]
    with servers.running("known", words, port, "/", tmp_path / "log", 60) as known:
        found = throughput.measure(known.url, 1, 3, 8, 5, None)
    assert (found["users"], found["requests"], found["failed"]) == (1, 3, 0)
    assert min(found["ttft_p50_ms"], found["tpot_p50_ms"], found["output_tokens_per_s"]) > 0
