"""The Triton kernels of attention.py: split the rows of a step, merge the passes' results, do a pass of short rows.

tests/rows.py has them as pure functions, which tests compare the kernels with. As ten PyTorch operations the split took
5% of the host's time for a step, and at 256 rows a GPU waits for the host.
"""

from collections.abc import Sequence

import torch
from vllm.triton_utils import tl, triton

__all__ = ["decode", "merge", "split"]

COLUMNS = 256
"""Columns of a block table, or tokens, that are copied at once."""
TILE, WARPS, STAGES = 64, 4, 2
"""Of the second pass: KV tokens that are read at once, and how many warps read how far ahead."""
LOG2_E = 1.4426950408889634


def split(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    block_size: int,
    prefix_table: torch.Tensor,
    rest: torch.Tensor,
    lens: torch.Tensor,
    shared: torch.Tensor,
) -> None:
    """Split the rows of a step into buffers.

    Read: `block_table` [R, at least C] int32, `seq_lens` [R] int32, `query_start_loc` [R + 1] int32. Written:
    `prefix_table` [1, prefix blocks] int32, `rest` [R, C] int32, `lens` [R] int32, `shared` [T] bool, by token.
    """
    rows = seq_lens.shape[0]
    prefix_blocks = prefix_table.shape[1]
    _split_kernel[(rows,)](
        block_table,
        seq_lens,
        query_start_loc,
        prefix_table,
        rest,
        lens,
        shared,
        rows,
        block_table.shape[1],
        rest.shape[1],
        shared.shape[0],
        block_table.stride(0),
        rest.stride(0),
        prefix_blocks,
        prefix_blocks * block_size,
        ROWS_2=triton.next_power_of_2(rows),
        PREFIX_2=triton.next_power_of_2(prefix_blocks),
        COLUMNS=COLUMNS,
    )


@triton.jit(do_not_specialize=["rows", "width", "columns", "tokens"])  # type: ignore[untyped-decorator]
def _split_kernel(  # type: ignore[no-untyped-def]  # pragma: no cover  (runs on the device)
    block_table,
    seq_lens,
    query_start_loc,
    prefix_table,
    rest,
    lens,
    shared,
    rows,
    width,
    columns,
    tokens,
    table_stride,
    rest_stride,
    prefix_blocks,
    prefix_tokens,
    ROWS_2: tl.constexpr,  # noqa: N803
    PREFIX_2: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0)
    # The first row with the whole prefix behind it tells which blocks the prefix is in; if there is none, row 0 does.
    every = tl.arange(0, ROWS_2)
    inside = every < rows
    starts = tl.load(query_start_loc + every, mask=inside, other=0)
    ends = tl.load(query_start_loc + every + 1, mask=inside, other=0)
    after = (tl.load(seq_lens + every, mask=inside, other=0) - (ends - starts) >= prefix_tokens) & inside
    first = tl.min(tl.where(after, every, rows), axis=0)
    first = tl.where(first == rows, 0, first).to(tl.int64)

    begin = tl.load(query_start_loc + row)
    end = tl.load(query_start_loc + row + 1)
    length = tl.load(seq_lens + row)
    block = tl.arange(0, PREFIX_2)
    of_prefix = block < prefix_blocks
    reference = tl.load(block_table + first * table_stride + block, mask=of_prefix, other=0)
    mine = tl.load(block_table + row.to(tl.int64) * table_stride + block, mask=of_prefix, other=0)
    alike = tl.sum((reference != mine).to(tl.int32), axis=0) == 0
    shares = (length - (end - begin) >= prefix_tokens) & alike
    if row == 0:
        tl.store(prefix_table + block, reference, mask=of_prefix)
    tl.store(lens + row, tl.where(shares, length - prefix_tokens, length))

    shift = tl.where(shares, prefix_blocks, 0)
    for at in range(0, columns, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        where = tl.minimum(column + shift, width - 1)
        value = tl.load(block_table + row.to(tl.int64) * table_stride + where, mask=column < columns, other=0)
        tl.store(rest + row.to(tl.int64) * rest_stride + column, value, mask=column < columns)
    for at in range(begin, end, COLUMNS):
        token = at + tl.arange(0, COLUMNS)
        tl.store(shared + token, shares, mask=token < end)
    if row == rows - 1:  # tokens of no row are padding
        for at in range(end, tokens, COLUMNS):
            token = at + tl.arange(0, COLUMNS)
            tl.store(shared + token, False, mask=token < tokens)


def merge(
    output: torch.Tensor, own_lse: torch.Tensor, prefix: torch.Tensor, prefix_lse: torch.Tensor, shared: torch.Tensor
) -> None:
    """Merge the first pass into `output`, in place, for the tokens that share.

    `output`, `prefix` [T, heads, head size]; log-sum-exps [heads, T] float32, contiguous; `shared` [T] bool.
    """
    tokens, heads, size = prefix.shape
    _merge_kernel[(tokens,)](
        output,
        own_lse,
        prefix,
        prefix_lse,
        shared,
        output.stride(0),
        output.stride(1),
        own_lse.stride(0),
        prefix_lse.stride(0),
        HEADS=heads,
        SIZE=size,
        HEADS_2=triton.next_power_of_2(heads),
        SIZE_2=triton.next_power_of_2(size),
    )


@triton.jit  # type: ignore[untyped-decorator]
def _merge_kernel(  # type: ignore[no-untyped-def]  # pragma: no cover  (runs on the device)
    output,
    own_lse,
    prefix,
    prefix_lse,
    shared,
    output_token_stride,
    output_head_stride,
    own_lse_stride,
    prefix_lse_stride,
    HEADS: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
    HEADS_2: tl.constexpr,  # noqa: N803
    SIZE_2: tl.constexpr,  # noqa: N803
):
    token = tl.program_id(0).to(tl.int64)
    if tl.load(shared + token) == 0:
        return
    head = tl.arange(0, HEADS_2)
    column = tl.arange(0, SIZE_2)
    inside = head < HEADS
    mask = inside[:, None] & (column < SIZE)[None, :]
    first = tl.load(prefix_lse + head * prefix_lse_stride + token, mask=inside, other=0.0)
    second = tl.load(own_lse + head * own_lse_stride + token, mask=inside, other=0.0)
    top = tl.maximum(first, second)
    first = tl.exp(first - top)
    second = tl.exp(second - top)
    total = first + second
    where = output + token * output_token_stride + head[:, None] * output_head_stride + column[None, :]
    part = prefix + token * HEADS * SIZE + head[:, None] * SIZE + column[None, :]
    merged = tl.load(part, mask=mask, other=0.0).to(tl.float32) * (first / total)[:, None]
    merged += tl.load(where, mask=mask, other=0.0).to(tl.float32) * (second / total)[:, None]
    tl.store(where, merged.to(output.dtype.element_ty), mask=mask)


def decode(
    output: torch.Tensor,
    query: torch.Tensor,
    halves: Sequence[torch.Tensor],
    block_table: torch.Tensor,
    lens: torch.Tensor,
    prefix: torch.Tensor,
    prefix_lse: torch.Tensor,
    shared: torch.Tensor,
    scale: float,
) -> None:
    """Attend with one token a row to the row's own KV, going on from the first pass where the row shares.

    Written: `output` [R, heads, head size]. Read: `query`, and the first pass's `prefix`, of the same shape;
    `prefix_lse` [heads, R] float32; `halves`: keys and values, each [blocks, block size, KV heads, head size], of one
    tensor; `block_table` [R, C] int32, `lens` [R] int32, `shared` [R] bool. docs/attention.md says why.
    """
    rows, heads, size = query.shape
    keys, values = halves
    group = heads // keys.shape[2]
    _decode_kernel[(rows, keys.shape[2])](
        output,
        query,
        keys,
        values,
        block_table,
        lens,
        prefix,
        prefix_lse,
        shared,
        scale * LOG2_E,
        output.stride(0),
        query.stride(0),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        block_table.stride(0),
        prefix.stride(0),
        prefix_lse.stride(0),
        GROUP=group,
        GROUP_2=max(16, triton.next_power_of_2(group)),
        SIZE=size,
        SIZE_2=triton.next_power_of_2(size),
        BLOCK=keys.shape[1],
        TILE=TILE,
        LOG2_E=LOG2_E,
        num_warps=WARPS,
        num_stages=STAGES,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _decode_kernel(  # type: ignore[no-untyped-def]  # pragma: no cover  (runs on the device)
    output,
    query,
    keys,
    values,
    block_table,
    lens,
    prefix,
    prefix_lse,
    shared,
    scale,
    output_stride,
    query_stride,
    block_stride,
    token_stride,
    head_stride,
    table_stride,
    prefix_stride,
    lse_stride,
    GROUP: tl.constexpr,  # noqa: N803
    GROUP_2: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
    SIZE_2: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    LOG2_E: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    length = tl.load(lens + row)
    shares = tl.load(shared + row) != 0
    member = tl.arange(0, GROUP_2)
    column = tl.arange(0, SIZE_2)
    head = kv_head * GROUP + member
    mine = member < GROUP
    inside = mine[:, None] & (column < SIZE)[None, :]
    place = head[:, None] * SIZE + column[None, :]
    asked = tl.load(query + row * query_stride + place, mask=inside, other=0.0)
    # What the first pass found is where the online softmax goes on.
    top = tl.load(prefix_lse + head * lse_stride + row, mask=mine & shares, other=float("-inf")) * LOG2_E
    total = tl.where(mine & shares, 1.0, 0.0)
    found = tl.load(prefix + row * prefix_stride + place, mask=inside & shares, other=0.0).to(tl.float32)
    for at in range(0, length, TILE):
        token = at + tl.arange(0, TILE)
        real = token < length
        block = tl.load(block_table + row * table_stride + token // BLOCK, mask=real, other=0).to(tl.int64)
        where = block * block_stride + (token % BLOCK) * token_stride + kv_head * head_stride
        key = tl.load(keys + where[None, :] + column[:, None], mask=real[None, :] & (column < SIZE)[:, None], other=0.0)
        score = tl.where(real[None, :], tl.dot(asked, key) * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp2(score - higher[:, None])
        fade = tl.exp2(top - higher)
        held = real[:, None] & (column < SIZE)[None, :]
        value = tl.load(values + where[:, None] + column[None, :], mask=held, other=0.0)
        found = found * fade[:, None] + tl.dot(weight.to(value.dtype), value)
        total = total * fade + tl.sum(weight, axis=1)
        top = higher
    total = tl.where(total > 0, total, 1.0)  # rows of no request
    tl.store(output + row * output_stride + place, (found / total[:, None]).to(output.dtype.element_ty), mask=inside)
