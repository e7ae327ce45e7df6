"""How vLLM's processes wait for each other once our plugin is loaded, on vLLM's own condition."""

import subprocess
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import pytest
import zmq
from vllm.distributed.device_communicators import cpu_communicator, shm_broadcast
from vllm.v1.worker import cpu_model_runner

from borg_serve import plugin
from borg_serve.errors import EngineError


def unspoilt() -> Any:
    """vLLM's module as it is, whichever test has loaded our plugin before."""
    spec = spec_from_file_location("unspoilt", shm_broadcast.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def spins(module: Any, monkeypatch: pytest.MonkeyPatch, read_s_ago: float) -> int:
    """Wait for one who does not write, so long after the last read: how often that was only giving up one's turn."""
    spins: list[bool] = []
    monkeypatch.setattr(module, "sched_yield", lambda: spins.append(True))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    address = f"inproc://{module.__name__}"
    writer = module.SpinCondition(is_reader=False, context=context, notify_address=address)
    reader = module.SpinCondition(is_reader=True, context=context, notify_address=address)
    reader.last_read = time.monotonic() - read_s_ago
    reader.wait(timeout_ms=50)
    for end in (writer.local_notify_socket, reader.local_notify_socket, reader.read_cancel_socket):
        end.close(linger=0)
    reader.write_cancel_socket.close(linger=0)
    return len(spins)


def test_plugin_lets_a_waiting_process_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm_broadcast.SpinCondition, "__init__", shm_broadcast.SpinCondition.__init__)  # put back later
    plugin.sleep_while_waiting()
    assert spins(shm_broadcast, monkeypatch, 2 * plugin.SPIN_S) == 0


def test_plugin_lets_no_process_sleep_while_notes_may_be_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeroMQ drops a note within 3 million ticks of another: 3 ms at 1 GHz."""
    assert plugin.SPIN_S > 3e6 / 1e9
    monkeypatch.setattr(shm_broadcast.SpinCondition, "__init__", shm_broadcast.SpinCondition.__init__)
    plugin.sleep_while_waiting()
    assert spins(shm_broadcast, monkeypatch, -60) == 1, "just read, and nobody has written since"


def test_plugin_is_needed_because_vllm_spins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spins(unspoilt(), monkeypatch, 2 * plugin.SPIN_S) == 1


def test_plugin_refuses_a_vllm_that_samples_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_model_runner, "CPUModelRunner", object)
    with pytest.raises(EngineError, match="sample_tokens"):
        plugin.keep_seeds()


def test_plugin_refuses_a_vllm_whose_workers_talk_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_communicator, "CpuCommunicator", object)
    with pytest.raises(EngineError, match="Gloo"):
        plugin.talk_through_gloo()


def test_plugin_refuses_a_vllm_that_waits_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm_broadcast.SpinCondition, "__init__", lambda self, is_reader: None)
    with pytest.raises(EngineError, match="busy_loop_s"):
        plugin.sleep_while_waiting()


def test_plugin_brings_no_metrics_into_the_engine() -> None:
    """A gauge of an engine's process, never set, would say for all of them that they are not ready."""
    look = "import sys, borg_serve.plugin; print([name for name in sys.modules if 'prometheus' in name])"
    assert subprocess.check_output([sys.executable, "-c", look], text=True).strip() == "[]"
