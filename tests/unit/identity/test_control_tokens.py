"""No control token survives in a client's text, in any normal form (I3)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from borg_serve.errors import IdentityError
from borg_serve.identity.control_tokens import Neutraliser, neutralise_json
from tests.hostile import BREAK, forms, pieces

TANGLED = frozenset({"<a>", "<a><b>", "<<a>", "a>", "aba", "[K]", "<file>", "|;|", "\uff5cend▁of▁text\uff5c", "é>"})


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


def test_json_is_neutralised_in_every_string_and_key() -> None:
    value = {"<a>": [{"x": "y<a>"}, ["<a>", 1, None, True, 1.5]], "plain": "text"}
    broken = f"<{BREAK}a>"
    assert neutralise_json(value, Neutraliser({"<a>"})) == {
        broken: [{"x": f"y{broken}"}, [broken, 1, None, True, 1.5]],
        "plain": "text",
    }
    assert value == {"<a>": [{"x": "y<a>"}, ["<a>", 1, None, True, 1.5]], "plain": "text"}


ORDINARY = ["resistance is futile. " * 90, "抵抗是徒劳的\uff0c我们是博格。" * 50, "naïve, déjà vu… 😀 " * 80]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_returned_as_the_same_object(text: str) -> None:
    neutral = Neutraliser({"<|im_start|>", "<|im_end|>", "<tool_call>"})
    assert neutral(text) is text, "nearly all text is ordinary: it is not copied"
