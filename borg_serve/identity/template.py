"""Puts the identity before the checkpoint's own chat template. The result is one Jinja text for vLLM.

Knows Jinja and transformers' template rules; knows nothing of tokens or requests.
"""

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from borg_serve.errors import IdentityError
from borg_serve.identity.text import Identity

__all__ = ["parse", "render", "stock_template", "wrap"]

# A request can pass variables to the template, and they must not reach the identity. Both names are therefore set
# before they are read, `messages` is built from literals and from itself, and everything else is a filter, a test or an
# operator: a variable can replace a global function such as `namespace`, but not those.
#
# vLLM reads the template's source. A loop over a message's content would make vLLM pass all contents as lists of parts
# (hence the filters), and the word developer between quotes would keep it from renaming developer messages for a stock
# template that does not know them (hence the split).
#
# `trim_blocks` removes the last newline, so the stock template begins a line, as it does without the prefix.
_PREFIX = """\
{%- set borg_leads = messages and messages[0].role in 'system developer'.split() -%}
{%- set borg_own = messages[0].content if borg_leads else '' -%}
{%- if borg_own is not string -%}
    {%- set borg_own = borg_own | default([], true) | selectattr('text', 'string') -%}
    {%- set borg_own = borg_own | map(attribute='text') | join('\\n') -%}
{%- endif -%}
{%- set borg_own = borg_own | trim -%}
{%- set messages = [{'role': 'system', 'content': %IDENTITY% ~ ('\\n\\n' ~ borg_own if borg_own else '')}]
    + messages[(1 if borg_leads else 0):] | list %}
"""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that renders."""

    def apply_chat_template(self, conversation: Any, /, **options: Any) -> Any: ...


class _Generation(jinja2.ext.Extension):
    """Parses transformers' `{% generation %}` block, which has no meaning here."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def wrap(stock: str, identity: Identity) -> str:
    """Return `stock`, unchanged, behind a prefix that makes the identity the first message of every conversation.

    The first message becomes a system message: the identity, then a blank line and the client's stripped instructions
    if its first message is a system or developer message that holds any. All other messages follow unchanged.
    A request can still set the variables of the stock template; none of them can change the identity.
    Raises IdentityError if `stock` is not a template.
    """
    parse(stock)
    return _PREFIX.replace("%IDENTITY%", _literal(identity.text)) + stock


def stock_template(directory: Path) -> str:
    """Return the chat template that came with the checkpoint in `directory`.

    As in transformers, `chat_template.jinja` goes before the `chat_template` of `tokenizer_config.json`, where the
    template named `default` is used if there are several, and that before `chat_template.json`. Raises IdentityError
    with the file's name.
    """
    jinja_file, config_file = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if jinja_file.exists():
        return _read(jinja_file)
    template = _member(config_file)
    if not template and (older := directory / "chat_template.json").exists():
        config_file, template = older, _member(older)
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str) or not template.strip():
        raise IdentityError(
            f"{config_file}: chat_template must be a template or a list with one named 'default', got {template!r}. "
            f"Add the model's {jinja_file.name} to the checkpoint."
        )
    return template


def render(
    tokenizer: Tokenizer,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Return the prompt for `messages` (and `tools`), up to where the assistant's answer begins, as vLLM renders it.

    Raises IdentityError if the stock template refuses them.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=None if tools is None else list(tools),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
        )
    except jinja2.TemplateError as error:
        raise IdentityError(
            f"chat template: these messages cannot be rendered, got {error.message!r}. "
            "Change the messages, or serve a model whose template takes system messages."
        ) from error
    return str(text)


def _literal(text: str) -> str:
    """Return `text` as a Jinja string literal: ASCII, with all that Jinja or vLLM could read as syntax escaped."""
    plain = set(string.ascii_letters + string.digits + " .,:;!?-()")
    return "'" + "".join(c if c in plain else f"\\U{ord(c):08x}" for c in text) + "'"


def parse(template: str) -> jinja2.nodes.Template:
    """Return the syntax tree of a chat template, by the rules of transformers. Raises IdentityError."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    try:
        return environment.parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise IdentityError(
            f"chat template: not a Jinja template, got {error.message!r} in line {error.lineno}. "
            "Restore the template that came with the model."
        ) from error


def _member(file: Path) -> Any:
    """The `chat_template` of a JSON file, None without one."""
    try:
        return json.loads(_read(file))["chat_template"]
    except (ValueError, KeyError, TypeError):
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise IdentityError(
            f"{path}: the chat template cannot be read, got {error}. Copy the file from the model again."
        ) from error
