"""How vLLM's processes wait for each other once our plugin is loaded, on vLLM's own condition."""

import subprocess
import sys
import time

import pytest
import zmq
from vllm.distributed.device_communicators import shm_broadcast

from borg_serve import plugin
from borg_serve.errors import EngineError


@pytest.fixture
def spins(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows each time that one who waits only gave up its turn."""
    spins: list[bool] = []
    monkeypatch.setattr(shm_broadcast, "sched_yield", lambda: spins.append(True))
    monkeypatch.setattr(shm_broadcast.SpinCondition, "__init__", shm_broadcast.SpinCondition.__init__)  # put back later
    return spins


def wait(address: str) -> None:
    """Wait for a moment for somebody to write who does not."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    writer = shm_broadcast.SpinCondition(is_reader=False, context=context, notify_address=address)
    reader = shm_broadcast.SpinCondition(is_reader=True, context=context, notify_address=address)
    reader.last_read = time.monotonic()
    reader.wait(timeout_ms=50)
    for end in (writer.local_notify_socket, reader.local_notify_socket, reader.read_cancel_socket):
        end.close(linger=0)
    reader.write_cancel_socket.close(linger=0)


def test_plugin_lets_a_waiting_process_sleep(spins: list[bool]) -> None:
    plugin.sleep_while_waiting()
    wait("inproc://sleeps")
    assert spins == []


def test_plugin_is_needed_because_vllm_spins(spins: list[bool]) -> None:
    wait("inproc://spins")
    assert spins == [True]


def test_plugin_refuses_a_vllm_that_waits_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm_broadcast.SpinCondition, "__init__", lambda self, is_reader: None)
    with pytest.raises(EngineError, match="busy_loop_s"):
        plugin.sleep_while_waiting()


def test_plugin_brings_no_metrics_into_the_engine() -> None:
    """A gauge of an engine's process, never set, would say for all of them that they are not ready."""
    look = "import sys, borg_serve.plugin; print([name for name in sys.modules if 'prometheus' in name])"
    assert subprocess.check_output([sys.executable, "-c", look], text=True).strip() == "[]"
