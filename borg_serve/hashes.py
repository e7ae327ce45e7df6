"""What vLLM does with the identity in every request, done once: its blocks' hashes, their lookup, its token ids.

vLLM chains a SHA-256 over every KV block of every prompt, then looks each hash up; a GPU's worker copies every prompt
into its table of token ids. At 16 tokens a block that is some 130 hashes and lookups and 2,100 ids, most of a
millisecond, for the same tokens in every request. This knows vLLM's requests, hasher, lookup and table by shape only;
it learns from the first requests how far they are alike.
"""

from collections.abc import Callable
from typing import Any

__all__ = ["Finder", "Hasher", "Writer", "finding", "remembering", "writing"]

Hasher = Callable[[Any], list[bytes]]
"""A vLLM request -> hashes of its full blocks that have none yet."""
Finder = Callable[[list[bytes], int], tuple[tuple[list[Any]], int, int]]
"""Hashes of a prompt's blocks, most tokens -> ([the cached blocks it begins with], their tokens, 0)."""
Writer = Callable[[int, int, list[int]], None]
"""A row of the table, where in it, token ids to write there."""


class _Beginning:
    """The longest beginning of all the lists it has been told of, in steps of `step`, and a value for each step."""

    def __init__(self, step: int = 1) -> None:
        self._step = step
        self._kept: tuple[list[Any], list[Any]] = [], []  # replaced as a whole: two threads of vLLM's ask

    def values(self, items: list[Any]) -> list[Any]:
        """The values of what `items` begin with; none if they do not begin with all of it."""
        known, values = self._kept
        return values if values and items[: len(known)] == known else []

    def learn(self, items: list[Any], values: list[Any]) -> None:
        """Keep what `items` and all before have in common, as far as there are values."""
        known, _ = self._kept
        parts = (index for index, (one, other) in enumerate(zip(known, items, strict=False)) if one != other)
        alike = next(parts, min(len(known), len(items)) if known else len(items))
        steps = min(alike // self._step, len(values))
        if steps:  # else a list that is like no other: forget nothing for it
            self._kept = items[: steps * self._step], values[:steps]

    def forget(self) -> None:
        self._kept = [], []


def remembering(hasher: Hasher, block_size: int) -> Hasher:
    """Return a hasher with the same results, which does not compute the longest beginning of all requests again.

    `block_size`: tokens a hash. Requests whose hashes depend on more than their tokens (images, adapters, salts,
    embeddings) go to `hasher` as they are.
    """
    prefix = _Beginning(block_size)

    def hash_blocks(request: Any) -> list[bytes]:
        before = request.block_hashes
        if before or not _plain(request):
            return hasher(request)
        hashes = prefix.values(request.prompt_token_ids)
        if not hashes:
            found = hasher(request)
            prefix.learn(request.prompt_token_ids, found)
            return found
        request.block_hashes = list(hashes)  # vLLM's hasher goes on behind them
        try:
            return hashes + hasher(request)
        finally:
            request.block_hashes = before  # the very list: its owner is about to extend it

    return hash_blocks


def finding(find: Finder, block_size: int) -> Finder:
    """Return a lookup in the same KV cache with the same results, which does not look for the shared beginning again.

    Its blocks are asked whether they still hold what they held: one that was given to another request has another hash.
    """
    prefix = _Beginning()

    def find_blocks(hashes: list[bytes], limit: int) -> tuple[tuple[list[Any]], int, int]:
        kept = prefix.values(hashes)
        if any(block.block_hash is not key for block, key in kept):
            prefix.forget()
            kept = []
        tokens = len(kept) * block_size
        if not kept or tokens > limit:
            found = find(hashes, limit)
            prefix.learn(hashes, [(block, block.block_hash) for block in found[0][0]])
            return found
        ((rest,), more, _) = find(hashes[len(kept) :], limit - tokens)
        return ([*(block for block, _ in kept), *rest],), tokens + more, 0

    return find_blocks


def writing(write: Writer) -> Writer:
    """Return a writer to the same table, which does not write the shared beginning where a row holds it already.

    Whoever writes past this one must do so behind a row's ids, as vLLM does with the tokens that it generates.
    """
    prefix = _Beginning()
    rows: set[int] = set()  # they begin with the prefix; their requests may be gone

    def beginning(ids: list[int]) -> list[int]:
        kept = prefix.values(ids)
        if not kept:
            prefix.learn(ids, ids)
            kept = prefix.values(ids)
        if not kept:  # prompts of another kind: an engine's first are its warm-up's
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


def _plain(request: Any) -> bool:
    """Whether the hashes of a new request follow from its token ids alone."""
    more = (request.mm_features, request.lora_request, request.cache_salt, request.prompt_embeds)
    return request.prompt_token_ids is not None and not any(item is not None and item != [] for item in more)
