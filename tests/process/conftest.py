"""The gate on real sockets, for the tests of what a client can send below HTTP."""

from collections.abc import Iterator

import pytest

from borg_serve.gate import http
from tests.process.raw import GateServer, serving


@pytest.fixture(scope="module")
def gate_server() -> Iterator[GateServer]:
    with serving() as gate_server:
        yield gate_server
        assert gate_server.alive()


@pytest.fixture
def hasty_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head must arrive within half a second."""
    monkeypatch.setattr(http, "HEAD_S", 0.5)
