"""Which rows of an engine step share the prefix, and what is left of each for itself: pure functions on tensors.

Nothing here knows a model, a kernel or the identity: rows share what they provably hold in the same KV blocks. It
works the same on any device and never waits for one, so that it can run before a CUDA graph is replayed.
"""

from dataclasses import dataclass

import torch

__all__ = ["Rows", "attention", "merge", "shared_tokens", "split"]


@dataclass(frozen=True)
class Rows:
    """A step's rows, split. R rows, C columns of the block table, P = `prefix_blocks` x block size."""

    shared: torch.Tensor
    """[R] bool: the row's first P tokens are in the prefix's blocks, computed before this step."""
    prefix_blocks: torch.Tensor
    """[1, prefix blocks] int32: the blocks that the shared rows have in common."""
    block_table: torch.Tensor
    """[R, C] int32: of a shared row the blocks after the prefix, of any other all of them."""
    lens: torch.Tensor
    """[R] int32: tokens in those blocks."""


def split(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    prefix_blocks: int,
    block_size: int,
    columns: int,
) -> Rows:
    """Split the rows of a step.

    `block_table` [R, at least `columns`] int32; `seq_lens` [R] int32, this step's tokens included; `query_start_loc`
    [R + 1] int32; `columns`: how many blocks the longest row has. A row shares if all tokens of this step come after
    the prefix, and its first blocks are those of the first row of which that is true. So prompts shorter than the
    prefix, the prefix's own prefill, copies in other blocks and padded rows (no tokens) do not share, and are whole.
    """
    prefix_tokens = prefix_blocks * block_size
    context = seq_lens - (query_start_loc[1:] - query_start_loc[:-1])
    after = context >= prefix_tokens
    own = block_table[:, :prefix_blocks]
    reference = own.index_select(0, after.to(torch.uint8).argmax().view(1))
    shared = after & (own == reference).all(dim=1)
    index = torch.arange(columns, device=block_table.device) + (shared * prefix_blocks).unsqueeze(1)
    rest = block_table.gather(1, index.clamp_(max=block_table.shape[1] - 1))
    return Rows(shared, reference, rest, seq_lens - shared * prefix_tokens)


def shared_tokens(shared: torch.Tensor, query_start_loc: torch.Tensor, tokens: int) -> torch.Tensor:
    """[tokens] bool: whether each token's row shares; False for padding after the last row.

    `shared` [R] bool, `query_start_loc` [R + 1] int32.
    """
    row = torch.searchsorted(query_start_loc[1:], torch.arange(tokens, device=shared.device), right=True)
    rows = shared.shape[0]
    return shared[row.clamp(max=rows - 1)] & (row < rows)


def merge(
    prefix: torch.Tensor, prefix_lse: torch.Tensor, own: torch.Tensor, own_lse: torch.Tensor, shared: torch.Tensor
) -> torch.Tensor:
    """One output from attention over two sets of keys; tokens that do not share keep `own`.

    Outputs [T, heads, head size]; log-sum-exps [heads, T] float32; `shared` [T] bool. The reference for the kernel in
    `attention`.
    """
    top = torch.maximum(prefix_lse, own_lse)
    first, second = torch.exp(prefix_lse - top), torch.exp(own_lse - top)
    total = first + second
    merged = (first / total).T.unsqueeze(2) * prefix + (second / total).T.unsqueeze(2) * own
    return torch.where(shared.view(-1, 1, 1), merged.to(own.dtype), own)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_table: torch.Tensor,
    lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a paged KV cache, slowly, in the query's type: (output [T, heads, head size], lse [heads, T]).

    `query` [T, heads, head size]; `key` and `value` [blocks, block size, KV heads, head size]; the last query of a row
    sees all of its `lens` tokens. The reference that kernels are held against, in float64.
    """
    tokens, heads, size = query.shape
    group = heads // key.shape[2]
    output = torch.zeros_like(query)
    lse = torch.full((heads, tokens), -torch.inf, dtype=query.dtype, device=query.device)
    starts = query_start_loc.tolist()
    for row, length in enumerate(lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        if begin == end or length == 0:
            continue
        blocks = block_table[row, : -(-length // key.shape[1])].long()
        keys = key[blocks].flatten(0, 1)[:length].to(query.dtype).repeat_interleave(group, 1)
        values = value[blocks].flatten(0, 1)[:length].to(query.dtype).repeat_interleave(group, 1)
        scores = torch.einsum("thd,shd->hts", query[begin:end], keys) * size**-0.5
        if causal:
            last = torch.arange(length - (end - begin), length, device=query.device).unsqueeze(1)
            scores.masked_fill_(torch.arange(length, device=query.device) > last, -torch.inf)
        lse[:, begin:end] = torch.logsumexp(scores, 2)
        output[begin:end] = torch.einsum("hts,shd->thd", torch.softmax(scores, 2), values)
    return output, lse
