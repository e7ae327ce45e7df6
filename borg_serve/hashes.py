"""The identity's block hashes, computed once: vLLM chains a SHA-256 over every KV block of every prompt.

At 16 tokens a block that is some 130 hashes, most of a millisecond, for the same tokens in every request. This knows
vLLM's requests and hasher by shape only; it learns from the first requests how far they are alike.
"""

from collections.abc import Callable
from typing import Any

__all__ = ["remembering"]

Hasher = Callable[[Any], list[bytes]]
"""A vLLM request -> hashes of its full blocks that have none yet."""


def remembering(hasher: Hasher, block_size: int) -> Hasher:
    """Return a hasher with the same results, which does not compute the longest beginning of all requests again.

    `block_size`: tokens a hash. Requests whose hashes depend on more than their tokens (images, adapters, salts,
    embeddings) go to `hasher` as they are.
    """
    known: tuple[list[int], list[bytes]] = [], []  # replaced as a whole: two threads of vLLM's ask

    def learn(ids: list[int], found: list[bytes]) -> None:
        nonlocal known
        tokens, _ = known
        parts = (index for index, (one, other) in enumerate(zip(tokens, ids, strict=False)) if one != other)
        alike = next(parts, min(len(tokens), len(ids)) if tokens else len(ids))
        blocks = min(alike // block_size, len(found))
        if blocks:  # else a request that is like no other: forget nothing for it
            known = ids[: blocks * block_size], found[:blocks]

    def hash_blocks(request: Any) -> list[bytes]:
        before = request.block_hashes
        if before or not _plain(request):
            return hasher(request)
        tokens, hashes = known
        ids = request.prompt_token_ids
        if not hashes or ids[: len(tokens)] != tokens:
            found = hasher(request)
            learn(ids, found)
            return found
        request.block_hashes = list(hashes)  # vLLM's hasher goes on behind them
        try:
            return hashes + hasher(request)
        finally:
            request.block_hashes = before  # the very list: its owner is about to extend it

    return hash_blocks


def _plain(request: Any) -> bool:
    """Whether the hashes of a new request follow from its token ids alone."""
    more = (request.mm_features, request.lora_request, request.cache_salt, request.prompt_embeds)
    return request.prompt_token_ids is not None and not any(item is not None and item != [] for item in more)
