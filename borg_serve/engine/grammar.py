"""What holds an answer to its schema, in the form that vLLM's backend `guidance` enforces.

vLLM writes tool calls as structural tags, which only its backend `xgrammar` reads; they become Lark grammars here. It
knows vLLM's sampling parameters, and nothing of requests.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from borg_serve.api.schema_grammar import enforced

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

__all__ = ["BACKEND", "hold", "lark"]

BACKEND = {"backend": "guidance"}
"""vLLM's `structured_outputs_config`. With `auto` an engine keeps the backend of its first request for all others
(v1/structured_output: "we only support a single backend"), and that backend ignores what it does not know."""
ONE_LINE = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}}
"""The compiler's options: a document on one line. Where any white space may stand, a small model was seen to write
empty lines until `max_tokens`."""


def hold(params: "SamplingParams") -> str | None:
    """Replace the schema or the structural tag of a request by what is enforced; the field of chat that it came from.

    Raises vLLM's VLLMValidationError.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import StructuredOutputsParams

    asked = params.structured_outputs
    if asked is None:
        return None
    if asked.json is not None or asked.json_object:
        schema = json.loads(asked.json) if isinstance(asked.json, str) else asked.json or {"type": "object"}
        params.structured_outputs = StructuredOutputsParams(json=json.dumps(enforced(schema) | ONE_LINE))
    elif asked.structural_tag is not None:
        try:
            grammar = lark(json.loads(asked.structural_tag)["format"])
        except KeyError as error:
            what = f"the engine cannot hold calls in this model's format ({error.args[0]}). Set tool_choice to auto"
            raise VLLMValidationError(f"{what}, and leave out strict.", parameter="tools") from None
        params.structured_outputs = StructuredOutputsParams(grammar=grammar)
        return "tools"
    return "response_format"


def lark(tag: Mapping[str, Any]) -> str:
    """Return the Lark grammar for the `format` of a structural tag. Raises KeyError for a kind without one."""
    rules: list[str] = []
    start = _expression(tag, rules)
    return "\n".join([f"start: {start}", *rules, r"TEXT: /(?s:.*)/", ""])


def _expression(tag: Mapping[str, Any], rules: list[str]) -> str:
    kind = tag["type"]
    if kind == "const_string":
        return json.dumps(tag["value"])
    if kind == "any_text" and not tag["excludes"]:
        return "TEXT"
    if kind == "json_schema" and tag["style"] == "json":
        # Arguments of a tool without a schema are an object all the same.
        schema = tag["json_schema"]
        body = enforced(schema) if isinstance(schema, dict) else {"type": "object"}
        return _rule(f"%json {json.dumps(body | ONE_LINE)}", rules)
    if kind == "sequence":
        return " ".join(_expression(part, rules) for part in tag["elements"])
    if kind == "or":
        return _either([_expression(part, rules) for part in tag["elements"]])
    if kind == "tag":
        return _tag(tag, "", rules)
    if kind == "tags_with_separator":
        call = _rule(_either([_tag(part, "", rules) for part in tag["tags"]]), rules)
        more = "" if tag["stop_after_first"] else f" ({json.dumps(tag['separator'])} {call})*"
        return f"({call}{more})" + ("" if tag["at_least_one"] else "?")
    if kind == "triggered_tags":
        calls = [_triggered(trigger, tag["tags"], rules) for trigger in tag["triggers"]]
        call = _rule(_either(calls), rules)
        if tag["stop_after_first"]:
            return call if tag["at_least_one"] else f"({call} | TEXT)"
        return f"{call}{'+' if tag['at_least_one'] else '*'} TEXT"
    raise KeyError(tag.get("style") or kind)


def _tag(tag: Mapping[str, Any], without: str, rules: list[str]) -> str:
    """One tag, without the beginning that its trigger has matched."""
    ends = tag["end"] if isinstance(tag["end"], list) else [tag["end"]]
    begin = tag["begin"].removeprefix(without)
    parts = [json.dumps(begin), _expression(tag["content"], rules), _either([json.dumps(end) for end in ends])]
    return " ".join(part for part in parts if part != '""')


def _triggered(trigger: str, tags: list[Mapping[str, Any]], rules: list[str]) -> str:
    """Any text up to a trigger, which ends at once there, and one of its tags."""
    head = f"text_{len(rules)}"
    rules.append(f"{head}[lazy]: TEXT {json.dumps(trigger)}")
    return f"{head} " + _either([_tag(tag, trigger, rules) for tag in tags if tag["begin"].startswith(trigger)])


def _either(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"({' | '.join(parts)})"


def _rule(body: str, rules: list[str]) -> str:
    name = f"rule_{len(rules)}"
    rules.append(f"{name}: {body}")
    return name
