"""The memory plan of a device, and how many requests (slots) its KV cache holds.

Arithmetic over token counts and bytes. Knows nothing of vLLM's objects or of requests.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from borg_serve.config import Limits

__all__ = [
    "GIB",
    "OWN_TOKENS",
    "MemoryPlan",
    "ModelSizes",
    "Slots",
    "element_bytes",
    "kv_bytes_a_token",
    "plan",
    "reserve",
    "slots",
]

OWN_TOKENS = 2048
"""Tokens beyond the identity that a request holds in the KV cache, for plans: a few turns of chat."""

GIB = 1 << 30
OVERHEAD_BYTES = 4 * GIB
"""A GPU's memory beside the weights and the KV cache: activations, CUDA graphs and the context (an estimate)."""
CPU_OVERHEAD_BYTES = GIB
"""The same of a CPU engine: its libraries and activations."""


@dataclass(frozen=True)
class Slots:
    """What an engine holds at once, for all API processes in front of it."""

    concurrent: int
    """Sequences."""
    reserved: int
    """Sequences beyond these, kept for keys that have less than their share."""
    kv_tokens: int
    """Tokens of the KV cache behind the identity."""
    block_tokens: int
    queued_bytes: int
    """Client text that may wait."""


def reserve(max_num_seqs: int) -> int:
    """How many sequences an engine with API keys runs beyond `max_num_seqs`."""
    return max(1, max_num_seqs // 8)


def slots(
    limits: Limits, *, kv_tokens: int, block_tokens: int, prefix_tokens: int, max_num_seqs: int, reserved: int = 0
) -> Slots:
    """What the KV cache and the scheduler hold. `reserved`: sequences that the engine runs beyond `max_num_seqs`."""
    own_tokens = max(0, kv_tokens - prefix_tokens // block_tokens * block_tokens)
    concurrent = max_num_seqs if limits.concurrent == "auto" else limits.concurrent
    if reserved:
        reserved = min(reserve(concurrent), max(0, max_num_seqs + reserved - concurrent))
    # A byte of text is at most one token, so this many bytes always fit in the cache.
    queued_bytes = max(own_tokens, limits.body_bytes) if limits.queued_bytes == "auto" else limits.queued_bytes
    return Slots(concurrent, reserved, own_tokens, block_tokens, queued_bytes)


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that decide its memory."""

    weights_bytes: int
    """Of all devices together, before the engine quantises."""
    dtype: str
    """What the model computes in."""
    num_layers: int
    num_kv_heads: int
    head_dim: int


def element_bytes(dtype: str) -> int:
    """Bytes of one number of a model that computes in this dtype."""
    return 4 if dtype == "float32" else 2


def weights_share(engine: Mapping[str, Any]) -> float:
    """The share of the weights' bytes that is left after the quantisation in the profile's `engine` section."""
    return 0.5 if engine.get("quantization") == "fp8" else 1.0


def kv_bytes_a_token(engine: Mapping[str, Any], model: ModelSizes, shards: int = 1) -> int:
    """Bytes that one token takes in the KV cache of each of `shards` devices, by the profile's `engine` section."""
    element = 1 if str(engine.get("kv_cache_dtype", "auto")).startswith("fp8") else element_bytes(model.dtype)
    return 2 * model.num_layers * max(1, model.num_kv_heads // shards) * model.head_dim * element


@dataclass(frozen=True)
class MemoryPlan:
    """Where one device's memory goes; all sizes in bytes, all counts in tokens."""

    weights_bytes: int
    kv_bytes_a_token: int
    kv_bytes: int
    block_tokens: int
    prefix_tokens: int
    device_bytes: int | None = None
    """Memory of the device; None where it is not known."""
    overhead_bytes: int = OVERHEAD_BYTES

    @property
    def fits(self) -> bool:
        """Whether the device holds all of it, as far as that is known."""
        used = self.weights_bytes + self.overhead_bytes + self.kv_bytes
        return self.device_bytes is None or (self.kv_bytes > 0 and used <= self.device_bytes)

    @property
    def kv_tokens(self) -> int:
        """Tokens the KV cache holds, in whole blocks."""
        return self.kv_bytes // (self.kv_bytes_a_token * self.block_tokens) * self.block_tokens

    @property
    def shared_tokens(self) -> int:
        """The identity's tokens in full blocks: stored once for all users."""
        return self.prefix_tokens // self.block_tokens * self.block_tokens

    @property
    def tail_tokens(self) -> int:
        """The identity's tokens that no full block covers: every request computes and stores them again."""
        return self.prefix_tokens - self.shared_tokens

    def users(self, context_tokens: int) -> int:
        """How many users with this many tokens each, identity included, the KV cache holds at once."""
        own = context_tokens - self.shared_tokens
        blocks = -(-max(own, 1) // self.block_tokens)
        return max(0, (self.kv_tokens - self.shared_tokens) // (blocks * self.block_tokens))


def plan(
    engine: Mapping[str, Any],
    model: ModelSizes,
    device_bytes: int,
    block_tokens: int,
    prefix_tokens: int,
    shards: int | None = None,
    *,
    on_cpu: bool = False,
) -> MemoryPlan:
    """Plan the memory of one device with `device_bytes`, by the profile's `engine` section.

    `shards`: devices that share the model, by default the section's `tensor_parallel_size`.
    """
    shards = shards or int(engine.get("tensor_parallel_size") or 1)
    weights = int(model.weights_bytes * weights_share(engine)) // shards
    overhead = CPU_OVERHEAD_BYTES if on_cpu else OVERHEAD_BYTES
    usable = int(float(engine.get("gpu_memory_utilization") or 0.9) * device_bytes)
    kv_bytes = int(engine.get("kv_cache_memory_bytes") or max(0, usable - weights - overhead))
    a_token = kv_bytes_a_token(engine, model, shards)
    if (blocks := engine.get("num_gpu_blocks_override")) is not None:
        kv_bytes = int(blocks) * block_tokens * a_token
    return MemoryPlan(weights, a_token, kv_bytes, block_tokens, prefix_tokens, device_bytes, overhead)
