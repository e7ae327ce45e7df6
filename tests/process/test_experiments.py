"""What experiments share, with servers of known timing: turns, pauses, figures, and the end of what was started."""

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random

import psutil
import pytest

from loadtests.experiments.experiment import block, rotation
from loadtests.generator.workload import body
from loadtests.servers import local
from loadtests.servers.contenders import Start


def known(name: str, folder: Path) -> Start:
    """What starts a server of known timing."""

    def start() -> AbstractContextManager[local.Server]:
        port = local.free_port()
        words = [sys.executable, "-m", "loadtests.generator.known", f"--port={port}", "--ttft-ms=100", "--gap-ms=10"]
        return local.running(name, words, port, "/", folder / f"{name}.log", 60)

    return start


def test_rotation_lets_one_server_run_at_a_time_and_ends_all(tmp_path: Path) -> None:
    shared = known("b", tmp_path)
    taken, servers = [], {}
    with rotation({"a": known("a", tmp_path), "b": shared, "b too": shared}, rounds=2, dropped=1) as turns:
        for number, name, server in turns:
            taken.append((number, name))
            servers[server.name] = server
            stopped = {one: other.process.status() == psutil.STATUS_STOPPED for one, other in servers.items()}
            assert [one for one, still in stopped.items() if not still] == [server.name]
    there, back = ["a", "b", "b too"], ["b too", "b", "a"]
    assert taken == [*((-1, name) for name in there), *((0, name) for name in back), *((1, name) for name in there)]
    assert not any(local.lives(server.process) for server in servers.values())


def test_block_measures_what_a_server_does(tmp_path: Path) -> None:
    with known("a", tmp_path)() as server:
        found = block(server, 2, [body(Random(0), 5) for _ in range(4)])
        assert (found["users"], found["requests"], found["failed"]) == (2, 4, 0)
        assert found["ttft_ms"] >= 95  # the server never answers sooner
        assert found["tpot_ms"] > 0
        assert set(found["cpu_s_per_1000"]) == set(local.GROUPS)
        assert found["memory_mib"] > 1
        with pytest.raises(RuntimeError, match="nothing was measured"):
            block(server, 1, [{**body(Random(0), 5), "messages": []}])


def test_server_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    with pytest.raises(RuntimeError, match="x did not become ready:\nno such thing"):
        local.running("x", words, local.free_port(), "/", tmp_path / "log", 60).__enter__()
