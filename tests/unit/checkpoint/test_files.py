"""The safetensors headers and the shard index: every byte accounted for, every lie named."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from borg_serve.checkpoint.files import INDEX_FILE, read_headers
from borg_serve.errors import Problem

SINGLE = "model.safetensors"


def write_raw(path: Path, header: object, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def write_shards(directory: Path) -> dict[str, str]:
    save_file({"a": np.ones((2, 3), np.float32)}, directory / "one.safetensors")
    save_file({"b": np.ones(4, np.float16), "c": np.ones(0, np.float32)}, directory / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def problems_of(directory: Path) -> list[str]:
    problems: list[Problem] = []
    read_headers(directory, problems)
    return [str(problem) for problem in problems]


def test_headers_say_where_every_tensor_lies(tmp_path: Path) -> None:
    write_shards(tmp_path)
    problems: list[Problem] = []
    tensors = read_headers(tmp_path, problems)
    assert problems == []
    assert {name: (t.dtype, t.shape, t.num_bytes) for name, t in tensors.items()} == {
        "a": ("F32", (2, 3), 24),
        "b": ("F16", (4,), 8),
        "c": ("F32", (0,), 0),
    }
    raw = tensors["a"].file.read_bytes()[tensors["a"].begin : tensors["a"].end]
    assert raw == np.ones((2, 3), np.float32).tobytes()


@pytest.mark.parametrize(
    ("keep_bytes", "message"),
    [(5, "whole header"), (40, "whole header"), (-1, "is truncated"), (-24, "is truncated")],
)
def test_headers_name_a_truncated_file(tmp_path: Path, keep_bytes: int, message: str) -> None:
    save_file({"a": np.ones((2, 3), np.float32)}, tmp_path / SINGLE)
    raw = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(raw[:keep_bytes])
    (problem,) = problems_of(tmp_path)
    assert SINGLE in problem
    assert message in problem


def test_headers_refuse_bytes_that_belong_to_no_tensor(tmp_path: Path) -> None:
    save_file({"a": np.ones((2, 3), np.float32)}, tmp_path / SINGLE)
    with (tmp_path / SINGLE).open("ab") as file:
        file.write(b"\0")
    (problem,) = problems_of(tmp_path)
    assert "belong to no tensor" in problem


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        b"\xff\xfe not JSON",
        [1, 2],
        {"a": 5},
        {"a": {**ENTRY, "dtype": "F33"}},
        {"a": {**ENTRY, "dtype": ["F32"]}},
        {"a": {"dtype": "C64", "shape": [2], "data_offsets": [0, 16]}},
        {"a": {**ENTRY, "shape": [1 << 63, 1 << 63]}},
        {"a": {**ENTRY, "shape": [-2]}},
        {"a": {**ENTRY, "shape": [3]}},
        {"a": {**ENTRY, "shape": [True, 2]}},
        {"a": {**ENTRY, "data_offsets": [8, 0]}},
        {"a": {**ENTRY, "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": {**ENTRY, "data_offsets": [8, 16]}},
        {"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}},
        {"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}},
        b'{"a": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]}, '
        b'"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
        b"[" * 100_000,
    ],
)
def test_headers_refuse_a_malformed_header(tmp_path: Path, header: object) -> None:
    write_raw(tmp_path / SINGLE, header, bytes(16))
    (problem,) = problems_of(tmp_path)
    assert problem.startswith(str(tmp_path / SINGLE))


def test_headers_refuse_a_header_longer_than_the_file(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    (problem,) = problems_of(tmp_path)
    assert "whole header" in problem


def test_headers_refuse_pickle_only_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    (problem,) = problems_of(tmp_path)
    assert "pytorch_model.bin" in problem
    assert "pickle" in problem


def test_headers_refuse_a_directory_without_weights(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path)
    assert "no weights" in problem


def test_headers_refuse_shards_without_an_index(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / INDEX_FILE).unlink()
    (problem,) = problems_of(tmp_path)
    assert INDEX_FILE in problem


def test_headers_name_a_missing_shard(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    (problem,) = problems_of(tmp_path)
    assert "two.safetensors" in problem
    assert "no such file" in problem


def test_headers_leave_a_file_alone_that_the_index_does_not_name(tmp_path: Path) -> None:
    write_shards(tmp_path)
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "model-old.safetensors"):
        save_file({"a": np.zeros(1, np.float32)}, tmp_path / name)
    assert problems_of(tmp_path) == []


def test_headers_refuse_an_index_that_names_a_tensor_no_shard_has(tmp_path: Path) -> None:
    write_index(tmp_path, write_shards(tmp_path) | {"ghost": "one.safetensors"})
    (problem,) = problems_of(tmp_path)
    assert "tensor ghost" in problem


def test_headers_refuse_an_index_that_misplaces_a_tensor(tmp_path: Path) -> None:
    write_index(tmp_path, write_shards(tmp_path) | {"a": "two.safetensors"})
    (problem,) = problems_of(tmp_path)
    assert "tensor a: " in problem
    assert "two.safetensors in the index, none in the files" in problem


def test_headers_refuse_an_index_that_omits_a_tensor(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path)
    del weight_map["b"]
    write_index(tmp_path, weight_map)
    (problem,) = problems_of(tmp_path)
    assert "tensor b: " in problem


def test_headers_refuse_a_tensor_in_two_shards(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path)
    save_file({"a": np.zeros(1, np.float32), "d": np.zeros(1, np.float32)}, tmp_path / "three.safetensors")
    write_index(tmp_path, weight_map | {"d": "three.safetensors"})
    assert any("tensor a" in problem and "one file" in problem for problem in problems_of(tmp_path))


@pytest.mark.parametrize("file", ["../one.safetensors", "/one.safetensors", "one.bin", 3])
def test_headers_refuse_an_index_that_points_out_of_the_directory(tmp_path: Path, file: object) -> None:
    write_index(tmp_path, write_shards(tmp_path) | {"a": file})
    (problem,) = problems_of(tmp_path)
    assert "beside the index" in problem


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 1}'])
def test_headers_refuse_a_malformed_index(tmp_path: Path, index: str) -> None:
    write_shards(tmp_path)
    (tmp_path / INDEX_FILE).write_text(index)
    assert any(INDEX_FILE in problem for problem in problems_of(tmp_path))


def test_headers_list_ten_tensors_and_count_the_rest(tmp_path: Path) -> None:
    write_index(tmp_path, write_shards(tmp_path) | {f"ghost.{i:02}": "one.safetensors" for i in range(25)})
    problems = problems_of(tmp_path)
    assert len(problems) == 11
    assert "got 15" in problems[-1]
