"""The scripts for hosts with GPUs, as far as can be told without one, and what they measure with."""

import asyncio
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from borg_serve.config import Config, load
from loadtests.experiments import peers
from loadtests.gpu import throughput
from loadtests.servers import local

ROOT = Path(__file__).parents[2]


def script(name: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a script for eight GPUs, of which there is none."""
    given = {"MODEL": "/no/such/model", "OUT": str(folder), "GPUS": "8", "PORT": str(local.free_port())}
    given["MORE"] = "engine.stream_interval=4 limits.deadline_s=90"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", f"loadtests/gpu/{name}.sh", *words]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path, **given}, capture_output=True, text=True)


def commands(output: str) -> dict[str, list[list[str]]]:
    """What a dry run listed, by name of the measurement."""
    found: dict[str, list[list[str]]] = {}
    for line in output.splitlines():
        name, _, command = line.removeprefix("+ ").partition(": ")
        found.setdefault(name, []).append(shlex.split(command))
    return found


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    """The commands of a dry run: the server's, then the client's."""
    folder = tmp_path_factory.mktemp("dry")
    done = script("multi_gpu", folder, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir() if path.suffix != ".yaml"] == [], "a dry run starts nothing"
    return commands(done.stdout)


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
    for name, (server, *clients) in listed.items():
        config = profile(server)
        assert config.model.path == "/no/such/model"
        assert config.server.keys is None
        assert (config.engine["stream_interval"], config.limits.deadline_s) == (4, 90)
        assert config.engine.get("tensor_parallel_size", 1) == (int(name.partition("tp")[2][:1]) if "tp" in name else 1)
        assert [client[:3] for client in clients] == [["python3", "-m", "loadtests.gpu.throughput"]] * 2
        assert ["--spread" in client for client in clients] == [False, True]
        if name.startswith("tp"):
            assert config.identity.attention == name.partition("-")[2]
        else:
            assert config.cluster.max_replicas is None
            assert config.cluster.replicas == (int(name.partition("-")[2]) if "replicas" in name else 1)


@pytest.mark.parametrize(("name", "step"), [("multi_gpu", "ray-tp2"), ("one_gpu", "cascade"), ("peers", "fp8")])
def test_gpu_scripts_do_only_what_is_named(name: str, step: str, tmp_path: Path) -> None:
    assert set(commands(script(name, tmp_path, "--dry-run", step).stdout)) == {step}


def test_multi_gpu_says_which_server_did_not_become_ready(tmp_path: Path) -> None:
    done = script("multi_gpu", tmp_path, "tp1-stock")
    assert done.returncode == 1
    assert "tp1-stock: not ready, see " in (tmp_path / "multi-gpu.txt").read_text()
    assert "/no/such/model" in (tmp_path / "tp1-stock.log").read_text()


def test_one_gpu_measures_every_attention(tmp_path: Path) -> None:
    found = commands(script("one_gpu", tmp_path, "--dry-run").stdout)
    attentions = {words[words.index("--attention") + 1] for (words,) in found.values() if "--attention" in words}
    assert attentions == {"stock", "shared", "cascade"}
    assert {"attention", "answers", "layers-tp1", "layers-tp2", "layers-tp4", "unshared"} < set(found)
    assert list(tmp_path.iterdir()) == [], "a dry run starts nothing"


def test_peers_are_asked_by_precision_users_prompts_and_identities(tmp_path: Path) -> None:
    done = script("peers", tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr
    found = commands(done.stdout)
    assert set(found) == {"bf16", "fp8", "bf16-prompts", "fp8-prompts", "identity-short", "identity-long"}
    for name, (words,) in found.items():
        assert words[:3] == ["python3", "-m", "loadtests.experiments.peers"]
        loads = [peers.load(word) for word in words if re.fullmatch(r"\d+:[\d.]+:\d+(:\d+)?", word)]
        settings = [word for word in words if re.fullmatch(r"[a-z_.]+=.*", word)]
        config = load(ROOT / words[words.index("--config") + 1], [word for word in settings if "prompt" not in word])
        assert max(each.users for each in loads) <= config.engine["max_num_seqs"], "nobody has to be refused"
        assert ("quantization" in config.engine) == name.startswith("fp8")
        assert {each.words for each in loads} == {900 if name.endswith("prompts") else 90}
        assert ("identity-" in settings[-1]) == name.startswith("identity")
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"


def test_throughput_counts_what_was_answered(tmp_path: Path) -> None:
    port = local.free_port()
    words = [sys.executable, "-m", "loadtests.generator.known", "--port", str(port), "--ttft-ms", "20", "--gap-ms", "1"]
    with local.running("known", words, port, "/", tmp_path / "log", 60) as known:
        found = throughput.measure(known.url, throughput.Load(1, requests=3, tokens=5), 8, None, "seed")
    assert (found["users"], found["requests"], found["failed"]) == (1, 3, 0)
    assert min(found["ttft_p50_ms"], found["tpot_p50_ms"], found["output_tokens_per_s"]) > 0


async def test_throughput_asks_something_new_each_time(tmp_path: Path) -> None:
    """A prompt of a measurement before would be in the server's KV cache; one seed repeats a measurement."""
    asked: list[str] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
        asked.append(json.loads(await reader.readexactly(length))["messages"][-1]["content"])
        writer.close()

    async with await asyncio.start_server(note, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for seed in ("one", "other", "one"):
            await asyncio.to_thread(throughput.measure, url, throughput.Load(2, requests=2), 2, None, seed)
    each = 2 + 4  # of each of two clients one first request, before the time is taken
    first, other, again = (set(asked[at : at + each]) for at in range(0, 3 * each, each))
    assert len(first | other) == 2 * each
    assert again == first


async def test_throughput_spreads_the_lengths_of_answers() -> None:
    """What a server is asked for, without one that answers."""
    asked: list[int] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
        asked.append(json.loads(await reader.readexactly(length))["max_tokens"])
        writer.close()

    async with await asyncio.start_server(note, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        url, spans = f"http://127.0.0.1:{port}", throughput.lengths(128, 0.5)
        await asyncio.to_thread(throughput.client, url, 2, 40, "seed", spans, None)
    assert 64 <= min(asked) < 80
    assert 170 < max(asked) <= 192
    assert throughput.lengths(128, 0) == (128, 128)


async def test_throughput_says_why_a_request_failed() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        loop = await asyncio.to_thread(throughput.client, f"http://127.0.0.1:{port}", 1, 2, "seed", (5, 5), None)
    assert (loop.ttft_s, loop.tokens) == ([], 0)
    assert loop.failed == {"without an answer's end: HTTP/1.1 503 Service Unavailable": 2}
