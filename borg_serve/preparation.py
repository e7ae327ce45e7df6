"""Everything that is settled before an engine starts: the checkpoint, the identity, the template, vLLM's arguments.

It is the same for one machine and for every replica of a cluster, and it travels between processes. It does not start
anything.
"""

import json
import platform
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from borg_serve import __version__, checkpoint, engine_arguments, identity, neutralise, template
from borg_serve.config import Config, is_hub_id
from borg_serve.device import vllm_version
from borg_serve.errors import CheckpointError
from borg_serve.identity import Identity, TokenPrefix

__all__ = ["Preparation", "installed", "load_tokenizer", "locate", "prepare"]

WARM_UP = "Hello"


@dataclass(frozen=True)
class Preparation:
    """What a server or a replica is made from."""

    config: Config
    directory: Path
    root: str | None
    """Root of the checkpoint's SHA-256 tree over its tensors; None for random weights."""
    identity: Identity
    chat_template: str
    prefix: TokenPrefix
    literals: frozenset[str]
    """Spellings of the tokenizer's control tokens."""
    vocab_size: int
    """Token ids of the model are below it."""
    warm_up_ids: tuple[int, ...]
    probe_ids: tuple[int, ...]
    args: Namespace
    """vLLM's arguments."""

    def version(self) -> dict[str, Any]:
        """The answer of `/version`."""
        return {
            "borg_serve": __version__,
            "vllm": vllm_version(),
            "ray": installed("ray"),
            "python": platform.python_version(),
            "model": self.config.model.served_name,
            "identity": {"sha256": self.identity.sha256, "tokens": len(self.prefix.token_ids)},
            "checkpoint": {"root": self.root},
        }


def prepare(config: Config, progress: Callable[[int, int], None] | None = None) -> Preparation:
    """Check the checkpoint whole, wrap its template, find the identity's tokens, settle vLLM's arguments.

    `progress(done, total)` counts the bytes of the checkpoint read so far. Raises CheckpointError, IdentityError or
    EngineError; nothing is left running.
    """
    directory = locate(config)
    root = _verified_root(config, directory, progress)
    text = identity.load(config.identity.prompt)
    tokenizer = load_tokenizer(directory)
    literals = neutralise.literals(tokenizer)
    identity.check_control_tokens(text, literals)
    neutralise.check(neutralise.Neutraliser(literals), tokenizer)
    chat_template = template.wrap(template.stock_template(directory), text)
    render = partial(template.render, tokenizer, chat_template)
    prefix = identity.token_prefix(render, tokenizer, text)
    question = config.model.probe.question if config.model.probe else WARM_UP

    def encode(content: str) -> tuple[int, ...]:
        return tuple(identity.encode(prefix, render([{"role": "user", "content": content}], None), tokenizer))

    return Preparation(
        config=config,
        directory=directory,
        root=root,
        identity=text,
        chat_template=chat_template,
        prefix=prefix,
        literals=literals,
        vocab_size=int(json.loads((directory / "config.json").read_text(encoding="utf-8"))["vocab_size"]),
        warm_up_ids=encode(WARM_UP),
        probe_ids=encode(question),
        args=engine_arguments.namespace(
            engine_arguments.build(config, str(directory), chat_template, len(prefix.token_ids))
        ),
    )


def locate(config: Config) -> Path:
    """The checkpoint's directory; a hub id is fetched into the hub's own cache. Raises CheckpointError."""
    path = config.model.path
    if not is_hub_id(path):
        if not Path(path).is_dir():
            cure = "Set model.path to a checkpoint, or make the demo's with `borg-serve demo-model`."
            raise CheckpointError(f"{config.file}: model.path: there is no such directory, got {path!r}. {cure}")
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(path, revision=config.model.revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).splitlines()[0]
        cure = "Check the name and the network, or set model.path to a directory."
        raise CheckpointError(
            f"{config.file}: model.path: cannot be fetched ({reason}), got {path!r}. {cure}"
        ) from None


def load_tokenizer(directory: Path) -> Any:
    """The checkpoint's own tokenizer, by transformers, without code from the checkpoint."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        cure = "Restore the tokenizer files that came with the model."
        raise CheckpointError(f"{directory}: the tokenizer cannot be read, got {reason}. {cure}") from None


def _verified_root(config: Config, directory: Path, progress: Callable[[int, int], None] | None) -> str | None:
    if config.model.load_format == "dummy":
        return None
    root = checkpoint.preflight(checkpoint.inspect(directory), progress)
    expected = config.cluster.expect_root
    if expected is not None and root != expected:
        cure = "Serve the checkpoint that was agreed on, or correct cluster.expect_root."
        raise CheckpointError(f"{directory}: the checkpoint's root must be {expected}, got {root}. {cure}")
    return root


def installed(name: str) -> str | None:
    """Version of an installed distribution, None if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
