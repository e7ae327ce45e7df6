"""The token ids that every prompt begins with, and how to tokenise only what follows them.

Knows nothing of templates: it calls a `render` function to get prompts.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from borg_serve.errors import IdentityError
from borg_serve.identity.text import Identity

__all__ = ["Render", "TokenPrefix", "encode", "token_prefix"]

Render = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None], str]
"""Messages and tools (or None) to the text of the prompt."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def encode(self, text: str, /, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True)
class TokenPrefix:
    """What every prompt begins with, as text and as token ids: the template's opening and the identity.

    It ends a token or two before the identity does, because a tokenizer may join the final full stop with the blank
    line that follows (Qwen2.5 has one token for the three characters).
    """

    text: str
    token_ids: tuple[int, ...]
    follows: str
    """The rest of the identity, which comes next in every prompt. `encode` looks for it too, because it decides where
    the last token ends."""


def token_prefix(render: Render, tokenizer: Tokenizer, identity: Identity) -> TokenPrefix:
    """Return the longest beginning that all prompts share and whose tokens do not depend on what follows it.

    Checked on sample conversations: the tokens of the beginning plus the tokens of the rest must equal the tokens of
    the whole prompt. Raises IdentityError if a prompt lacks the identity, or if no such beginning reaches the
    identity's last word.
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

    The ids are those of the whole text. A text that does not begin with the prefix is tokenised whole.
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
