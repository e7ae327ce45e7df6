"""What a start would refuse, found without one: vLLM's configuration, its model without weights, and the memory.

It starts no engine and reads no weights. What only a device can tell, such as how much of its memory is free, it does
not know.
"""

import logging
import tempfile
from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, cast

from borg_serve.config import Config
from borg_serve.engine.arguments import in_a_line, namespace
from borg_serve.engine.client import configure
from borg_serve.engine.environment import device
from borg_serve.engine.memory import GIB, MemoryPlan
from borg_serve.errors import ConfigError, EngineError, Problem
from borg_serve.upstream import pinned

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["rehearse"]

REFUSALS = (
    *(ValueError, TypeError, KeyError, AttributeError, ImportError, NotImplementedError, RuntimeError, OSError),
    EngineError,
)
"""How vLLM refuses arguments."""
ROOM = 64
"""Tokens beside the identity that the shortest conversation takes."""


def rehearse(config: Config, args: Mapping[str, Any], prefix_tokens: int, plan: MemoryPlan | None) -> None:
    """Go as far towards a start as this machine can without starting. Raises ConfigError with what stands against it.

    `args`: vLLM's arguments with the checkpoint's directory, its config at least; `plan`: None without its weights.
    """
    made = _told(config, args, _configure)
    problems = _room(config, made.model_config.max_model_len, prefix_tokens, plan)
    if plan is not None and not plan.fits:
        problems.append(_too_much(config, plan))
    problems += _parallel(config, made) + (_processor(config, made) if device() == "cpu" else [])
    if problems:
        raise ConfigError(problems)
    _told(config, args, _load_parts)


def _told(config: Config, args: Mapping[str, Any], work: "Callable[[Mapping[str, Any]], VllmConfig]") -> "VllmConfig":
    """Do the work quietly; an error of vLLM's becomes a ConfigError about the keys without which it does not happen."""
    logging.disable()
    try:
        try:
            return work(args)
        except REFUSALS as error:
            cause = error.__cause__
            reason = in_a_line(cause if isinstance(error, EngineError) and isinstance(cause, Exception) else error)
        others = {f"engine.{name}": {**args, name: None} for name in config.engine}
        others["model.dtype"] = {**args, "dtype": "auto"}
        keys = [key for key, without in others.items() if _works(work, without)] or ["engine"]
    finally:
        logging.disable(logging.NOTSET)
    values = {key: config.engine.get(key.partition(".")[2], config.model.dtype) for key in keys}
    got = config.engine if keys == ["engine"] else values if len(values) > 1 else values[keys[0]]
    where, cure = f"{config.file}: {' and '.join(keys)}", "Correct it, or remove it for vLLM's default."
    raise ConfigError([Problem(where, f"vLLM says: {reason}", got, cure)])


def _works(work: "Callable[[Mapping[str, Any]], VllmConfig]", args: Mapping[str, Any]) -> bool:
    try:
        work(args)
    except REFUSALS:
        return False
    return True


def _configure(args: Mapping[str, Any]) -> "VllmConfig":
    return configure(namespace(args), 1, 0)


def _room(config: Config, longest: int, prefix_tokens: int, plan: MemoryPlan | None) -> list[Problem]:
    """Whether the identity and a conversation fit in the context, and one whole context in the KV cache."""
    asked, least = config.engine.get("max_model_len", longest), prefix_tokens + ROOM
    if longest < least:
        what = f"leaves no room for a conversation beside the identity's {prefix_tokens:,} tokens"
        return [Problem(f"{config.file}: engine.max_model_len", what, asked, f"Set at least {least}.")]
    needed = least if asked in (-1, "auto") else longest
    if plan is None or not plan.fits or plan.kv_tokens >= needed:
        return []
    keys = ("num_gpu_blocks_override", "kv_cache_memory_bytes", "gpu_memory_utilization")
    key = next((key for key in keys if key in config.engine), "max_model_len")
    what = f"leaves {max(0, plan.kv_tokens):,} tokens of KV cache, and one request may take {needed:,} tokens"
    cure = f"Give the KV cache {needed * plan.kv_bytes_a_token} bytes, or lower engine.max_model_len."
    return [Problem(f"{config.file}: engine.{key}", what, config.engine.get(key, asked), cure)]


def _parallel(config: Config, made: "VllmConfig") -> list[Problem]:
    """Whether there are GPUs for all workers, and layers for all stages."""
    problems = []
    stages, layers = made.parallel_config.pipeline_parallel_size, made.model_config.hf_text_config.num_hidden_layers
    if stages > layers:
        what = f"must not exceed the model's {layers} layers"
        problems.append(
            Problem(f"{config.file}: engine.pipeline_parallel_size", what, stages, f"Set at most {layers}.")
        )
    if device() == "cuda":
        from vllm.platforms import current_platform

        size = made.parallel_config.world_size
        if current_platform.is_cuda() and size > (count := current_platform.device_count()):
            what, cure = f"needs {size} GPUs, and this machine has {count}", "Lower it, or use a Ray cluster."
            asked = made.parallel_config.tensor_parallel_size
            problems.append(Problem(f"{config.file}: engine.tensor_parallel_size", what, asked, cure))
    return problems


def _too_much(config: Config, plan: MemoryPlan) -> Problem:
    """The problem of a plan that is larger than the device."""
    there = plan.device_bytes or 0
    key = next((key for key in ("kv_cache_memory_bytes", "gpu_memory_utilization") if key in config.engine), None)
    where = f"{config.file}: engine{f'.{key}' if key else ''}"
    what = (
        f"does not fit in the {there / GIB:.1f} GiB of a device beside {plan.weights_bytes / GIB:.1f} GiB "
        f"of weights and {plan.overhead_bytes / GIB:.1f} GiB for the engine's work"
    )
    left = there - plan.weights_bytes - plan.overhead_bytes
    cure = "Use a larger device, more of them (engine.tensor_parallel_size), or a quantised checkpoint."
    if key == "kv_cache_memory_bytes" and left > 0:
        cure = f"Set at most {left}."
    return Problem(where, what, config.engine[key] if key else "the weights", cure)


def _processor(config: Config, made: "VllmConfig") -> list[Problem]:
    """What vLLM's CPU engine finds out only after its start: it has no kernel for some uses of FP8."""
    import torch

    problems, name = [], str(config.engine.get("quantization") or "")
    if name.startswith("fp8") and getattr(made.model_config.hf_config, "quantization_config", None) is None:
        what, cure = "cannot quantise the weights on a CPU", "Remove it, or serve a checkpoint that is quantised."
        problems.append(Problem(f"{config.file}: engine.quantization", what, name, cure))
    cache = str(made.cache_config.cache_dtype)
    if cache.startswith("fp8") and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        what, cure = "needs a processor with AVX-512", "Remove it."
        problems.append(Problem(f"{config.file}: engine.kv_cache_dtype", what, cache, cure))
    return problems


def _load_parts(args: Mapping[str, Any]) -> "VllmConfig":
    """Load what an engine loads by name when it starts, and on a CPU the model without its weights."""
    with pinned("engine"):
        from vllm.model_executor.model_loader import get_model_loader
        from vllm.utils.hashing import get_hash_fn_by_name

    given = namespace(args)
    made = configure(given, 1, 0)
    get_hash_fn_by_name(made.cache_config.prefix_caching_hash_algo)(b"")
    get_model_loader(made.load_config)
    for name in (*(given.logits_processors or ()), *filter(None, [given.worker_extension_cls])):
        resolve_name(name)
    if device() == "cpu" and made.parallel_config.world_size == 1:
        _build_model(made)
    return made


def _build_model(made: "VllmConfig") -> None:
    """Build the model without memory for its weights: layers choose their kernels for this device, or refuse."""
    with pinned("engine"):
        from vllm.config import set_current_vllm_config
        from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
        from vllm.model_executor.model_loader.utils import initialize_model
        from vllm.utils.torch_utils import set_default_torch_dtype
    import torch

    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(made):
        init_distributed_environment(1, 0, f"file://{folder}/meeting", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        with set_default_torch_dtype(cast(torch.dtype, made.model_config.dtype)), torch.device("meta"):
            initialize_model(made)
    for layer in made.compilation_config.static_forward_context.values():
        backend = getattr(layer, "attn_backend", None)
        if backend is None:
            continue
        cache = made.cache_config
        if not backend.supports_kv_cache_dtype(cache.cache_dtype):
            raise ValueError(f"kv_cache_dtype is not supported by {backend.get_name()} on this device")
        if not backend.supports_block_size(cache.block_size):
            sizes = ", ".join(map(str, backend.get_supported_kernel_block_sizes()))
            raise ValueError(f"block_size is not supported by {backend.get_name()} on this device, which takes {sizes}")
