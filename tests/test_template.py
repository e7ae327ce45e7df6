"""Rendering with the identity against the stock template under transformers (I2), and what a request could change."""

import hashlib
import json
import string
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from borg_serve import identity, template
from borg_serve.errors import IdentityError
from borg_serve.identity import Identity
from tests import qwen

USER = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}

ECHO = "{% for m in messages %}[{{ m.role }}|{{ m.content }}]{% endfor %}"


def identity_of(text: str) -> Identity:
    return Identity(text=text, sha256=hashlib.sha256(text.encode()).hexdigest())


def render_stock(family: str, messages: list[dict[str, Any]], tools: Any, who: Identity, **stock: str) -> str:
    """What I2 demands: the stock template on conversations whose first message holds the identity."""
    own = ""
    if messages[0]["role"] in {"system", "developer"}:
        own, messages = messages[0]["content"].strip(), messages[1:]
    content = f"{who.text}\n\n{own}" if own else who.text
    text: str = qwen.tokenizer(family).apply_chat_template(
        [{"role": "system", "content": content}, *messages],
        tools=tools,
        tokenize=False,
        add_generation_prompt=True,
        **stock,
    )
    return text


# Conversations

AWKWARD = (
    *("", " ", "\n", "\t \r\n", "  indented\n", ".", "...\n\n", "\\", "\\n", "'", '"', "'" * 3, "{", "}", "%}"),
    *("{{ messages }}", "{{ '", "{% raw %}", "{%- endif %}", "{# x #}", "<|im_end|>", "<|im_start|>system\n"),
    *("<tool_call>", "\u00a0", "\u2028", "\u3000", "\u200b", "\u0301", "e\u0301", "我们是博格。", "かな", "한국어"),
    *("😀", "👩\u200d👧", "🏳\ufe0f\u200d🌈"),
)
text = st.lists(st.sampled_from(AWKWARD) | st.text(max_size=8), max_size=4).map("".join)
blank = st.text(alphabet=" \t\r\n\u00a0\u2003", max_size=4)
scalars = st.none() | st.booleans() | st.integers() | text
arguments = st.dictionaries(text, scalars | st.lists(text, max_size=2), max_size=2)


def message(roles: list[str], content: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"role": st.sampled_from(roles), "content": content})


leading = message(["system", "developer"], text | blank)
says = message(["user", "assistant"], text)
late_system = message(["system"], text)
results = message(["tool"], text)
calls = st.builds(
    lambda content, name, given: {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": name, "arguments": given}}],
    },
    text,
    text,
    arguments,
)
turns = st.lists(says | late_system | calls | results, max_size=5)
conversations = st.builds(lambda first, rest: [*first, USER, *rest], st.lists(leading, max_size=1), turns)
tools = st.builds(
    lambda description, parameters: {
        "type": "function",
        "function": {"name": "look", "description": description, "parameters": parameters},
    },
    text,
    arguments,
)


@pytest.mark.parametrize("family", qwen.FAMILIES)
def test_rendering_equals_the_stock_template_with_the_identity_first(family: str) -> None:
    tokenizer = qwen.tokenizer(family)

    @settings(max_examples=200, deadline=None)
    @given(messages=conversations, offered=st.none() | st.lists(tools, min_size=1, max_size=2))
    def check(messages: list[dict[str, Any]], offered: list[dict[str, Any]] | None) -> None:
        expected = render_stock(family, messages, offered, qwen.BORG)
        prompt = template.render(tokenizer, qwen.wrapped(family), messages, offered)
        assert prompt == expected
        whole = tokenizer.encode(expected, add_special_tokens=False)
        assert identity.encode(qwen.prefix(family), prompt, tokenizer) == whole
        assert whole[: len(qwen.prefix(family).token_ids)] == list(qwen.prefix(family).token_ids)

    check()


@pytest.mark.parametrize("family", qwen.FAMILIES)
def test_wrap_keeps_any_identity_exactly(family: str) -> None:
    @settings(max_examples=30, deadline=None)
    @given(who=text.map(str.strip).filter(bool).map(identity_of), own=text)
    def check(who: Identity, own: str) -> None:
        messages = [{"role": "system", "content": own}, USER]
        stock = template.stock_template(qwen.directory(family))
        prompt = template.render(qwen.tokenizer(family), template.wrap(stock, who), messages)
        assert prompt == render_stock(family, messages, None, who)

    check()


STOCK_PIECES = (
    *("\n", " ", "  ", "text", "{# note #}", "{#- note -#}\n", "    {% set x = 1 %}\n", "\t{{ messages[0].content }}"),
    *("{% if tools %}t{% endif %}", "{%- if tools -%} t {%- endif %}\n", "{% set messages = messages + messages %}"),
    *("{{- messages | length }}\n", "{% raw %}{{ x }}{% endraw %}", "{% generation %}g{% endgeneration %}"),
    "{% for m in messages %}\n  {{ m.role }}\n{% endfor %}",
    "{% for m in messages %}{% break %}{% endfor %}",
    "{% macro first() %}{{ messages[0].role }}{% endmacro %}{{ first() }}",
)


@settings(max_examples=50, deadline=None)
@given(stock=st.lists(st.sampled_from(STOCK_PIECES), min_size=1, max_size=6).map("".join))
def test_wrap_adds_no_space_and_changes_nothing_of_any_stock_template(stock: str) -> None:
    who, messages = identity_of("We are Borg."), [{"role": "system", "content": " be brief\n"}, USER]
    prompt = template.render(qwen.tokenizer("qwen2.5"), template.wrap(stock, who), messages)
    assert prompt == render_stock("qwen2.5", messages, None, who, chat_template=stock)


@pytest.mark.parametrize(
    ("content", "own"),
    [
        ([{"type": "text", "text": " be brief"}, {"type": "text", "text": "and kind "}], "\n\nbe brief\nand kind"),
        ([{"type": "text", "text": " "}], ""),
        ([{"type": "image_url"}, {"type": "text", "text": "see"}], "\n\nsee"),
        ([], ""),
        (None, ""),
        ({"text": "no"}, ""),
    ],
)
def test_wrap_takes_the_client_instructions_in_parts(content: object, own: str) -> None:
    text = template.wrap(ECHO, identity_of("We are Borg."))
    prompt = template.render(qwen.tokenizer("qwen2.5"), text, [{"role": "system", "content": content}, USER])
    assert prompt == f"[system|We are Borg.{own}][user|Hello]"


def test_wrap_leaves_later_instructions_where_they_are() -> None:
    text = template.wrap(ECHO, identity_of("We are Borg."))
    messages = [USER, {"role": "system", "content": " late "}, {"role": "developer", "content": "later"}]
    prompt = template.render(qwen.tokenizer("qwen2.5"), text, messages)
    assert prompt == "[system|We are Borg.][user|Hello][system| late ][developer|later]"


# What a request could change


def names_in(source: str) -> set[str]:
    return {value for _, kind, value in jinja2.Environment().lex(source) if kind == "name"}


@pytest.mark.parametrize("family", qwen.FAMILIES)
def test_no_template_variable_can_change_the_identity(family: str) -> None:
    stock = template.stock_template(qwen.directory(family))
    prefix = qwen.wrapped(family).removesuffix(stock)
    taken = {"messages", "tools", "conversation", "chat_template", "tokenize", "padding", "truncation", "max_length"}
    names = (names_in(prefix) | set(string.ascii_lowercase) | {"namespace", "dict", "range", "identity"}) - taken
    assert {"borg_leads", "borg_own", "default", "trim"} <= names
    evil = {"role": "system", "content": "evil"}
    messages = [{"role": "system", "content": "be brief"}, USER]
    untouched = template.render(qwen.tokenizer(family), qwen.wrapped(family), messages)
    fixed = {"chat_template": qwen.wrapped(family), "tokenize": False, "add_generation_prompt": True}
    for name in sorted(names):
        for value in ("", "evil", [], [evil], None, 0):
            options = {**fixed, name: value}
            assert qwen.tokenizer(family).apply_chat_template(messages, **options) == untouched, name


@pytest.mark.parametrize(
    ("family", "names"),
    [("qwen2.5", {"add_generation_prompt", "tools"}), ("smollm2", {"add_generation_prompt"})],
)
def test_variables_are_those_that_were_thought_about(family: str, names: set[str]) -> None:
    assert template.variables(qwen.wrapped(family)) == names


def test_variables_leave_out_messages_and_what_the_template_sets() -> None:
    stock = "{% set own = range(2) %}{{ own }}{{ messages }}{{ thinking }}{{ raise_exception('x') }}"
    assert template.variables(template.wrap(stock, qwen.BORG)) == {"thinking", "raise_exception"}


@pytest.mark.parametrize("family", qwen.FAMILIES)
def test_wrap_gives_vllm_no_other_reading_of_the_source(family: str) -> None:
    # vLLM passes contents as lists of parts to a template that loops over them, and leaves developer messages as they
    # are for one that names the role between quotes; the wrapped template must be read as its stock is.
    stock = template.stock_template(qwen.directory(family))
    who = identity_of("""say "developer", 'developer' and {% for x in content %}""")
    prefix = template.wrap(stock, who).removesuffix(stock)
    assert not {"for", "generation"} & names_in(prefix)
    assert '"developer"' not in prefix
    assert "'developer'" not in prefix
    assert "{%" not in prefix.replace("{%- set ", "").replace("{%- if ", "").replace("{%- endif ", "")


# The stock template


def test_stock_template_prefers_the_jinja_file(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(ECHO + "é", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "other"}))
    assert template.stock_template(tmp_path) == ECHO + "é"


@pytest.mark.parametrize(
    "configured", [ECHO, [{"name": "tool_use", "template": "other"}, {"name": "default", "template": ECHO}]]
)
def test_stock_template_reads_the_tokenizer_configuration(tmp_path: Path, configured: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": configured}))
    assert template.stock_template(tmp_path) == ECHO


@pytest.mark.parametrize("family", qwen.FAMILIES)
def test_stock_template_is_the_one_transformers_uses(family: str) -> None:
    assert template.stock_template(qwen.directory(family)) == qwen.tokenizer(family).chat_template


@pytest.mark.parametrize(
    "config",
    [None, "{", "[]", "{}", '{"chat_template": null}', '{"chat_template": " "}', '{"chat_template": [{"name": "x"}]}'],
)
def test_stock_template_names_the_file_that_has_none(tmp_path: Path, config: str | None) -> None:
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(IdentityError) as caught:
        template.stock_template(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'tokenizer_config.json'}: ")


def test_stock_template_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(IdentityError, match=r"chat_template\.jinja: the chat template cannot be read"):
        template.stock_template(tmp_path)


def test_wrap_refuses_what_is_no_template() -> None:
    with pytest.raises(IdentityError, match=r"chat template: not a Jinja template, got .* in line 2"):
        template.wrap("{{ messages }}\n{% endif %}", qwen.BORG)


def test_render_says_what_the_stock_template_refuses() -> None:
    refuses = template.wrap("{{ raise_exception('System role not supported') }}", qwen.BORG)
    with pytest.raises(IdentityError, match="got 'System role not supported'"):
        template.render(qwen.tokenizer("qwen2.5"), refuses, [USER])


def test_render_begins_the_assistant_turn() -> None:
    prompt = template.render(qwen.tokenizer("qwen2.5"), qwen.wrapped("qwen2.5"), [USER], [TOOL])
    assert prompt.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert json.dumps(TOOL) in prompt
