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

from borg_serve import __version__
from borg_serve.checkpoint.check import inspect, preflight
from borg_serve.checkpoint.locate import load_tokenizer, locate, without_strays
from borg_serve.config import Config, is_hub_id
from borg_serve.engine import arguments, quantised
from borg_serve.engine.environment import vllm_version
from borg_serve.errors import CheckpointError
from borg_serve.identity import control_tokens, template
from borg_serve.identity.prefix import TokenPrefix, encode, token_prefix
from borg_serve.identity.text import Identity, check_control_tokens, load_identity

__all__ = ["Preparation", "checked_literals", "installed", "prepare"]

WARM_UP = "Hello"


@dataclass(frozen=True)
class Preparation:
    """What a server or a replica is made from."""

    config: Config
    directory: Path
    root: str | None
    """Root of the checkpoint's SHA-256 tree over its tensors; None for random weights."""
    revision: str | None
    """The commit that a hub id was fetched at; None for a directory."""
    identity: Identity
    chat_template: str
    prefix: TokenPrefix
    literals: frozenset[str]
    """Spellings of the tokenizer's control tokens."""
    vocab_size: int
    """Token ids of the model are below it."""
    context: int
    """Tokens of a prompt and its answer together."""
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
            "checkpoint": {"root": self.root, "revision": self.revision},
        }


def prepare(config: Config, progress: Callable[[int, int], None] | None = None) -> Preparation:
    """Check the checkpoint whole, wrap its template, find the identity's tokens, settle vLLM's arguments.

    `progress(done, total)` counts the bytes of the checkpoint read so far. Raises CheckpointError, IdentityError or
    EngineError; nothing is left running.
    """
    directory = locate(config)
    root = _verified_root(config, directory, progress)
    identity = load_identity(config.identity.prompt)
    tokenizer = load_tokenizer(directory)
    arguments.check_parser_knows(config, tokenizer)
    literals = checked_literals(identity, tokenizer)
    chat_template = template.wrap(template.stock_template(directory), identity)
    render = partial(template.render, tokenizer, chat_template)
    prefix = token_prefix(render, tokenizer, identity)
    served = str(without_strays(directory))
    question = config.model.probe.question if config.model.probe else WARM_UP

    def encode_question(content: str) -> tuple[int, ...]:
        return tuple(encode(prefix, render([{"role": "user", "content": content}], None), tokenizer))

    args = arguments.namespace(arguments.build(config, served, chat_template, len(prefix.token_ids)))
    model = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return Preparation(
        config=config,
        directory=directory,
        root=root,
        revision=directory.name if is_hub_id(config.model.path) else None,
        identity=identity,
        chat_template=chat_template,
        prefix=prefix,
        literals=literals,
        vocab_size=int(model["vocab_size"]),
        context=args.max_model_len or int(model["max_position_embeddings"]),
        warm_up_ids=encode_question(WARM_UP),
        probe_ids=encode_question(question),
        args=args,
    )


def _verified_root(config: Config, directory: Path, progress: Callable[[int, int], None] | None) -> str | None:
    if config.model.load_format == "dummy":
        return None
    layers = partial(quantised.served_layers, dtype=config.model.dtype)
    root = preflight(inspect(directory), progress, quantised=layers)
    expected = config.cluster.expect_root
    if expected is not None and root != expected:
        cure = "Serve the checkpoint that was agreed on, or correct cluster.expect_root."
        raise CheckpointError(f"{directory}: the checkpoint's root must be {expected}, got {root}. {cure}")
    return root


def checked_literals(identity: Identity, tokenizer: Any) -> frozenset[str]:
    """Return the spellings of the control tokens, which the identity must not hold and which can be neutralised.

    Raises IdentityError.
    """
    literals = control_tokens.literals(tokenizer)
    check_control_tokens(identity, literals)
    control_tokens.check_neutraliser(control_tokens.Neutraliser(literals), tokenizer)
    return literals


def installed(name: str) -> str | None:
    """Version of an installed distribution, None if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
