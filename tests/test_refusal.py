"""Every field that vLLM or OpenAI know is accepted or refused on purpose."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from borg_serve.chat import ChatRequest
from borg_serve.refusal import REFUSED, RequestError, shown


def fields(package: str, file: str, *classes: str) -> set[str]:
    """Names annotated in the bodies of these classes, read without importing the package."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text())
    bodies = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name in classes]
    assert len(bodies) == len(classes)
    targets = [item.target for body in bodies for item in body if isinstance(item, ast.AnnAssign)]
    return {target.id for target in targets if isinstance(target, ast.Name) and not target.id.startswith("_")}


def test_refused_and_accepted_cover_every_field_of_vllm() -> None:
    known = fields("vllm", "entrypoints/openai/chat_completion/protocol.py", "ChatCompletionRequest")
    assert {"messages", "kv_transfer_params", "cache_salt"} <= known
    assert known - REFUSED.keys() - ChatRequest.model_fields.keys() == set()


def test_refused_and_accepted_cover_every_field_of_openai() -> None:
    classes = [f"CompletionCreateParams{kind}" for kind in ("Base", "NonStreaming", "Streaming")]
    known = fields("openai", "types/chat/completion_create_params.py", *classes)
    assert {"messages", "stream", "web_search_options"} <= known
    assert known - REFUSED.keys() - ChatRequest.model_fields.keys() == set()


def test_refused_and_accepted_share_no_field() -> None:
    assert REFUSED.keys() & ChatRequest.model_fields.keys() == set()


def test_request_error_has_openais_shape() -> None:
    error = RequestError(404, "The model does not exist.", param="model", code="model_not_found")
    assert error.body() == {
        "error": {
            "message": "The model does not exist.",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (1.5, "1.5"),
        ("a" * 40, '"' + "a" * 40 + '"'),
        ("a" * 41, '"' + "a" * 40 + '"…'),
        ('"\n', '"\\"\\n"'),
        ("\ud800", '"?"'),
        ([1] * 1000, "an array of 1000 items"),
        ({"a": 1}, "an object with 1 keys"),
        (10**60, "1" + "0" * 39),
    ],
)
def test_shown_shortens(value: object, text: str) -> None:
    assert shown(value) == text
