"""Reads where the tensors of a checkpoint lie: the shard index and the safetensors headers, every byte accounted for.

Knows the file format; knows nothing of what the tensors are for, and reads none of their values.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from borg_serve.errors import Problem

__all__ = ["COPY_AGAIN", "DTYPES", "INDEX_FILE", "Dtype", "TensorInfo", "first_problems", "read_headers", "read_json"]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
LISTED = 10
COPY_AGAIN = "Copy the checkpoint again from its source."


@dataclass(frozen=True)
class Dtype:
    """A safetensors dtype: its size, and how a value that is NaN or infinite looks."""

    bits: int
    torch_name: str | None = None
    magnitude_mask: int | None = None
    """Clears the sign bit of a little-endian unsigned integer view; None where every bit pattern is finite."""
    least_non_finite: int = 0
    """Smallest masked value that is not finite: infinity where the format has one, otherwise NaN."""
    has_infinity: bool = True


DTYPES: Mapping[str, Dtype] = {
    "BOOL": Dtype(8, "bool"),
    "U8": Dtype(8, "uint8"),
    "I8": Dtype(8, "int8"),
    "U16": Dtype(16, "uint16"),
    "I16": Dtype(16, "int16"),
    "U32": Dtype(32, "uint32"),
    "I32": Dtype(32, "int32"),
    "U64": Dtype(64, "uint64"),
    "I64": Dtype(64, "int64"),
    "F64": Dtype(64, "float64", 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": Dtype(32, "float32", 0x7FFF_FFFF, 0x7F80_0000),
    "F16": Dtype(16, "float16", 0x7FFF, 0x7C00),
    "BF16": Dtype(16, "bfloat16", 0x7FFF, 0x7F80),
    # OCP 8-bit floating point specification: E4M3 spends only S.1111.111 on NaN and has no infinity.
    "F8_E4M3": Dtype(8, "float8_e4m3fn", 0x7F, 0x7F, has_infinity=False),
    "F8_E5M2": Dtype(8, "float8_e5m2", 0x7F, 0x7C),
    # OCP microscaling specification: an E8M0 scale has no sign, and 0xFF is its NaN. The 4-bit and 6-bit element
    # formats have neither NaN nor infinity.
    "F8_E8M0": Dtype(8, "float8_e8m0fnu", 0xFF, 0xFF, has_infinity=False),
    "F4": Dtype(4),
    "F6_E2M3": Dtype(6),
    "F6_E3M2": Dtype(6),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes `begin` to `end` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


def read_json(path: Path, problems: list[Problem]) -> dict[str, Any]:
    """Return a file's JSON object, or an empty one after noting why there is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        got = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        problems.append(Problem(str(path), "must be a readable JSON file", got, COPY_AGAIN))
        return {}
    if not isinstance(document, dict):
        problems.append(Problem(str(path), "must hold a JSON object", type(document).__name__, COPY_AGAIN))
        return {}
    return document


def first_problems(names: Sequence[str], where: Path, what: str, got: Callable[[str], object]) -> list[Problem]:
    """Turn names of tensors that are wrong in one way into problems: the first ten, then a count."""
    problems = [Problem(f"{where}: tensor {name}", what, got(name), COPY_AGAIN) for name in names[:LISTED]]
    if len(names) > LISTED:
        problems.append(Problem(f"{where}: more tensors than these {LISTED}", what, len(names) - LISTED, COPY_AGAIN))
    return problems


def read_headers(directory: Path, problems: list[Problem]) -> dict[str, TensorInfo]:
    """Return every tensor of a checkpoint directory by name, sorted, and note what is wrong with its files.

    Files that no index names are problems too: an engine might read them, and nobody would have checked them.
    """
    present = sorted(path.name for path in directory.glob("*.safetensors"))
    index = directory / INDEX_FILE
    weight_map = _read_index(index, problems) if index.is_file() else None
    if index.is_file() and weight_map is None:
        return {}
    needed = present if weight_map is None else sorted(set(weight_map.values()))
    if not present and weight_map is None:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        what = f"must hold {SINGLE_FILE}, or {INDEX_FILE} and its shards"
        cure = "Save the model as safetensors: reading a pickle can run code." if pickles else COPY_AGAIN
        problems.append(Problem(str(directory), what, pickles[:LISTED] or "no weights", cure))
    elif weight_map is None and present != [SINGLE_FILE]:
        what = f"must say which tensor is where when there is more than {SINGLE_FILE}"
        problems.append(Problem(str(index), what, "no such file", COPY_AGAIN))
    for name in sorted(set(needed) - set(present)):
        problems.append(Problem(str(directory / name), f"is named by {INDEX_FILE}", "no such file", COPY_AGAIN))
    for name in sorted(set(present) - set(needed)):
        cure = "Move it out of the directory, or copy the checkpoint again."
        problems.append(
            Problem(str(directory / name), "must be checked or absent", f"no word of it in {INDEX_FILE}", cure)
        )

    tensors: dict[str, TensorInfo] = {}
    readable: set[str] = set()
    for name in sorted(set(needed) & set(present)):
        header = _read_header(directory / name)
        if isinstance(header, Problem):
            problems.append(header)
            continue
        readable.add(name)
        twice = sorted(tensors.keys() & header.keys())
        problems += first_problems(twice, directory, f"must be in one file, not in {name} too", _file_of(tensors))
        tensors |= header
    if weight_map is not None:
        placed = {name: tensor.file.name for name, tensor in tensors.items()}
        named = {name: file for name, file in weight_map.items() if file in readable}
        wrong = sorted(name for name in placed.keys() | named.keys() if placed.get(name) != weight_map.get(name))
        what = "must be in the file that the index says"
        problems += first_problems(
            wrong, index, what, lambda name: f"{weight_map.get(name)} in the index, {placed.get(name)} in the files"
        )
    return dict(sorted(tensors.items()))


def _file_of(tensors: Mapping[str, TensorInfo]) -> Callable[[str], str]:
    return lambda name: tensors[name].file.name


def _read_index(path: Path, problems: list[Problem]) -> dict[str, str] | None:
    weight_map = read_json(path, problems).get("weight_map")
    if not isinstance(weight_map, dict):
        problems.append(Problem(f"{path}: weight_map", "must map tensors to files", weight_map, COPY_AGAIN))
        return None
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            what = "must name a safetensors file beside the index"
            problems.append(Problem(f"{path}: weight_map: {name}", what, file, COPY_AGAIN))
            return None
    return weight_map


def _read_header(file: Path) -> dict[str, TensorInfo] | Problem:
    """Return the tensors of one file, or why it is not a whole safetensors file."""

    def wrong(what: str, got: object) -> Problem:
        return Problem(str(file), what, got, COPY_AGAIN)

    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if size < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
                return wrong("must hold its whole header", f"{header_bytes} header bytes in a file of {size}")
            header = json.loads(stream.read(header_bytes).decode("utf-8"), object_pairs_hook=_unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        return wrong("must start with a safetensors header", str(error))
    if not isinstance(header, dict):
        return wrong("must have a JSON object as header", type(header).__name__)
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        tensor = _tensor(name, entry, file, 8 + header_bytes)
        if tensor is None:
            return wrong(f"must give tensor {name} a known dtype, a shape, and offsets that fit them", entry)
        tensors[name] = tensor
    position = 8 + header_bytes
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != position:
            return wrong(f"must place tensor {tensor.name} right after the one before it", tensor.begin - position)
        position = tensor.end
    if size != position:
        state = "is truncated" if size < position else "has bytes that belong to no tensor"
        return wrong(f"{state}: its header describes {position} bytes", size)
    return tensors


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(keys) != len(set(keys)):
        raise ValueError(f"the header names {max(keys, key=keys.count)} twice")
    return dict(pairs)


def _tensor(name: str, entry: object, file: Path, data_begin: int) -> TensorInfo | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or entry["dtype"] not in DTYPES:
        return None
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        return None
    begin, end = offsets
    if (end - begin) * 8 != prod(shape) * DTYPES[entry["dtype"]].bits:
        return None
    return TensorInfo(name, entry["dtype"], tuple(shape), file, data_begin + begin, data_begin + end)


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)
