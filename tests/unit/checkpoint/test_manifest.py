"""The Merkle tree and the manifest file."""

import hashlib
from pathlib import Path

import pytest

from borg_serve.checkpoint.files import INDEX_FILE
from borg_serve.checkpoint.manifest import MANIFEST_FILE, Manifest, digest_files, merkle_root, read_manifest
from borg_serve.errors import CheckpointError

# The vectors of the Certificate Transparency project for RFC 6962: roots over the first n of eight inputs.
INPUTS = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
ROOTS = {
    0: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
}


@pytest.mark.parametrize("count", ROOTS)
def test_merkle_root_agrees_with_rfc_6962(count: int) -> None:
    leaves = [hashlib.sha256(b"\x00" + bytes.fromhex(text)).digest() for text in INPUTS[:count]]
    assert merkle_root(leaves).hex() == ROOTS[count]


@pytest.fixture
def manifest() -> Manifest:
    leaves = {name: hashlib.sha256(name.encode()).digest() for name in "abc"}
    digests = {name: leaf.hex() for name, leaf in leaves.items()}
    root = merkle_root(list(leaves.values())).hex()
    return Manifest(root=root, tensors=digests, files={"config.json": "0" * 64})


def test_manifest_reads_as_it_was_written(tmp_path: Path, manifest: Manifest) -> None:
    assert read_manifest(tmp_path) is None
    manifest.write(tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_FILE]


def test_manifest_with_a_changed_root_or_leaf_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    manifest.write(tmp_path)
    text = (tmp_path / MANIFEST_FILE).read_text()
    for digest in (manifest.root, *manifest.tensors.values()):
        for first in ("0" if digest[0] != "0" else "1", "z", ""):
            (tmp_path / MANIFEST_FILE).write_text(text.replace(digest, first + digest[1:]))
            with pytest.raises(CheckpointError, match=MANIFEST_FILE):
                read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "borg-manifest/2", "root": "", "tensors": {}, "files": {}}',
        '{"format": "borg-manifest/1", "root": "", "tensors": [], "files": {}}',
        f'{{"root": "{ROOTS[0]}", "tensors": {{}}, "files": {{}}}}',
        '{"format": "borg-manifest/1", "root": "", "tensors": {"a": "abc"}, "files": {}}',
        '{"format": "borg-manifest/1", "root": "", "tensors": {"a": 5}, "files": {}}',
        "\ufeff{}",
    ],
)
def test_manifest_that_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=MANIFEST_FILE):
        read_manifest(tmp_path)


def test_manifest_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, manifest: Manifest) -> None:
    manifest.write(tmp_path)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone").rmdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        manifest.write(tmp_path / "gone")
    assert read_manifest(tmp_path) == manifest


def test_digest_covers_what_an_engine_reads_beside_the_weights(tmp_path: Path) -> None:
    covered = ["chat_template.jinja", "config.json", "merges.txt", "tokenizer.json", "tokenizer.model"]
    for name in [*covered, MANIFEST_FILE, INDEX_FILE, "model.safetensors", "README.md"]:
        (tmp_path / name).write_text(name)
    assert digest_files(tmp_path) == {name: hashlib.sha256(name.encode()).hexdigest() for name in covered}
