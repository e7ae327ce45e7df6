"""What our plugin changes in vLLM's processes, on vLLM's own classes, and that it says so when those have moved."""

import inspect
import multiprocessing
import subprocess
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zmq
from vllm import envs
from vllm.compilation import backends, decorators
from vllm.distributed.device_communicators import cpu_communicator, shm_broadcast
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import core
from vllm.v1.worker import cpu_model_runner, gpu_worker

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


def admits(steps: int, interval: int) -> list[bool]:
    """In which steps an engine with this `prefill_schedule_interval` admits prompts."""
    engine: Any = SimpleNamespace(
        vllm_config=SimpleNamespace(scheduler_config=SimpleNamespace(prefill_schedule_interval=interval))
    )
    return [not core.EngineCore._should_throttle_prefills(engine) for _ in range(steps)]


def test_plugin_lets_one_engine_admit_prompts_in_some_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core.EngineCore, "_should_throttle_prefills", core.EngineCore._should_throttle_prefills)
    assert admits(5, 4) == [True] * 5, "vLLM does so for data parallelism alone"
    plugin.space_prefills(core)
    assert admits(9, 4) == [True, False, False, False, True, False, False, False, True]
    assert admits(3, 1) == [True] * 3


def test_plugin_spaces_prompts_by_what_vllm_asks_before_each_step() -> None:
    for step in (core.EngineCore.step, core.EngineCore.step_with_batch_queue):
        assert "schedule(self._should_throttle_prefills())" in inspect.getsource(step)
    assert "any(not r.is_prefill_chunk for r in self.running)" in inspect.getsource(Scheduler.schedule), (
        "nobody waits alone"
    )


def test_plugin_refuses_a_vllm_that_admits_prompts_elsewhere() -> None:
    with pytest.raises(EngineError, match="_should_throttle_prefills"):
        plugin.space_prefills(SimpleNamespace(EngineCore=object))


@pytest.mark.parametrize("gpu", [0, 1])
def test_plugin_compiles_for_each_gpu(gpu: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def init_device(self: Any) -> None:
        self.device = torch.device("cuda", gpu)

    monkeypatch.setattr(gpu_worker.Worker, "init_device", init_device)
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/cache")
    plugin.compile_for_each_gpu()
    worker: Any = SimpleNamespace()
    gpu_worker.Worker.init_device(worker)
    assert f"/cache/cuda{gpu}" == envs.VLLM_CACHE_ROOT


def test_plugin_is_needed_because_vllm_caches_by_rank() -> None:
    for module in (backends, decorators):
        source = inspect.getsource(module)
        assert 'f"rank_{rank}_{dp_rank}"' in source, "the GPU is in the name now: compile_for_each_gpu can go"
        assert "envs.VLLM_CACHE_ROOT" in source


def test_plugin_refuses_a_vllm_whose_worker_begins_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_worker, "Worker", object)
    with pytest.raises(EngineError, match="init_device"):
        plugin.compile_for_each_gpu()


@pytest.mark.parametrize(("ray", "changed"), [(None, False), (False, False), (True, True)])
def test_plugin_changes_workers_of_ray_too(ray: bool | None, changed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are no children of vLLM's processes, and there is no parent to end with."""
    done: list[str] = []
    for name in ("sleep_while_waiting", "keep_seeds", "talk_through_gloo", "remember_hashes", "remember_blocks"):
        monkeypatch.setattr(plugin, name, lambda *_, name=name: done.append(name))
    monkeypatch.setattr(plugin, "space_prefills", lambda _: None)
    monkeypatch.setattr(plugin, "_end_with", lambda _: done.append("end"))
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: ray) if ray is not None else None)
    assert multiprocessing.parent_process() is None
    plugin.register.__wrapped__()
    assert ("keep_seeds" in done) == changed
    assert "end" not in done
