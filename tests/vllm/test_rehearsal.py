"""`borg-serve check` as a promise: what would stop a start is refused by the key that it is about, without a start."""

from pathlib import Path

import pytest
import torch

from borg_serve.checkpoint.check import inspect
from borg_serve.config import load
from borg_serve.engine import arguments, report
from borg_serve.engine.arguments import field_problems
from borg_serve.engine.environment import device, device_bytes
from borg_serve.engine.rehearsal import rehearse
from borg_serve.errors import ConfigError
from tests import qwen

PROFILE = Path(__file__).parents[2] / "configs" / "demo-cpu.yaml"

pytestmark = pytest.mark.skipif(device() != "cpu", reason="the demo's profile is for the CPU")


def check(*sets: str) -> str | None:
    """What `borg-serve check` says against the demo's profile with these settings."""
    directory, tokens = qwen.directory("smollm2"), len(qwen.prefix("smollm2").token_ids)
    try:
        config = load(PROFILE, [f"model.path={directory}", *sets], field_problems)
        args = arguments.build(config, str(directory), "{{ messages }}", tokens)
        arguments.check_parser_knows(config, qwen.tokenizer("smollm2"))
        found = inspect(directory)
        plan = report.plan(config, found, found.weight_bytes, args, tokens)
        rehearse(config, args, tokens, plan)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("server.tool_call_parser=hermess", "is not one of vLLM"),
        ("server.tool_call_parser=llama3_json", "does not fit the checkpoint's tokenizer"),
        ("engine.max_model_len=99999", "greater than the derived max_model_len"),
        ("engine.max_model_len=0", "must be a positive integer"),
        ("engine.max_model_len=-5", "greater than or equal to -1"),
        ("engine.max_model_len=2000", "leaves no room for a conversation beside the identity's 2,320 tokens"),
        ("engine.max_model_len=8q", "vLLM says"),
        ("engine.max_num_seqs=0", "greater than or equal to 1"),
        ("engine.max_num_seqs=1000", "max_num_batched_tokens (256) must be greater than or equal to max_num_seqs"),
        ("engine.max_num_batched_tokens=8", "must be greater than or equal to max_num_seqs (16)"),
        ("engine.kv_cache_memory_bytes=1000", "leaves 0 tokens of KV cache, and one request may take 8,192"),
        ("engine.kv_cache_memory_bytes=-5", "does not fit"),
        ("engine.kv_cache_memory_bytes=200000000", "leaves 4,320 tokens of KV cache"),
        ("engine.kv_cache_memory_bytes=999999999999999", "does not fit"),
        ("engine.kv_cache_memory_bytes=2GiB", "cannot be converted to human_readable_int"),
        ("engine.gpu_memory_utilization=1.5", "less than or equal to 1"),
        ("engine.num_gpu_blocks_override=3", "leaves 96 tokens of KV cache"),
        ("engine.block_size=16", "block_size is not supported by CPU_ATTN"),
        ("engine.block_size=33", "block_size is not supported by CPU_ATTN"),
        ("engine.block_size=0", "greater than 0"),
        ("engine.kv_cache_dtype=int4", "invalid choice"),
        ("engine.kv_cache_dtype=nvfp4", "kv_cache_dtype is not supported by CPU_ATTN"),
        ("engine.quantization=fp8", "torch.float32 is not supported for quantization method fp8"),
        ("engine.quantization=awq", "Cannot find the config file for awq"),
        ("engine.quantization=compressed-tensors", "missing 3 required positional arguments"),
        ("engine.quantization=nosuch", "Unknown quantization method: nosuch"),
        ("engine.tensor_parallel_size=2", "Total number of attention heads (9) must be divisible"),
        ("engine.tensor_parallel_size=0", "greater than or equal to 1"),
        ("engine.pipeline_parallel_size=40", "must not exceed the model's 30 layers"),
        ("engine.distributed_executor_backend=nosuch", "vLLM says"),
        ("engine.attention_backend=NOSUCH", "Unknown attention backend: 'NOSUCH'"),
        ("engine.compilation_config={mode: 9}", "Input should be 0, 1, 2 or 3"),
        ("engine.hf_overrides={architectures: [Nope]}", "Supported architectures: ['A"),
        ("engine.reasoning_parser=nosuch", "Reasoning parser 'nosuch' not found"),
        ("engine.tokenizer_mode=slow", "is decided elsewhere"),
        ("engine.enable_sleep_mode=true", "Sleep mode is not supported on current platform"),
        ("engine.model_loader_extra_config={nosuch: 1}", "Unexpected extra config keys"),
        ("engine.logits_processors=[nosuch.module:X]", "No module named 'nosuch'"),
        ("engine.worker_extension_cls=nosuch.X", "No module named 'nosuch'"),
        ("engine.optimization_level=9", "Input should be 0, 1, 2 or 3"),
        ("engine.stream_interval=0", "greater than or equal to 1"),
        ("engine.watermark=2", "less than 1"),
    ],
)
def test_check_refuses_what_would_not_start_and_names_the_key(setting: str, said: str) -> None:
    found = check(setting)
    assert found is not None
    (line,) = found.splitlines()
    key = setting.partition("=")[0]
    assert key in line.removeprefix(f"{PROFILE}: ").partition(": ")[0].split(" and "), line
    assert said in line
    for repr_ in ("<function", "<class", "PosixPath", "dict_keys", "[type=", "got None", "got True"):
        assert repr_ not in line


@pytest.mark.parametrize(
    "sets",
    [
        (),
        ("engine.max_model_len=auto", "engine.kv_cache_memory_bytes=200M"),
        ("engine.max_model_len=8k", "engine.kv_cache_memory_bytes=2G", "engine.block_size="),
        ("model.dtype=bfloat16", "engine.kv_cache_dtype=auto"),
        ("engine.tensor_parallel_size=3",),
        ("model.load_format=dummy",),
    ],
    ids=" ".join,
)
def test_check_takes_what_starts(sets: tuple[str, ...]) -> None:
    assert check(*sets) is None


def test_check_knows_what_a_processor_can_do_with_fp8() -> None:
    able = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    assert (check("engine.kv_cache_dtype=fp8") is None) is able
    found = check("model.dtype=bfloat16", "engine.quantization=fp8") or ""
    assert "engine.quantization: cannot quantise the weights on a CPU" in found


def test_check_counts_the_memory_of_this_machine() -> None:
    assert (device_bytes() or 0) > 1 << 30
    found = check("engine.kv_cache_memory_bytes=999999999999999") or ""
    most = int(found.rpartition("Set at most ")[2].rstrip("."))
    assert check(f"engine.kv_cache_memory_bytes={most}") is None
    assert "does not fit" in (check(f"engine.kv_cache_memory_bytes={most + 1}") or "")
