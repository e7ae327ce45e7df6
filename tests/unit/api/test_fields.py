"""Every field that vLLM, OpenAI or Anthropic know is honoured, ignored or refused on purpose."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from borg_serve.api import fields as known_fields
from tests.protocols import CASES, CHAT, MESSAGES, RESPONSES, Case

Source = tuple[str, str, str]
"""A package, a file of it, and a class in that file; the SDKs spread a request over a base and its two variants."""

PARTS = ("", "Base", "NonStreaming", "Streaming")

KNOWN: list[tuple[Case, Source, str]] = [
    (CHAT, ("vllm", "entrypoints/openai/chat_completion/protocol.py", "ChatCompletionRequest"), "cache_salt"),
    (CHAT, ("openai", "types/chat/completion_create_params.py", "CompletionCreateParams"), "web_search_options"),
    (RESPONSES, ("vllm", "entrypoints/openai/responses/protocol.py", "ResponsesRequest"), "kv_transfer_params"),
    (RESPONSES, ("openai", "types/responses/response_create_params.py", "ResponseCreateParams"), "truncation"),
    (MESSAGES, ("vllm", "entrypoints/anthropic/protocol.py", "AnthropicMessagesRequest"), "kv_transfer_params"),
    (MESSAGES, ("anthropic", "types/message_create_params.py", "MessageCreateParams"), "thinking"),
    (MESSAGES, ("anthropic", "types/beta/message_create_params.py", "MessageCreateParams"), "mcp_servers"),
]


def fields(package: str, file: str, name: str) -> set[str]:
    """Names annotated in the bodies of the class and its variants, read without importing the package."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    names = {f"{name}{part}" for part in PARTS}
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text())
    bodies = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name in names]
    assert bodies
    targets = [item.target for body in bodies for item in body if isinstance(item, ast.AnnAssign)]
    return {target.id for target in targets if isinstance(target, ast.Name) and not target.id.startswith("_")}


@pytest.mark.parametrize(
    ("case", "source", "one"), KNOWN, ids=lambda value: value[1] if isinstance(value, tuple) else ""
)
def test_fields_that_others_know_are_all_known_here(case: Case, source: Source, one: str) -> None:
    known = fields(*source)
    assert one in known
    assert known - case.model.REFUSED.keys() - case.model.model_fields.keys() - known_fields.HINTS == set()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fields_are_refused_or_honoured(case: Case) -> None:
    assert case.model.REFUSED.keys() & case.model.model_fields.keys() == set()


def test_fields_ignored_are_named_in_a_form_fit_for_a_header() -> None:
    paths = [("messages", str(index), "annotations") for index in range(9)] + [("a\r\nb: é", "x" * 90)]
    assert known_fields.shown_names(paths) == ("messages.annotations", "a__b___." + "x" * 56)
    assert len(known_fields.shown_names([(f"a{index}",) for index in range(99)])) == 16


def test_fields_ignored_are_counted_by_known_names_only() -> None:
    labels = [known_fields.counted(name) for name in ("thinking", "tools.web_search", "tools.odd", "odd")]
    assert labels == ["thinking", "web_search", "other", "other"]
