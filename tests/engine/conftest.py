"""Clients for the one server that the tests of this folder share."""

from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.engine.process import Server


def pytest_configure(config: pytest.Config) -> None:
    """Load Schemathesis's plugin for the tests of this folder alone: it takes seconds."""
    config.pluginmanager.import_plugin("schemathesis.pytest.plugin")


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
