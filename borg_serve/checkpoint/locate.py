"""Finds the checkpoint's directory, fetching it from a hub if needed, and loads its tokenizer.

Knows profiles, the hub and transformers; does not look at the weights.
"""

import tempfile
from pathlib import Path
from typing import Any

from borg_serve.checkpoint import hub
from borg_serve.checkpoint.files import INDEX_FILE, SINGLE_FILE, read_json
from borg_serve.config import Config, is_hub_id
from borg_serve.errors import CheckpointError, Problem

__all__ = ["load_tokenizer", "locate", "without_strays"]

_folders: list[tempfile.TemporaryDirectory[str]] = []
"""Removed when this process ends."""


def locate(config: Config) -> Path:
    """Return the checkpoint's directory; a hub id is fetched into the hub's own cache. Raises CheckpointError."""
    path = config.model.path
    if not is_hub_id(path):
        if not Path(path).is_dir():
            cure = "Set model.path to a checkpoint, or make the demo's with `borg-serve demo-model`."
            raise CheckpointError(f"{config.file}: model.path: there is no such directory, got {path!r}. {cure}")
        hub.go_offline()
        return Path(path)
    directory = hub.fetch(config)
    hub.go_offline()
    return directory


def without_strays(directory: Path) -> Path:
    """Return the directory, or one of links to its files without the safetensors that do not belong to the model.

    Where there is no index, an engine reads every safetensors file, an adapter's too.
    """
    files = sorted(path for path in directory.iterdir() if path.is_file())
    strays = [path for path in files if path.suffix == ".safetensors" and path.name != SINGLE_FILE]
    if not strays or (directory / INDEX_FILE).is_file():
        return directory
    _folders.append(tempfile.TemporaryDirectory(prefix="borg-serve-"))
    folder = Path(_folders[-1].name)
    for path in files:
        if path not in strays:
            (folder / path.name).symlink_to(path.resolve())
    return folder


def load_tokenizer(directory: Path) -> Any:
    """Load the checkpoint's own tokenizer with transformers, without code from the checkpoint."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if code := read_json(directory / "tokenizer_config.json", []).get("auto_map"):
            what = "asks for code from the checkpoint, never run, for a tokenizer that transformers does not have"
            cure = "Use a checkpoint whose tokenizer transformers has itself."
            where = f"{directory / 'tokenizer_config.json'}: auto_map"
            raise CheckpointError(str(Problem(where, what, code, cure))) from None
        cure = "Restore the tokenizer files that came with the model."
        raise CheckpointError(f"{directory}: the tokenizer cannot be read, got {reason}. {cure}") from None
