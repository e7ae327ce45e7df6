"""The pass over a checkpoint's tensors: their hashes, and values that are not finite."""

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from borg_serve.checkpoint.files import DTYPES, INDEX_FILE, TensorInfo, read_headers
from borg_serve.checkpoint.manifest import Manifest
from borg_serve.checkpoint.reading import CHUNK_BYTES, Reading, read_tensors
from borg_serve.errors import CheckpointError, Problem


def tensors_of(directory: Path) -> dict[str, TensorInfo]:
    problems: list[Problem] = []
    tensors = read_headers(directory, problems)
    assert problems == []
    return tensors


def readings_of(directory: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Reading]:
    save_file(dict(tensors), directory / "model.safetensors")
    return read_tensors(tensors_of(directory).values())


@pytest.mark.parametrize(
    ("dtype", "torch_name"), [(name, torch_name) for name, torch_name in DTYPES.items() if torch_name]
)
def test_dtype_has_the_size_torch_gives_it(dtype: str, torch_name: str) -> None:
    bits = re.search(r"\d+", dtype)
    assert getattr(torch, torch_name).itemsize * 8 == (int(bits[0]) if bits else 8)


def test_leaf_is_sha256_over_the_documented_encoding(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    leaf = readings_of(tmp_path, {"a": values})["a"].leaf
    header = b'["a","F32",[2,3]]'
    assert (
        leaf == hashlib.sha256(b"\0" + len(header).to_bytes(8, "little") + header + values.numpy().tobytes()).digest()
    )


def test_leaf_covers_name_dtype_and_shape(tmp_path: Path) -> None:
    zeros = torch.zeros(4, dtype=torch.float16)
    same_bytes = {
        "a": zeros,
        "b": zeros.clone(),
        "c": zeros.view(torch.bfloat16).clone(),
        "d": zeros.reshape(2, 2).clone(),
    }
    leaves = []
    for tensor in (same_bytes["a"], same_bytes["c"], same_bytes["d"]):
        leaves.append(readings_of(tmp_path, {"a": tensor})["a"].leaf)
    leaves.append(readings_of(tmp_path, {"b": same_bytes["b"]})["b"].leaf)
    assert len(set(leaves)) == 4


def test_root_does_not_depend_on_sharding_or_order(tmp_path: Path) -> None:
    tensors = {name: torch.full((5,), float(i)) for i, name in enumerate("cab")}
    (whole := tmp_path / "whole").mkdir()
    expected = Manifest.of(readings_of(whole, tensors), {}).root
    (sharded := tmp_path / "sharded").mkdir()
    for name, tensor in tensors.items():
        save_file({name: tensor}, sharded / f"{name}.safetensors")
    (sharded / INDEX_FILE).write_text(json.dumps({"weight_map": {name: f"{name}.safetensors" for name in "bca"}}))
    assert Manifest.of(read_tensors(tensors_of(sharded).values(), threads=1), {}).root == expected


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small")
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (17,), "b": (5, 7), "c": (1,)}
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")
    return directory


@settings(deadline=None)
@given(data=st.data())
def test_root_changes_with_any_flipped_byte(small: Path, data: st.DataObject) -> None:
    tensors = tensors_of(small)
    sound = Manifest.of(read_tensors(tensors.values()), {})
    name = data.draw(st.sampled_from(sorted(tensors)))
    offset = data.draw(st.integers(tensors[name].begin, tensors[name].end - 1))
    mask = data.draw(st.integers(1, 255))
    file = tensors[name].file
    raw = bytearray(file.read_bytes())
    raw[offset] ^= mask
    try:
        file.write_bytes(raw)
        changed = Manifest.of(read_tensors(tensors.values(), threads=1), {})
    finally:
        raw[offset] ^= mask
        file.write_bytes(raw)
    assert changed.root != sound.root
    assert {other for other in tensors if changed.tensors[other] != sound.tensors[other]} == {name}


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        (torch.bfloat16, torch.int16),
        (torch.float16, torch.int16),
        (torch.float8_e4m3fn, torch.uint8),
        (torch.float8_e5m2, torch.uint8),
        (torch.float8_e8m0fnu, torch.uint8),
    ],
)
def test_every_bit_pattern_is_judged_as_torch_judges_it(tmp_path: Path, dtype: torch.dtype, bits: torch.dtype) -> None:
    patterns = torch.arange(torch.iinfo(bits).min, torch.iinfo(bits).max + 1).to(bits)
    values = patterns.view(dtype).float()
    finite = values.isfinite()
    tensors = {"finite": patterns[finite].view(dtype)}
    bad = patterns[~finite]
    tensors |= {f"bad.{i}": bad[i : i + 1].view(dtype) for i in range(len(bad))}
    readings = readings_of(tmp_path, tensors)
    assert readings.pop("finite").non_finite is None
    kinds = ["Inf" if value.isinf() else "NaN" for value in values[~finite]]
    assert len(kinds) > 0
    assert [readings[f"bad.{i}"].non_finite for i in range(len(bad))] == [f"{kind} at element 0" for kind in kinds]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_wide_floats_are_judged_too(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    largest = torch.finfo(dtype).max
    tensors = {
        "good": torch.tensor([largest, -largest, 0.0], dtype=dtype),
        "bad": torch.tensor([1, value], dtype=dtype),
    }
    readings = readings_of(tmp_path, tensors)
    assert readings["good"].non_finite is None
    assert readings["bad"].non_finite == f"{'NaN' if value != value else 'Inf'} at element 1"


def test_first_fault_is_counted_across_chunks(tmp_path: Path) -> None:
    values = torch.zeros(CHUNK_BYTES, dtype=torch.bfloat16)
    first = CHUNK_BYTES // 2 + 3
    values[first] = float("inf")
    values[first + 5] = float("nan")
    assert readings_of(tmp_path, {"a": values})["a"].non_finite == f"Inf at element {first}"


def test_integers_are_never_a_fault(tmp_path: Path) -> None:
    assert readings_of(tmp_path, {"a": torch.full((3,), -1, dtype=torch.int64)})["a"].non_finite is None


def test_reading_reports_progress_in_the_callers_thread(tmp_path: Path) -> None:
    save_file({name: torch.zeros(100) for name in "abc"}, tmp_path / "model.safetensors")
    seen: list[tuple[int, int, int]] = []
    read_tensors(tensors_of(tmp_path).values(), lambda done, total: seen.append((done, total, threading.get_ident())))
    assert seen == [(done, 1200, threading.get_ident()) for done in (400, 800, 1200)]


def test_reading_names_the_tensor_that_a_shrunken_file_lost(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / "model.safetensors")
    tensors = tensors_of(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(tensors["a"].end - 1)
    with pytest.raises(CheckpointError, match="tensor a cannot be read"):
        read_tensors(tensors.values())
