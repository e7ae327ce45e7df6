"""Which CUDA graphs are captured, and which one a step gets, by vLLM's own manager. No GPU is needed for that."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config.attention import AttentionConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

from borg_serve.engine.attention_choice import PREFIX_OPTION
from borg_serve.vllm_plugin.graphs import SHORT, DecodeGraphs, capture_decodes_apart
from borg_serve.vllm_plugin.worker import GpuWorker

FULL = CUDAGraphMode.FULL
SIZES = [1, 2, 4, 8, 16, 24, 32]
REQUESTS = 16


def manager(kind: type[Any], mode: CUDAGraphMode = FULL, backend: str = "CUSTOM", dtype: str = "auto") -> Any:
    """As it is before its graphs are captured; vLLM's own constructor asks for a GPU's process group."""
    made = object.__new__(kind)
    made.compilation_config = SimpleNamespace(cudagraph_capture_sizes=SIZES, max_cudagraph_capture_size=SIZES[-1])
    caches = SimpleNamespace(use_kda_recoverssm=False, cache_dtype=dtype)
    attention = AttentionConfig(backend=AttentionBackendEnum[backend])
    promised = {PREFIX_OPTION: 2100}
    made.vllm_config = SimpleNamespace(
        speculative_config=None, cache_config=caches, attention_config=attention, additional_config=promised
    )
    made.cudagraph_mode, made.max_num_reqs, made.decode_query_len = mode, REQUESTS, 1
    made.varlen_decode, made.ubatch_runner, made.lora_capture_cases = False, None, [0]
    made._candidates, made._capture_descs, made._lora_dispatch_map, made._max_lora_case = {}, {}, {}, 0
    made._init_candidates()
    made._graphs_captured = True
    return made


def cached(*computed: int) -> Any:
    return SimpleNamespace(scheduled_cached_reqs=SimpleNamespace(num_computed_tokens=list(computed)))


def test_graphs_are_vllms_and_one_more_for_each_number_of_requests() -> None:
    ours, stock = (manager(kind)._capture_descs[FULL] for kind in (DecodeGraphs, ModelCudaGraphManager))
    assert [graph for graph in ours if graph.uniform_token_count is None] == stock
    apart = [(graph.num_tokens, graph.num_reqs) for graph in ours if graph.uniform_token_count == 1]
    assert apart == [(size, size) for size in reversed(SIZES) if size <= REQUESTS]


@pytest.mark.parametrize("short", [True, False])
def test_graphs_of_steps_without_prompts_are_theirs_if_rows_are_short(short: bool) -> None:
    made, stock = manager(DecodeGraphs), manager(ModelCudaGraphManager)
    made.look(cached(2100, 2100 + SHORT - short))
    for requests in range(1, REQUESTS + 1):
        decode = made.dispatch(requests, requests, 1, 0)
        assert decode.uniform_token_count == (1 if short else None)
        assert decode.num_tokens == stock.dispatch(requests, requests, 1, 0).num_tokens
        for tokens in range(requests + 1, SIZES[-1] + 1):
            mixed = requests, tokens, None, 0
            assert made.dispatch(*mixed) == stock.dispatch(*mixed)


@pytest.mark.parametrize(
    "other", [{"mode": CUDAGraphMode.FULL_AND_PIECEWISE}, {"backend": "FLASH_ATTN"}, {"dtype": "fp8"}]
)
def test_graphs_are_vllms_where_the_kernel_is_not_used(other: dict[str, Any]) -> None:
    ours, stock = (manager(kind, **other)._capture_descs for kind in (DecodeGraphs, ModelCudaGraphManager))
    assert ours == stock


def test_graphs_are_the_runners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_runner, "ModelCudaGraphManager", ModelCudaGraphManager)
    capture_decodes_apart()
    assert vars(model_runner)["ModelCudaGraphManager"] is DecodeGraphs


def test_graphs_hear_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GpuWorker.__mro__[1], "execute_model", lambda self, step: step)
    worker = object.__new__(GpuWorker)
    made = manager(DecodeGraphs)
    worker.model_runner = SimpleNamespace(cudagraph_manager=made)  # type: ignore[assignment]
    for computed, short in ((2100 + SHORT, False), (2200, True)):
        worker.execute_model(cached(computed))
        assert made.short == short
