"""Calls of tools are held to what vLLM's structural tags say, in the grammar that its backend `guidance` compiles."""

import json
from typing import Any

import llguidance
import pytest
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionNamedToolChoiceParam,
    ChatCompletionToolsParam,
)
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.tool_parsers.structural_tag_registry import get_model_structural_tag, limit_to_single_tool_call
from vllm.v1.structured_output.backend_guidance import serialize_guidance_grammar, validate_guidance_grammar
from vllm.v1.structured_output.request import get_structured_output_key

from borg_serve.engine.grammar import hold

BYTES = llguidance.LLTokenizer("byte")
ONE = {"type": "object", "properties": {"a": {"type": "integer", "format": "int32"}}, "required": ["a"]}
TOOLS = [
    ChatCompletionToolsParam(function={"name": "one", "parameters": ONE, "strict": True}),
    ChatCompletionToolsParam(function={"name": "two", "parameters": ONE}),
]
NAMED = ChatCompletionNamedToolChoiceParam(function={"name": "one"})


def call(name: str, arguments: str, line: str = "\n") -> str:
    return f'<tool_call>{line}{{"name": "{name}", "arguments": {arguments}}}{line}</tool_call>'


def calls(choice: Any, model: str = "hermes", single: bool = False) -> SamplingParams:
    tag = get_model_structural_tag(model, TOOLS, choice, False)
    assert tag is not None
    if single:
        limit_to_single_tool_call(tag)
    return SamplingParams(structured_outputs=StructuredOutputsParams(structural_tag=tag.model_dump_json()))


def writes(params: SamplingParams, text: str) -> bool:
    """Whether an engine that got these parameters could write the text, and end there."""
    assert params.structured_outputs is not None
    validate_guidance_grammar(params)
    grammar = serialize_guidance_grammar(*get_structured_output_key(params.structured_outputs))
    matcher = llguidance.LLMatcher(BYTES, grammar, log_level=0)
    return bool(matcher.consume_tokens(BYTES.tokenize_bytes(text.encode())) and matcher.is_accepting())


GOOD, OTHER, BAD = call("one", '{"a": 1}'), call("two", '{"b":[]}'), call("one", '{"a":"x"}')


@pytest.mark.parametrize(
    ("choice", "single", "fits", "misfits"),
    [
        (
            "auto",
            False,
            ["a < b", GOOD, call("one", '{"a":1}', ""), f"First: {GOOD} and {OTHER}.", GOOD + GOOD],
            [BAD, f"x {BAD}", f"{GOOD} {BAD}", call("two", "5"), call("three", "{}"), "<tool_call> none"],
        ),
        ("required", False, [GOOD, OTHER, GOOD + OTHER], ["", "a", BAD, f"a {GOOD}", GOOD + BAD]),
        (NAMED, False, [GOOD], ["", OTHER, BAD, GOOD + GOOD]),
        ("auto", True, ["a", GOOD, f"a {GOOD}"], [GOOD + GOOD, f"{GOOD} a", BAD]),
        ("required", True, [GOOD, OTHER], ["a", GOOD + OTHER, BAD]),
    ],
    ids=["auto", "required", "named", "auto-single", "required-single"],
)
def test_calls_of_tools_follow_their_schemas(choice: Any, single: bool, fits: list[str], misfits: list[str]) -> None:
    params = calls(choice, single=single)
    assert hold(params) == "tools"
    assert [text for text in fits if not writes(params, text)] == []
    assert [text for text in misfits if writes(params, text)] == []


@pytest.mark.parametrize("model", ["deepseek_v3_1", "llama", "qwen_3"])
@pytest.mark.parametrize("choice", ["auto", "required", NAMED], ids=["auto", "required", "named"])
def test_calls_in_the_formats_of_other_models_have_a_grammar(model: str, choice: Any) -> None:
    params = calls(choice, model)
    hold(params)
    validate_guidance_grammar(params)
    assert writes(params, "a") == (choice == "auto")


def test_calls_in_a_format_that_cannot_be_held_are_refused() -> None:
    with pytest.raises(VLLMValidationError, match=r"cannot hold calls .*qwen_xml.*Set tool_choice to auto") as refused:
        hold(calls("required", "qwen_3_coder"))
    assert refused.value.parameter == "tools"


def test_schema_reaches_the_backend_as_it_is_enforced() -> None:
    schema = {"type": "array", "items": {"type": "string", "format": "byte"}, "x-guidance": {"lenient": True}}
    for given in (schema, json.dumps(schema)):
        params = SamplingParams(structured_outputs=StructuredOutputsParams(json=given))
        assert hold(params) == "response_format"
        assert writes(params, '["a", "?"]')
        assert not writes(params, "[1]")
        assert not writes(params, '["a",\n"?"]')
    assert hold(SamplingParams()) is None


def test_json_objects_and_arguments_are_written_on_one_line() -> None:
    for params, one, more in (
        (
            SamplingParams(structured_outputs=StructuredOutputsParams(json_object=True)),
            '{"a": [1,2]}',
            '{\n"a": [1,2]}',
        ),
        (calls(NAMED), GOOD, GOOD.replace(": ", ":\n")),
    ):
        assert one != more
        hold(params)
        assert writes(params, one)
        assert not writes(params, more)
