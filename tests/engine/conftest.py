"""The one server that the tests of this folder share, and clients for it."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests import workers
from tests.engine.collector import Collector, receiving
from tests.engine.process import Server, living, running


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """What receives the shared server's traces."""
    with receiving() as collector:
        yield collector


@pytest.fixture(scope="session")
def server(checkpoint: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A ready server; at the end SIGTERM must end it with status 0 and leave no process behind."""
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
    """The shared server for the one test that ends it: that one runs last."""
    return server


@pytest.fixture(scope="session")
def http(server: Server) -> Iterator[httpx.Client]:
    """A plain HTTP client of the shared server."""
    with httpx.Client(base_url=server.base_url, timeout=180) as client:
        yield client


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    """OpenAI's own client of the shared server; it repeats nothing, so that every failure shows."""
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=180) as client:
        yield client
