"""Breaks the tokenizer's control tokens in client text, so that client text is always tokenised as text (I3).

Knows how the tokens are spelled; knows nothing of requests. The callers decide which strings came from a client.
"""

import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from itertools import pairwise
from typing import Any, Final, Protocol
from unicodedata import decomposition, normalize

from borg_serve.errors import IdentityError

__all__ = ["Neutraliser", "check_neutraliser", "literals", "neutralise_json"]

BREAK = "\u200b"
"""ZERO WIDTH SPACE: invisible; no normal form removes it or joins the characters around it."""

FORMS: Final = ("NFC", "NFD", "NFKC", "NFKD")
NEVER = r"(?!)"


class AddedToken(Protocol):
    """The part of `tokenizers.AddedToken` that is read here."""

    content: str


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]: ...
    def get_added_vocab(self) -> Mapping[str, int]: ...
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


def literals(tokenizer: Tokenizer) -> frozenset[str]:
    """Return the spelling of every added token, special or not, except tokens of whitespace only.

    Some tokenizers add tokens for runs of blanks. They control nothing, and ordinary text is full of them.
    """
    spellings = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return frozenset(text for text in spellings | set(tokenizer.get_added_vocab()) if text.strip())


class Neutraliser:
    """Breaks each control token in a text with one U+200B after its first character; returns other text unchanged.

    It also breaks spellings that become a control token only under Unicode normalisation (full-width brackets,
    ligatures, letters in decomposed form), because a tokenizer may normalise before it looks for its tokens. Nothing is
    removed, and an insertion cannot create a token. The result holds no token as it is, in NFC or in NFKC.
    """

    def __init__(self, literals: Iterable[str]) -> None:
        written = frozenset(literals)
        for literal in written:
            if len(literal) < 2:
                raise IdentityError(
                    f"tokenizer: an added token must have two or more characters to be broken, got {literal!r}. "
                    "Remove it from the checkpoint's added tokens."
                )
        spellings = written | {normalize(form, literal) for literal in written for form in FORMS}
        alphabet, firsts = set("".join(spellings)), {spelling[0] for spelling in spellings}
        self._folds = {c: fold for c, fold in _folds().items() if not alphabet.isdisjoint(fold)}
        self._openings = tuple(firsts | {c for c, fold in self._folds.items() if not firsts.isdisjoint(fold)})
        self._foldable = _any_of(self._folds)
        self._start = _start(spellings)

    def __call__(self, text: str) -> str:
        """Return `text` without any control token; the same object when it holds none. Linear in the text's length."""
        if not any(opening in text for opening in self._openings):
            return text
        if text.isascii() or not self._foldable.search(text):
            return self._start.sub(rf"\g<0>{BREAK}", text) if self._start.search(text) else text
        return self._break_folded(text)

    def _break_folded(self, text: str) -> str:
        # Search the folded text, but break the original, so that the rest of it stays as the client wrote it.
        folds = [self._folds.get(character, character) for character in text]
        origin = [index for index, fold in enumerate(folds) for _ in fold]
        cuts = sorted({origin[match.start()] + 1 for match in self._start.finditer("".join(folds))})
        return BREAK.join(text[start:end] for start, end in pairwise([0, *cuts, len(text)])) if cuts else text


def neutralise_json(value: Any, neutralise: Callable[[str], str]) -> Any:
    """Return a JSON value with every string in it neutralised, keys included.

    Recurses once a level, so limit the depth of client data first.
    """
    if isinstance(value, str):
        return neutralise(value)
    if isinstance(value, dict):
        return {neutralise(key): neutralise_json(item, neutralise) for key, item in value.items()}
    if isinstance(value, list):
        return [neutralise_json(item, neutralise) for item in value]
    return value


def check_neutraliser(neutralise: Neutraliser, tokenizer: Tokenizer) -> None:
    """Raise IdentityError if a neutralised control token is still tokenised as one.

    Tries each token as written, in upper and lower case and in full-width letters: a tokenizer that folds case or drops
    U+200B would undo the break.
    """
    added = set(tokenizer.get_added_vocab().values()) | set(tokenizer.added_tokens_decoder)
    wide = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
    for literal in sorted(literals(tokenizer)):
        for attempt in {literal, literal.upper(), literal.lower(), literal.translate(wide)}:
            if added.intersection(tokenizer.encode(neutralise(attempt), add_special_tokens=False)):
                raise IdentityError(
                    f"tokenizer: client text must not be able to write the control token {literal!r}, got it from "
                    f"{neutralise(attempt)!r}. Serve a checkpoint whose tokenizer does not normalise its added tokens."
                )


@cache
def _folds() -> Mapping[str, str]:
    """Map every character that folding changes to its fold."""
    characters = (c for c in map(chr, range(sys.maxunicode + 1)) if decomposition(c))
    return {c: fold for c in characters if (fold := normalize("NFKC", c)) != c}


def _any_of(characters: Collection[str]) -> re.Pattern[str]:
    # `re` has a table for characters up to U+FFFF but tries the others one by one, so those become a single range.
    members = "".join(re.escape(c) for c in characters if c <= "\uffff")
    if high := [c for c in characters if c > "\uffff"]:
        members += f"{min(high)}-{max(high)}"
    return re.compile(f"[{members}]" if members else NEVER)


def _start(spellings: Iterable[str]) -> re.Pattern[str]:
    """Match only the first character of each spelling, so that overlapping spellings are all found."""
    rests: dict[str, list[str]] = {}
    for spelling in sorted(spellings):
        rests.setdefault(spelling[0], []).append(re.escape(spelling[1:]))
    return re.compile("|".join(f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items()) or NEVER)
