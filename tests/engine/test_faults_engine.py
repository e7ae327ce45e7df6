"""A full disk, a killed engine core, a killed server; the tests of the shared server come first."""

import json
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.engine.faults import HANG, SHORT, Clients, left, lose_engine
from tests.engine.process import Server, running
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def mute(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("mute"), *HANG, f"--set=model.path={checkpoint}") as server:
        yield server


def test_fault_full_disk_under_the_log_stops_nothing(mute: Server) -> None:
    size = mute.log.stat().st_size
    for process in (psutil.Process(mute.pid), *mute.family()):
        # From here on no file of theirs may grow, as on a full disk: writing fails with EFBIG.
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    clients = Clients(mute)
    for _ in range(50):
        httpx.get(f"{mute.base_url}/no-such-route")  # a line of log each
    for stream in (False, True):
        answer, end = clients.ask(SHORT, stream=stream)
        end.result(60)
        assert answer.status == 200
        assert answer.events()[-1] == "[DONE]" if stream else json.loads(answer.text)["choices"]
    assert clients.ready() == 200
    assert mute.log.stat().st_size == size


def test_fault_killed_engine_core_ends_everything(mute: Server) -> None:
    lose_engine(mute, "VLLM::EngineCore", signal.SIGKILL)


def test_fault_killed_server_leaves_no_engine_behind(checkpoint: Path, tmp_path: Path) -> None:
    with running(tmp_path, f"--set=model.path={checkpoint}") as server:
        family = server.family()
        assert {process.cmdline()[0] for process in family} >= {"VLLM::EngineCore"}
        os.kill(server.pid, signal.SIGKILL)
        assert server.ended() == -signal.SIGKILL
        wait_until("its engine has ended", lambda: left(family) == [], 30)
