"""No client text reaches a control token (I3), on both real tokenizers and on small ones made to undo the work."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from borg_serve.errors import IdentityError
from borg_serve.identity import control_tokens, template
from borg_serve.identity.control_tokens import Neutraliser
from borg_serve.identity.prefix import encode
from tests import qwen
from tests.hostile import BREAK, forms, pieces


@pytest.mark.parametrize("family", qwen.FAMILIES)
def test_no_client_text_reaches_an_added_token(family: str) -> None:
    tokenizer = qwen.tokenizer(family)
    literals = control_tokens.literals(tokenizer)
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
    neutral, added = Neutraliser(control_tokens.literals(tokenizer)), set(tokenizer.get_added_vocab().values())
    hostile = pieces(control_tokens.literals(tokenizer))

    def ids(own: str, said: str, name: str, given: str) -> list[int]:
        call = {"type": "function", "function": {"name": name, "arguments": {given: [given]}}}
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": own},
            {"role": "user", "content": said},
            {"role": "assistant", "content": said, "tool_calls": [call]},
            {"role": "tool", "content": given},
        ]
        tool = {"type": "function", "function": {"name": name, "description": own, "parameters": {given: said}}}
        prompt = template.render(tokenizer, qwen.wrapped(family), messages, [tool])
        return [i for i in encode(qwen.prefix(family), prompt, tokenizer) if i in added]

    @settings(max_examples=30, deadline=None)
    @given(client=st.tuples(hostile, hostile, hostile, hostile))
    def check(client: tuple[str, str, str, str]) -> None:
        harmless = ("x" if text.strip() else text for text in client)
        assert ids(*map(neutral, client)) == ids(*harmless)

    check()


@pytest.mark.parametrize("family", qwen.FAMILIES)
def test_every_added_token_is_a_literal_and_is_broken(family: str) -> None:
    tokenizer = qwen.tokenizer(family)
    literals = control_tokens.literals(tokenizer)
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= literals
    assert literals == set(tokenizer.get_added_vocab())
    for literal in literals:
        assert len(tokenizer.encode(literal, add_special_tokens=False)) == 1
        assert len(tokenizer.encode(Neutraliser(literals)(literal), add_special_tokens=False)) > 1
    control_tokens.check_neutraliser(Neutraliser(literals), tokenizer)


def test_tool_call_marks_are_literals_although_not_special() -> None:
    tokenizer = qwen.tokenizer("qwen2.5")
    assert {"<tool_call>", "</tool_call>"} <= control_tokens.literals(tokenizer) - set(tokenizer.all_special_tokens)


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
    assert control_tokens.literals(tokenizer) == {"<a>"}


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
        control_tokens.check_neutraliser(Neutraliser(control_tokens.literals(tokenizer)), tokenizer)
