"""No text of a client's can become a control token (I3): property tests on the text, and on both real tokenizers."""

import timeit
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from borg_serve import identity, neutralise, template
from borg_serve.errors import IdentityError
from borg_serve.neutralise import Neutraliser
from tests import qwen

BREAK = "\u200b"
WIDE = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
TANGLED = frozenset({"<a>", "<a><b>", "<<a>", "a>", "aba", "[K]", "<file>", "|;|", "\uff5cend▁of▁text\uff5c", "é>"})


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


@settings(max_examples=200, deadline=None)
@given(text=pieces(TANGLED))
def test_result_holds_no_literal_in_any_form_and_loses_nothing(text: str) -> None:
    neutral = Neutraliser(TANGLED)
    result = neutral(text)
    assert not [(literal, form) for form in forms(result) for literal in TANGLED if literal in form]
    assert result.replace(BREAK, "") == text.replace(BREAK, "")
    assert neutral(result) == result


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_text_without_a_literal_comes_back_itself(text: str) -> None:
    assert Neutraliser({"<|im_start|>", "<tool_call>"})(text) is text


NEAR = ["", "<", "<|im_start|", "|im_start|>", "< |im_start|>", "<|im_\u200bstart|>", "≮|im_start|>"]


@pytest.mark.parametrize("text", NEAR)
def test_near_misses_come_back_themselves(text: str) -> None:
    assert Neutraliser({"<|im_start|>"})(text) is text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x<tool>y", "x<_tool>y"),
        ("<tool><tool>", "<_tool><_tool>"),
        ("<t<tool>ool>", "<t<_tool>ool>"),
        ("ababa", "a_ba_ba"),
        ("é<tool>", "é<_tool>"),
        ("\uff1ctool>\uff0cok", "\uff1c_tool>\uff0cok"),
        ("⒜ba", "⒜ba"),
        ("﹤\uff54ool>", "﹤_\uff54ool>"),
    ],
)
def test_each_literal_is_broken_once_after_its_first_character(text: str, expected: str) -> None:
    assert Neutraliser({"<tool>", "aba"})(text) == expected.replace("_", BREAK)


def test_nothing_to_look_for_changes_nothing() -> None:
    assert Neutraliser([])("<|im_start|> é") == "<|im_start|> é"


def test_token_of_one_character_is_refused() -> None:
    with pytest.raises(IdentityError, match="two or more characters to be broken, got '§'"):
        Neutraliser({"§", "<a>"})


def test_walk_reaches_every_string_and_key() -> None:
    value = {"<a>": [{"x": "y<a>"}, ["<a>", 1, None, True, 1.5]], "plain": "text"}
    broken = f"<{BREAK}a>"
    assert Neutraliser({"<a>"}).walk(value) == {
        broken: [{"x": f"y{broken}"}, [broken, 1, None, True, 1.5]],
        "plain": "text",
    }
    assert value == {"<a>": [{"x": "y<a>"}, ["<a>", 1, None, True, 1.5]], "plain": "text"}


ORDINARY = ["resistance is futile. " * 90, "抵抗是徒劳的\uff0c我们是博格。" * 50, "naïve, déjà vu… 😀 " * 80]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_of_2_kb_takes_at_most_20_us(text: str) -> None:
    neutral = Neutraliser({"<|im_start|>", "<|im_end|>", "<tool_call>"})
    assert min(timeit.repeat(lambda: neutral(text), number=1, repeat=50)) <= 20e-6


# On real tokenizers


@pytest.mark.parametrize("family", qwen.FAMILIES)
def test_no_client_text_reaches_an_added_token(family: str) -> None:
    tokenizer = qwen.tokenizer(family)
    literals = neutralise.literals(tokenizer)
    neutral, added = Neutraliser(literals), set(tokenizer.get_added_vocab().values())

    @settings(max_examples=100, deadline=None)
    @given(text=pieces(literals))
    def check(text: str) -> None:
        for form in forms(neutral(text)):
            assert added.isdisjoint(tokenizer.encode(form, add_special_tokens=False))
            assert not [literal for literal in literals if literal in form]

    check()


@pytest.mark.parametrize("family", qwen.FAMILIES)
def test_prompt_holds_only_the_control_tokens_of_its_template(family: str) -> None:
    tokenizer = qwen.tokenizer(family)
    neutral, added = Neutraliser(neutralise.literals(tokenizer)), set(tokenizer.get_added_vocab().values())
    hostile = pieces(neutralise.literals(tokenizer))

    def control_tokens(own: str, said: str, name: str, given: str) -> list[int]:
        call = {"type": "function", "function": {"name": name, "arguments": {given: [given]}}}
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": own},
            {"role": "user", "content": said},
            {"role": "assistant", "content": said, "tool_calls": [call]},
            {"role": "tool", "content": given},
        ]
        tool = {"type": "function", "function": {"name": name, "description": own, "parameters": {given: said}}}
        prompt = template.render(tokenizer, qwen.wrapped(family), messages, [tool])
        return [i for i in identity.encode(qwen.prefix(family), prompt, tokenizer) if i in added]

    @settings(max_examples=30, deadline=None)
    @given(client=st.tuples(hostile, hostile, hostile, hostile))
    def check(client: tuple[str, str, str, str]) -> None:
        harmless = ("x" if text.strip() else text for text in client)
        assert control_tokens(*map(neutral, client)) == control_tokens(*harmless)

    check()


@pytest.mark.parametrize("family", qwen.FAMILIES)
def test_every_added_token_is_a_literal_and_is_broken(family: str) -> None:
    tokenizer = qwen.tokenizer(family)
    literals = neutralise.literals(tokenizer)
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= literals
    assert literals == set(tokenizer.get_added_vocab())
    for literal in literals:
        assert len(tokenizer.encode(literal, add_special_tokens=False)) == 1
        assert len(tokenizer.encode(Neutraliser(literals)(literal), add_special_tokens=False)) > 1
    neutralise.check(Neutraliser(literals), tokenizer)


def test_tool_call_marks_are_literals_although_not_special() -> None:
    tokenizer = qwen.tokenizer("qwen2.5")
    assert {"<tool_call>", "</tool_call>"} <= neutralise.literals(tokenizer) - set(tokenizer.all_special_tokens)


def small_tokenizer(normalizer: Any, *added: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {byte: i for i, byte in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]


def test_blank_added_tokens_are_no_literals() -> None:
    from tokenizers import AddedToken

    tokenizer = small_tokenizer(None, AddedToken("  "), AddedToken("\t\t"), AddedToken("<a>", lstrip=True, rstrip=True))
    assert neutralise.literals(tokenizer) == {"<a>"}


@pytest.mark.parametrize("flags", [{"lstrip": True, "rstrip": True}, {"single_word": True}, {"normalized": True}])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_flag_of_an_added_token_brings_it_back(flags: dict[str, bool], data: st.DataObject) -> None:
    from tokenizers import AddedToken, normalizers

    literals = frozenset({"<a>", "[K]", "<file>"})
    tokenizer = small_tokenizer(normalizers.NFKC(), *(AddedToken(literal, **flags) for literal in sorted(literals)))
    text = Neutraliser(literals)(data.draw(pieces(literals)))
    assert set(tokenizer.get_added_vocab().values()).isdisjoint(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("kind", ["Lowercase", "StripZeroWidth"])
def test_check_refuses_a_tokenizer_that_undoes_the_break(kind: str) -> None:
    from tokenizers import AddedToken, normalizers

    normalizer = normalizers.Lowercase() if kind == "Lowercase" else normalizers.Replace(BREAK, "")
    tokenizer = small_tokenizer(normalizer, AddedToken("<tool_call>", normalized=True))
    with pytest.raises(IdentityError, match="must not be able to write the control token '<tool_call>'"):
        neutralise.check(Neutraliser(neutralise.literals(tokenizer)), tokenizer)
