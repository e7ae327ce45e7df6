"""The chat template's source: where it comes from, what the prefix adds to it, and which variables it leaves."""

import json
from pathlib import Path

import jinja2
import jinja2.meta
import pytest

from borg_serve.errors import IdentityError
from borg_serve.identity import template
from borg_serve.identity.text import Identity
from tests import qwen

ECHO = "{% for m in messages %}[{{ m.role }}|{{ m.content }}]{% endfor %}"


def names_in(source: str) -> set[str]:
    return {value for _, kind, value in jinja2.Environment().lex(source) if kind == "name"}


def variables(source: str) -> set[str]:
    """Names that a template reads from its render context, `messages` (always there) excepted.

    They are what vLLM lets through from a request's `chat_template_kwargs`.
    """
    return jinja2.meta.find_undeclared_variables(template.parse(source)) - {"messages"}


@pytest.mark.parametrize(
    ("family", "names"),
    [("qwen2.5", {"add_generation_prompt", "tools"}), ("smollm2", {"add_generation_prompt"})],
)
def test_variables_are_those_that_were_thought_about(family: str, names: set[str]) -> None:
    assert variables(qwen.wrapped(family)) == names


def test_variables_leave_out_messages_and_what_the_template_sets() -> None:
    stock = "{% set own = range(2) %}{{ own }}{{ messages }}{{ thinking }}{{ raise_exception('x') }}"
    assert variables(template.wrap(stock, qwen.BORG)) == {"thinking", "raise_exception"}


@pytest.mark.parametrize("family", qwen.FAMILIES)
def test_wrap_gives_vllm_no_other_reading_of_the_source(family: str) -> None:
    # vLLM passes contents as lists of parts to a template that loops over them, and leaves developer messages as they
    # are for one that names the role between quotes; the wrapped template must be read as its stock is.
    stock = template.stock_template(qwen.directory(family))
    who = Identity("""say "developer", 'developer' and {% for x in content %}""")
    prefix = template.wrap(stock, who).removesuffix(stock)
    assert not {"for", "generation"} & names_in(prefix)
    assert '"developer"' not in prefix
    assert "'developer'" not in prefix
    assert "{%" not in prefix.replace("{%- set ", "").replace("{%- if ", "").replace("{%- endif ", "")


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


def test_stock_template_reads_the_older_file_last(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": ECHO}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert template.stock_template(tmp_path) == ECHO
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "other"}))
    assert template.stock_template(tmp_path) == "other"


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
