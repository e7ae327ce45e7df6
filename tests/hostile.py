"""Text that is full of control tokens: whole, cut, nested and disguised."""

import unicodedata

from hypothesis import strategies as st

BREAK = "\u200b"

WIDE = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}


def pieces(literals: frozenset[str]) -> st.SearchStrategy[str]:
    """Text of whole, cut, nested, adjacent and disguised literals."""
    whole = st.sampled_from(sorted(literals))
    cut = st.builds(lambda literal, at: literal[:at], whole, st.integers(1, 6)) | st.builds(
        lambda literal, at: literal[at:], whole, st.integers(1, 6)
    )
    nested = st.builds(lambda outer, inner, at: outer[:at] + inner + outer[at:], whole, whole, st.integers(1, 6))
    disguised = st.builds(str.translate, whole | cut, st.just(WIDE)) | st.builds(
        lambda literal, form: unicodedata.normalize(form, literal), whole, st.sampled_from(["NFD", "NFKD"])
    )
    ligature = whole.map(lambda literal: literal.replace("fi", "\ufb01").replace("K", "\u212a").replace(";", "\u037e"))
    other = st.sampled_from([BREAK, "\u0301", "\u0338", "\ufe0f", " ", "\n", "<", "|", ">", "≯", "⒜", "㎜", "ﬁ", "😀"])
    return st.lists(whole | cut | nested | disguised | ligature | other | st.text(max_size=3), max_size=8).map("".join)


def forms(text: str) -> list[str]:
    return [text, unicodedata.normalize("NFC", text), unicodedata.normalize("NFKC", text)]
