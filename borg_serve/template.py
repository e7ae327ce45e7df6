"""The checkpoint's own chat template with the identity before it: one Jinja text, given to vLLM as it is.

Knows Jinja and transformers' template rules; knows nothing of tokens or of requests.
"""

import json
import string
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from borg_serve.errors import IdentityError
from borg_serve.identity import Identity

__all__ = ["render", "stock_template", "variables", "wrap"]

# Both names are set before they are read, in every case, so no render context can supply them; `messages` is rebound
# from literals and from itself. Only filters, tests and operators are used besides: a context cannot replace those, as
# it can a global function such as `namespace`.
#
# Two forms are bent around vLLM, which reads the template's source: a loop over a message's content would make it
# pass all contents as lists of parts, and the role between quotes would keep it from renaming developer messages for
# a stock template that does not know them. Hence the filters, and the split.
#
# The last newline is the one that `trim_blocks` takes away; the stock template then begins a line, as it does alone.
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
    if its first message is a system or developer message that holds any. All other messages follow as they came.
    Rendering is exact under transformers' environment (immutable sandbox, `trim_blocks`, `lstrip_blocks`,
    `loopcontrols`), which vLLM uses too.

    What a request can still set are the variables of the stock template, `variables(wrapped)`: for Qwen2.5 `tools` and
    `add_generation_prompt`, for SmolLM2 `add_generation_prompt`. None of them can reach the identity.

    Raises IdentityError if `stock` is not a template.
    """
    _parse(stock)
    return _PREFIX.replace("%IDENTITY%", _literal(identity.text)) + stock


def variables(template: str) -> frozenset[str]:
    """Return the names that `template` reads from its render context, `messages` (always there) excepted.

    They are what vLLM lets through from a request's `chat_template_kwargs`: Jinja's own functions (`range`) are not
    among them, those that transformers adds (`raise_exception`) are.
    """
    return frozenset(jinja2.meta.find_undeclared_variables(_parse(template)) - {"messages"})


def stock_template(directory: Path) -> str:
    """Return the chat template that came with the checkpoint in `directory`.

    `chat_template.jinja` goes before the `chat_template` of `tokenizer_config.json`, as in transformers; of several
    named templates the one called `default` is taken. Raises IdentityError, naming the file.
    """
    jinja_file, config_file = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if jinja_file.exists():
        return _read(jinja_file)
    try:
        template = json.loads(_read(config_file))["chat_template"]
    except (ValueError, KeyError, TypeError):
        template = None
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
    """Return the prompt for `messages` (and `tools`), up to where the assistant begins to speak, as vLLM renders it.

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


@cache
def _environment() -> jinja2.Environment:
    return jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )


def _parse(template: str) -> jinja2.nodes.Template:
    try:
        return _environment().parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise IdentityError(
            f"chat template: not a Jinja template, got {error.message!r} in line {error.lineno}. "
            "Restore the template that came with the model."
        ) from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise IdentityError(
            f"{path}: the chat template cannot be read, got {error}. Copy the file from the model again."
        ) from error
