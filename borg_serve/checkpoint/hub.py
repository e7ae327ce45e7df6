"""Fetches a checkpoint from a hub into the hub's own cache: one commit of it, and only the files that are served.

Knows huggingface_hub and the names of files; does not look at the weights.
"""

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from borg_serve.checkpoint.files import INDEX_FILE, SINGLE_FILE, read_index, read_json
from borg_serve.config import Config
from borg_serve.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from huggingface_hub.utils.tqdm import tqdm

__all__ = ["Unreachable", "fetch", "go_offline", "weight_bytes"]

SMALL = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
UNNEEDED = ["*/*", "adapter_*", "consolidated*"]
"""Folders with other formats of the model, adapters, and Mistral's own format."""
TOKEN = "set HF_TOKEN to a token of yours"


class Unreachable(CheckpointError):
    """The hub does not answer, or may not be asked, and its cache does not hold what is needed."""


class _Stop(Exception):
    """Ends a download thread after SIGINT or SIGTERM."""


def go_offline() -> None:
    """Let this process and its children ask no hub from now on: what they need is in a directory."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if (constants := sys.modules.get("huggingface_hub.constants")) is not None:
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]  # it has read the environment when it was imported


def fetch(config: Config, weights: bool = True) -> Path:
    """Return the directory of a snapshot, named by its commit, after fetching what is not in the hub's cache yet.

    Without `weights` it holds the configuration, the tokenizer and the index only. Files that were fetched whole stay
    when it fails. Raises Unreachable, or CheckpointError for another reason, in one line.
    """
    from huggingface_hub import snapshot_download

    repository = config.model.path
    with _explained(config), _stoppable() as bar:
        directory = Path(
            snapshot_download(
                repository,
                revision=config.model.revision,
                allow_patterns=SMALL,
                ignore_patterns=UNNEEDED,
                tqdm_class=bar,
            )
        )
        if not weights:
            return directory
        names = _weights(directory)
        absent = names - (_listed(repository, directory).keys() or names)
        if not absent:
            snapshot_download(repository, revision=directory.name, allow_patterns=sorted(names), tqdm_class=bar)
            if all((directory / name).is_file() for name in names):
                return directory
    where = f"{config.file}: model.path: {repository} at {directory.name}"
    if not absent:  # the hub was not asked, and an older cache does not know what is missing
        raise Unreachable(str(Problem(where, "is not whole in the hub's cache", None, "Unset HF_HUB_OFFLINE.")))
    others = [name for name in _listed(repository, directory) if name.endswith((".bin", ".gguf", ".pt", ".onnx"))]
    cure = "Name a repository that holds the model as safetensors."
    raise CheckpointError(str(Problem(where, f"must hold {sorted(absent)[0]}", others[:10] or "no such file", cure)))


def weight_bytes(config: Config, directory: Path) -> int | None:
    """Bytes of a snapshot's weights, whether they were fetched or not; None if neither index nor hub have told."""
    metadata = read_json(directory / INDEX_FILE, []).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if type(total) not in (int, float):
        sizes = _listed(config.model.path, directory)
        found = [sizes.get(name) for name in _weights(directory)]
        total = sum(size for size in found if size is not None) if None not in found else None
    return None if total is None else int(total)


def _weights(directory: Path) -> set[str]:
    index = directory / INDEX_FILE
    return set((read_index(index, []) or {}).values() if index.is_file() else ()) or {SINGLE_FILE}


def _listed(repository: str, directory: Path) -> dict[str, int]:
    """The sizes of a commit's files, as the hub has listed them; nothing if it was never asked."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    with suppress(CachedRepoTreeNotFoundError):
        return {file.path: file.size for file in get_cached_repo_tree(repository, revision=directory.name)}
    return {}


@contextmanager
def _stoppable() -> "Iterator[type[tqdm]]":
    """huggingface_hub's own progress bar, which ends the download threads at SIGINT and SIGTERM.

    They would go on to the end of their files otherwise. Where signals belong to another thread it does nothing.
    """
    from huggingface_hub.utils.tqdm import tqdm

    stopping = threading.Event()

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            if stopping.is_set():
                raise _Stop
            return super().update(n)

    def stop(number: int, frame: Any) -> None:
        stopping.set()
        go_offline()  # nothing is tried again
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield Bar
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield Bar
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _explained(config: Config) -> Iterator[None]:
    """Turn what goes wrong on the way from the hub into one line with its cure."""
    try:
        yield
    except (KeyboardInterrupt, OSError, ValueError, _Stop) as error:
        raise _explain(config, error) from None
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):
            raise
        raise _explain(config, error) from None


def _explain(config: Config, error: BaseException) -> CheckpointError:
    from huggingface_hub import constants, errors

    where, repository = f"{config.file}: model.path", config.model.path

    def line(what: str, got: object, cure: str, kind: type[CheckpointError] = CheckpointError) -> CheckpointError:
        return kind(str(Problem(where, what, got, cure)))

    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
    again = "Run it again: files that are whole stay."
    if isinstance(error, KeyboardInterrupt | _Stop):
        return line("the download was interrupted", repository, again)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        cure = f"Free space in {constants.HF_HUB_CACHE}, or set HF_HOME to a folder on another disk. {again}"
        return line("the disk is full", repository, cure)
    if isinstance(cause, errors.GatedRepoError) or status == 403:
        return line("is gated", repository, f"Accept its terms on its page on the hub, and {TOKEN}.")
    if isinstance(cause, errors.RevisionNotFoundError):
        where = f"{config.file}: model.revision"
        return line(f"is no branch, tag or commit of {repository}", config.model.revision, "Correct or remove it.")
    if isinstance(cause, errors.RepositoryNotFoundError) or status == 401:
        return line("is unknown to the hub, or private", repository, f"Correct the name, or {TOKEN}.")
    if status is not None:
        return line(f"the hub answers {status}", repository, "Try again later, or set model.path to a directory.")
    if constants.HF_HUB_OFFLINE:
        cure = "Unset HF_HUB_OFFLINE, or set model.path to a directory."
        return line("is not whole in the hub's cache, and HF_HUB_OFFLINE is set", repository, cure, Unreachable)
    reason = (str(cause or error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno is not None):
        cure = f"Make {constants.HF_HUB_CACHE} writable, or set HF_HOME to another folder."
        return line(f"cannot be written to the hub's cache ({reason})", repository, cure)
    cure = f"Check the network and HF_ENDPOINT ({constants.ENDPOINT}), or set model.path to a directory. {again}"
    return line(f"cannot be fetched ({reason})", repository, cure, Unreachable)
