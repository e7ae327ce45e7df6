"""Splitting a step's rows and merging two passes, against attention over each row as a whole, in float64."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import rows

BLOCK, PREFIX = 4, 3
HEADS, KV_HEADS, SIZE = 4, 2, 8
TOKENS = BLOCK * PREFIX


@dataclass
class Step:
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def columns(self) -> int:
        return -(-int(self.seq_lens.max()) // BLOCK)


def step(given: list[tuple[str, int, int]], seed: int = 0, padding: int = 0) -> Step:
    """A step with rows of these kinds: (where the first blocks are, context, tokens of this step)."""
    torch.manual_seed(seed)
    blocks = iter((torch.randperm(len(given) * 12 + PREFIX) + 1).tolist())
    common = [next(blocks) for _ in range(PREFIX)]
    table = torch.randint(0, 5, (len(given) + padding, 13), dtype=torch.int32)
    for row, (kind, context, new) in enumerate(given):
        used = -(-(context + new) // BLOCK)
        own = [next(blocks) for _ in range(used)]
        if kind == "shared":
            own[:PREFIX] = common[:used]
        elif kind == "half":
            own[: PREFIX - 1] = common[: min(used, PREFIX - 1)]
        table[row, :used] = torch.tensor(own, dtype=torch.int32)
    table[len(given) :] = 0
    lens = [context + query for _, context, query in given] + [0] * padding
    starts = [0, *(query for _, _, query in given), *([0] * padding)]
    start_loc = torch.tensor(starts).cumsum(0).to(torch.int32)
    cache = torch.randn(2, len(given) * 12 + PREFIX + 1, BLOCK, KV_HEADS, SIZE, dtype=torch.float64)
    query = torch.randn(int(start_loc[-1]), HEADS, SIZE, dtype=torch.float64)
    return Step(table, torch.tensor(lens, dtype=torch.int32), start_loc, query, cache[0], cache[1])


def split(given: Step) -> rows.Rows:
    return rows.split(given.block_table, given.seq_lens, given.query_start_loc, PREFIX, BLOCK, given.columns())


def two_passes(given: Step) -> torch.Tensor:
    """What the kernels compute, by the reference attention."""
    found = split(given)
    tokens = given.query.shape[0]
    span = torch.tensor([0, tokens], dtype=torch.int32)
    whole = torch.tensor([TOKENS])
    prefix, prefix_lse = rows.attention(
        given.query, given.key, given.value, found.prefix_blocks, whole, span, causal=False
    )
    own, own_lse = rows.attention(
        given.query, given.key, given.value, found.block_table, found.lens, given.query_start_loc
    )
    shared = rows.shared_tokens(found.shared, given.query_start_loc, tokens)
    prefix[~shared], prefix_lse[:, ~shared] = torch.nan, torch.nan  # what nobody may read
    return rows.merge(prefix, prefix_lse, own, own_lse, shared)


KINDS = st.tuples(st.sampled_from(["shared", "own", "half"]), st.integers(0, 30), st.integers(1, 9))


@settings(max_examples=200)
@given(st.lists(KINDS, min_size=1, max_size=9), st.integers(0, 1000), st.integers(0, 3))
def test_rows_in_two_passes_are_rows_as_a_whole(kinds: list[tuple[str, int, int]], seed: int, padding: int) -> None:
    given = step(kinds, seed, padding)
    expected, _ = rows.attention(
        given.query, given.key, given.value, given.block_table, given.seq_lens, given.query_start_loc
    )
    torch.testing.assert_close(two_passes(given), expected)


@pytest.mark.parametrize(
    ("kinds", "shared"),
    [
        ([("shared", 20, 1), ("shared", 12, 1), ("shared", 12, 5)], [True, True, True]),
        ([("shared", 11, 1), ("shared", 12, 1)], [False, True]),  # its last token of the prefix is computed only now
        ([("shared", 0, 20), ("shared", 13, 1)], [False, True]),  # the prefix's own prefill
        ([("shared", 3, 1), ("shared", 14, 2)], [False, True]),  # shorter than the prefix
        ([("shared", 14, 1), ("own", 14, 1), ("half", 14, 1), ("shared", 14, 1)], [True, False, False, True]),
        ([("own", 14, 1), ("shared", 14, 1), ("shared", 14, 1)], [True, False, False]),  # right, if not fast
        ([("own", 3, 1)], [False]),
    ],
)
def test_rows_share_what_they_hold_in_the_same_blocks(kinds: list[tuple[str, int, int]], shared: list[bool]) -> None:
    given = step(kinds)
    found = split(given)
    assert found.shared.tolist() == shared
    for row, is_shared in enumerate(shared):
        length = int(given.seq_lens[row]) - TOKENS * is_shared
        first = PREFIX * is_shared
        blocks = -(-length // BLOCK)
        assert int(found.lens[row]) == length
        assert found.block_table[row, :blocks].tolist() == given.block_table[row, first : first + blocks].tolist()


def test_rows_of_padding_hold_nothing() -> None:
    given = step([("shared", 14, 1)], padding=3)
    found = split(given)
    assert found.shared.tolist() == [True, False, False, False]
    assert found.lens.tolist() == [3, 0, 0, 0]
    tokens = rows.shared_tokens(found.shared, given.query_start_loc, 4)
    assert tokens.tolist() == [True, False, False, False]


def test_rows_give_each_token_what_its_row_is() -> None:
    starts = torch.tensor([0, 2, 2, 3, 6], dtype=torch.int32)
    shared = torch.tensor([True, True, False, True])
    assert rows.shared_tokens(shared, starts, 8).tolist() == [True, True, False, True, True, True, False, False]
