"""How many GPUs some users need: an estimate from the merged 7B checkpoint's sizes and the speeds of an H100 and H200s.

Arithmetic only. It does not know a machine, nor what users really send.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from borg_serve.capacity import MemoryPlan, kv_bytes_a_token
from borg_serve.errors import ConfigError, Problem

__all__ = ["GPUS", "Gpu", "Plan", "Speed", "Workload", "plan", "speed"]

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
WEIGHTS_BYTES = 15_231_233_024
READ_BYTES = 14.14e9
"""Weights that a step reads: all but the input embedding."""
PREFILL_FLOP = 13.45e9
"""A prompt token."""
LAYERS, KV_HEADS, HEAD_DIM = 28, 4, 128
IDENTITY_TOKENS = 2132
BLOCK_TOKENS = 16
ATTENTION_HEADS = 28

# Measured on one H100 and one and two H200, vLLM 0.29.0.
BANDWIDTH_SHARE = 3.0 / 3.35
"""Of the maker's bandwidth, what reading weights reaches."""
PREFILL_SHARE = 0.6
"""Of the maker's arithmetic, what prefill is counted on to reach."""
SHARED_READ = 2.3
"""A prefix that all sequences share is read this many times faster than the maker's bandwidth: the chip's caches serve
a part of it. 139.5 us a layer for 256 sequences and 2,048 tokens."""
PASS_S = 0.3e-3
"""Of every step, what a pass over the identity for all rows costs beside its arithmetic: with it 16 us a layer at 64
rows, 22 at 256 (docs/results/h100.md)."""
ATTENTION_FLOP = 4 * ATTENTION_HEADS * HEAD_DIM * LAYERS
"""Of one token looking at another, all layers."""
STEP_S = 1.55e-3
"""Of every step, what is neither reading nor arithmetic. This and the next are chosen to give the tokens/s that were
served at 64 and 256 users: 7,260 and 18,250 on an H100, 9,610 and 21,250 on an H200 (docs/results/h100.md)."""
SEQUENCE_S = 2.6e-6
"""Of every step, the same for each sequence in it."""
TP_SHARE = 0.68
"""Of a GPU's own speed, what it reaches as one of several. Chosen to come near the 294, 12,580 and 24,390 tokens/s that
two H200 served to 1, 64 and 256 users (docs/results/multi-gpu.md); more than two were not measured."""
MIXED_S = 11e-3
"""What a step with prompts takes longer, while others are decoding: it runs outside the full CUDA graphs, on the host's
time. Chosen to come near what an H200 served to 64 and 256 users whose answers differed in length: 5,650 and 12,150
tokens/s, 7,180 and 16,250 with engine.prefill_schedule_interval at 4 (docs/results/multi-gpu.md)."""
API_TOKEN_S = 47e-6
"""Time of an API process for a token, the token's part of a request included (docs/results/api-process.md)."""
API_EVENT_S = 1 / 9_000 - API_TOKEN_S
"""And for an event of a stream, which brings engine.stream_interval tokens. With one, hosts of GPUs carried 9,000
tokens/s (8,740 to 9,030 at 256 users)."""
REPLICA_SHARE = 0.7
"""Of what a single server's API process carries, what that of a replica of Ray Serve does. Chosen to come near the
11,030 tokens/s that one on an H200 served to 256 users, and the 21,400 of two with as many each
(docs/results/multi-gpu.md)."""
OVERHEAD_BYTES = 4 * GIB
"""Activations, CUDA graphs and the context."""


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
    tp, memory = _fit(device, context_tokens, engine)
    by_memory = memory.users(context_tokens)
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
        weights_bytes=memory.weights_bytes,
        kv_bytes=memory.kv_bytes,
        kv_tokens=memory.kv_tokens,
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
    kv_bytes = _kv_bytes_a_token(engine, 1)
    weights_s = READ_BYTES * _weights_share(engine) / bytes_s
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
    least = int(engine.get("tensor_parallel_size") or 1)
    for tp in (size for size in range(least, KV_HEADS + 1) if ATTENTION_HEADS % size == 0 and KV_HEADS % size == 0):
        memory = _memory(gpu, engine, tp)
        if memory.users(context_tokens) > 0:
            return tp, memory
    what = f"one user with {context_tokens} tokens fits on no replica of up to {KV_HEADS} {gpu.name}"
    got = f"engine.tensor_parallel_size {least}"
    raise ConfigError([Problem("--gpu", what, got, "Use a larger GPU, or engine.quantization: fp8.")])


def _memory(gpu: Gpu, engine: Mapping[str, Any], tp: int) -> MemoryPlan:
    weights = int(WEIGHTS_BYTES * _weights_share(engine)) // tp
    usable = int(float(engine.get("gpu_memory_utilization") or 0.9) * gpu.memory_bytes)
    kv_bytes = engine.get("kv_cache_memory_bytes") or max(0, usable - weights - OVERHEAD_BYTES)
    block = engine.get("block_size")
    return MemoryPlan(
        weights_bytes=weights,
        kv_bytes_a_token=_kv_bytes_a_token(engine, tp),
        kv_bytes=int(kv_bytes),
        block_tokens=block if isinstance(block, int) else BLOCK_TOKENS,
        prefix_tokens=IDENTITY_TOKENS,
    )


def _weights_share(engine: Mapping[str, Any]) -> float:
    return 0.5 if engine.get("quantization") == "fp8" else 1.0


def _kv_bytes_a_token(engine: Mapping[str, Any], tp: int) -> int:
    return kv_bytes_a_token(engine, tp, dtype="bfloat16", num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
