"""How our CPU worker and executor wait and communicate, on vLLM's own queues. No engine is started."""

import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
import zmq
from vllm.distributed.device_communicators import cpu_communicator, shm_broadcast
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.worker.gpu_worker import Worker

from borg_serve.errors import EngineError
from borg_serve.vllm_plugin import patches
from borg_serve.vllm_plugin.cpu import CpuWorker
from borg_serve.vllm_plugin.executor import SleepingExecutor


def polls(monkeypatch: pytest.MonkeyPatch, read_s_ago: float) -> int:
    """Wait once for a writer that does not write, so long after the last read: how often the reader only polled."""
    polls: list[bool] = []
    monkeypatch.setattr(shm_broadcast, "sched_yield", lambda: polls.append(True))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    address = f"inproc://{uuid4()}"  # closing one takes ZeroMQ a moment
    writer: Any = shm_broadcast.SpinCondition(is_reader=False, context=context, notify_address=address)
    reader: Any = shm_broadcast.SpinCondition(is_reader=True, context=context, notify_address=address)
    reader.last_read = time.monotonic() - read_s_ago
    reader.wait(timeout_ms=50)
    for end in (writer.local_notify_socket, reader.local_notify_socket, reader.read_cancel_socket):
        end.close(linger=0)
    reader.write_cancel_socket.close(linger=0)
    return len(polls)


@pytest.fixture
def sleeping(monkeypatch: pytest.MonkeyPatch) -> None:
    """An executor as it begins, before it makes its queues; what it changed is put back later."""
    monkeypatch.setattr(shm_broadcast.SpinCondition, "__init__", shm_broadcast.SpinCondition.__init__)
    monkeypatch.setattr(MultiprocExecutor, "_init_executor", lambda self: None)
    SleepingExecutor._init_executor(object.__new__(SleepingExecutor))


def test_executor_is_needed_because_vllm_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    assert polls(monkeypatch, 2 * patches.SPIN_S) == 1


@pytest.mark.usefixtures("sleeping")
def test_executor_lets_a_waiting_process_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    assert polls(monkeypatch, 2 * patches.SPIN_S) == 0


@pytest.mark.usefixtures("sleeping")
def test_executor_lets_no_process_sleep_while_notes_may_be_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeroMQ drops a notification within 3 million ticks of another: 3 ms at 1 GHz."""
    assert patches.SPIN_S > 3e6 / 1e9
    assert polls(monkeypatch, -60) == 1, "just read, and nobody has written since"


def test_executor_of_a_vllm_that_waits_in_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm_broadcast.SpinCondition, "__init__", lambda self, is_reader: None)
    with pytest.raises(EngineError, match="busy_loop_s"):
        patches.sleep_while_waiting()


def test_worker_of_a_vllm_that_communicates_in_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cpu_communicator.CpuCommunicator, "_all_group_ranks_share_shm_group_name")
    with pytest.raises(EngineError, match="_all_group_ranks_share_shm_group_name"):
        patches.talk_through_gloo()


def test_plugin_brings_no_metrics_into_the_engine() -> None:
    """A gauge of an engine's process that is never set would say for all of them that they are not ready."""
    names = ", ".join(("scheduler", "cpu", "executor"))
    look = f"import sys; from borg_serve.vllm_plugin import {names}; print('borg_serve.metrics' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", look], text=True).split()[-1] == "False"


@pytest.mark.parametrize("v2", [False, True])
def test_worker_samples_without_the_seeds_of_unfinished_prompts(monkeypatch: pytest.MonkeyPatch, v2: bool) -> None:
    seen: list[dict[int, str]] = []

    def sample_tokens(self: Any, grammar_output: Any) -> str:
        seen.append(dict(generators))
        return "tokens"

    monkeypatch.setattr(Worker, "sample_tokens", sample_tokens)
    generators = {0: "whole", 2: "unfinished"}
    worker: Any = object.__new__(CpuWorker)
    worker.use_v2_model_runner = v2
    if not v2:
        mask = SimpleNamespace(np=[False, False, True])
        worker.model_runner = SimpleNamespace(
            discard_request_mask=mask, input_batch=SimpleNamespace(generators=generators)
        )
    assert worker.sample_tokens(None) == "tokens"
    assert seen == [{0: "whole"} | ({2: "unfinished"} if v2 else {})]
    assert generators == {0: "whole", 2: "unfinished"}
