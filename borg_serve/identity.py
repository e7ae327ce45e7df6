"""The identity text, its fingerprint, and the tokens that every prompt begins with because of it.

Knows nothing of templates: what a prompt looks like is asked of a `render` function.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from borg_serve.errors import IdentityError

__all__ = ["Identity", "Render", "TokenPrefix", "check_control_tokens", "encode", "load", "token_prefix"]

Render = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None], str]
"""Messages and tools (or None) to the text of the prompt."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def encode(self, text: str, /, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True)
class Identity:
    """The text that every prompt's system message begins with."""

    text: str
    sha256: str
    """Of the text in UTF-8, in hexadecimal."""


@dataclass(frozen=True)
class TokenPrefix:
    """What every prompt begins with, as text and as tokens: the template's opening and the identity.

    The last token or two of the identity are not in it: a tokenizer may join the final full stop with the blank line
    that follows (Qwen2.5 has one token for the three characters).
    """

    text: str
    token_ids: tuple[int, ...]
    follows: str
    """The text that comes next in every prompt. It settles where the last token ends, so `encode` looks for it too."""


def load(path: str | os.PathLike[str]) -> Identity:
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
    return Identity(text=text, sha256=hashlib.sha256(text.encode()).hexdigest())


def check_control_tokens(identity: Identity, literals: Iterable[str]) -> None:
    """Raise IdentityError if the identity holds one of `literals`, the spellings of the tokenizer's added tokens."""
    found = sorted(literal for literal in literals if literal in identity.text)
    if found:
        raise IdentityError(
            f"identity: the text must hold no control token of the tokenizer, got {', '.join(map(repr, found))}. "
            "Describe the token in other words."
        )


def token_prefix(render: Render, tokenizer: Tokenizer, identity: Identity) -> TokenPrefix:
    """Return the longest beginning that all prompts share and whose tokens do not depend on what follows it.

    Tried on many conversations: in each, the tokens of the beginning and those of the rest alone must make up the
    tokens of the whole. Raises IdentityError if a prompt lacks the identity, or if no beginning that reaches the
    identity's last word will do.
    """
    prompts = [render(messages, tools) for messages, tools in _conversations()]
    shared = os.path.commonprefix(prompts)  # noqa: RUF071 (character by character is what is wanted)
    start = shared.find(identity.text)
    if start < 0:
        raise IdentityError(
            "chat template: every prompt must begin alike up to the end of the identity, got prompts that part after "
            f"{shared[-40:]!r}. Use a template that prints the system message first and unchanged."
        )
    end = start + len(identity.text)
    wholes = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    last_word = identity.text.split()[-1]
    shortest = start + max(1, len(identity.text.removesuffix(last_word).rstrip()))
    for cut in range(end - 1, shortest - 1, -1):
        head = tokenizer.encode(shared[:cut], add_special_tokens=False)
        if all(
            whole == head + tokenizer.encode(prompt[cut:], add_special_tokens=False)
            for prompt, whole in zip(prompts, wholes, strict=True)
        ):
            return TokenPrefix(text=shared[:cut], token_ids=tuple(head), follows=shared[cut:end])
    raise IdentityError(
        "tokenizer: the tokens of the identity must not depend on what follows it, got no such beginning that ends "
        f"within {last_word!r}. End the identity with a sentence, or use a byte-level BPE tokenizer."
    )


def encode(prefix: TokenPrefix, text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of a rendered prompt, tokenising only what comes after the prefix.

    The same ids as tokenising the whole, which is what happens to a text that does not begin with the prefix.
    """
    if not (text.startswith(prefix.text) and text.startswith(prefix.follows, len(prefix.text))):
        return tokenizer.encode(text, add_special_tokens=False)
    return [*prefix.token_ids, *tokenizer.encode(text[len(prefix.text) :], add_special_tokens=False)]


_OPENINGS = (
    *("I am", "you", "s", "7 rules", "007", "'s", "|>", "...", "!?", "<b>", "\\n", "e\u0301", "한국", "👩\u200d👧"),
    *'"({[#-*.,_%@~`=^$&+/我。、かéßΩعก½²😀🏳',
    *"\u0301\u0338\u00ad\u180e\u200b\u2060\ufeff\ue000\U000f0000\x01\x7f",
)
"""How a client's own instructions may begin, once stripped: one of each kind that a pre-tokenizer tells apart."""


def _conversations() -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]]:
    parameters = {"type": "object", "properties": {}}
    tool = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": parameters}}
    for opening in _OPENINGS:
        # The user's words differ from one conversation to the next, so that no prompt can share more than the system's.
        user = {"role": "user", "content": opening}
        yield [{"role": "system", "content": opening}, user], None
        yield [{"role": "system", "content": f"{opening} Be brief."}, user], [tool]
    for opening in _OPENINGS[:2]:
        user = {"role": "user", "content": opening}
        yield [user], None
        yield [user], [tool]
