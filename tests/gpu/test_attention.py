"""The shared-prefix attention on a GPU, layer by layer, against float64 and against FlashAttention's own error."""

import os
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata

if not (torch.cuda.is_available() and current_platform.is_cuda()):
    pytest.skip("needs a CUDA device and vLLM for CUDA", allow_module_level=True)

from borg_serve.vllm_plugin import attention, kernels
from borg_serve.vllm_plugin.attention import SharedPrefixMetadata
from tests import rows
from tests.gpu.steps import DEVICE, KINDS, Backend, Shape, Step, step

MODEL = os.environ.get("BORG_GPU_MODEL", "")
"""A directory with the configuration of a Qwen2.5-7B; weights are not needed."""
pytestmark = pytest.mark.skipif(not Path(MODEL, "config.json").is_file(), reason="BORG_GPU_MODEL names no model")


def reference(given: Step, shape: Shape) -> torch.Tensor:
    """Float64, and what does not depend on how the rows are split."""
    key, value = given.halves(shape.size)
    common = given.common
    output, _ = rows.attention(
        given.query.double(), key.double(), value.double(), common.block_table_tensor, common.seq_lens,
        common.query_start_loc,
    )  # fmt: skip
    return output


def error(found: torch.Tensor, expected: torch.Tensor, tokens: int) -> float:
    """Relative error over the tokens that are no padding; NaN never passes."""
    return float((found[:tokens].double() - expected[:tokens]).norm() / expected[:tokens].norm())


def check(given: Step, shape: Shape, ours: Backend, stock: Backend, expect: bool = True) -> None:
    tokens = int(given.common.query_start_loc_cpu[-1])
    assert isinstance(ours.build(given.common), SharedPrefixMetadata) == expect
    expected = reference(given, shape)
    here, theirs = error(ours.run(given), expected, tokens), error(stock.run(given), expected, tokens)
    print(f"error {here:.2e}, stock {theirs:.2e}")
    assert here <= 1.5 * theirs + 1e-4


@pytest.fixture(scope="module", params=["bf16", "fp8"])
def pair(request: pytest.FixtureRequest) -> tuple[Shape, Backend, Backend]:
    shape = Shape(fp8=request.param == "fp8")
    config = shape.config(MODEL)
    return shape, Backend(shape, config, shared=True), Backend(shape, config, shared=False)


@pytest.mark.parametrize(
    ("batch", "longest"), [(1, 4000), (39, 4000), (40, 4000), (64, 4000), (40, 400), (64, 400), (256, 400), (512, 400)]
)
def test_attention_of_decode_is_as_exact_as_stock(
    pair: tuple[Shape, Backend, Backend], batch: int, longest: int
) -> None:
    """With rows of up to 512 tokens of their own the second pass is our kernel, with longer ones FlashAttention's."""
    shape, ours, stock = pair
    check(
        step(shape, ["shared"] * batch, batch, longest),
        shape,
        ours,
        stock,
        batch * shape.kv_heads >= attention.MIN_READS,
    )


def test_attention_of_few_rows_is_stocks_own_after_many(pair: tuple[Shape, Backend, Backend]) -> None:
    """A step in one pass may cut its rows into as many parts as stock's, whatever the step before could."""
    shape, ours, stock = pair
    ours.build(step(shape, ["shared"] * 64, 0, 400).common)
    few = step(shape, ["shared"] * 8, 1, 400).common
    assert ours.build(few).max_num_splits == stock.build(few).max_num_splits


@pytest.mark.parametrize("seed", range(12))
def test_attention_of_mixed_rows_is_as_exact_as_stock(pair: tuple[Shape, Backend, Backend], seed: int) -> None:
    shape, ours, stock = pair
    rng = random.Random(seed)
    kinds = [rng.choice(KINDS if seed % 2 else ("shared", "copied", "short")) for _ in range(rng.randint(40, 120))]
    check(step(shape, kinds, seed, rng.choice([40, 1500])), shape, ours, stock)


@pytest.mark.parametrize("prefix", [512, 1024, 2128, 4096])
@pytest.mark.parametrize("block", [16, 64, 128])
def test_attention_takes_any_prefix_and_block(prefix: int, block: int) -> None:
    shape = Shape(prefix=prefix // block * block, block=block)
    config = shape.config(MODEL)
    kinds = ["shared"] * 40 + list(KINDS) * 2
    check(step(shape, kinds, prefix, 600), shape, Backend(shape, config, True), Backend(shape, config, False))


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(14, 2, 128), (7, 1, 128), (9, 3, 64), (32, 8, 128)])
def test_attention_takes_any_heads(heads: int, kv_heads: int, size: int) -> None:
    shape = Shape(heads=heads, kv_heads=kv_heads, size=size)
    config = shape.config(MODEL)
    kinds = ["shared"] * 160 + list(KINDS)
    check(step(shape, kinds, heads, 600), shape, Backend(shape, config, True), Backend(shape, config, False))


@pytest.mark.parametrize("apart", [False, True])
def test_attention_in_a_cuda_graph_follows_what_the_rows_become(
    pair: tuple[Shape, Backend, Backend], apart: bool
) -> None:
    """Captured once on rows without anything, as vLLM captures; replayed on every kind of decode, padding behind.

    `apart`: as a graph for rows with one token each is captured, whose second pass is another one.
    """
    shape, ours, stock = pair
    batch = 64
    mixes = [["shared"] * 64, ["shared", "copied", "short"] * 16, ["copied"] * 40, ["short"] * 33 + ["shared"] * 3]
    steps = [step(shape, kinds, index, 900, padded=batch - len(kinds)) for index, kinds in enumerate(mixes)]
    blocks = max(given.cache.shape[0] for given in steps)
    columns = max(given.common.block_table_tensor.shape[1] for given in steps)
    first = steps[0]
    # The buffers that the graph knows.
    cache = torch.zeros(blocks, *first.cache.shape[1:], device=DEVICE, dtype=first.cache.dtype)
    table = torch.zeros(batch, columns, dtype=torch.int32, device=DEVICE)
    held = Step(torch.zeros_like(first.query), cache, _replaced(first, table, shape), first.lens)
    held.common.seq_lens.zero_()
    output = torch.full(held.query.shape, torch.nan, dtype=torch.bfloat16, device=DEVICE)
    held.common.max_seq_len = 8192
    with set_current_vllm_config(ours.config):
        build = ours.builder.build_for_cudagraph_capture if apart else partial(ours.builder.build, 0)
        metadata = build(held.common)
    assert metadata.prefix.one_each == apart
    ours.forward(held, metadata, output)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.forward(held, metadata, output)
    for given in steps:
        tokens = int(given.common.query_start_loc_cpu[-1])
        held.query.zero_()
        held.query[: given.query.shape[0]].copy_(given.query)
        cache[: given.cache.shape[0]].copy_(given.cache)
        table.zero_()
        table[:, : given.common.block_table_tensor.shape[1]].copy_(given.common.block_table_tensor)
        held.common.seq_lens.copy_(given.common.seq_lens)
        held.common.query_start_loc.copy_(given.common.query_start_loc)
        held.common.max_seq_len = max(given.lens)
        output.fill_(torch.nan)
        ours.build(held.common)
        graph.replay()
        torch.cuda.synchronize()
        expected = reference(given, shape)
        theirs = error(stock.run(given), expected, tokens)
        assert error(output, expected, tokens) <= 1.5 * theirs + 1e-4


def _replaced(given: Step, table: torch.Tensor, shape: Shape) -> CommonAttentionMetadata:
    from dataclasses import replace

    common = given.common
    return replace(
        common,
        block_table_tensor=table,
        seq_lens=common.seq_lens.clone(),
        query_start_loc=common.query_start_loc.clone(),
    )


def test_attention_merge_is_the_reference() -> None:
    torch.manual_seed(0)
    own, prefix = (torch.randn(70, 28, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    own_lse, prefix_lse = (10 * torch.randn(28, 70, device=DEVICE) for _ in range(2))
    shared = torch.rand(70, device=DEVICE) < 0.7
    prefix[~shared], prefix_lse[:, ~shared] = torch.nan, torch.nan  # what nobody may read
    expected = rows.merge(prefix, prefix_lse, own, own_lse, shared)
    output = own.clone()
    kernels.merge(output, own_lse, prefix, prefix_lse, shared)
    torch.testing.assert_close(output, expected)
    assert torch.equal(output[~shared], own[~shared])


@pytest.mark.parametrize("seed", range(6))
def test_attention_split_is_the_reference(seed: int) -> None:
    rng = random.Random(seed)
    shape = Shape()
    kinds = [rng.choice(KINDS) for _ in range(rng.randint(32, 300))] if seed else ["short"] * 40
    common = step(shape, kinds, seed, 600).common
    count, block = common.num_reqs, shape.block
    blocks = shape.prefix // block
    columns = -(-common.max_seq_len // block)
    read = common.block_table_tensor[:count], common.seq_lens[:count], common.query_start_loc[: count + 1]
    expected = rows.split(*read, blocks, block, columns)
    tokens = common.num_actual_tokens + 300 * (seed % 2)  # some are padding
    prefix, rest, lens = (
        torch.full(size, -7, dtype=torch.int32, device=DEVICE) for size in ((1, blocks), (count, columns + 3), (count,))
    )
    shared = torch.ones(tokens, dtype=torch.bool, device=DEVICE)
    kernels.split(*read, block, prefix, rest[:, :columns], lens, shared)
    assert torch.equal(prefix, expected.prefix_blocks)
    assert torch.equal(rest[:, :columns], expected.block_table)
    assert (rest[:, columns:] == -7).all()
    assert torch.equal(lens, expected.lens)
    assert torch.equal(shared, rows.shared_tokens(expected.shared, common.query_start_loc[: count + 1], tokens))
