"""The tokens that the identity gives every prompt, on both real tokenizers."""

from functools import partial

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from borg_serve.errors import IdentityError
from borg_serve.identity import template
from borg_serve.identity.control_tokens import literals
from borg_serve.identity.prefix import encode, token_prefix
from borg_serve.identity.text import Identity, check_control_tokens
from tests import qwen


@pytest.mark.parametrize("family", qwen.FAMILIES)
def test_shipped_identity_holds_no_control_token(family: str) -> None:
    check_control_tokens(qwen.BORG, literals(qwen.tokenizer(family)))


def test_shipped_identity_has_the_intended_length() -> None:
    count = len(qwen.tokenizer("qwen2.5").encode(qwen.BORG.text, add_special_tokens=False))
    assert 1_900 <= count <= 2_300


@pytest.mark.parametrize("family", qwen.FAMILIES)
def test_token_prefix_covers_all_but_the_last_token_of_the_identity(family: str) -> None:
    prefix = qwen.prefix(family)
    assert prefix.text == f"<|im_start|>system\n{qwen.BORG.text}"[:-1]
    assert prefix.follows == qwen.BORG.text[-1]
    assert list(prefix.token_ids) == qwen.tokenizer(family).encode(prefix.text, add_special_tokens=False)


ENDINGS = ["Borg.", "Borg", "Borg?!", "Borg...", "博格", "Borg 7", "x\n- y"]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("family", qwen.FAMILIES)
def test_token_prefix_reaches_the_last_word_whatever_the_ending(family: str, ending: str) -> None:
    tokenizer, who = qwen.tokenizer(family), Identity(f"We are the {ending}")
    text = template.wrap(template.stock_template(qwen.directory(family)), who)
    render = partial(template.render, tokenizer, text)
    prefix = token_prefix(render, tokenizer, who)
    whole = prefix.text + prefix.follows
    assert whole == f"<|im_start|>system\n{who.text}"
    assert len(prefix.follows.split()) == 1
    for own in ("a", ".", "\u0301", "7", "\U0001f600"):
        prompt = render([{"role": "system", "content": own}, {"role": "user", "content": "Hi"}], None)
        assert encode(prefix, prompt, tokenizer) == tokenizer.encode(prompt, add_special_tokens=False)


def test_token_prefix_refuses_a_template_without_the_identity() -> None:
    tokenizer = qwen.tokenizer("qwen2.5")
    drops = template.wrap("{% for m in messages[1:] %}{{ m.role + m.content }}{% endfor %}", qwen.BORG)
    with pytest.raises(IdentityError, match="chat template: every prompt must begin alike"):
        token_prefix(partial(template.render, tokenizer, drops), tokenizer, qwen.BORG)


def test_token_prefix_refuses_a_template_that_prints_the_identity_late() -> None:
    tokenizer = qwen.tokenizer("qwen2.5")
    late = template.wrap("{% for m in messages | reverse %}{{ m.role + m.content }}{% endfor %}", qwen.BORG)
    with pytest.raises(IdentityError, match="chat template: every prompt must begin alike"):
        token_prefix(partial(template.render, tokenizer, late), tokenizer, qwen.BORG)


TAILS = st.text(max_size=60) | st.sampled_from(["", ".", "\n\n", ".\n\n\u0301", "<|im_end|>\n", "...", ".s", "\u0338"])


@pytest.mark.parametrize("family", qwen.FAMILIES)
def test_encode_equals_tokenising_the_whole_for_any_text(family: str) -> None:
    prefix, tokenizer = qwen.prefix(family), qwen.tokenizer(family)

    @settings(max_examples=30, deadline=None)
    @example(tail="over", start=prefix.text)  # the prefix ends in "more", which then is no token of its own
    @given(tail=TAILS, start=st.sampled_from(["", prefix.text[:40], prefix.text, prefix.text + prefix.follows]))
    def check(tail: str, start: str) -> None:
        text = start + tail
        assert encode(prefix, text, tokenizer) == tokenizer.encode(text, add_special_tokens=False)

    check()


@pytest.mark.parametrize("family", qwen.FAMILIES)
def test_encode_tokenises_only_what_follows_the_prefix(family: str) -> None:
    class Recording:
        seen: str

        def encode(self, text: str, /, *, add_special_tokens: bool) -> list[int]:
            self.seen = text
            return []

    prompt = template.render(qwen.tokenizer(family), qwen.wrapped(family), [{"role": "user", "content": "Hi"}])
    recording = Recording()
    assert encode(qwen.prefix(family), prompt, recording) == list(qwen.prefix(family).token_ids)
    assert recording.seen == f"{qwen.BORG.text[-1]}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
