"""What vLLM computes for the prefix in every request, computed once: block hashes, their lookup, a table's token ids.

vLLM chains a SHA-256 over every KV block of a prompt and looks each hash up; a GPU's worker copies every prompt into
its table of token ids. This module learns from the first requests how far they are alike. It knows vLLM's requests,
hasher, lookup and table by their shape only.
"""

from collections.abc import Callable
from hashlib import sha256
from typing import Any

__all__ = ["Hasher", "Lookup", "Writer", "remember_blocks", "remember_hashes", "remember_ids"]

Hasher = Callable[[Any], list[bytes]]
"""A vLLM request -> hashes of its full blocks that have none yet."""
Lookup = Callable[[list[bytes], int], tuple[tuple[list[Any]], int, int]]
"""Hashes of a prompt's blocks, most tokens -> ([the cached blocks it begins with], their tokens, 0)."""
Writer = Callable[[int, int, list[int]], None]
"""A row of the table, a position in it, token ids to write there."""


class _Beginning:
    """The longest beginning of all lists seen so far, in units of `unit` items, with a value for each unit."""

    def __init__(self, unit: int = 1) -> None:
        self._unit = unit
        self._kept: tuple[list[Any], list[Any]] = [], []  # replaced as a whole: vLLM calls from two threads

    def values(self, items: list[Any]) -> list[Any]:
        """The kept values, or none if `items` do not begin with everything that is kept."""
        known, values = self._kept
        return values if values and items[: len(known)] == known else []

    def learn(self, items: list[Any], values: list[Any]) -> None:
        """Keep what `items` and all lists before have in common, as far as there are values."""
        known, _ = self._kept
        differing = (index for index, (one, other) in enumerate(zip(known, items, strict=False)) if one != other)
        alike = next(differing, min(len(known), len(items)) if known else len(items))
        units = min(alike // self._unit, len(values))
        if units:  # a list that is like no other changes nothing
            self._kept = items[: units * self._unit], values[:units]

    def forget(self) -> None:
        self._kept = [], []


def remember_hashes(hasher: Hasher, block_size: int, prefix_tokens: int = 0) -> Hasher:
    """Return a hasher with the same results that does not compute the hashes of the prefix again.

    `block_size`: tokens a hash. `prefix_tokens`: how many tokens all prompts begin with; a request with a salt shares
    the full blocks of these, and no block behind them with a request of another salt. vLLM salts the first block, and
    so all: without `prefix_tokens` that stays so. Requests whose hashes depend on more (images, adapters, embeddings)
    go to `hasher` as they are.
    """
    prefix = _Beginning(block_size)
    salted = _salted(hasher, block_size, prefix_tokens // block_size)

    def hash_blocks(request: Any) -> list[bytes]:
        before = request.block_hashes
        if (len(before) + 1) * block_size > request.num_tokens:
            return []  # asked for every token, while a block becomes full once in a while
        if not _depends_on_tokens_alone(request):
            return hasher(request)
        if request.cache_salt is not None:
            return salted(request)
        if before:
            return hasher(request)
        hashes = prefix.values(request.prompt_token_ids)
        if not hashes:
            found = hasher(request)
            prefix.learn(request.prompt_token_ids, found)
            return found
        request.block_hashes = list(hashes)  # vLLM's hasher continues after them
        try:
            return hashes + hasher(request)
        finally:
            request.block_hashes = before  # the same list: its owner extends it next

    return hash_blocks


def _salted(hasher: Hasher, block_size: int, shared: int) -> Hasher:
    """A hasher for requests with a salt: it enters the chain of hashes behind so many blocks."""
    size = shared * block_size
    known: tuple[list[int], list[bytes]] = [], []

    def of_the_prefix(request: Any) -> list[bytes]:
        """The hashes of the blocks that all share, or none if the prompt begins otherwise."""
        nonlocal known
        begins, hashes = request.prompt_token_ids[:size], known[1]
        if not hashes and len(begins) == size:
            hashes = hasher(request)[:shared]
            known = begins, hashes
        return hashes if begins == known[0] else []

    def hash_blocks(request: Any) -> list[bytes]:
        before, salt = request.block_hashes, request.cache_salt
        if not shared or len(before) > shared:
            return hasher(request)
        request.cache_salt, request.block_hashes = None, []
        try:
            hashes = of_the_prefix(request)
            if hashes:
                parent = sha256(hashes[-1] + salt.encode()).digest()
                request.block_hashes = [*hashes[:-1], parent]  # vLLM's hasher continues after it
                return hashes[len(before) :] + hasher(request)
        finally:
            request.cache_salt, request.block_hashes = salt, before
        return hasher(request)

    return hash_blocks


def remember_blocks(lookup: Lookup, block_size: int) -> Lookup:
    """Return a lookup in the same KV cache with the same results that does not look the prefix up again.

    A block that was given to another request has another hash: the kept blocks are checked for the hash they had.
    """
    prefix = _Beginning()

    def find_blocks(hashes: list[bytes], limit: int) -> tuple[tuple[list[Any]], int, int]:
        kept = prefix.values(hashes)
        if any(block.block_hash is not key for block, key in kept):
            prefix.forget()
            kept = []
        tokens = len(kept) * block_size
        if not kept or tokens > limit:
            found = lookup(hashes, limit)
            prefix.learn(hashes, [(block, block.block_hash) for block in found[0][0]])
            return found
        ((rest,), more, _) = lookup(hashes[len(kept) :], limit - tokens)
        return ([*(block for block, _ in kept), *rest],), tokens + more, 0

    return find_blocks


def remember_ids(write: Writer) -> Writer:
    """Return a writer to the same table that does not write the prefix into a row that holds it already.

    Writes that do not go through this writer must lie behind a row's prompt, as those of generated tokens do.
    """
    prefix = _Beginning()
    rows: set[int] = set()  # rows that begin with the prefix, whether or not a request uses them

    def beginning(ids: list[int]) -> list[int]:
        kept = prefix.values(ids)
        if not kept:
            prefix.learn(ids, ids)
            kept = prefix.values(ids)
        if not kept:  # an engine's warm-up prompts come first and are of another kind
            prefix.forget()
            rows.clear()
            prefix.learn(ids, ids)
            kept = ids
        return kept

    def write_ids(row: int, start: int, ids: list[int]) -> None:
        kept = [] if start else beginning(ids)
        if kept and row in rows:
            write(row, len(kept), ids[len(kept) :])
            return
        rows.discard(row)
        if kept:
            rows.add(row)
        write(row, start, ids)

    return write_ids


def _depends_on_tokens_alone(request: Any) -> bool:
    more = (request.mm_features, request.lora_request, request.prompt_embeds)
    return request.prompt_token_ids is not None and not any(item is not None and item != [] for item in more)
