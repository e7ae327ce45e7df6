"""A writer of token ids that does not write the prefix again, on a table of plain lists."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from borg_serve.vllm_plugin.prefix_memo import remember_ids

IDENTITY = [random.Random(0).randrange(150_000) for _ in range(645)]


class Table:
    """Rows of token ids as a GPU's worker has them."""

    def __init__(self) -> None:
        self.rows = {row: [0] * 900 for row in range(3)}
        self.written: list[int] = []

    def write(self, row: int, start: int, ids: list[int]) -> None:
        self.rows[row][start : start + len(ids)] = ids
        self.written.append(len(ids))


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(["identity", "other", "part", "dummy"]), st.integers(0, 70)), max_size=20))
def test_ids_written_are_all_there_whatever_came_before(prompts: list[tuple[str, int]]) -> None:
    table = Table()
    write = remember_ids(table.write)
    for turn, (kind, more) in enumerate(prompts):
        start = {"identity": IDENTITY, "other": [turn], "part": IDENTITY[:55], "dummy": []}[kind]
        ids = [*start, *([turn] * more)]
        row = turn % 3
        write(row, 0, ids)
        found = table.rows[row]
        assert found[: len(ids)] == ids
        found[len(ids) : len(ids) + 40] = [-1] * 40  # generated tokens do not go through the writer


def test_ids_of_the_identity_are_written_once_a_row() -> None:
    table = Table()
    write = remember_ids(table.write)
    for turn, tail in enumerate(([1] * 20, [2] * 20, [3] * 20, [4] * 30, [5] * 5, [6] * 10)):
        write(turn % 3, 0, IDENTITY + tail)
    whole = len(IDENTITY)
    assert table.written == [whole + 20, whole + 20, whole + 20, 30, 5, 10]


def test_ids_after_an_engines_warm_up_are_the_identitys() -> None:
    table = Table()
    write = remember_ids(table.write)
    for dummy in ([0] * 50, [0] * 60, [1] * 900):
        write(0, 0, dummy)
    for tail in ([1] * 20, [2] * 20, [3] * 20):
        write(0, 0, IDENTITY + tail)
    assert table.written[-1] == 20
