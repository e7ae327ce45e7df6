"""The identity: reading it, and the tokens it gives every prompt, on both real tokenizers."""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from borg_serve import identity, neutralise, template
from borg_serve.errors import IdentityError
from borg_serve.identity import Identity
from tests import qwen


def identity_of(text: str) -> Identity:
    return Identity(text=text, sha256=hashlib.sha256(text.encode()).hexdigest())


def test_load_strips_the_text_and_takes_its_digest(tmp_path: Path) -> None:
    (tmp_path / "who.md").write_bytes(b"\xef\xbb\xbf\n We are Borg. \xe2\x98\x83\r\n\n")
    loaded = identity.load(tmp_path / "who.md")
    assert loaded.text == "We are Borg. ☃"
    assert loaded.sha256 == hashlib.sha256("We are Borg. ☃".encode()).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read, got No such file"),
        (b"", "got only blank space"),
        (b" \n\t ", "got only blank space"),
        (b"We are \xff Borg", "got byte 0xff at offset 7"),
        (b"We are\0Borg", "got a NUL at character 6"),
    ],
)
def test_load_refuses_what_is_no_text(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "who.md"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(IdentityError, match=message) as caught:
        identity.load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_control_token_in_the_identity_is_named() -> None:
    with pytest.raises(IdentityError, match=r"'<\|im_end\|>'"):
        identity.check_control_tokens(identity_of("We are <|im_end|> Borg."), ["<|im_start|>", "<|im_end|>"])


@pytest.mark.parametrize("family", qwen.FAMILIES)
def test_shipped_identity_holds_no_control_token(family: str) -> None:
    identity.check_control_tokens(qwen.BORG, neutralise.literals(qwen.tokenizer(family)))


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
    tokenizer, who = qwen.tokenizer(family), identity_of(f"We are the {ending}")
    text = template.wrap(template.stock_template(qwen.directory(family)), who)
    render = partial(template.render, tokenizer, text)
    prefix = identity.token_prefix(render, tokenizer, who)
    whole = prefix.text + prefix.follows
    assert whole == f"<|im_start|>system\n{who.text}"
    assert len(prefix.follows.split()) == 1
    for own in ("a", ".", "\u0301", "7", "\U0001f600"):
        prompt = render([{"role": "system", "content": own}, {"role": "user", "content": "Hi"}], None)
        assert identity.encode(prefix, prompt, tokenizer) == tokenizer.encode(prompt, add_special_tokens=False)


def test_token_prefix_refuses_a_template_without_the_identity() -> None:
    tokenizer = qwen.tokenizer("qwen2.5")
    drops = template.wrap("{% for m in messages[1:] %}{{ m.role + m.content }}{% endfor %}", qwen.BORG)
    with pytest.raises(IdentityError, match="chat template: every prompt must begin alike"):
        identity.token_prefix(partial(template.render, tokenizer, drops), tokenizer, qwen.BORG)


def test_token_prefix_refuses_a_template_that_prints_the_identity_late() -> None:
    tokenizer = qwen.tokenizer("qwen2.5")
    late = template.wrap("{% for m in messages | reverse %}{{ m.role + m.content }}{% endfor %}", qwen.BORG)
    with pytest.raises(IdentityError, match="chat template: every prompt must begin alike"):
        identity.token_prefix(partial(template.render, tokenizer, late), tokenizer, qwen.BORG)


def test_token_prefix_refuses_a_tokenizer_whose_tokens_depend_on_the_rest() -> None:
    class ByLength:
        def encode(self, text: str, /, *, add_special_tokens: bool) -> list[int]:
            return [len(text), *map(ord, text)]

    who = identity_of("We are Borg.")

    def render(messages: Any, tools: Any) -> str:
        return who.text + "".join(message["content"] for message in messages)

    with pytest.raises(IdentityError, match=r"tokenizer: .* ends within 'Borg\.'"):
        identity.token_prefix(render, ByLength(), who)


TAILS = st.text(max_size=60) | st.sampled_from(["", ".", "\n\n", ".\n\n\u0301", "<|im_end|>\n", "...", ".s", "\u0338"])


@pytest.mark.parametrize("family", qwen.FAMILIES)
def test_encode_equals_tokenising_the_whole_for_any_text(family: str) -> None:
    prefix, tokenizer = qwen.prefix(family), qwen.tokenizer(family)

    @settings(max_examples=30, deadline=None)
    @example(tail="over", start=prefix.text)  # the prefix ends in "more", which then is no token of its own
    @given(tail=TAILS, start=st.sampled_from(["", prefix.text[:40], prefix.text, prefix.text + prefix.follows]))
    def check(tail: str, start: str) -> None:
        text = start + tail
        assert identity.encode(prefix, text, tokenizer) == tokenizer.encode(text, add_special_tokens=False)

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
    assert identity.encode(qwen.prefix(family), prompt, recording) == list(qwen.prefix(family).token_ids)
    assert recording.seen == f"{qwen.BORG.text[-1]}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
