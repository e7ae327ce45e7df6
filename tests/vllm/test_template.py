"""Rendering with the identity against the stock template under transformers (I2), and what a request could change."""

import json
import string
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from borg_serve.errors import IdentityError
from borg_serve.identity import template
from borg_serve.identity.prefix import encode
from borg_serve.identity.text import Identity
from tests import qwen

USER = {"role": "user", "content": "Hello"}

TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}

ECHO = "{% for m in messages %}[{{ m.role }}|{{ m.content }}]{% endfor %}"


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
        assert encode(qwen.prefix(family), prompt, tokenizer) == whole
        assert whole[: len(qwen.prefix(family).token_ids)] == list(qwen.prefix(family).token_ids)

    check()


@pytest.mark.parametrize("family", qwen.FAMILIES)
def test_wrap_keeps_any_identity_exactly(family: str) -> None:
    @settings(max_examples=30, deadline=None)
    @given(who=text.map(str.strip).filter(bool).map(Identity), own=text)
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
    who, messages = Identity("We are Borg."), [{"role": "system", "content": " be brief\n"}, USER]
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
    text = template.wrap(ECHO, Identity("We are Borg."))
    prompt = template.render(qwen.tokenizer("qwen2.5"), text, [{"role": "system", "content": content}, USER])
    assert prompt == f"[system|We are Borg.{own}][user|Hello]"


def test_wrap_leaves_later_instructions_where_they_are() -> None:
    text = template.wrap(ECHO, Identity("We are Borg."))
    messages = [USER, {"role": "system", "content": " late "}, {"role": "developer", "content": "later"}]
    prompt = template.render(qwen.tokenizer("qwen2.5"), text, messages)
    assert prompt == "[system|We are Borg.][user|Hello][system| late ][developer|later]"


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


@pytest.mark.parametrize("family", qwen.FAMILIES)
def test_stock_template_is_the_one_transformers_uses(family: str) -> None:
    assert template.stock_template(qwen.directory(family)) == qwen.tokenizer(family).chat_template


def test_render_says_what_the_stock_template_refuses() -> None:
    refuses = template.wrap("{{ raise_exception('System role not supported') }}", qwen.BORG)
    with pytest.raises(IdentityError, match="got 'System role not supported'"):
        template.render(qwen.tokenizer("qwen2.5"), refuses, [USER])


def test_render_begins_the_assistant_turn() -> None:
    prompt = template.render(qwen.tokenizer("qwen2.5"), qwen.wrapped("qwen2.5"), [USER], [TOOL])
    assert prompt.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert json.dumps(TOOL) in prompt
