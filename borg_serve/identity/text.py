"""The identity text that every prompt begins with, and its SHA-256. Knows nothing of templates or tokens."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from borg_serve.errors import IdentityError

__all__ = ["Identity", "check_control_tokens", "load_identity"]


@dataclass(frozen=True)
class Identity:
    """The text that every prompt's system message begins with."""

    text: str

    @property
    def sha256(self) -> str:
        """SHA-256 of the text in UTF-8, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_identity(path: str | os.PathLike[str]) -> Identity:
    """Read an identity file: UTF-8, with the blank space around the text stripped. Raises IdentityError."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise IdentityError(
            f"{path}: the identity must be UTF-8, got byte {error.object[error.start]:#04x} at offset {error.start}. "
            "Save the file as UTF-8."
        ) from error
    except OSError as error:
        raise IdentityError(
            f"{path}: the identity cannot be read, got {error.strerror}. Name an existing text file."
        ) from error
    if not text:
        raise IdentityError(f"{path}: the identity must hold a text, got only blank space. Write one.")
    if "\0" in text:
        raise IdentityError(
            f"{path}: the identity must be plain text, got a NUL at character {text.index(chr(0))}. Remove it."
        )
    return Identity(text)


def check_control_tokens(identity: Identity, literals: Iterable[str]) -> None:
    """Raise IdentityError if the identity holds one of `literals`, the spellings of the tokenizer's added tokens."""
    found = sorted(literal for literal in literals if literal in identity.text)
    if found:
        raise IdentityError(
            f"identity: the text must hold no control token of the tokenizer, got {', '.join(map(repr, found))}. "
            "Describe the token in other words."
        )
