"""The hashes of a sound checkpoint: a Merkle tree over its tensors, and the file that keeps it.

Knows SHA-256 and one file format; reads no tensors.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from borg_serve.checkpoint.files import INDEX_FILE
from borg_serve.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from borg_serve.checkpoint.reading import Reading

__all__ = ["MANIFEST_FILE", "Manifest", "digest_files", "merkle_root", "read_manifest"]

MANIFEST_FILE = "borg-manifest.json"

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """Return the Merkle tree hash of RFC 6962, section 2.1, over leaf hashes in their order."""
    if not leaves:
        return hashlib.sha256().digest()
    if len(leaves) == 1:
        return leaves[0]
    split = 1 << ((len(leaves) - 1).bit_length() - 1)  # the largest power of two below the number of leaves
    return hashlib.sha256(b"\x01" + merkle_root(leaves[:split]) + merkle_root(leaves[split:])).digest()


class Manifest(BaseModel):
    """SHA-256 of each tensor and small file of a sound checkpoint, in hexadecimal; the root is over tensors only."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal["borg-manifest/1"] = "borg-manifest/1"
    root: Sha256
    tensors: dict[str, Sha256]
    files: dict[str, Sha256]

    @classmethod
    def of(cls, readings: Mapping[str, "Reading"], files: dict[str, str]) -> "Manifest":
        """Build the tree over leaves sorted by name, so that files and their order do not matter."""
        leaves = {name: readings[name].leaf for name in sorted(readings)}
        tensors = {name: leaf.hex() for name, leaf in leaves.items()}
        return cls(root=merkle_root(list(leaves.values())).hex(), tensors=tensors, files=files)

    def write(self, directory: Path) -> None:
        """Replace the manifest in `directory` atomically."""
        temporary = directory / f".{MANIFEST_FILE}.{os.getpid()}.partial"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(self.model_dump_json(indent=1) + "\n")
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
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _damaged(path, "is not a manifest", " ".join(str(error).split())) from error
    if "format" not in manifest.model_fields_set:
        raise _damaged(path, "must name its format", None)
    root = merkle_root([bytes.fromhex(manifest.tensors[name]) for name in sorted(manifest.tensors)]).hex()
    if manifest.root != root:
        raise _damaged(path, f"is damaged: its leaves have the root {root}", manifest.root)
    return manifest


def digest_files(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of each small file an engine may read: configuration, tokenizer, chat template.

    The manifest itself is left out, and the shard index, because sharding does not change a checkpoint.
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


def _damaged(path: Path, what: str, got: object) -> CheckpointError:
    cure = "Fetch the manifest again, or write a new one from a copy you trust with `borg-serve manifest write`."
    return CheckpointError(str(Problem(str(path), what, got, cure)))
