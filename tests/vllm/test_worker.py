"""Our GPU worker around vLLM's, whose own part needs a GPU and is replaced here."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import envs
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker import gpu_worker

from borg_serve.errors import EngineError
from borg_serve.vllm_plugin import attention
from borg_serve.vllm_plugin.worker import GpuWorker

IDENTITY = [random.Random(0).randrange(150_000) for _ in range(600)]


def started(monkeypatch: pytest.MonkeyPatch, gpu: int, runner: Any, v2: bool = True) -> Any:
    """A worker on this GPU, with this model runner."""

    def init_device(self: Any) -> None:
        self.device, self.model_runner = torch.device("cuda", gpu), runner

    def init(self: Any) -> None:
        self.use_v2_model_runner = v2

    monkeypatch.setattr(gpu_worker.Worker, "__init__", init)
    monkeypatch.setattr(gpu_worker.Worker, "init_device", init_device)
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/cache")
    worker = GpuWorker()
    worker.init_device()
    return worker


def runner(written: list[int]) -> Any:
    table = SimpleNamespace(stage_write=lambda row, start, ids: written.append(len(ids)))
    return SimpleNamespace(req_states=SimpleNamespace(all_token_ids=table))


@pytest.mark.parametrize("gpu", [0, 1])
def test_worker_compiles_for_its_gpu(gpu: int, monkeypatch: pytest.MonkeyPatch) -> None:
    started(monkeypatch, gpu, runner([]))
    assert f"/cache/cuda{gpu}" == envs.VLLM_CACHE_ROOT


def test_worker_writes_the_identity_once_into_a_row_of_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    worker = started(monkeypatch, 0, runner(written))
    for tail in ([1] * 20, [2] * 20, [3] * 20):
        worker.model_runner.req_states.all_token_ids.stage_write(0, 0, IDENTITY + tail)
    assert written[-1] == 20


def test_worker_with_vllms_older_runner_has_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    started(monkeypatch, 0, object(), v2=False)


def test_worker_of_a_vllm_that_keeps_token_ids_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="vLLM moved req_states"):
        started(monkeypatch, 0, object())


def test_worker_makes_the_shared_attention_known(monkeypatch: pytest.MonkeyPatch) -> None:
    started(monkeypatch, 0, runner([]))
    assert AttentionBackendEnum.CUSTOM.get_class() is attention.SharedPrefixBackend
