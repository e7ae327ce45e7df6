"""For all tests: the environment that vLLM needs, quick tests first, a watch on pauses, and a Redis."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

from borg_serve.checkpoint import demo
from borg_serve.engine.environment import prepare_environment
from loadtests.servers import local
from tests import workers
from tests.engine.collector import Collector, receiving
from tests.engine.process import Server, living, running
from tests.stillness import Stillness
from tests.waiting import wait_until

prepare_environment()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Machines are shared and noisy: how long one example takes says nothing. A run asks what the run before it asked;
# HYPOTHESIS_PROFILE=search draws anew, as `make fuzz` does.
hypothesis.settings.register_profile("borg", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "borg"))

STILLNESS = Stillness()
TIERS = ("process", "load", "engine", "browser", "cluster", "gpu")
ORDER = ("pure", "process", "load", "engine", "browser", "ending", "cluster", "gpu")


def _tier(path: Path) -> str:
    """Return the folder of `tests` that a path lies in: a room of `tests/unit` may have the name of a tier."""
    tests = Path(__file__).parent
    return path.relative_to(tests).parts[0] if path != tests and path.is_relative_to(tests) else ""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the folder of a tier that is not asked for alone: importing what its tests import takes seconds."""
    name = _tier(collection_path)
    return True if name in TIERS and f"not {name}" in config.getoption("markexpr") else None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what lies in the folder of a tier, and have what fails while the machine stands still run again."""
    item.add_marker(pytest.mark.flaky(reruns=2, condition=STILLNESS.happened))
    tier = _tier(item.path)
    if tier in TIERS:
        item.add_marker(tier)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Count the machine's pauses for the test that begins."""
    STILLNESS.begin()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say when the machine stood still: it is what a test ran again for."""
    pauses_s = STILLNESS.pauses_s
    if pauses_s:
        times = f"{len(pauses_s)} times, at most for {max(pauses_s):.0f} s"
        terminalreporter.write_line(f"the machine stood still {times}; what failed meanwhile ran again")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put pure tests first; then the engine's with one of their own, those that share the server, and its end."""

    def rank(item: pytest.Item) -> tuple[int, bool]:
        fixtures = getattr(item, "fixturenames", ())
        tier = next((name for name in TIERS if item.get_closest_marker(name)), "pure")
        shares = "server" in fixtures
        return ORDER.index("ending" if shares and "ending" in fixtures else tier), shares

    items.sort(key=rank)


@pytest.fixture(scope="session")
def divisible(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint with heads that two workers can share; it computes the same."""
    from tests.engine.padded import pad  # torch takes seconds, which pure tests do not have

    return pad(demo.materialise(), tmp_path_factory.mktemp("divisible") / "model")


@pytest.fixture(scope="session")
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """The demo checkpoint, made the first time, in a form that the workers can share."""
    found: Path = demo.materialise() if workers.WORKERS == 1 else request.getfixturevalue("divisible")
    return found


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """What receives the shared server's traces."""
    with receiving() as collector:
        yield collector


@pytest.fixture(scope="session")
def server(checkpoint: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The one that engine and browser tests share; SIGTERM must end it with status 0, and leave no process behind."""
    settings = (f"--set=model.path={checkpoint}", f"--set=engine.otlp_traces_endpoint={collector.url}")
    with running(tmp_path_factory.mktemp("server"), *settings, more=collector.environment) as server:
        family = server.family()
        assert family, "the engine must be a process of its own"
        workers.check(family)
        yield server
        assert server.stop() == 0, server.tail()
        assert living(family) == []


@pytest.fixture(scope="session")
def ending(server: Server) -> Server:
    """The shared server for the one test that ends it: of those that share it, that one runs last."""
    return server


@dataclass(frozen=True)
class Redis:
    """A running Redis; `address` is host:port."""

    address: str
    process: subprocess.Popen[bytes]


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """Redis from the machine's own packages, on a free port."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("no redis-server: `make system` as root installs it")
    port = local.free_port()
    words = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no", "--dir"]
    folder = tmp_path_factory.mktemp("redis")
    with subprocess.Popen([program, *words, str(folder)], stdout=subprocess.DEVNULL) as process:

        def answers() -> bool:
            with socket.socket() as sock:
                return sock.connect_ex(("127.0.0.1", port)) == 0

        wait_until("Redis answers", answers, 30)
        yield Redis(f"127.0.0.1:{port}", process)
        process.kill()
