"""What vLLM's KV cache manager works out for every token, and what is known without it for most of them.

A request that decodes needs a new block once in a block's tokens, and fills one as often. In between, two calls a
token find that there is nothing to do. This module knows vLLM's manager by its shape only.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["Allocate", "Cache", "allocate_where_needed", "cache_where_full"]

Allocate = Callable[..., Any]
"""A request, how many new tokens it gets, and more -> its new blocks, or None if there are too few."""
Cache = Callable[[Any, int], None]
"""A request and how many of its tokens are computed; full blocks among these become a prefix for others."""


def allocate_where_needed(
    allocate: Allocate, block_size: int, blocks: Mapping[str, Sequence[Any]], cached: Mapping[str, int], nothing: Any
) -> Allocate:
    """Return an allocator with the same results that answers `nothing` by itself for a token that has its slot.

    `blocks`: those of each request, by its id. `cached`: how many are a prefix for others. For full attention only.
    """

    def allocate_slots(
        request: Any, num_new_tokens: int, *args: Any, num_lookahead_tokens: int = 0, **more: Any
    ) -> Any:
        if num_new_tokens == 1 and not num_lookahead_tokens and not args and not more:
            tokens, name = request.num_computed_tokens + 1, request.request_id
            if tokens // block_size <= cached.get(name, 0) and tokens <= len(blocks.get(name, ())) * block_size:
                return nothing
        return allocate(request, num_new_tokens, *args, num_lookahead_tokens=num_lookahead_tokens, **more)

    return allocate_slots


def cache_where_full(cache: Cache, block_size: int, cached: Mapping[str, int]) -> Cache:
    """Return the same that does nothing by itself while no other block has become full."""

    def cache_blocks(request: Any, num_computed_tokens: int) -> None:
        if num_computed_tokens // block_size > cached.get(request.request_id, 0):
            cache(request, num_computed_tokens)

    return cache_blocks
