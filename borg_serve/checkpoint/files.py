"""Reads the shard index and the safetensors headers: where each tensor is, with every byte of the files accounted for.

Knows files; does not know what the tensors are for, and does not read their values.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from borg_serve.errors import Problem

__all__ = [
    "COPY_AGAIN",
    "DTYPES",
    "INDEX_FILE",
    "SINGLE_FILE",
    "TensorInfo",
    "first_problems",
    "lfs_pointers",
    "read_headers",
    "read_index",
    "read_json",
]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
LISTED = 10
LFS = b"version https://git-lfs"
UNREAD = ("adapter_", "consolidated")
"""How files beside a checkpoint begin that are not part of it: adapters, and the model in Mistral's own format."""
COPY_AGAIN = "Copy the checkpoint again from its source."


DTYPES: Mapping[str, str | None] = {
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{"BOOL": "bool", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
    **{"F4": None, "F6_E2M3": None, "F6_E3M2": None},
}
"""The dtypes a checkpoint may use, as safetensors and torch name them. Those without a torch name have neither NaN nor
infinity (OCP microscaling specification)."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor is: bytes `begin` to `end` of `file`."""

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


def lfs_pointers(directory: Path) -> list[Problem]:
    """Return a problem for each file that git-lfs has left a pointer for, of those that a checkpoint is served from."""
    suffixes = {".json", ".safetensors", ".jinja", ".txt", ".model"}
    small = (path for path in sorted(directory.iterdir()) if path.suffix in suffixes and path.is_file())
    found = []
    for path in small:
        if not path.name.startswith(UNREAD) and path.stat().st_size < 1024 and path.read_bytes().startswith(LFS):
            cure = "Run `git lfs pull` where it was cloned, or fetch it again."
            found.append(Problem(str(path), "must be the file itself", "a pointer of git-lfs", cure))
    return found


def first_problems(names: Sequence[str], where: Path, what: str, got: Callable[[str], object]) -> list[Problem]:
    """Return a problem for each of the first ten tensors that are wrong in the same way, then one with a count."""
    problems = [Problem(f"{where}: tensor {name}", what, got(name), COPY_AGAIN) for name in names[:LISTED]]
    if len(names) > LISTED:
        problems.append(Problem(f"{where}: more tensors than these {LISTED}", what, len(names) - LISTED, COPY_AGAIN))
    return problems


def read_headers(directory: Path, problems: list[Problem]) -> dict[str, TensorInfo]:
    """Return every tensor of a checkpoint directory by name, sorted; add what is wrong with its files to `problems`.

    Files that the index does not name are left alone, as engines do.
    """
    present = sorted(path.name for path in directory.glob("*.safetensors") if not path.name.startswith(UNREAD))
    index = directory / INDEX_FILE
    weight_map = read_index(index, problems) if index.is_file() else None
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
            wrong,
            index,
            what,
            lambda name: f"{weight_map.get(name, 'none')} in the index, {placed.get(name, 'none')} in the files",
        )
    return dict(sorted(tensors.items()))


def _file_of(tensors: Mapping[str, TensorInfo]) -> Callable[[str], str]:
    return lambda name: tensors[name].file.name


def read_index(path: Path, problems: list[Problem]) -> dict[str, str] | None:
    """Return which file each tensor is in, or None after noting what is wrong with the index."""
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
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        if "file not fully covered" not in str(error):  # that one, its last check, is explained with figures below
            return wrong("must be a safetensors file with its whole header", str(error))
    try:
        with file.open("rb") as stream:
            data_begin = 8 + int.from_bytes(stream.read(8), "little")
            # safetensors takes the last of two tensors with one name.
            header = json.loads(stream.read(data_begin - 8), object_pairs_hook=_unique_keys)
    except (OSError, ValueError) as error:
        return wrong("must have a readable header", str(error))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            return wrong(f"must give tensor {name} a known dtype", entry["dtype"])
        begin, end = (data_begin + offset for offset in entry["data_offsets"])
        tensors[name] = TensorInfo(name, entry["dtype"], tuple(entry["shape"]), file, begin, end)
    described = max((tensor.end for tensor in tensors.values()), default=data_begin)
    if (size := file.stat().st_size) != described:
        state = "is truncated" if size < described else "has bytes that belong to no tensor"
        return wrong(f"{state}: its header describes {described} bytes", size)
    return tensors


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(keys) != len(set(keys)):
        raise ValueError(f"the header names {max(keys, key=keys.count)} twice")
    return dict(pairs)
