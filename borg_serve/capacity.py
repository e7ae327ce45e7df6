"""What fits where: the memory plan that `borg-serve check` prints, and the places the gate hands out.

Arithmetic over token counts and bytes. It does not know vLLM, nor what a request says.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from borg_serve.config import Limits

__all__ = ["OWN_TOKENS", "MemoryPlan", "Slots", "element_bytes", "kv_bytes_a_token", "slots"]

SLACK = 1.5
"""How much more than its part each of several API processes may take: the kernel deals connections out unevenly. With
none, 4 processes refused some of 240 users where 256 had a place; what is too much waits in the engine's own queue."""

OWN_TOKENS = 2048
"""Tokens of its own (beyond the identity) that a request is counted on to hold in the KV cache: a few turns of chat.

Longer ones are no danger: vLLM preempts and recomputes when the cache is full. It only costs time."""


@dataclass(frozen=True)
class Slots:
    """Places of one API process."""

    concurrent: int
    queued: int
    queued_bytes: int


def slots(
    limits: Limits, *, kv_tokens: int, block_tokens: int, prefix_tokens: int, max_num_seqs: int, processes: int
) -> Slots:
    """Divide what the KV cache and the scheduler hold among the API processes.

    The queue is short on purpose, an eighth of what runs: who waits longer is better served by another try elsewhere.
    """
    own_tokens = max(0, kv_tokens - prefix_tokens // block_tokens * block_tokens)
    fits = max(1, min(max_num_seqs, own_tokens // OWN_TOKENS))
    concurrent = fits if limits.concurrent == "auto" else limits.concurrent
    queued = max(1, concurrent // 8) if limits.queued == "auto" else limits.queued
    # A byte of text is at most one token, so this many bytes never need more cache than there is.
    queued_bytes = max(own_tokens, limits.body_bytes) if limits.queued_bytes == "auto" else limits.queued_bytes
    return Slots(_share(concurrent, processes), _share(queued, processes), _share(queued_bytes, processes))


def _share(total: int, processes: int) -> int:
    return math.ceil(total * (SLACK if processes > 1 else 1) / processes)


def element_bytes(dtype: str) -> int:
    """Bytes of one number of a model that computes in this dtype."""
    return 4 if dtype == "float32" else 2


def kv_bytes_a_token(
    engine: Mapping[str, Any], shards: int, *, dtype: str, num_layers: int, num_kv_heads: int, head_dim: int
) -> int:
    """Bytes that one token takes in the KV cache of each of `shards` devices.

    `engine`: the profile's section. `dtype`: what the model computes in, and keeps there unless the profile says more.
    """
    element = 1 if str(engine.get("kv_cache_dtype", "auto")).startswith("fp8") else element_bytes(dtype)
    return 2 * num_layers * max(1, num_kv_heads // shards) * head_dim * element


@dataclass(frozen=True)
class MemoryPlan:
    """Where one device's memory goes; all sizes in bytes, all counts in tokens."""

    weights_bytes: int
    kv_bytes_a_token: int
    kv_bytes: int
    block_tokens: int
    prefix_tokens: int

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
