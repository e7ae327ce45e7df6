"""Estimates how many GPUs a number of users needs, from the merged 7B checkpoint's sizes and measured speeds.

Arithmetic only. It does not know the machine or what users really send.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from borg_serve.engine import memory
from borg_serve.engine.memory import MemoryPlan, ModelSizes
from borg_serve.errors import ConfigError, Problem

__all__ = ["GPUS", "MODEL", "Gpu", "Plan", "Speed", "Workload", "plan", "speed"]

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """A GPU by its maker's figures."""

    name: str
    memory_bytes: int
    bytes_s: float
    """Memory bandwidth."""
    flop_s: float
    """Dense arithmetic in 16 bits."""
    two_passes: bool
    """Whether attention can read the identity once for all (docs/attention.md)."""


GPUS: Mapping[str, Gpu] = {
    "h100": Gpu("H100 80GB SXM", 80 * GIB, 3.35e12, 990e12, True),
    "h200": Gpu("H200 141GB SXM", 140 * GIB, 4.80e12, 990e12, True),
    "a100-80gb": Gpu("A100 80GB SXM", 80 * GIB, 2.04e12, 312e12, False),
    "l40s": Gpu("L40S 48GB", 45 * GIB, 0.864e12, 362e12, False),
}

# The merged 7B checkpoint, in 16 bits.
MODEL = ModelSizes(15_231_233_024, "bfloat16", num_layers=28, num_kv_heads=4, head_dim=128)
READ_BYTES = 14.14e9
"""Weights that a step reads: all but the input embedding."""
PREFILL_FLOP = 13.45e9
"""A prompt token."""
IDENTITY_TOKENS = 2132
BLOCK_TOKENS = 16
ATTENTION_HEADS = 28

# Fitted to measurements on H100 and H200 GPUs with vLLM 0.29.0: docs/results/h100.md, multi-gpu.md, api-process.md.
BANDWIDTH_SHARE = 3.0 / 3.35
"""The share of the maker's bandwidth that reading weights reaches."""
PREFILL_SHARE = 0.6
"""The share of the maker's arithmetic that prefill reaches."""
SHARED_READ = 2.3
"""How much faster than the maker's bandwidth a prefix that all sequences share is read, because caches serve a part."""
PASS_S = 0.3e-3
"""Of every step: the cost of a pass over the identity for all rows, beside its arithmetic."""
ATTENTION_FLOP = 4 * ATTENTION_HEADS * MODEL.head_dim * MODEL.num_layers
"""Of one token that attends to another, all layers."""
STEP_S = 1.55e-3
"""Of every step: what is neither reading nor arithmetic."""
SEQUENCE_S = 2.6e-6
"""The same, for each sequence in the step."""
TP_SHARE = 0.68
"""The share of its own speed that a GPU reaches as one of two; more than two were not measured."""
MIXED_S = 11e-3
"""How much longer a step with prompts takes while others decode: it runs outside the full CUDA graphs."""
API_TOKEN_S = 47e-6
"""An API process's time for a token, with the token's part of its request."""
API_EVENT_S = 1 / 9_000 - API_TOKEN_S
"""An API process's time for an event of a stream, which holds engine.stream_interval tokens."""
REPLICA_SHARE = 0.7
"""The share of a single server's API process that one of a Ray Serve replica carries."""


@dataclass(frozen=True)
class Workload:
    """What one request is taken to be; the defaults are those of the measurements."""

    new_tokens: int = 120
    """Prompt tokens of the request that no cache holds."""
    output_tokens: int = 128
    spread: bool = True
    """Whether answers differ in length, so that some end, and prompts come, in most steps; else all begin together."""


@dataclass(frozen=True)
class Speed:
    """Output tokens/s of one replica with `users` at once, and where a step's milliseconds go."""

    tokens_s: float
    weights_ms: float
    identity_ms: float
    own_ms: float
    rest_ms: float
    prefill_ms: float
    """Of a step, for the new requests that come with it."""
    mixed_ms: float
    """Of a step, for its running outside the full CUDA graphs where prompts come with it."""


@dataclass(frozen=True)
class Plan:
    """An estimate. Memory is of one GPU, speeds are of one replica where not said otherwise."""

    gpu: str
    users: int
    context_tokens: int
    tensor_parallel_size: int
    replicas: int
    users_a_replica: int
    """The most at once, by memory and by engine.max_num_seqs."""
    users_by_memory: int
    weights_bytes: int
    kv_bytes: int
    kv_tokens: int
    api_processes: int
    api_tokens_s: float
    """What one replica's API processes carry."""
    tokens_s: float
    """All replicas together with these users, as far as their API processes carry it."""
    tokens_s_a_user: float
    engine_tokens_s: float
    """One replica's engine alone."""
    tokens_s_unshared: float
    """All replicas together, if every request brought an identity of its own."""
    tokens_s_apart: float | None
    """All together, if each GPU were a replica of its own; None where it is, or would not hold its users."""
    speed: Speed


def plan(
    gpu: str,
    users: int,
    context_tokens: int,
    engine: Mapping[str, Any],
    processes: int = 1,
    workload: Workload | None = None,
) -> Plan:
    """Size a service for `users` requests at once with `context_tokens` each, identity included.

    `engine`: the profile's section. `processes`: API processes where one replica is enough; on a cluster each has one.
    Raises ConfigError for numbers that cannot be planned for.
    """
    device = _device(gpu)
    load = workload or Workload()
    _check(users, context_tokens, int(engine.get("max_model_len") or 32768))
    tp, planned = _fit(device, context_tokens, engine)
    by_memory = planned.users(context_tokens)
    most = min(by_memory, int(engine.get("max_num_seqs") or 256))
    replicas = math.ceil(users / most)
    api_processes = processes if replicas == 1 else 1
    batch = math.ceil(users / replicas)
    reached = speed(device, batch, context_tokens, engine, tp, load)
    unshared = speed(device, batch, context_tokens, engine, tp, load, shared=False)
    carried = api_tokens_s(engine) * (REPLICA_SHARE if replicas > 1 else api_processes)

    def together(engine_tokens_s: float) -> float:
        """All replicas, as far as their API processes carry it."""
        return min(engine_tokens_s, carried) * users / batch

    total = together(reached.tokens_s)
    apart = None
    if tp > 1 and _memory(device, engine, 1).users(context_tokens) >= (own := math.ceil(users / (replicas * tp))):
        alone = speed(device, own, context_tokens, engine, 1, load)
        apart = min(alone.tokens_s, api_tokens_s(engine) * REPLICA_SHARE) * users / own
    return Plan(
        gpu=device.name,
        users=users,
        context_tokens=context_tokens,
        tensor_parallel_size=tp,
        replicas=replicas,
        users_a_replica=most,
        users_by_memory=by_memory,
        weights_bytes=planned.weights_bytes,
        kv_bytes=planned.kv_bytes,
        kv_tokens=planned.kv_tokens,
        api_processes=api_processes,
        api_tokens_s=carried,
        tokens_s=total,
        tokens_s_a_user=total / users,
        engine_tokens_s=reached.tokens_s,
        tokens_s_unshared=together(unshared.tokens_s),
        tokens_s_apart=apart,
        speed=reached,
    )


def speed(
    gpu: Gpu,
    users: int,
    context_tokens: float,
    engine: Mapping[str, Any],
    tp: int = 1,
    workload: Workload | None = None,
    *,
    shared: bool = True,
    identity_tokens: int = IDENTITY_TOKENS,
) -> Speed:
    """Output tokens/s of one replica's engine while `users` keep one request each in it.

    A step reads the weights once, and the identity and each user's own tokens from the KV cache; a request's prefill is
    spread over the steps that write its answer. `shared`: the identity is cached once for all; else every request
    computes and reads its own.
    """
    load = workload or Workload()
    gpus = tp * (TP_SHARE if tp > 1 else 1)
    bytes_s, flop_s = gpu.bytes_s * BANDWIDTH_SHARE * gpus, gpu.flop_s * PREFILL_SHARE * gpus
    kv_bytes = memory.kv_bytes_a_token(engine, MODEL)
    weights_s = READ_BYTES * memory.weights_share(engine) / bytes_s
    identity_s = users * identity_tokens * kv_bytes / (gpu.bytes_s * gpus * SHARED_READ if shared else bytes_s)
    if shared and gpu.two_passes:
        identity_s = min(identity_s, PASS_S + users * identity_tokens * ATTENTION_FLOP / flop_s)
    own_s = users * max(0.0, context_tokens - identity_tokens) * kv_bytes / bytes_s
    rest_s = STEP_S + users * SEQUENCE_S
    computed = load.new_tokens + (0 if shared else identity_tokens)
    prefill_s = users * computed * PREFILL_FLOP / flop_s / load.output_tokens
    mixed_s = MIXED_S * _mixed(users, engine, load) if load.spread else 0.0
    parts = (weights_s, identity_s, own_s, rest_s, prefill_s, mixed_s)
    step_s = sum(parts)
    milliseconds = [1000 * part for part in parts]
    return Speed(users / step_s, *milliseconds)


def _mixed(users: int, engine: Mapping[str, Any], load: Workload) -> float:
    """The share of steps in which prompts come to others that are decoding."""
    interval = int(engine.get("prefill_schedule_interval") or 1)
    none_waits = (1 - 1 / load.output_tokens) ** ((users - 1) * interval)
    return (1 - none_waits) / interval


def api_tokens_s(engine: Mapping[str, Any]) -> float:
    """Output tokens/s that one API process renders and streams."""
    return 1 / (API_TOKEN_S + API_EVENT_S / int(engine.get("stream_interval") or 1))


def _device(gpu: str) -> Gpu:
    if gpu not in GPUS:
        raise ConfigError([Problem("--gpu", "is not a GPU that is known here", gpu, f"Name one of {', '.join(GPUS)}.")])
    return GPUS[gpu]


def _check(users: int, context_tokens: int, longest: int) -> None:
    problems = []
    if users < 1:
        problems.append(Problem("--users", "must be 1 or more", users, "Say how many requests run at once."))
    if not IDENTITY_TOKENS < context_tokens <= longest:
        what = (
            f"must be more than the identity's {IDENTITY_TOKENS} tokens, and at most engine.max_model_len ({longest})"
        )
        cure = "Count the identity, the conversation and the answer."
        problems.append(Problem("--context", what, context_tokens, cure))
    if problems:
        raise ConfigError(problems)


def _fit(gpu: Gpu, context_tokens: int, engine: Mapping[str, Any]) -> tuple[int, MemoryPlan]:
    """The tensor parallelism of the profile, or the smallest above it at which one user fits; and one GPU's memory."""
    least, most = int(engine.get("tensor_parallel_size") or 1), MODEL.num_kv_heads
    for tp in (size for size in range(least, most + 1) if ATTENTION_HEADS % size == 0 and most % size == 0):
        planned = _memory(gpu, engine, tp)
        if planned.users(context_tokens) > 0:
            return tp, planned
    what = f"one user with {context_tokens} tokens fits on no replica of up to {most} {gpu.name}"
    got = f"engine.tensor_parallel_size {least}"
    raise ConfigError([Problem("--gpu", what, got, "Use a larger GPU, or engine.quantization: fp8.")])


def _memory(gpu: Gpu, engine: Mapping[str, Any], tp: int) -> MemoryPlan:
    block = engine.get("block_size")
    block_tokens = block if isinstance(block, int) else BLOCK_TOKENS
    return memory.plan(engine, MODEL, gpu.memory_bytes, block_tokens, IDENTITY_TOKENS, tp)
