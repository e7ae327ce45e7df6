"""Fingerprints tensors: one pass that hashes and looks for NaN and infinity, a Merkle tree, a file that keeps it.

Knows bytes, dtypes and SHA-256; knows nothing of configurations or of what an architecture needs.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from borg_serve.errors import CheckpointError, Problem
from borg_serve.weights import DTYPES, INDEX_FILE, TensorInfo

__all__ = [
    "MANIFEST_FILE",
    "Manifest",
    "Progress",
    "Reading",
    "digest_files",
    "merkle_root",
    "read_manifest",
    "read_tensors",
]

MANIFEST_FILE = "borg-manifest.json"
FORMAT = "borg-manifest/1"
CHUNK_BYTES = 1 << 20  # a chunk and its scratch stay in a core's L2 cache; a multiple of every dtype's size

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, in the caller's own thread."""


@dataclass(frozen=True)
class Reading:
    """What one pass over a tensor's bytes found."""

    leaf: bytes
    """SHA-256 of the tensor's name, dtype, shape and bytes."""
    non_finite: str | None
    """The first value that is not finite, `NaN at element 17`; None for a sound tensor."""


def read_tensors(
    tensors: Iterable[TensorInfo], progress: Progress | None = None, threads: int | None = None
) -> dict[str, Reading]:
    """Read every tensor once, hash it and look for NaN and infinity; by default with a thread for each usable core.

    Raises CheckpointError when a file cannot be read to the end of a tensor.
    """
    by_size = sorted(tensors, key=lambda tensor: tensor.num_bytes, reverse=True)
    total_bytes = sum(tensor.num_bytes for tensor in by_size)
    readings: dict[str, Reading] = {}
    done_bytes = 0
    pool = ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)))
    try:
        pending = {pool.submit(_read_tensor, tensor): tensor for tensor in by_size}
        for future in as_completed(pending):
            tensor = pending[future]
            readings[tensor.name] = future.result()
            done_bytes += tensor.num_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)
    finally:
        pool.shutdown(cancel_futures=True)
    return readings


def _read_tensor(tensor: TensorInfo) -> Reading:
    import numpy as np  # here, so that the command line starts without it

    dtype = DTYPES[tensor.dtype]
    header = json.dumps([tensor.name, tensor.dtype, list(tensor.shape)], separators=(",", ":")).encode()
    # RFC 6962, section 2.1: a leaf starts with 0x00 and an interior node with 0x01, so neither can pass for the other.
    # The header's length in front of it keeps header and data apart.
    sha256 = hashlib.sha256(b"\x00" + len(header).to_bytes(8, "little") + header)
    buffer = bytearray(min(CHUNK_BYTES, tensor.num_bytes))
    scratch = bytearray(len(buffer))
    non_finite = None
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.begin)
            for offset in range(0, tensor.num_bytes, CHUNK_BYTES):
                chunk = memoryview(buffer)[: min(CHUNK_BYTES, tensor.num_bytes - offset)]
                if file.readinto(chunk) != len(chunk):
                    raise OSError("it ends inside the tensor: another process changed it")
                sha256.update(chunk)
                if dtype.magnitude_mask is None or non_finite is not None:
                    continue
                values = np.frombuffer(chunk, f"<u{dtype.bits // 8}")
                magnitudes = np.frombuffer(scratch, values.dtype)[: len(values)]
                np.bitwise_and(values, values.dtype.type(dtype.magnitude_mask), out=magnitudes)
                if magnitudes.max() >= dtype.least_non_finite:
                    first = int(np.argmax(magnitudes >= dtype.least_non_finite))
                    infinite = dtype.has_infinity and magnitudes[first] == dtype.least_non_finite
                    non_finite = f"{'Inf' if infinite else 'NaN'} at element {offset * 8 // dtype.bits + first}"
    except OSError as error:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name} cannot be read, got {error}. Check the disk and copy it again."
        ) from error
    return Reading(sha256.digest(), non_finite)


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """Return the Merkle tree hash of RFC 6962, section 2.1, over leaf hashes in their order."""
    if not leaves:
        return hashlib.sha256().digest()
    if len(leaves) == 1:
        return leaves[0]
    split = 1 << ((len(leaves) - 1).bit_length() - 1)  # the largest power of two below the number of leaves
    return hashlib.sha256(b"\x01" + merkle_root(leaves[:split]) + merkle_root(leaves[split:])).digest()


@dataclass(frozen=True)
class Manifest:
    """SHA-256 of each tensor and small file of a sound checkpoint, in hexadecimal; the root is over tensors only."""

    root: str
    tensors: Mapping[str, str]
    files: Mapping[str, str]

    @classmethod
    def of(cls, readings: Mapping[str, Reading], files: Mapping[str, str]) -> "Manifest":
        """Build the tree over leaves sorted by name, so that files and their order do not matter."""
        leaves = {name: readings[name].leaf for name in sorted(readings)}
        return cls(merkle_root(list(leaves.values())).hex(), {name: leaf.hex() for name, leaf in leaves.items()}, files)

    def write(self, directory: Path) -> None:
        """Replace the manifest in `directory` atomically."""
        temporary = directory / f".{MANIFEST_FILE}.{os.getpid()}.partial"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump({"format": FORMAT, **asdict(self)}, file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(directory / MANIFEST_FILE)
        except OSError as error:
            raise CheckpointError(
                f"{directory / MANIFEST_FILE}: cannot be written, got {error}. Make the directory writable."
            ) from error
        finally:
            temporary.unlink(missing_ok=True)


def read_manifest(directory: Path) -> Manifest | None:
    """Return the manifest of a checkpoint directory, or None if there is none.

    Raises CheckpointError when the file is not what `Manifest.write` writes, or its root is not that of its leaves.
    """
    path = directory / MANIFEST_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, "cannot be read as JSON", str(error)) from error
    if not isinstance(document, dict) or document.keys() != {"format", "root", "tensors", "files"}:
        raise _damaged(path, "must have the keys format, root, tensors and files", type(document).__name__)
    if document["format"] != FORMAT:
        raise _damaged(path, f"must have the format {FORMAT!r}", document["format"])
    for key in ("tensors", "files"):
        digests = document[key]
        if not isinstance(digests, dict) or not all(map(_is_sha256, digests.values())):
            raise _damaged(path, f"{key} must map names to SHA-256 in hexadecimal", "something else")
    root = merkle_root([bytes.fromhex(document["tensors"][name]) for name in sorted(document["tensors"])]).hex()
    if document["root"] != root:
        raise _damaged(path, f"is damaged: its leaves have the root {root}", document["root"])
    return Manifest(root, document["tensors"], document["files"])


def digest_files(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of each small file an engine may read: configuration, tokenizer, chat template.

    Left out are the manifest itself and the shard index, which says how tensors are spread over files and nothing else.
    """
    suffixes = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
    digests = {}
    for path in sorted(directory.iterdir()):
        if path.suffix in suffixes and path.name not in (MANIFEST_FILE, INDEX_FILE) and path.is_file():
            try:
                digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read, got {error}. Make it readable.") from error
    return digests


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _damaged(path: Path, what: str, got: object) -> CheckpointError:
    cure = "Fetch the manifest again, or write a new one from a copy you trust with `borg-serve manifest write`."
    return CheckpointError(str(Problem(str(path), what, got, cure)))
